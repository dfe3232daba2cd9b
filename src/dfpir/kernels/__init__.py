"""The operations of a transformer block, and the one place that chooses who computes them.

`reference` is the definition in plain PyTorch, against which everything else is tested. Inference
and training run on the passes exported here: those of `fused`, by Triton's kernels, where `backend`
says so; on a CPU without gradients those of `cpu`; otherwise those of `generic`, in plain PyTorch
for every device.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from dfpir.kernels import backend, cpu, generic
from dfpir.kernels.generic import convolve, mix
from dfpir.kernels.passes import Advance, Projection
from dfpir.kernels.reference import keep_largest

__all__ = [
    "Advance",
    "Projection",
    "attend",
    "attention_matrix",
    "convolve",
    "feed_forward",
    "gram",
    "mix",
]


def gram(
    features: Tensor,
    projections: Sequence[Projection],
    heads: int,
    *,
    rows: int | None,
    advance: Advance,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over all pixels what the attention between channels needs.

    Parameters
    ----------
    features : Tensor, (N, H, W, C), contiguous
    projections : sequence of Projection
        One of 2C outputs, or one of C for the queries and one of C for the keys.
    heads : int
    rows : int, optional
        Height of a strip at most.
    advance : Advance

    Returns
    -------
    products : Tensor, (N, heads, C/heads, C/heads), float32
        Queries times transposed keys.
    query_squares, key_squares : Tensor, (N, heads, C/heads), float32
    """
    chosen = passes_for(features)
    sums: tuple[Tensor, Tensor, Tensor] = chosen.gram(
        features, projections, heads, rows=rows, advance=advance
    )
    return sums


def attend(
    features: Tensor,
    value: Projection,
    matrix: Tensor,
    *,
    skip: bool,
    rows: int | None,
    advance: Advance,
) -> Tensor:
    """Return matrix v, plus the features themselves where `skip` is set, (N, H, W, C).

    `matrix` is (N or 1, C, C). The features may be overwritten where no gradient is wanted.
    """
    chosen = passes_for(features)
    attended: Tensor = chosen.attend(features, value, matrix, skip=skip, rows=rows, advance=advance)
    return attended


def feed_forward(
    features: Tensor,
    hidden: Projection,
    project_out: Tensor,
    *,
    rows: int | None,
    advance: Advance,
) -> Tensor:
    """Return features + project_out (GELU(a) * b), a and b being halves of the hidden features.

    The features may be overwritten where no gradient is wanted.
    """
    chosen = passes_for(features)
    result: Tensor = chosen.feed_forward(features, hidden, project_out, rows=rows, advance=advance)
    return result


def passes_for(features: Tensor) -> ModuleType:
    """Return the module whose passes serve these features."""
    gradient = torch.is_grad_enabled()
    if backend.use_triton(features.device, features.dtype, gradient):
        return importlib.import_module("dfpir.kernels.fused")
    if features.device.type == "cpu" and not gradient:
        return cpu
    return generic


def attention_matrix(
    sums: tuple[Tensor, Tensor, Tensor],
    temperature: Tensor,
    project_out: Tensor,
    *,
    kept: int | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Turn the sums of `gram` into the one matrix that acts on the values.

    The result is project_out blockdiag(softmax(scores)) scale: attention and the projection after
    it, in one.

    Parameters
    ----------
    sums : tuple of Tensor
        What `gram` returns, (N, heads, C/heads, ...).
    temperature : Tensor, (heads, 1, 1)
    project_out : Tensor, (C, C)
    kept : int, optional
        Scores to keep in each row, all by default.
    scale : Tensor, (1,), optional

    Returns
    -------
    Tensor, (N, C, C), of the dtype of `project_out`
    """
    products, query_squares, key_squares = sums
    # Bounded before the root, whose slope at nothing is infinite: a norm is at least 1e-12.
    query_norms, key_norms = (side.clamp_min(1e-24).sqrt() for side in (query_squares, key_squares))
    norms = query_norms[..., :, None] * key_norms[..., None, :]
    scores = products / norms * temperature.float()
    if kept is not None:
        scores = keep_largest(scores, kept)
    weights = scores.softmax(dim=-1)
    if scale is not None:
        weights = weights * scale.float()
    count, heads, each, _ = weights.shape
    columns = project_out.float().view(-1, heads, each).transpose(0, 1)  # (heads, C, C/heads)
    matrix = (columns @ weights).transpose(1, 2)  # (N, C, heads, C/heads)
    return matrix.reshape(count, heads * each, heads * each).to(project_out.dtype)
