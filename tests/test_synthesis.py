"""The degradations do what they are named after, and repeat."""

import math

import pytest
import torch

from dfpir import synthesis
from dfpir.degradation import Degradation
from dfpir.pixels import is_grey


@pytest.fixture
def sharp(photograph):
    pixels = torch.from_numpy(photograph).permute(2, 0, 1)[None].float() / 255
    return torch.cat([pixels, pixels.flip(-1)])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def difference(images):
    """Mean absolute difference between neighbours: how much detail there is."""
    return float((images[..., 1:] - images[..., :-1]).abs().mean())


@pytest.mark.parametrize("kind", Degradation)
def test_pictures_stay_pictures_and_repeat(sharp, kind):
    first = synthesis.degrade(sharp, kind, seeded(3))
    assert first.shape == sharp.shape
    assert float(first.min()) >= 0 and float(first.max()) <= 1
    assert torch.equal((first * 255).round() / 255, first)
    assert torch.equal(first, synthesis.degrade(sharp, kind, seeded(3)))
    assert not torch.equal(first, synthesis.degrade(sharp, kind, seeded(4)))
    assert not torch.equal(first, sharp)


@pytest.mark.parametrize("sigma", [15.0, 25.0, 50.0])
def test_noise_has_its_standard_deviation(sigma):
    grey = torch.full((1, 3, 128, 128), 0.5)
    noisy = synthesis.gaussian_noise(grey, sigma, seeded())
    assert float((noisy - grey).std()) * 255 == pytest.approx(sigma, rel=0.02)
    assert float((noisy - grey).mean()) * 255 == pytest.approx(0, abs=sigma / 50)


def test_rain_adds_light_in_streaks(sharp):
    dark = torch.zeros(1, 3, 128, 128)
    rainy = synthesis.rain(dark, seeded(1))
    assert float(rainy.max()) > 0.2
    along = float((rainy[..., 1:, :] - rainy[..., :-1, :]).abs().mean())
    assert difference(rainy) > along  # streaks fall


def test_haze_brings_colours_nearer_to_its_light(sharp):
    hazy = synthesis.haze(sharp, seeded(1))
    assert float(hazy.std()) < float(sharp.std())
    assert float(hazy.min()) > float(sharp.min())


def test_half_of_the_haze_is_white_and_the_rest_grey():
    black = torch.zeros(600, 3, 2, 2)
    light = synthesis.haze(black, seeded(), beta=30.0, depth=torch.ones(600, 1, 2, 2))[..., 0, 0]
    brightness = light.mean(dim=1)
    assert 0.64 < float(brightness.amin()) < 0.68
    white = brightness > 0.985  # tinted by 3 % at the most
    assert float(white.float().mean()) == pytest.approx(0.5, abs=0.06)
    assert float((brightness < 0.8).float().mean()) == pytest.approx(0.21, abs=0.05)
    torch.testing.assert_close(light, brightness[:, None].expand(-1, 3), rtol=0.065, atol=0)


def test_blur_keeps_light_and_removes_detail(sharp):
    blurred = synthesis.motion_blur(sharp, seeded(2))
    assert difference(blurred) < 0.9 * difference(sharp)
    assert float(blurred.mean()) == pytest.approx(float(sharp.mean()), abs=0.05)


def test_what_does_not_move_stays_sharp():
    """What is left is noise of at most two grey levels, and JPEG in half of the images."""
    pixels = 0.3 + 0.4 * torch.rand(1, 3, 32, 32, generator=seeded()).expand(40, -1, -1, -1)
    still = synthesis.motion_blur(pixels, seeded(2), 0.0)
    changes = (still - pixels).square().mean(dim=(1, 2, 3)).sqrt() * synthesis.LEVELS
    assert 0.3 < float((changes < 2.2).float().mean()) < 0.8
    assert float(changes.max()) < 40


def test_a_lens_softens_half(sharp):
    pixels = sharp[:1, :, :32, :32].expand(300, -1, -1, -1)
    soft = synthesis.softened(pixels, seeded())
    changed = (soft - pixels).abs().amax(dim=(1, 2, 3)) > 1e-3
    assert 0.4 < float(changed.float().mean()) < 0.6
    assert difference(soft) < difference(pixels)


def test_shake_kernels_sum_to_one_and_are_centred():
    extent = torch.full((6, 1, 1, 1), 15.0)
    kernels = synthesis.shake_kernels(6, extent, 31, seeded())
    assert torch.allclose(kernels.sum(dim=(1, 2)), torch.ones(6))
    steps = torch.arange(31) - 15.0
    centre = (kernels.sum(dim=1) * steps).sum(dim=1)
    assert float(centre.abs().max()) < 0.5


def test_low_light_is_dark(sharp):
    dark = synthesis.low_light(sharp, seeded(1))
    assert (dark.mean(dim=(1, 2, 3)) < 0.6 * sharp.mean(dim=(1, 2, 3))).all()


def test_most_darkness_is_of_four_and_a_half_to_seven_stops():
    grey = torch.full((300, 3, 8, 8), 0.5)
    dark = synthesis.low_light(grey, seeded(2)).mean(dim=(1, 2, 3))
    least, most = (synthesis.low_light(grey, seeded(2), 2**-stops) for stops in (7, 4.5))
    between = (dark >= least.mean(dim=(1, 2, 3))) & (dark <= most.mean(dim=(1, 2, 3)))
    assert 0.6 < float(between.float().mean()) < 0.95


def test_lamps_stand_out_of_the_dark():
    """In about half of the images what is white is far brighter than what is grey is by then."""
    scene = torch.full((300, 3, 8, 16), 0.5)
    scene[..., 8:] = 1.0
    dark = synthesis.low_light(scene, seeded(3), 2**-5)
    grey, white = (side.mean(dim=(1, 2, 3)) for side in (dark[..., :8], dark[..., 8:]))
    assert float(grey.median()) < 0.2
    assert 0.1 < float((white > 0.6).float().mean()) < 0.5
    assert float((white > grey).float().mean()) > 0.95


def test_glare_lifts_black_and_white_stands_out_in_the_dark():
    """In about three of four images black is nearer to grey than a sensor alone makes it."""
    scene = torch.full((400, 3, 8, 24), 0.5)
    scene[..., :8] = 0.0
    scene[..., 16:] = 0.79  # below what may be a lamp
    dark = synthesis.low_light(scene, seeded(5), 2**-5)
    black, grey, white = dark.mean(dim=(1, 2)).reshape(400, 3, 8).median(dim=2).values.T
    lifted = black > 0.25 * grey
    assert 0.5 < float(lifted.float().mean()) < 0.95
    # In linear light 0.79 is 2.8 times 0.5.
    stops = (white / grey.clamp(min=1 / 255)).log2()
    assert 0.65 < float(stops.median()) < 1.2


def test_black_stays_black_in_the_dark():
    """Rounding must not take a value below the foot of the curve."""
    dark = synthesis.low_light(torch.zeros(64, 3, 16, 16), seeded())
    assert dark.isfinite().all() and float(dark.median()) < 0.05


def test_the_white_balance_of_the_dark_is_off_by_up_to_a_half():
    """Beyond what the power of the curve makes of it: seen in pairs of channels in linear light."""
    grey = torch.full((400, 3, 4, 4), 0.9)
    dark = synthesis.low_light(grey, seeded(4), 0.2).mean(dim=(2, 3))
    ratios = (dark[:, 0] / dark[:, 1]).log()
    assert 0.1 < float(ratios.std()) < 0.25 and abs(float(ratios.mean())) < 0.03


@pytest.mark.parametrize("brightness", [0.15, 0.3, 0.46, 0.7])
def test_a_good_exposure_is_nearer_to_the_middle_or_brighter_and_keeps_order(sharp, brightness):
    pixels = (sharp * brightness / sharp.mean(dim=(1, 2, 3), keepdim=True)).clamp(0, 1)
    exposed = synthesis.well_exposed(pixels)
    before, after = (side.mean(dim=(1, 2, 3)) for side in (pixels, exposed))
    bright = before >= synthesis.WELL_EXPOSED
    torch.testing.assert_close(exposed[bright], pixels[bright].clamp(min=1e-4))
    missing = synthesis.WELL_EXPOSED - before
    assert (synthesis.WELL_EXPOSED - after)[~bright].le(0.35 * missing[~bright] + 0.03).all()
    for dim, bright in zip(pixels, exposed, strict=True):
        assert (bright.flatten()[dim.flatten().argsort()].diff() >= -1e-6).all()


@pytest.mark.parametrize("veil", [0.0, 0.05, 0.15])
def test_full_contrast_has_no_veil_of_its_own(sharp, veil):
    """However much light lies over all of a picture, what remains is the same."""
    clear = synthesis.full_contrast(sharp)
    darkest = clear.amin(dim=1).flatten(1)
    assert (darkest.quantile(0.01, dim=1) < 1e-6).all()
    veiled = clear * (1 - veil) + veil
    torch.testing.assert_close(synthesis.full_contrast(veiled), clear, atol=1e-5, rtol=0)


def test_a_bright_thing_is_no_veil():
    snow = torch.full((1, 3, 8, 8), 0.9)
    assert float(synthesis.full_contrast(snow).amin()) > 0.85


def test_depth_is_that_of_a_scene(sharp):
    depth = synthesis.scene_depth(sharp[:1].expand(300, -1, -1, -1), seeded())
    assert depth.shape == (300, 1, *sharp.shape[2:])
    assert float(depth.amin()) > 0
    torch.testing.assert_close(depth.amax(dim=(2, 3)), torch.ones(300, 1))
    nearest = depth.amin(dim=(2, 3))
    # Some are almost flat; most reach from near by, which is seldom here, to a good way off.
    assert float(nearest.max()) > 0.5 and float(nearest.median()) < 0.4
    assert float((nearest < 0.05).float().mean()) < 0.15
    # What lies lower is nearer, more often than not.
    lower, upper = depth[:, :, -32:].mean(dim=(1, 2, 3)), depth[:, :, :32].mean(dim=(1, 2, 3))
    assert 0.5 < float((lower < upper).float().mean()) < 0.95


def test_what_is_bright_is_farther_more_often_than_not():
    scene = torch.full((300, 3, 32, 64), 0.2)
    scene[..., 32:] = 0.8
    depth = synthesis.scene_depth(scene, seeded(6))
    dark, bright = (side.mean(dim=(1, 2, 3)) for side in (depth[..., :32], depth[..., 32:]))
    assert 0.52 < float((bright > dark).float().mean()) < 0.8


def test_haze_thickens_with_depth(sharp):
    ramp = torch.linspace(0.05, 1, sharp.shape[-1]).expand(2, 1, *sharp.shape[2:])
    hazy = synthesis.haze(sharp, seeded(2), depth=ramp)
    kept = (hazy - hazy.mean(2, True)).abs().mean((1, 2)) / (
        (sharp - sharp.mean(2, True)).abs().mean((1, 2)) + 1e-3
    )
    near, far = kept[:, :40].mean(dim=1), kept[:, -40:].mean(dim=1)
    assert (near > 1.2 * far).all()


def test_light_from_near_by_falls_off_in_three_of_five():
    ramp = torch.linspace(0.2, 0.9, 8).expand(500, 1, 2, 8)
    lit = synthesis.lit_from_near(torch.full((500, 3, 2, 8), 0.8), ramp, seeded())
    torch.testing.assert_close(lit[..., 0], torch.full((500, 3, 2), 0.8))
    assert (lit[..., 1:] <= lit[..., :-1] + 1e-6).all()
    left = (lit[..., -1] == lit[..., 0]).all(dim=2).all(dim=1)
    assert float(left.float().mean()) == pytest.approx(0.4, abs=0.06)
    least = 0.8 * math.exp(-1.5 * 0.7)
    assert least <= float(lit.amin()) < 1.1 * least


@pytest.mark.parametrize("gain", [0.8, 1.0, 1.6])
def test_contrast_grows_around_the_mean_and_white_stays_white(gain):
    soft = 0.4 + 0.2 * torch.rand(2, 3, 16, 16, generator=seeded())
    steep = synthesis.steeper(soft, gain)
    torch.testing.assert_close(steep.std(dim=(1, 2, 3)), gain * soft.std(dim=(1, 2, 3)))
    torch.testing.assert_close(steep.mean(dim=(1, 2, 3)), soft.mean(dim=(1, 2, 3)))
    torch.testing.assert_close(synthesis.steeper(soft[0], gain), steep[0])
    hard = synthesis.steeper(torch.rand(1, 3, 16, 16, generator=seeded()), 2.0)
    assert float(hard.amin()) == 0 and float(hard.amax()) == 1 and float((hard == 1).sum()) > 50


def test_half_of_the_scenes_get_another_contrast():
    soft = (0.45 + 0.1 * torch.rand(1, 3, 8, 8, generator=seeded())).expand(400, -1, -1, -1)
    gain = synthesis.contrasted(soft, seeded()).std(dim=(1, 2, 3)) / soft.std(dim=(1, 2, 3))
    changed = (gain - 1).abs() > 1e-4
    assert 0.4 < float(changed.float().mean()) < 0.6
    assert 0.79 < float(gain.min()) < 0.85 and 1.9 < float(gain.max()) < 2.01
    assert 1.1 < float(gain[changed].log().mean().exp()) < 1.4


def test_hazy_scenes_are_as_dark_far_away_as_their_targets(sharp, monkeypatch):
    depths = []

    def remembered(*given, depth=None, **named):
        depths.append(depth)
        return synthesis.quantised(given[0])

    monkeypatch.setattr(synthesis, "haze", remembered)
    pixels = sharp[:1].expand(12, -1, -1, -1)
    _, targets, _, _ = synthesis.training_pairs(pixels, [Degradation.HAZE] * 12, seeded())
    fallen = (targets / synthesis.full_contrast(pixels).clamp(min=0.02)).mean(dim=1)
    [depth] = depths
    far = depth[:, 0] > depth.flatten(1).quantile(0.8, dim=1)[:, None, None]
    near = depth[:, 0] < depth.flatten(1).quantile(0.2, dim=1)[:, None, None]
    scenes = zip(fallen, far, near, strict=True)
    darker = sum(float(each[a].mean()) < float(each[b].mean()) for each, a, b in scenes)
    assert darker >= 6


def test_noise_pairs_are_half_raw(sharp):
    pixels = sharp[:1, :, :32, :32].expand(200, -1, -1, -1)
    noisy, targets, sigmas = synthesis.noise_pairs(pixels, seeded())
    raw = (targets != pixels).flatten(1).any(dim=1)  # or turned grey, as one in six is
    assert 0.45 < float(raw.float().mean()) < 0.71
    clipped = noisy[~raw]
    assert float(clipped.min()) >= 0 and float(clipped.max()) <= 1
    assert float(noisy[raw].min()) < 0  # not clipped
    assert float(sigmas.min()) >= 3 and 75 < float(sigmas.max()) <= 80
    assert 0.3 < float((sigmas == 25).float().mean()) * 3 / 0.5 * 0.5 < 0.8


def test_some_noise_grows_with_the_light():
    pixels = torch.linspace(0.1, 0.9, 32).expand(300, 3, 32, 32)
    deviation = synthesis.shot_noise(pixels, torch.full((300, 1, 1, 1), 20.0), seeded())
    root_mean_square = deviation.square().mean(dim=(1, 2, 3)).sqrt()
    assert torch.allclose(root_mean_square, torch.full((300,), 20.0), rtol=1e-3)
    growing = (deviation != deviation[:, :1, :1, :1]).flatten(1).any(dim=1)
    assert 0.3 < float(growing.float().mean()) < 0.5
    bright, dark = (pixels[0] > pixels[0].quantile(0.9)), (pixels[0] < pixels[0].quantile(0.1))
    for image in deviation[growing]:
        # Of the variance at least a third is in proportion to the light.
        assert image[bright].mean() > 1.2 * image[dark].mean()


def test_nearest_noise_is_that_of_single_numbers():
    sigmas = torch.linspace(3, 75, 500)
    expected = [Degradation.nearest_noise(sigma).index for sigma in sigmas.tolist()]
    assert synthesis.nearest_noise(sigmas).tolist() == expected
    assert len(set(expected)) == 3


def test_varied_photographs_have_other_colours_and_tones(sharp):
    pixels = sharp[:1, :, :24, :24].expand(200, -1, -1, -1)
    varied = synthesis.varied(pixels, [True] * 200, seeded(), blend=False)
    assert varied.shape == pixels.shape and 0 <= float(varied.min()) <= float(varied.max()) <= 1
    assert torch.equal(varied, synthesis.varied(pixels, [True] * 200, seeded(), blend=False))
    same = (varied == pixels).flatten(1).all(dim=1)
    assert 0.15 < float(same.float().mean()) < 0.45  # a half, and one in six orders is the same
    # The gamma of each, from its median, and the colours as they are without it.
    medians = varied.flatten(1).median(dim=1).values
    gamma = medians.log() / pixels.flatten(1).median(dim=1).values.log()
    assert float(gamma.min()) > 0.69 and float(gamma.max()) < 1.43
    assert 0.35 < float((gamma - 1).abs().lt(1e-4).float().mean()) < 0.65
    straight = varied ** (1 / gamma.reshape(-1, 1, 1, 1))
    orders = {
        tuple(torch.cdist(each.flatten(1), pixels[0].flatten(1)).argmin(dim=1).tolist())
        for each in straight
    }
    assert len(orders) == 6 and all(len(set(order)) == 3 for order in orders)


def test_micrographs_keep_their_colours(sharp):
    pixels = sharp[:1, :, :24, :24].expand(60, -1, -1, -1)
    assert torch.equal(synthesis.varied(pixels, [False] * 60, seeded(), blend=False), pixels)


def test_a_third_are_blended_with_the_one_before():
    pixels = torch.arange(300.0).remainder(2).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    blended = synthesis.varied(pixels, [False] * 300, seeded(), blend=True)
    weight = (blended - pixels).abs()[:, 0, 0, 0]
    changed = weight > 0
    assert 0.23 < float(changed.float().mean()) < 0.43
    assert float(weight[changed].min()) >= 0.3 and float(weight[changed].max()) <= 0.5


def test_training_pairs_name_what_they_did(sharp, monkeypatch):
    for varied in ("lit_from_near", "contrasted"):
        monkeypatch.setattr(synthesis, varied, lambda pixels, *_, **__: pixels)
    pixels = sharp[:1, :, :48, :48].expand(9, -1, -1, -1)
    kinds = [None, *Degradation, None]
    inputs, targets, indices, sigmas = synthesis.training_pairs(pixels, kinds, seeded())
    assert indices[1:8].tolist() == list(range(7))
    assert sigmas[1:4].tolist() == [15, 25, 50] and sigmas[4:8].tolist() == [0] * 4
    for number in (0, 8):
        nearest = Degradation.nearest_noise(float(sigmas[number]))
        assert int(indices[number]) == nearest.index
    for number, kind in enumerate(kinds[1:8], start=1):
        expected = pixels[number : number + 1]
        if kind in synthesis.GLOBAL:
            expected = synthesis.full_contrast(expected)
        if kind is Degradation.LOW_LIGHT:
            expected = synthesis.well_exposed(expected)
        if kind is Degradation.BLUR:
            assert difference(targets[number : number + 1]) <= difference(expected)
        else:
            torch.testing.assert_close(targets[number : number + 1], expected)
    assert all(not torch.equal(a, b) for a, b in zip(inputs, targets, strict=True))


def test_noise_on_grey_is_grey_and_on_colour_is_not():
    grey = torch.rand(2, 1, 16, 16, generator=seeded(0)).expand(-1, 3, -1, -1)
    noisy = synthesis.gaussian_noise(grey, 25.0, seeded(1))
    assert torch.equal(noisy, noisy[:, :1].expand_as(noisy))
    assert 20 < 255 * float((noisy - grey).std()) < 30
    coloured = synthesis.gaussian_noise(
        torch.rand(2, 3, 16, 16, generator=seeded(0)), 25.0, seeded(1)
    )
    assert not torch.equal(coloured, coloured[:, :1].expand_as(coloured))
    inputs, targets, _ = synthesis.noise_pairs(
        torch.rand(60, 3, 8, 8, generator=seeded(2)), seeded(3)
    )
    turned = is_grey(targets)
    assert torch.equal(turned, is_grey(inputs)) and 3 <= int(turned.sum()) <= 20
