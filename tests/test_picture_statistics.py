"""Tones, sharpness by direction and veil: what they are, and what moves them."""

import numpy as np
import pytest
import torch
from kornia.filters import gaussian_blur2d
from skimage import data as pictures
from torch import Generator
from torch.nn import functional as F

from dfpir import picture_statistics
from dfpir.degradation import Degradation
from dfpir.picture_statistics import described, over_directions, sharpness, tones, veil
from dfpir.synthesis import degrade

LOSS = 0
"""Where `sharpness` has the least of the losses from full size to half."""


def seeded(seed=0):
    return Generator().manual_seed(seed)


def pixels_of(name):
    array = getattr(pictures, name)()
    return torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 255


def grey_of(name):
    return pixels_of(name).mean(dim=1, keepdim=True)


def test_tones_are_those_of_numpy_and_do_not_care_for_flips():
    picture = torch.rand(1, 3, 60, 70, generator=seeded())
    found = tones(picture)
    array = picture[0].double().numpy()
    dark, mean, bright = array.min(0), array.mean(0), array.max(0)
    expected = [
        *np.quantile(dark, picture_statistics.QUANTILES["darkest"]),
        *np.quantile(mean, picture_statistics.QUANTILES["mean"]),
        *np.quantile(bright, picture_statistics.QUANTILES["brightest"]),
        mean.mean(),
        mean.std(),
        (bright - dark).mean(),
    ]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tones(picture.flip((2, 3))), found)


def test_tones_of_a_large_picture_are_those_of_a_part_of_its_pixels(monkeypatch):
    picture = degrade(pixels_of("astronaut"), Degradation.HAZE, seeded())
    exact = tones(picture)
    monkeypatch.setattr(picture_statistics, "MOST_TONES", 20_000)
    torch.testing.assert_close(tones(picture), exact, rtol=0, atol=0.01)


def test_haze_lifts_the_darkest_tones():
    sharp = pixels_of("coffee")
    assert tones(degrade(sharp, Degradation.HAZE, seeded()))[0] > tones(sharp)[0] + 0.05


def test_second_differences_vanish_on_planes_and_are_those_of_numpy():
    rows, columns = torch.meshgrid(torch.arange(20.0), torch.arange(24.0), indexing="ij")
    plane = (0.3 * rows - 0.2 * columns)[None, None]
    assert picture_statistics.second_differences(plane).abs().max() < 1e-4
    noise = torch.rand(1, 1, 20, 24, generator=seeded())
    found = picture_statistics.second_differences(noise)
    array = noise[0, 0].numpy()
    for number, (down, right) in enumerate(picture_statistics.DIRECTIONS):
        both = np.roll(array, (down, right), (0, 1)) + np.roll(array, (-down, -right), (0, 1))
        expected = (both - 2 * array)[2:-2, 2:-2].ravel()
        np.testing.assert_allclose(found[number].numpy(), expected, atol=1e-6)


def test_half_the_directions_on_lies_the_one_across():
    steps = torch.tensor(picture_statistics.DIRECTIONS)
    assert (steps * steps.roll(len(steps) // 2, 0)).sum(dim=1).tolist() == [0] * len(steps)


@pytest.mark.parametrize("turn", ["flip", "quarter"])
def test_sharpness_does_not_care_for_flips_and_turns(turn):
    grey = grey_of("astronaut")[..., :256, :320]
    other = grey.flip(3) if turn == "flip" else grey.rot90(1, (2, 3))
    torch.testing.assert_close(sharpness(other), sharpness(grey), rtol=1e-3, atol=1e-3)


def test_motion_takes_the_detail_of_one_direction_and_softness_that_of_all():
    """The greatest gap between a direction and the one across tells the two apart."""
    grey = grey_of("astronaut")
    moved = F.conv2d(grey, torch.full((1, 1, 1, 9), 1 / 9), padding="same")
    soft = gaussian_blur2d(grey, (13, 13), (2.0, 2.0))
    least, _, greatest, gap = (
        torch.stack([sharpness(each)[LOSS + place] for each in (grey, moved, soft)])
        for place in range(4)
    )
    assert least[1] < least[0] - 0.3 and least[2] < least[0] - 0.3
    assert greatest[2] < greatest[0] - 0.3 and greatest[1] > greatest[2] + 0.3
    assert gap[1] < gap[0] - 0.3 and abs(gap[2] - gap[0]) < 0.2


def test_bright_lines_are_told_from_dark_ones():
    grey = 0.5 * grey_of("coffee") + 0.1
    lines = torch.zeros_like(grey)
    lines[..., ::37] = 0.3
    dark, bright = (sharpness(each)[-6] for each in (grey - 0.3 * lines, grey + lines))
    assert bright > dark + 0.1


def test_over_directions():
    values = torch.tensor([1.0, 0, 0, 0, 3, 0, 0, 0])
    assert over_directions(values).tolist() == [0, 0.5, 3, -2]


def test_haze_lifts_the_darkest_of_all_blocks_and_ties_it_to_contrast():
    sharp = pixels_of("astronaut")
    hazy = degrade(sharp, Degradation.HAZE, seeded(1), 2.0)
    before, after = veil(sharp), veil(hazy)
    assert (after[:4] > before[:4] + 0.05).all()  # quantiles of the dark channel
    assert (after[7:11] < before[7:11]).all()  # of the contrast
    assert after[14] < before[14]  # correlation of the two


def test_the_veil_does_not_care_for_flips():
    picture = pixels_of("coffee")[..., :320, :480]
    for axes in ([2], [3], [2, 3]):
        torch.testing.assert_close(veil(picture.flip(axes)), veil(picture), rtol=1e-3, atol=1e-3)


def test_a_flat_picture_has_finite_numbers():
    flat = torch.full((1, 3, 40, 60), 0.5)
    assert described(flat, flat, flat).shape == (picture_statistics.COUNT,)
    assert described(flat, flat, flat).isfinite().all()


def test_parts_count_together():
    grey = grey_of("astronaut")[..., :256, :256]
    torch.testing.assert_close(
        sharpness(torch.cat([grey, grey])), sharpness(grey), rtol=1e-3, atol=2e-3
    )
    parts = torch.cat([grey, torch.zeros_like(grey)])
    assert sharpness(parts)[1] == pytest.approx(float(sharpness(grey)[1]), abs=0.01)
