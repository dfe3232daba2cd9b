"""The road from array to array, with small random networks and a classifier of straw."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from conftest import SMALL_COMPACT, distance, random_model
from dfpir import kernels
from dfpir import restorer as module
from dfpir.degradation import Degradation, Diagnosis
from dfpir.kernels import generic
from dfpir.model import DFPIRConfig
from dfpir.restorer import Restorer, memory_needed, vote
from dfpir.synthesis import degrade
from dfpir.tiling import Tiling

NAMES = [*(member.value for member in Degradation), "clean"]


def diagnosis(verdict, degradation=None, probability=0.9, sigma=None):
    likely = degradation.value if degradation else "clean"
    rest = (1 - probability) / (len(NAMES) - 1)
    table = {name: probability if name == likely else rest for name in NAMES}
    return Diagnosis(verdict, degradation, table, sigma)


def pixels_of(picture):
    return torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255


@pytest.fixture
def restorer(tiny_model):
    return Restorer(model=tiny_model)


@pytest.fixture
def verdict(monkeypatch):
    """Set what the classifier will find in one image after the other."""

    def decide(*found):
        calls = []

        def classify(_, pixels):
            calls.append(len(pixels))
            return [found[(len(calls) - 1) % len(found)]]

        monkeypatch.setattr(module, "classify_with", classify)
        monkeypatch.setattr(module, "bundled_classifier", lambda: None)
        return calls

    return decide


RAIN, HAZE, NOISE = (
    diagnosis("degraded", kind)
    for kind in (Degradation.RAIN, Degradation.HAZE, Degradation.NOISE_25)
)
CLEAR = diagnosis("clean")


def test_several_degradations_are_removed_one_after_the_other(restorer, photograph, verdict):
    part = photograph[:32, :40]
    verdict(RAIN, HAZE, CLEAR)
    done = restorer.restore(part, most_steps=3)
    assert done.steps == (Degradation.RAIN, Degradation.HAZE)
    assert done.record.steps == ("rain", "haze") and done.diagnosis == RAIN
    assert done.summary.endswith("restored, then haze")
    pixels = pixels_of(part)
    for step in done.steps:
        pixels = restorer.restore_pixels(pixels, step).image
    assert np.abs(done.image - np.rint(255 * pixels[0].permute(1, 2, 0).numpy())).max() <= 1
    verdict(RAIN, HAZE, CLEAR)
    assert restorer.restore(part).steps == (Degradation.RAIN,)


def test_strength_and_mask_blend_with_the_end_of_all_steps(restorer, photograph, verdict):
    part = photograph[:32, :40].astype(np.float32) / 255
    mask = np.zeros((32, 40), np.float32)
    mask[:, :20] = 1
    verdict(RAIN, HAZE, CLEAR)
    whole = restorer.restore(part, most_steps=2).image
    verdict(RAIN, HAZE, CLEAR)
    done = restorer.restore(part, most_steps=2, strength=0.5, mask=mask).image
    assert np.allclose(done[:, :20], (part + whole)[:, :20] / 2, atol=1e-6)
    assert np.array_equal(done[:, 20:], part[:, 20:])


def test_progress_of_several_steps_ends_at_the_whole(restorer, photograph, verdict):
    seen = []
    verdict(RAIN, HAZE, CLEAR)
    restorer.restore(
        photograph[:32, :40], most_steps=3, on_progress=lambda *step: seen.append(step)
    )
    fractions = [done / total for done, total in seen]
    assert fractions[-1] == 1 and max(total for _, total in seen) == seen[-1][1]


def test_several_images_have_steps_of_their_own(restorer, photograph, verdict):
    pixels = pixels_of(photograph[:32, :40]).repeat(2, 1, 1, 1)
    verdict(RAIN, CLEAR, HAZE, CLEAR)  # Both are judged before the first is restored.
    done = restorer.restore_pixels(pixels, one_verdict=False, most_steps=3)
    assert done.steps == (Degradation.RAIN, Degradation.HAZE)
    assert torch.equal(done.image[1], pixels[1])
    assert done.taken == (done.steps, ())
    # Alike at first sight, but what came of them differs.
    verdict(RAIN, RAIN, RAIN, HAZE, CLEAR, CLEAR, RAIN)
    pixels = pixels_of(photograph[:32, :40]).repeat(3, 1, 1, 1)
    done = restorer.restore_pixels(pixels, one_verdict=False, most_steps=3)
    assert done.summary.splitlines() == [
        "image 1: rain streaks (90% sure); restored, then haze",
        "image 2: rain streaks (90% sure); restored",
        "image 3: rain streaks (90% sure); left as it is",
    ]
    pixels = pixels[:2]
    verdict(RAIN, RAIN, HAZE)
    assert restorer.restore_pixels(pixels, most_steps=3).steps == (Degradation.RAIN,)


def test_what_is_found_and_not_known_is_left_with_a_remark(photograph, verdict):
    few = replace(SMALL_COMPACT, degradations=tuple(Degradation)[:4])
    restorer = Restorer(model=random_model(few).requires_grad_(False))
    part = photograph[:32, :40]
    verdict(HAZE)
    done = restorer.restore(part)
    np.testing.assert_array_equal(done.image, part)
    assert done.steps == () and "not trained for 'haze'" in done.report
    verdict(RAIN, HAZE)
    assert restorer.restore(part, most_steps=3).steps == (Degradation.RAIN,)
    with pytest.raises(ValueError, match="not trained for 'haze'"):
        restorer.restore(part, "haze")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_ensemble_takes_any_precision(restorer, photograph, dtype):
    pixels = pixels_of(photograph[:32, :40])
    done = restorer.restore_pixels(pixels.to(dtype), "rain", ensemble=True)
    assert done.image.dtype is dtype
    single = restorer.restore_pixels(pixels, "rain", ensemble=True)
    assert float((done.image.float() - single.image).abs().max()) < 0.02


def test_deviations_of_all_steps_add_up(restorer, photograph, verdict):
    part = photograph[:32, :40]
    verdict(RAIN, HAZE, CLEAR)
    one = restorer.restore(part, ensemble=True).consistency
    verdict(RAIN, HAZE, CLEAR)
    two = restorer.restore(part, ensemble=True, most_steps=2).consistency
    assert (two > one).all()


@pytest.mark.parametrize("most", [0, 4])
def test_a_number_of_steps_that_is_none_is_refused(restorer, photograph, most):
    with pytest.raises(ValueError, match=f"most_steps is {most}; expected 1 to 3"):
        restorer.restore(photograph, "rain", most_steps=most)


def test_a_step_that_did_not_help_is_undone_and_said(restorer, photograph, verdict):
    verdict(RAIN, RAIN)
    done = restorer.restore(photograph[:32, :40], most_steps=3)
    assert done.steps == () and np.array_equal(done.image, photograph[:32, :40])
    assert "Removing rain streaks was undone" in done.report


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("shape", [(20, 24), (20, 24, 3), (20, 24, 4), (2, 20, 24, 3)])
def test_dtype_and_shape_are_kept(restorer, dtype, shape):
    array = np.random.default_rng(0).random(shape)
    array = array.astype(dtype) if dtype == np.float32 else (array * 200).astype(dtype)
    done = restorer.restore(array, "rain")
    assert done.image.dtype == dtype and done.image.shape == shape
    assert not np.array_equal(done.image, array)
    if shape[-1] == 4:
        assert np.array_equal(done.image[..., 3], array[..., 3])


@pytest.mark.parametrize("a", [1, 16, 257])
@pytest.mark.parametrize("b", [0, 100])
def test_gain_and_offset_pass_through(restorer, a, b):
    array = np.random.default_rng(3).integers(0, 200, (24, 32)).astype(np.uint16)
    plain = restorer.restore(array.astype(np.float64), "noise-25").image
    changed = restorer.restore((array * a + b).astype(np.uint16), "noise-25").image
    limit = 0.5 + a * 200 * 1e-5
    assert np.abs(changed - np.clip(plain * a + b, 0, 65535)).max() <= limit


def test_an_ensemble_is_the_mean_over_flips_and_turns(restorer, photograph):
    part = photograph[:40, :56]
    done = restorer.restore(part, "rain", ensemble=True)
    answers = []
    for flip in (False, True):
        for quarters in range(4):
            seen = np.rot90(part[:, ::-1] if flip else part, quarters)
            answer = np.rot90(
                restorer.restore(seen.astype(np.float32) / 255, "rain").image, -quarters
            )
            answers.append(answer[:, ::-1] if flip else answer)
    mean, spread = np.mean(answers, axis=0), np.std(answers, axis=0, ddof=1)
    assert np.abs(done.image - 255 * mean).max() <= 0.51
    expected = 255 * np.sqrt((spread**2).mean(axis=-1))
    np.testing.assert_allclose(done.consistency, expected, rtol=1e-2, atol=1e-2)
    assert done.consistency.dtype == np.float32 and done.consistency.shape == (40, 56)
    assert done.record.ensemble and not restorer.restore(part, "rain").record.ensemble


def test_an_ensemble_answers_a_flipped_image_flipped(restorer, photograph):
    part = photograph[:48, :48]
    done, flipped = (restorer.restore(each, "blur", ensemble=True) for each in (part, part[::-1]))
    assert np.abs(done.image.astype(int) - flipped.image[::-1]).max() <= 1
    np.testing.assert_allclose(done.consistency, flipped.consistency[::-1], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shape", [(20, 24), (20, 24, 1), (2, 20, 24, 3), (1, 20, 24, 4)])
def test_consistency_is_one_value_for_each_pixel(restorer, shape):
    array = np.random.default_rng(0).integers(0, 4000, shape).astype(np.uint16)
    mask = np.zeros((20, 24), bool)
    mask[:, :12] = True
    done = restorer.restore(array, "haze", ensemble=True, mask=mask, strength=0.5)
    assert done.consistency.shape == (shape[:3] if len(shape) == 4 else shape[:2])
    assert (done.consistency[..., 12:] == 0).all() and (done.consistency[..., :12] > 0).any()
    whole = restorer.restore(array, "haze", ensemble=True)
    np.testing.assert_allclose(
        done.consistency[..., :12], whole.consistency[..., :12] / 2, rtol=1e-4, atol=1e-4
    )
    assert restorer.restore(array, "haze").consistency is None


def test_strength_blends(restorer, photograph):
    array = photograph[:32, :32].astype(np.float32) / 255
    full = restorer.restore(array, "haze").image
    assert np.array_equal(restorer.restore(array, "haze", strength=0).image, array)
    half = restorer.restore(array, "haze", strength=0.5).image
    assert np.abs(half - (array + full) / 2).max() < 1e-6


def test_mask_limits(restorer, photograph):
    array = photograph[:32, :40]
    mask = np.zeros((32, 40), bool)
    mask[8:16, 8:16] = True
    full = restorer.restore(array, "haze").image
    masked = restorer.restore(array, "haze", mask=mask).image
    turned = mask[::-1].astype(np.float32)[::-1]  # its strides are negative
    assert np.array_equal(restorer.restore(array, "haze", mask=turned).image, masked)
    assert np.array_equal(masked[~mask], array[~mask])
    assert np.array_equal(masked[mask], full[mask])


@pytest.mark.parametrize(
    ("shape", "axis"), [((24, 32), None), ((3, 24, 32), 0), ((2, 24, 32, 3), -1)]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint32])
def test_outside_of_the_mask_every_bit_stays(restorer, dtype, shape, axis):
    """Though the way to pixels and back rounds what has more digits than float32."""
    generator = np.random.default_rng(0)
    array = (1000 + 1e8 * generator.random(shape)).astype(dtype)
    mask = np.zeros((24, 32))
    mask[8:16, 8:16] = 0.5
    done = restorer.restore(array, "haze", mask=mask, channel_axis=axis, value_range=(0, 2e8)).image
    outside = np.broadcast_to(mask[..., None] == 0 if axis == -1 else mask == 0, shape)
    assert np.array_equal(done[outside], array[outside])
    assert (done[~outside] != array[~outside]).any()


@pytest.mark.parametrize("found", [diagnosis("clean"), diagnosis("unsure", Degradation.RAIN, 0.4)])
def test_auto_leaves_alone_what_is_not_surely_degraded(restorer, verdict, photograph, found):
    verdict(found)
    done = restorer.restore(photograph)
    assert done.steps == () and np.array_equal(done.image, photograph)
    assert done.image is not photograph
    assert "left as it is" in done.summary


def test_auto_restores_what_was_found(restorer, verdict, photograph):
    calls = verdict(diagnosis("degraded", Degradation.HAZE))
    done = restorer.restore(photograph)
    assert calls == [1]
    assert done.steps == (Degradation.HAZE,) and done.diagnosis.name == "haze"
    assert np.array_equal(done.image, restorer.restore(photograph, "haze").image)
    assert "haze" in done.summary and "restored" in done.summary


def test_a_stack_has_one_verdict(restorer, verdict, photograph):
    calls = verdict(
        diagnosis("degraded", Degradation.RAIN),
        diagnosis("clean"),
        diagnosis("degraded", Degradation.RAIN),
    )
    done = restorer.restore(np.stack([photograph] * 3))
    assert calls == [1, 1, 1] and done.steps == (Degradation.RAIN,)
    assert np.array_equal(done.image[0], done.image[1])


def test_each_image_may_have_its_own_verdict(restorer, verdict, photograph):
    verdict(
        diagnosis("degraded", Degradation.RAIN),
        diagnosis("degraded", Degradation.RAIN),
        diagnosis("clean"),
        diagnosis("degraded", Degradation.HAZE),
    )
    pixels = pixels_of(photograph[:16, :24]).expand(4, -1, -1, -1)
    done = restorer.restore_pixels(pixels, one_verdict=False)
    assert done.steps == (Degradation.RAIN, Degradation.HAZE) and len(done.diagnoses) == 4
    for number, name in ((1, "rain"), (2, "clean"), (3, "haze")):
        alone = restorer.restore_pixels(pixels[:1], name).image[0]
        assert torch.equal(done.image[number], alone)
    assert done.summary.splitlines() == [
        "images 1-2: rain streaks (90% sure); restored",
        "image 3: clean (90% sure); left as it is",
        "image 4: haze (90% sure); restored",
    ]


def test_a_verdict_can_be_handed_on(restorer, photograph):
    pixels = pixels_of(photograph[:16, :16])
    for name in ("clean", "unsure"):
        done = restorer.restore_pixels(pixels, name)
        assert done.image is pixels and done.diagnosis.name == name
        assert done.summary == f"{name}, as told; left as it is"


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_of_any_channels(restorer, channels):
    layout = torch.rand(2, 18, 20, channels)  # as hosts with channels last have it
    image = restorer.restore_pixels(layout.movedim(-1, 1), "haze").image.movedim(1, -1)
    expected = restorer.restore(layout.numpy(), "haze", value_range=(0, 1)).image
    assert image.shape == layout.shape and image.is_contiguous()
    assert np.abs(image.numpy() - expected).max() < 1e-6
    assert torch.equal(image[..., 3:], layout[..., 3:])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 5, 8, 8), "5 channels"),
        ((0, 3, 8, 8), "nothing to restore"),
        ((1, 3, 0, 8), "nothing to restore"),
        ((3, 8, 8), "four axes"),
    ],
)
def test_pixels_that_are_no_images_are_named(restorer, shape, message):
    with pytest.raises(ValueError, match=message):
        restorer.restore_pixels(torch.zeros(shape), "rain")


@pytest.mark.parametrize(
    ("pixels", "message"),
    [(torch.full((1, 3, 4, 4), torch.nan), "48 values"), (torch.ones(1, 3, 4, 4).int(), "int32")],
)
def test_values_that_are_no_pixels_are_named(restorer, pixels, message):
    with pytest.raises(ValueError, match=message):
        restorer.restore_pixels(pixels, "rain")


def test_a_mask_of_another_size_is_stretched(restorer, photograph):
    pixels = pixels_of(photograph[:32, :48])
    mask = torch.zeros(1, 8, 12)
    mask[:, :, :6] = 1
    full = restorer.restore_pixels(pixels, "haze").image
    image = restorer.restore_pixels(pixels, "haze", mask=mask).image
    assert torch.equal(image[..., 26:], pixels[..., 26:])
    assert torch.equal(image[..., :22], full[..., :22])


def test_an_empty_mask_is_reported(restorer, photograph):
    pixels = pixels_of(photograph[:16, :16])
    done = restorer.restore_pixels(pixels, "haze", mask=torch.zeros(1, 64, 64))
    assert torch.equal(done.image, pixels) and done.steps == ()
    assert "mask is empty" in done.report


def test_images_are_shown_as_they_are_done(restorer):
    seen = {}
    pixels = torch.rand(3, 3, 16, 16)
    done = restorer.restore_pixels(pixels, "rain", on_image=seen.__setitem__)
    assert list(seen) == [0, 1, 2]
    assert all(torch.equal(image, done.image[number]) for number, image in seen.items())


def test_judging_can_be_cancelled(restorer, verdict):
    verdict(diagnosis("clean"))
    seen = []
    restorer.restore_pixels(torch.rand(3, 3, 16, 16), on_progress=lambda *call: seen.append(call))
    assert seen == [(0, 3)] * 3


def test_frames_share_attention_when_sampled(restorer, photograph, monkeypatch):
    measured = []
    measure = restorer.model.measure
    monkeypatch.setattr(
        restorer.model, "measure", lambda w, *a, **k: measured.append(len(w)) or measure(w, *a, **k)
    )
    frames = pixels_of(photograph[:48, :48]).repeat(20, 1, 1, 1)
    tiling = Tiling(64, statistics="sampled")
    done = restorer.restore_pixels(frames, "haze", tiling=tiling)
    assert measured == [module.SAMPLED_WINDOWS]
    assert distance(done.image[7:8], restorer.restore_pixels(frames[:1], "haze").image) < 1e-5


class MemoryShort:
    """Let the network run only in as few rows, or on as few pixels, as a limit allows."""

    def __init__(self, monkeypatch, model, *, rows=0, pixels=0):
        self.calls = []
        forward = model.forward

        def limited(images, *arguments, **options):
            self.calls.append((options.get("rows"), tuple(images.shape[-2:])))
            low = options.get("rows") is not None and options["rows"] <= rows
            if low or images.shape[-2] * images.shape[-1] <= pixels:
                return forward(images, *arguments, **options)
            message = "CUDA out of memory. Tried to allocate 1.00 EiB"
            raise RuntimeError(message)

        monkeypatch.setattr(model, "forward", limited)


def test_lower_strips_are_tried_when_memory_runs_out(restorer, photograph, monkeypatch, caplog):
    monkeypatch.setattr(Restorer, "takes_strips", True)
    pixels = pixels_of(photograph[:64, :64])
    expected = restorer.restore_pixels(pixels, "rain").image
    short = MemoryShort(monkeypatch, restorer.model, rows=module.FEWEST_ROWS)
    done = restorer.restore_pixels(pixels, "rain")
    assert [rows for rows, _ in short.calls][-1] == module.FEWEST_ROWS and len(short.calls) == 2
    assert distance(done.image, expected) < 1e-5
    assert done.record.statistics == "whole" and done.record.notes == ()
    assert "Memory ran out" in caplog.text


def test_tiles_are_tried_at_last_and_said_so(restorer, monkeypatch):
    pixels = torch.rand(1, 3, 600, 100)
    MemoryShort(monkeypatch, restorer.model, pixels=(256 + 2 * module.Tiling().overlap) * 100)
    done = restorer.restore_pixels(pixels, "rain")
    assert done.record.statistics == "sampled"
    assert "tiles of 256 pixels" in done.report


def test_memory_that_never_suffices_is_an_error(restorer, monkeypatch):
    MemoryShort(monkeypatch, restorer.model)
    with pytest.raises(RuntimeError, match="out of memory"):
        restorer.restore_pixels(torch.rand(1, 3, 16, 16), "rain")


def test_other_errors_are_not_taken_for_want_of_memory(restorer, monkeypatch):
    def broken(*_, **__):
        message = "expected scalar type Float"
        raise RuntimeError(message)

    monkeypatch.setattr(restorer.model, "forward", broken)
    with pytest.raises(RuntimeError, match="scalar type"):
        restorer.restore_pixels(torch.rand(1, 3, 16, 16), "rain")


def test_overflow_in_half_precision_is_done_again_in_single(tiny_model):
    with torch.no_grad():
        tiny_model.embed.weight.mul_(1e4)
        tiny_model.output.weight.mul_(1e4)
    pixels = torch.rand(1, 3, 32, 32)
    half = Restorer(model=copy.deepcopy(tiny_model).to(torch.bfloat16).half())
    done = half.restore_pixels(pixels, "rain")
    assert done.image.isfinite().all()
    assert "float16" in done.report and half.dtype is torch.float16


@pytest.mark.parametrize("tiling", [None, Tiling(64, 16, statistics="sampled")])
def test_half_precision_does_not_round_the_pixels(tiny_model, tiling):
    with torch.no_grad():
        tiny_model.output.weight.zero_()
    pixels = torch.rand(1, 3, 100, 90)
    half = Restorer(model=tiny_model.to(torch.bfloat16))
    assert torch.equal(half.restore_pixels(pixels, "rain", tiling=tiling).image, pixels)


@pytest.mark.parametrize("kind", Degradation)
def test_half_precision_keeps_a_photograph(photograph, kind):
    """In bfloat16, which is no default, the bundled weights restore the same to 45 dB."""
    sharp = torch.from_numpy(photograph[:96, :96]).permute(2, 0, 1)[None] / 255
    degraded = degrade(sharp, kind, torch.Generator().manual_seed(1))
    single, half = (
        Restorer(device="cpu", dtype=dtype).restore_pixels(degraded, kind)
        for dtype in ("float32", "bfloat16")
    )
    assert half.record.notes == single.record.notes  # not done again in single precision
    assert 45 < peak_signal_noise_ratio(single.image.numpy(), half.image.numpy(), data_range=1) < 99


def test_damaged_weights_are_noticed(restorer):
    with torch.no_grad():
        restorer.model.output.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        restorer.restore_pixels(torch.rand(1, 3, 16, 16), "rain")


def test_vote_averages_sigma_of_those_who_agree():
    noisy = [diagnosis("degraded", Degradation.NOISE_25, sigma=s) for s in (20.0, 30.0)]
    found = vote([*noisy, diagnosis("clean")])
    assert found.degradation is Degradation.NOISE_25 and found.sigma == 25.0
    assert sum(found.probabilities.values()) == pytest.approx(1)


def test_all_noise_votes_as_one():
    """Two noisy images of different levels outvote a clean one."""
    noisy = [
        diagnosis("degraded", Degradation.NOISE_15, sigma=17.0),
        diagnosis("degraded", Degradation.NOISE_25, sigma=22.0),
    ]
    for order in (noisy, noisy[::-1]):
        found = vote([diagnosis("clean"), *order])
        assert found.verdict == "degraded" and found.sigma == 19.5
        assert found.degradation is Degradation.NOISE_25  # nearest to 19.5, if just so
    assert vote([noisy[0], diagnosis("clean"), diagnosis("clean")]).verdict == "clean"


def test_a_given_model_is_not_touched(tiny_model):
    before = {key: value.clone() for key, value in tiny_model.state_dict().items()}
    Restorer(model=tiny_model).restore(np.zeros((9, 9, 3), np.uint8), "blur")
    for key, value in tiny_model.state_dict().items():
        assert torch.equal(value, before[key])


def test_weights_and_model_exclude_each_other(tiny_model):
    with pytest.raises(ValueError, match="not both"):
        Restorer("dfpir-compact-14", model=tiny_model)


def test_pixels_keep_dtype_and_stay_usable(restorer):
    pixels = torch.rand(2, 3, 16, 16, dtype=torch.float16)
    image = restorer.restore_pixels(pixels, "rain").image
    assert image.dtype == torch.float16 and not image.is_inference()


@pytest.mark.parametrize(
    "tiling", [Tiling(16, 8), Tiling(16, 48, "sampled"), Tiling(128, 0, "sampled")]
)
def test_every_tiling_gives_the_image(restorer, photograph, tiling):
    pixels = pixels_of(photograph[:64, :64])
    whole = restorer.restore_pixels(pixels, "rain").image
    tiled = restorer.restore_pixels(pixels, "rain", tiling=tiling).image
    exact = tiling.statistics == "whole" or tiling.size >= 64
    assert distance(tiled, whole) < (1e-5 if exact else 0.05)


def test_strips_give_the_whole_image(restorer, monkeypatch, photograph):
    rows = []
    forward = restorer.model.forward
    monkeypatch.setattr(
        restorer.model, "forward", lambda *a, **k: rows.append(k["rows"]) or forward(*a, **k)
    )
    monkeypatch.setattr(kernels, "passes_for", lambda features: generic)
    monkeypatch.setattr(Restorer, "takes_strips", True)
    whole = restorer.restore(photograph, "rain").image
    monkeypatch.setattr(module, "free_memory", lambda device: 1000)
    monkeypatch.setattr(module, "STRIP_PIXELS", 2**9)
    strips = restorer.restore(photograph, "rain").image
    assert np.abs(strips.astype(int) - whole).max() <= 1
    assert rows == [None, module.FEWEST_ROWS]


def test_on_a_processor_the_way_does_not_depend_on_its_memory(restorer, monkeypatch):
    expected = restorer.ways((4000, 512), None)
    monkeypatch.setattr(module, "free_memory", lambda device: 1000)
    assert restorer.ways((4000, 512), None) == expected
    assert expected[0] is None and all(isinstance(way, Tiling) for way in expected[1:])


@pytest.mark.parametrize("free", [1000, 10**12])
def test_elsewhere_strips_are_taken_where_memory_is_short(restorer, monkeypatch, free):
    monkeypatch.setattr(Restorer, "device", torch.device("cuda"))
    monkeypatch.setattr(module, "free_memory", lambda device: free)
    assert (restorer.strip_rows((400, 400)) is None) == (free > 1000)


def test_memory_grows_with_the_image_and_shrinks_by_strips():
    config = DFPIRConfig.paper()
    whole = memory_needed(config, (1088, 1920), torch.float32)
    assert memory_needed(config, (544, 960), torch.float32) < whole / 3
    assert memory_needed(config, (1088, 1920), torch.bfloat16) == whole // 2
    assert memory_needed(config, (1088, 1920), torch.float32, rows=32) < whole / 3


def test_progress_covers_the_stack(restorer):
    seen = []
    restorer.restore(
        np.zeros((2, 16, 16, 3), np.uint8), "rain", on_progress=lambda d, t: seen.append((d, t))
    )
    total = seen[0][1]
    assert [done for done, _ in seen] == list(range(1, total + 1))
    assert {t for _, t in seen} == {total}


@pytest.mark.parametrize("one_verdict", [True, False])
def test_progress_with_sampled_statistics(restorer, verdict, one_verdict):
    verdict(*[diagnosis("degraded", Degradation.RAIN)] * 3)
    seen = []
    restorer.restore_pixels(
        torch.rand(3, 3, 40, 40),
        tiling=Tiling(16, 8, statistics="sampled"),
        one_verdict=one_verdict,
        on_progress=lambda *call: seen.append(call),
    )
    judged, worked = seen[:3], seen[3:]
    assert judged == [(0, 3)] * 3
    tiles, measurings = 3 * 9, 1 if one_verdict else 3
    total = module.SAMPLED_WINDOWS * measurings + tiles
    assert {each for _, each in worked} == {total}
    done = [each for each, _ in worked]
    assert done == sorted(done) and done[-1] == total
    assert len(set(done)) > total - 3  # of small steps all along


@pytest.mark.parametrize("count", [1, 2])
def test_measuring_can_be_cancelled(restorer, monkeypatch, count):
    class Stop(Exception):
        pass

    def stop(done, total):
        if done >= module.SAMPLED_WINDOWS // 2:
            raise Stop

    monkeypatch.setattr(restorer, "run_tiles", lambda *_: pytest.fail("it has gone on"))
    frames = torch.rand(count, 3, 40, 40)
    with pytest.raises(Stop):
        restorer.restore_pixels(
            frames, "rain", tiling=Tiling(16, statistics="sampled"), on_progress=stop
        )


def test_cancel(restorer):
    class Stop(Exception):
        pass

    def stop(done, total):
        raise Stop

    with pytest.raises(Stop):
        restorer.restore(np.zeros((16, 16, 3), np.uint8), "rain", on_progress=stop)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": 1.5}, "strength is 1.5"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"degradation": "snow"}, "Unknown degradation 'snow'"),
        ({"degradation": "rain", "mask": np.zeros((3, 3))}, r"Mask has shape \(3, 3\)"),
        ({"degradation": "rain", "mask": np.full((16, 16), 2)}, "outside 0..1"),
    ],
)
def test_bad_arguments_are_named(restorer, arguments, message):
    with pytest.raises(ValueError, match=message):
        restorer.restore(np.zeros((16, 16, 3), np.uint8), **arguments)


@pytest.mark.parametrize("device", ["nowhere", "cuda:99"])
def test_absent_devices_are_named(device):
    with pytest.raises(ValueError, match=f"'{device}' cannot be used.*'cpu'"):
        module.choose_device(device)


def test_unknown_precision_is_named():
    with pytest.raises(ValueError, match=r"'int8'.*float32"):
        module.choose_dtype("int8", torch.device("cpu"))


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_auto_takes_the_accelerator_there_is(monkeypatch, kind):
    for each in ("cuda", "mps", "xpu"):
        monkeypatch.setattr(getattr(torch, each), "is_available", lambda each=each: each == kind)
    assert module.choose_device().type == kind


def test_record_can_be_written_down(restorer, photograph):
    done = restorer.restore(photograph, "rain", strength=0.5)
    facts = json.loads(json.dumps(done.record.as_dict()))
    assert facts["steps"] == ["rain"] and facts["strength"] == 0.5
    assert facts["value_range"] == [0, 255] and len(facts["input_sha256"]) == 64
    assert facts["diagnosis"]["told"] is True


def test_bundled_weights_restore_noise(photograph):
    noise = np.random.default_rng(0).normal(0, 25, photograph.shape)
    noisy = np.clip(photograph + noise, 0, 255).astype(np.uint8)
    done = Restorer(device="cpu").restore(noisy)
    error = lambda image: np.square(image.astype(float) - photograph).mean()  # noqa: E731
    assert done.diagnosis.degradation is Degradation.NOISE_25
    assert error(done.image) < error(noisy) / 4
    assert done.record.weights == "dfpir-compact-14"
    assert SMALL_COMPACT.stem == 2


@pytest.mark.parametrize("shape", [(20, 24, 3), (20, 24, 4)])
def test_a_grey_picture_in_three_channels_stays_grey(restorer, shape):
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    picture[..., :3] = picture[..., :1]
    done = restorer.restore(picture, "haze").image
    assert (done[..., :3] == done[..., :1]).all()
    assert (done[..., 0] == restorer.restore(picture[..., 0], "haze").image).all()
    assert not (done[..., :3] == picture[..., :3]).all()
