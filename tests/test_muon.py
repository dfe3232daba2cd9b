"""Muon: steps with even singular values, as PyTorch's own takes them."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import SMALL_COMPACT, distance
from dfpir.model import DFPIR
from dfpir.muon import Muon, is_matrix, orthogonalised


def with_gradient(*shape, seed=0):
    torch.manual_seed(seed)
    value = torch.nn.Parameter(torch.randn(shape))
    value.grad = torch.randn(shape)
    return value


@given(st.integers(2, 40), st.integers(2, 40), st.floats(1e-3, 1e3))
@settings(max_examples=50)
def test_singular_values_become_about_one(rows, columns, scale):
    torch.manual_seed(rows * 100 + columns)
    matrix = torch.randn(2, rows, columns)
    before, after = (
        torch.linalg.svdvals(matrix),
        torch.linalg.svdvals(orthogonalised(scale * matrix)),
    )
    well_above_nothing = before > 0.02 * matrix.norm(dim=(1, 2))[:, None]
    assert float(after.max()) < 1.3
    assert float(after[well_above_nothing].min()) > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 96)])
def test_steps_are_those_of_torch(shape, dtype):
    theirs = getattr(torch.optim, "Muon", None)
    if theirs is None:
        pytest.skip("this PyTorch has no Muon")
    mine, other = with_gradient(*shape), with_gradient(*shape)
    start = mine.detach().clone()
    optimizers = [
        Muon([mine], lr=0.1, weight_decay=0.01, dtype=dtype),
        theirs([other], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    ]
    for step in range(3):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        mine.grad, other.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    apart = distance(mine.detach() - start, other.detach() - start)
    assert apart < (0.03 if dtype is torch.float32 else 1e-6)  # theirs is in bfloat16


def test_a_convolution_is_its_matrix():
    flat, folded = with_gradient(24, 48), with_gradient(24, 48)
    kernel = torch.nn.Parameter(folded.detach().reshape(24, 48, 1, 1))
    kernel.grad = folded.grad.reshape(24, 48, 1, 1)
    Muon([flat], lr=0.1).step()
    Muon([kernel], lr=0.1).step()
    torch.testing.assert_close(kernel.detach().flatten(1), flat.detach())


def test_a_step_is_as_large_as_that_of_adamw():
    value = with_gradient(64, 128)
    before = value.detach().clone()
    Muon([value], lr=0.01).step()
    assert float((value.detach() - before).square().mean().sqrt()) == pytest.approx(0.002, rel=0.25)


def test_it_goes_on_from_its_state():
    values = [with_gradient(16, 16), with_gradient(16, 16)]
    optimizers = [Muon([value], lr=0.1) for value in values]
    optimizers[0].step()
    values[1].data.copy_(values[0])
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for value, optimizer in zip(values, optimizers, strict=True):
        value.grad = torch.ones(16, 16)
        optimizer.step()
    assert torch.equal(*values)


def test_it_is_for_mixing_channels():
    model = DFPIR(SMALL_COMPACT)
    chosen = {name for name, value in model.named_parameters() if is_matrix(value)}
    assert chosen and all("depthwise" not in name and "norm" not in name for name in chosen)
    assert any(name.endswith("qkv.weight") for name in chosen)
