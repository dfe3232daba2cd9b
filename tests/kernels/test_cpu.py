"""The passes used for inference against the definition in kernels/reference.py."""

import pytest
import torch
from torch.nn import functional as F

from conftest import assert_equal, random_model
from dfpir import kernels
from dfpir.degradation import Degradation
from dfpir.kernels import cpu, reference
from dfpir.model import (
    DGPB,
    DFPIRConfig,
    TransformerBlock,
    _Passes,
    fold,
    from_rows,
    shuffle,
    to_rows,
    unshuffle,
)


def nothing(pixels):
    pass


def features(channels, height, width, batch=2, scale=1.0):
    generator = torch.Generator().manual_seed(channels * height + width)
    return scale * torch.randn(batch, channels, height, width, generator=generator)


def block(channels, heads, expansion=2.66):
    torch.manual_seed(channels)
    made = TransformerBlock(channels, heads, expansion).requires_grad_(False)
    for value in made.parameters():
        value.add_(0.1 * torch.randn_like(value))
    return made


def passes_over(images, rows):
    """What a block needs to run on its own."""
    return _Passes(
        torch.zeros(len(images), dtype=torch.int64),
        None,
        shared=False,
        rows=rows,
        on_progress=None,
        pixels=images[:, 0].numel(),
        passes=1,
    )


@pytest.fixture(params=["cpu", "generic"])
def way(request):
    """The passes without and with gradients."""
    with torch.set_grad_enabled(request.param == "generic"):
        assert kernels.passes_for(torch.zeros(1)).__name__.endswith(request.param)
        yield request.param


@pytest.fixture
def tiles_of_few_pixels(monkeypatch):
    """Tiles so small that small images have several in each direction."""
    monkeypatch.setattr(cpu, "TILE_BYTES", 32 * 2**10)
    monkeypatch.setattr(cpu, "TILE_ROWS", 3)


SHAPES = [(8, 1, 7, 5), (16, 2, 1, 1), (48, 1, 33, 17), (96, 2, 9, 4), (32, 8, 6, 11)]


def test_layer_norm_is_the_formula():
    x, weight, bias = features(6, 3, 4).double(), torch.rand(6).double(), torch.rand(6).double()
    mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    expected = (x - mean) / (variance + 1e-5).sqrt() * weight[:, None, None] + bias[:, None, None]
    assert_equal(reference.layer_norm(x, weight, bias), expected, torch.float64)


def test_channel_attention_is_the_formula():
    q, k, v = (features(8, 4, width).double()[..., :4] for width in (4, 5, 6))
    temperature = torch.tensor([[[1.5]], [[0.7]]]).double()
    expected = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        queries = F.normalize(q[:, part].flatten(2), dim=-1)
        keys = F.normalize(k[:, part].flatten(2), dim=-1)
        scores = (queries @ keys.transpose(1, 2) * temperature[head]).softmax(-1)
        expected.append(scores @ v[:, part].flatten(2))
    expected = torch.cat(expected, dim=1).reshape(v.shape)
    assert_equal(reference.channel_attention(q, k, v, temperature), expected, torch.float64)


def test_channel_attention_does_not_care_where_pixels_are():
    q, k, v = (features(8, 5, 6) for _ in range(3))
    order = torch.randperm(30)
    shuffle = lambda x: x.flatten(2)[..., order].reshape(x.shape)  # noqa: E731
    temperature = torch.ones(2, 1, 1)
    plain = reference.channel_attention(q, k, v, temperature, kept=3)
    shuffled = reference.channel_attention(*map(shuffle, (q, k, v)), temperature, kept=3)
    assert_equal(shuffled, shuffle(plain))


def test_keep_largest_keeps_a_valid_top_set():
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0]])
    kept = reference.keep_largest(scores, 2)
    assert torch.isfinite(kept).sum() == 2
    assert kept[0, 0] == 3 and kept[0, 1] == float("-inf")


@pytest.mark.parametrize(("channels", "heads", "height", "width"), SHAPES)
@pytest.mark.parametrize("rows", [None, 1, 4])  # of no concern to the processor's passes
def test_block_equals_its_definition(way, channels, heads, height, width, rows):
    made, x = block(channels, heads), features(channels, height, width)
    expected = made(x)
    assert_equal(from_rows(made.infer(to_rows(x), passes_over(x, rows))), expected)


@pytest.mark.parametrize(("height", "width"), [(40, 37), (9, 64), (50, 1), (1, 50)])
def test_tiles_leave_no_trace(tiles_of_few_pixels, height, width):
    made, x = block(48, 1), features(48, height, width)
    assert cpu.tile_shape(height, width, 4 * 255) != (height, width)
    with torch.no_grad():
        expected = made(x)
        assert_equal(from_rows(made.infer(to_rows(x), passes_over(x, None))), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 7), (16, 16), (20, 33), (5, 1)])
@pytest.mark.parametrize("onednn", [True, False])
def test_a_product_is_that_of_matrices(monkeypatch, onednn, shape, dtype):
    monkeypatch.setattr(cpu, "ONEDNN", onednn)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*size, generator=generator).to(dtype)
        for size in ((*shape, 24), (40, 24), (40,))
    )
    expected = F.linear(x.double(), weight.double(), bias.double())
    assert_equal(cpu.product(x, weight, bias), expected, dtype)
    across = weight[:24].t()  # not contiguous
    assert_equal(cpu.product(x, across), F.linear(x.double(), across.double()), dtype)


@pytest.mark.parametrize("skip", [False, True])
def test_perturbation_block_equals_its_definition(way, tiles_of_few_pixels, skip):
    torch.manual_seed(0)
    made, x = DGPB(16, 2, 7, 2.66, skip=skip).requires_grad_(False), features(16, 23, 21)
    for row in made.perturbation.permutations:
        row.copy_(torch.randperm(len(row)))
    run = passes_over(x, None)
    run.indices = torch.tensor([Degradation.HAZE.index, Degradation.NOISE_15.index])
    expected = made(x, run.indices)
    assert_equal(from_rows(made.infer(to_rows(x), run.indices, run)), expected)


@pytest.mark.parametrize("value", [0.0, 3.0, 1e4])
def test_constant_images_stay_finite(way, value):
    made, x = block(8, 2), torch.full((1, 8, 6, 5), value)
    found = from_rows(made.infer(to_rows(x), passes_over(x, 2)))
    assert torch.isfinite(found).all()
    assert_equal(found, made(x))


def test_gram_sums_do_not_depend_on_strips(way):
    made, x = block(16, 2), to_rows(features(16, 13, 7).double())
    made = made.double()
    joint = fold(made.norm1, made.attention.qkv, made.attention.depthwise)
    part = kernels.Projection(*(each[:32] for each in joint[:3]))
    whole = kernels.gram(x, [part], 2, rows=None, advance=nothing)
    for rows in (1, 5):
        strips = kernels.gram(x, [part], 2, rows=rows, advance=nothing)
        for found, expected in zip(strips, whole, strict=True):
            assert_equal(found, expected)


@pytest.mark.parametrize("rows", [None, 1, 2, 5, 64])
@pytest.mark.parametrize("rearrange", [None, shuffle, unshuffle])
def test_convolution_by_strips(rows, rearrange):
    x, weight = features(4, 10, 6), features(4, 3, 3, batch=8)
    expected = F.conv2d(x, weight, padding=1)
    if rearrange is not None:
        change = F.pixel_shuffle if rearrange is shuffle else F.pixel_unshuffle
        expected = change(expected, 2)
    seen = []
    with torch.no_grad():
        found = kernels.convolve(to_rows(x), weight, rearrange, rows=rows, advance=seen.append)
    assert_equal(from_rows(found), expected)
    assert sum(seen) == 2 * 10 * 6


@pytest.mark.parametrize("rows", [None, 2, 5])
@pytest.mark.parametrize("gradient", [False, True])
def test_convolution_is_added_to_a_residual(rows, gradient):
    x, weight, residual = features(4, 10, 6), features(4, 3, 3, batch=8), features(8, 10, 6)
    expected = residual + F.relu(F.conv2d(x, weight, padding=1))
    given, seen = to_rows(residual), []
    with torch.set_grad_enabled(gradient):
        found = kernels.convolve(
            to_rows(x), weight, F.relu, rows=rows, advance=seen.append, residual=given
        )
    assert_equal(from_rows(found), expected)
    assert (found is given) != gradient  # in place, unless it could be wanted again
    assert sum(seen) == 2 * 10 * 6


def test_folded_matrices_follow_the_parameters():
    made, x = block(8, 2), features(8, 5, 6)
    with torch.no_grad():
        made.infer(to_rows(x), passes_over(x, None))
        kept = made._kept
        made.infer(to_rows(x), passes_over(x, None))
        assert made._kept is kept
        made.norm1.weight.mul_(2)
        assert_equal(from_rows(made.infer(to_rows(x), passes_over(x, None))), made(x))
        assert made.double()._kept is None
    made.load_state_dict({key: value + 0.5 for key, value in made.state_dict().items()})
    with torch.no_grad():
        found = from_rows(made.infer(to_rows(x.double()), passes_over(x, None)))
        assert_equal(found, made(x.double()))


def test_batch_equals_singles():
    model = random_model(DFPIRConfig(width=8, blocks=(1, 1, 1, 1), refinement_blocks=1))
    x = features(3, 16, 24)
    with torch.no_grad():
        together = model(x, torch.tensor([3, 5]))
        apart = [model(x[i : i + 1], torch.tensor([kind])) for i, kind in enumerate([3, 5])]
    assert_equal(together, torch.cat(apart))
