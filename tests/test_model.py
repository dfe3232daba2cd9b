"""The network: one function by two roads, any size, strips, fixed attention, progress."""

import pytest
import torch

from conftest import TOLERANCE, assert_equal, distance, random_model
from dfpir.degradation import Degradation
from dfpir.model import DFPIR, DFPIRConfig, pad_to_multiple


def pixels(height=37, width=50, batch=2):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_sizes_are_the_paper_s():
    with torch.device("meta"):
        model = DFPIR()
    text_projections = sum(512 * 512 + 512 + 512 * 2 * c + 2 * c for c in (48, 96, 192, 384))
    assert sum(value.numel() for value in model.parameters()) + text_projections == 31_104_761
    assert [DFPIRConfig.paper().kept(level) for level in range(4)] == [43] * 4


def test_compact_fits_the_package():
    with torch.device("meta"):
        count = sum(value.numel() for value in DFPIR(DFPIRConfig.compact()).parameters())
    assert 2 * count < 14e6


@pytest.mark.parametrize("rows", [None, 1, 3])
def test_inference_equals_the_definition(model, both, rows):
    with torch.no_grad():
        defined = model.define(pixels(), both)
        assert_equal(model(pixels(), both, rows=rows), defined)


def test_inference_equals_the_definition_in_double(model, both):
    model, x = model.double(), pixels().double()
    with torch.no_grad():
        defined = model.define(x, both)
        # The sums behind the attention are kept in single precision.
        assert_equal(model(x, both), defined, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(tiny_model, dtype):
    x = pixels(16, 16)
    single = tiny_model(x, Degradation.RAIN)
    half = tiny_model.to(dtype)(x.to(dtype), Degradation.RAIN)
    assert half.dtype == dtype
    assert distance(half, single) <= TOLERANCE[dtype]


@pytest.mark.parametrize("road", ["forward", "define"])
def test_half_precision_adds_to_pixels_that_are_not_rounded(tiny_model, road):
    half = tiny_model.bfloat16()
    half.output.weight.zero_()
    x = pixels(16, 16)
    assert torch.equal(getattr(half, road)(x, Degradation.RAIN), x)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 2), (17, 9), (64, 8)])
def test_any_size(tiny_model, size):
    restored = tiny_model(pixels(*size), Degradation.BLUR)
    assert restored.shape == (2, 3, *size)
    assert torch.isfinite(restored).all()


def test_padding_mirrors_then_repeats_the_edge():
    row = torch.tensor([[[[1.0, 2.0, 3.0]]]]).expand(1, 1, 3, 3)
    assert pad_to_multiple(row, 8)[0, 0, 0].tolist() == [1, 2, 3, 2, 1, 1, 1, 1]
    even = torch.rand(1, 1, 8, 16)
    assert pad_to_multiple(even, 8) is even


def test_degradation_decides(tiny_model):
    x = pixels(16, 16)
    outputs = [tiny_model(x, member) for member in Degradation]
    for number, output in enumerate(outputs):
        for other in outputs[:number]:
            assert not torch.equal(output, other)


def test_every_parameter_learns(model, both):
    model(pixels(16, 16), both).square().mean().backward()
    for name, value in model.named_parameters():
        assert value.grad is not None and value.grad.abs().sum() > 0, name


@pytest.mark.parametrize("rows", [None, 3])
def test_the_definition_and_the_inference_path_learn_alike(model, both, rows):
    def gradients(restored):
        model.zero_grad()
        restored.square().mean().backward()
        return [value.grad.clone() for value in model.parameters()]

    x = pixels(24, 32)
    defined = gradients(model.define(x, both))
    for found, expected in zip(gradients(model(x, both, rows=rows)), defined, strict=True):
        assert distance(found, expected) <= 1e-3


def test_gradients_of_a_black_image_are_finite(model):
    model(torch.zeros(1, 3, 16, 16), Degradation.RAIN).square().mean().backward()
    assert all(torch.isfinite(value.grad).all() for value in model.parameters())


def test_attention_of_the_whole_image_is_the_image_s_own(tiny_model):
    x = pixels(batch=1)
    attention = tiny_model.measure(x, Degradation.RAIN)
    given = tiny_model(x, Degradation.RAIN, attention=attention, rows=2)
    assert_equal(given, tiny_model(x, Degradation.RAIN))


def test_windows_share_their_sums(tiny_model):
    # Large enough for scores that differ: ties would be broken either way.
    x = pixels(96, 64, batch=1)
    once = tiny_model.measure(x, Degradation.RAIN)
    twice = tiny_model.measure(torch.cat([x, x]), Degradation.RAIN)
    for alone, shared in zip(once, twice, strict=True):
        assert shared.shape[0] == 1
        assert_equal(shared, alone)


def test_with_fixed_attention_a_tile_is_what_it_is_in_the_image(tiny_model):
    x = pixels(448, 448, batch=1)
    attention = tiny_model.measure(x, Degradation.HAZE)
    whole = tiny_model(x, Degradation.HAZE, attention=attention)
    tile = tiny_model(x[..., 16:432, 16:432], Degradation.HAZE, attention=attention)
    # So far from the tile's border nothing of it can be seen.
    assert_equal(tile[..., 192:224, 192:224], whole[..., 208:240, 208:240])


@pytest.mark.parametrize("rows", [None, 1, 4])
def test_progress_counts_to_the_end(model, rows):
    seen = []
    with torch.no_grad():
        model(
            pixels(40, 24),
            Degradation.RAIN,
            rows=rows,
            on_progress=lambda done, total: seen.append((done, total)),
        )
    total = seen[0][1]
    assert seen == [(number + 1, total) for number in range(total)]


def test_raising_from_progress_cancels(tiny_model):
    class Stop(Exception):
        pass

    calls = []

    def stop(done, total):
        calls.append(done)
        if done == 3:
            raise Stop

    with pytest.raises(Stop):
        tiny_model(pixels(), Degradation.RAIN, on_progress=stop)
    assert calls == [1, 2, 3]


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8), (1, 3, 0, 8), (0, 3, 8, 8)])
def test_wrong_shapes_are_refused(tiny_model, shape):
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
        tiny_model(torch.zeros(shape), Degradation.RAIN)


def test_one_degradation_for_each_image(tiny_model, both):
    with pytest.raises(ValueError, match="3 images"):
        tiny_model(pixels(8, 8, batch=3), both)


def test_untrained_degradation_is_refused():
    model = random_model(
        DFPIRConfig(8, (1, 1, 1, 1), 1, degradations=(Degradation.RAIN, Degradation.HAZE))
    )
    with pytest.raises(ValueError, match=r"'blur'.*rain, haze"):
        model(pixels(8, 8), Degradation.BLUR)
