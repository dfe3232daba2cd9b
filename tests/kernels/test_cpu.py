"""The passes used for inference against the definition in kernels/reference.py."""

import pytest
import torch
from torch.nn import functional as F

from conftest import assert_equal, random_model
from dfpir import kernels
from dfpir.kernels import reference
from dfpir.model import DFPIRConfig, TransformerBlock, fold, from_rows, to_rows


def nothing():
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
@pytest.mark.parametrize("rows", [None, 1, 4])
def test_block_equals_its_definition(channels, heads, height, width, rows):
    from dfpir.model import _Run

    made, x = block(channels, heads), features(channels, height, width)
    run = _Run(None, False, rows, None, 1)
    assert_equal(from_rows(made.infer(to_rows(x), run)), made(x))


@pytest.mark.parametrize("value", [0.0, 3.0, 1e4])
def test_constant_images_stay_finite(value):
    from dfpir.model import _Run

    made, x = block(8, 2), torch.full((1, 8, 6, 5), value)
    found = from_rows(made.infer(to_rows(x), _Run(None, False, 2, None, 1)))
    assert torch.isfinite(found).all()
    assert_equal(found, made(x))


def test_gram_sums_do_not_depend_on_strips():
    made, x = block(16, 2), to_rows(features(16, 13, 7).double())
    made = made.double()
    joint = fold(made.norm1, made.attention.qkv, made.attention.depthwise)
    part = kernels.Projection(*(each[:32] for each in joint[:3]))
    whole = kernels.gram(x, [part], 2, None, nothing)
    for rows in (1, 5):
        for found, expected in zip(kernels.gram(x, [part], 2, rows, nothing), whole, strict=True):
            assert_equal(found, expected)


def test_batch_equals_singles():
    model = random_model(DFPIRConfig(width=8, blocks=(1, 1, 1, 1), refinement_blocks=1))
    x = features(3, 16, 24)
    with torch.no_grad():
        together = model(x, torch.tensor([3, 5]))
        apart = [model(x[i : i + 1], torch.tensor([kind])) for i, kind in enumerate([3, 5])]
    assert_equal(together, torch.cat(apart))
