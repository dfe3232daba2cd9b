"""Each kernel against its definition, interpreted on a CPU or compiled on a GPU."""

import pytest
import torch
from torch.nn import functional as F

from conftest import SMALL, SMALL_COMPACT, TOLERANCE, assert_equal, distance, random_model
from dfpir import kernels
from dfpir.degradation import Degradation
from dfpir.kernels import backend, reference

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = [
    (48, 1, 9, 7, 0, 0),
    (96, 2, 5, 6, 1, 1),
    (16, 2, 1, 1, 0, 0),
    (24, 3, 6, 3, 0, 1),
]
"""Channels, heads, height, width, rows around that are read and not written."""

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_case = pytest.mark.parametrize(
    ("channels", "heads", "height", "width", "above", "below"), CASES
)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """New memory is full of NaN, so that an element nobody writes is seen."""
    from dfpir.kernels import operators  # noqa: F401

    for name in ("empty", "empty_like"):
        made = getattr(torch, name)

        def poisoned(*arguments, made=made, **options):
            tensor = made(*arguments, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, poisoned)


@pytest.fixture(autouse=True)
def no_tf32():
    """On a card cuDNN would round float32 factors by default, in the definition too."""
    places = torch.backends.cudnn, torch.backends.cuda.matmul
    usual = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    yield
    for place, allowed in zip(places, usual, strict=True):
        place.allow_tf32 = allowed


def draw(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype)


def rows(height, width, channels, dtype, *, batch=2, seed=0):
    """Features that are not contiguous: every second row, channels first in memory."""
    tall = draw(batch, channels, 2 * height, width, dtype=dtype, seed=seed)
    return tall[:, :, ::2].permute(0, 2, 3, 1)


def single(*tensors):
    """The same values in single precision, for the definition."""
    return [None if tensor is None else tensor.float() for tensor in tensors]


@each_dtype
@pytest.mark.parametrize(
    ("channels", "height", "width", "wider"),
    [(48, 9, 7, 1), (96, 3, 4, 3), (16, 1, 1, 2), (24, 6, 3, 1)],
)
def test_project(dtype, channels, height, width, wider):
    x = rows(height, width, channels, dtype)
    weight = draw(wider * channels, channels, dtype=dtype, scale=channels**-0.5)
    bias = draw(wider * channels, dtype=dtype)
    found = torch.ops.dfpir.project(x, weight, bias)
    assert found.dtype == dtype and found.is_contiguous()
    assert_equal(found, reference.project(*single(x, weight, bias)), dtype)


@each_dtype
@pytest.mark.parametrize("value", [0.0, 0.7, 6e4])
def test_project_a_constant_image_to_the_bias(dtype, value):
    x = torch.full((1, 3, 3, 48), value, dtype=dtype, device=DEVICE)
    bias = draw(20, dtype=dtype)
    found = torch.ops.dfpir.project(x, draw(20, 48, dtype=dtype), bias)
    assert_equal(found, bias.expand_as(found), dtype)


@each_dtype
def test_project_huge_values(dtype):
    x = (3e4 + 1e4 * draw(1, 4, 4, 32)).clamp(max=6e4).to(dtype)
    weight, bias = draw(32, 32, dtype=dtype), draw(32, dtype=dtype)
    found = torch.ops.dfpir.project(x, weight, bias)
    assert_equal(found, reference.project(*single(x, weight, bias)), dtype)


@each_dtype
@each_case
def test_correlate(dtype, channels, heads, height, width, above, below):
    sides = [rows(height + above + below, width, channels, dtype, seed=seed) for seed in (0, 1)]
    filters = [draw(channels, 1, 3, 3, dtype=dtype, seed=seed) for seed in (2, 3)]
    found = torch.ops.dfpir.correlate(*sides, *filters, heads, above, below)
    expected = reference.correlate(*single(*sides, *filters), heads, above, below)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert_equal(one, other, dtype)


@each_dtype
@each_case
def test_mix_values(dtype, channels, heads, height, width, above, below):
    values = rows(height + above + below, width, channels, dtype)
    filters = draw(channels, 1, 3, 3, dtype=dtype)
    matrix = draw(2, channels, channels, dtype=dtype, scale=channels**-0.5)
    for given, residual in (
        (matrix, rows(height, width, channels, dtype, seed=5)),
        (matrix[:1], None),
    ):
        out = torch.empty(2, channels, height, width, device=DEVICE, dtype=dtype)
        out = out.permute(0, 2, 3, 1)
        torch.ops.dfpir.mix_values(values, filters, given, residual, out, above, below)
        expected = reference.mix_values(*single(values, filters, given, residual), above, below)
        assert_equal(out, expected, dtype)


@each_dtype
@each_case
def test_gate(dtype, channels, heads, height, width, above, below):
    hidden = rows(height + above + below, width, 2 * 40, dtype)
    filters = draw(2 * 40, 1, 3, 3, dtype=dtype)
    project_out = draw(channels, 40, dtype=dtype, scale=40**-0.5)
    residual = rows(height, width, channels, dtype, seed=5)
    out = torch.empty_like(residual)
    torch.ops.dfpir.gate(hidden, filters, project_out, residual, out, above, below)
    expected = reference.gate(*single(hidden, filters, project_out, residual), above, below)
    assert_equal(out, expected, dtype)


@each_dtype
@pytest.mark.parametrize(
    ("channels", "height", "width"), [(16, 1, 1), (40, 9, 7), (48, 5, 18), (64, 3, 4)]
)
def test_filter_and_its_gradients(dtype, channels, height, width):
    x = rows(height, width, channels, dtype).requires_grad_()
    filters = draw(channels, 1, 3, 3, dtype=dtype, seed=1).requires_grad_()
    slope = rows(height, width, channels, dtype, seed=2)
    found = torch.ops.dfpir.filter(x, filters)
    found.backward(slope)
    exact = [value.detach().float().requires_grad_() for value in (x, filters)]
    wide = F.conv2d(exact[0].permute(0, 3, 1, 2), exact[1], padding=1, groups=channels)
    expected = wide.permute(0, 2, 3, 1)
    expected.backward(slope.float())
    assert_equal(found.detach(), expected.detach(), dtype)
    for given, precise in zip((x, filters), exact, strict=True):
        assert given.grad.dtype == dtype
        assert_equal(given.grad, precise.grad, dtype)


def kept_by(sums, kept):
    products, query_squares, key_squares = sums
    norms = (query_squares[..., :, None] * key_squares[..., None, :]).sqrt()
    scores = products / norms
    return scores, torch.isfinite(reference.keep_largest(scores, kept))


@each_dtype
def test_the_scores_kept_are_the_same(dtype):
    """In half precision a score may cross the threshold only if it is next to it."""
    query, key = (draw(1, 16, 16, 96, dtype=dtype, seed=seed) for seed in (0, 1))
    key = key + query.roll(1, dims=-1)  # scores that differ
    filters = [draw(96, 1, 3, 3, dtype=dtype, seed=seed) for seed in (2, 3)]
    found = torch.ops.dfpir.correlate(query, key, *filters, 2, 0, 0)
    expected = reference.correlate(*single(query, key, *filters), 2)
    _, mask = kept_by(found, 43)
    scores, exact = kept_by(expected, 43)
    assert mask.sum(-1).eq(43).all()
    threshold = scores.where(exact, torch.inf).amin(-1, keepdim=True)
    differ = mask != exact
    assert (
        (scores - threshold).abs()[differ].amax().item() < TOLERANCE[dtype] if differ.any() else 1
    )
    assert differ.float().mean() < 0.01


@pytest.mark.parametrize(
    ("config", "dtype", "rows"),
    [
        (SMALL, torch.float32, None),
        (SMALL, torch.bfloat16, 3),
        (SMALL_COMPACT, torch.float32, 3),
        (SMALL_COMPACT, torch.float16, None),
    ],
)
def test_the_network_equals_its_definition(monkeypatch, config, dtype, rows):
    told = [Degradation.RAIN, Degradation.NOISE_50][: 2 if rows else 1]  # interpreting is slow
    model = random_model(config).to(DEVICE).requires_grad_(False)
    x = torch.rand(len(told), 3, 7, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with torch.no_grad():
        expected = model.define(x, told)
        monkeypatch.setenv("DFPIR_KERNELS", "triton")
        assert kernels.passes_for(x).__name__ == "dfpir.kernels.fused"
        found = model.to(dtype)(x.to(dtype), told, rows=rows)
    assert found.dtype == dtype
    assert_equal(found, expected, dtype)


def test_a_strip_s_memory_is_bounded(monkeypatch):
    from dfpir.kernels import fused

    part = kernels.Projection(draw(96, 32), draw(96), draw(96, 1, 3, 3))
    x = draw(1, 40, 8, 32)
    whole = list(fused.projected_strips(x, [part], None))
    monkeypatch.setattr(fused, "STRIP_BYTES", 8 * 96 * 4 * 10)
    parts = list(fused.projected_strips(x, [part], None))
    assert [top for top, *_ in parts] == [0, 10, 20, 30] and len(whole) == 1
    assert all(projected.shape[1] <= 12 for _, _, (projected,), _, _ in parts)


def test_operators_are_sound():
    """What `torch.compile` needs: right schemas, and shapes known without running."""
    x, filters = draw(1, 4, 5, 16), draw(16, 1, 3, 3)
    out = torch.zeros(1, 4, 5, 16, device=DEVICE)
    operators = torch.ops.dfpir
    tests = ("test_schema", "test_faketensor")
    for operator, arguments in (
        (operators.project, (x, draw(20, 16), draw(20))),
        (operators.correlate, (x, x.flip(1), filters, filters.clone(), 2, 0, 0)),
        (operators.mix_values, (x, filters, draw(1, 16, 16), None, out, 0, 0)),
        (operators.gate, (draw(1, 4, 5, 32), draw(32, 1, 3, 3), draw(16, 16), x, out, 0, 0)),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=tests)
    torch.library.opcheck(operators.filter_weights.default, (x, x.flip(1)), test_utils=tests)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_the_filter_with_its_gradient_is_sound(wanted):
    arguments = [
        value.requires_grad_(gradient)
        for value, gradient in zip((draw(1, 4, 5, 16), draw(16, 1, 3, 3)), wanted, strict=True)
    ]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.dfpir.filter.default,
        tuple(arguments),
        test_utils=(*tests, "test_aot_dispatch_dynamic"),
    )


def test_a_pass_learns_alike_with_the_filter_s_kernel(monkeypatch):
    """A pass of the generic ones with the kernel, against the same without it."""
    x = draw(1, 6, 7, 16)
    hidden = kernels.Projection(draw(48, 16), draw(48), draw(48, 1, 3, 3))
    project_out = draw(16, 24)
    values = x, hidden.weight, hidden.bias, hidden.filters, project_out
    for value in values:
        value.requires_grad_()

    def gradients():
        made = kernels.feed_forward(x, hidden, project_out, rows=None, advance=lambda pixels: None)
        return torch.autograd.grad(made.square().sum(), values)

    expected = gradients()
    monkeypatch.setattr(backend, "use_filter", lambda features: True)
    for found, defined in zip(gradients(), expected, strict=True):
        assert_equal(found, defined)


def test_compile_sees_one_operator():
    seen = []

    def look(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    def project(x, weight, bias):
        return torch.ops.dfpir.project(x, weight, bias)

    arguments = draw(1, 4, 5, 16), draw(20, 16), draw(20)
    with torch.no_grad():
        found = torch.compile(project, backend=look, fullgraph=True)(*arguments)
    assert seen == ["dfpir.project"]
    assert distance(found, project(*arguments)) == 0


def test_the_probe_finds_the_kernels_right():
    backend.check(torch.device(DEVICE))


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    x = torch.randn(1, 4200, 4200, 128, device="cuda", dtype=torch.bfloat16)
    weight, bias = draw(128, 128, dtype=x.dtype), draw(128, dtype=x.dtype)
    found = torch.ops.dfpir.project(x, weight, bias)
    assert_equal(found[:, -1:], reference.project(*single(x[:, -1:], weight, bias)), x.dtype)
