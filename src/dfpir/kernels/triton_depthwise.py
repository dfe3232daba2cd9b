"""What the kernels share: a block of pixels, its 3x3 neighbourhood, the precision of products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_ROWS, BLOCK_COLUMNS = 8, 8
"""Pixels of a program, near a square so that neighbours are read again from cache, not memory."""


def precision(tensor: torch.Tensor) -> str:
    """Return how float32 products are formed: as PyTorch is told to form its own."""
    allowed = tensor.is_cuda and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def operand(tensor: torch.Tensor) -> object:
    """Return the type in which a product's factors go to `tl.dot`: the tensor's own.

    But for bfloat16 in the interpreter, which would multiply the bits as integers: the rounded
    factors are widened there.
    """
    if tensor.dtype is torch.bfloat16 and not tensor.is_cuda:
        return tl.float32
    known = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return known[tensor.dtype]


@triton.jit  # type: ignore[untyped-decorator]
def depthwise(  # type: ignore[no-untyped-def]
    source,  # pointer to pixel (0, 0) of an image (H, W, C)
    filters,  # (C, 9)
    row,  # (P,) int64, of the centre
    column,  # (P,) int64
    inside,  # (P,)
    channel,  # (K,)
    known,  # (K,)
    height,
    width,
    stride_row,
    stride_column,
    stride_channel,
    P: tl.constexpr,
    K: tl.constexpr,
):
    """Return y[p, k] = sum over t of filters[k, t] x[p + t, k], float32; zeros beyond the image."""
    total = tl.zeros((P, K), dtype=tl.float32)
    for tap in tl.static_range(9):
        at_row = row + (tap // 3 - 1)
        at_column = column + (tap % 3 - 1)
        seen = inside & (at_row >= 0) & (at_row < height) & (at_column >= 0) & (at_column < width)
        start = at_row * stride_row + at_column * stride_column  # (P,)
        x = tl.load(
            source + start[:, None] + channel[None, :] * stride_channel,
            mask=seen[:, None] & known[None, :],
            other=0.0,
        )  # (P, K)
        weight = tl.load(filters + channel * 9 + tap, mask=known, other=0.0)  # (K,)
        total += x.to(tl.float32) * weight.to(tl.float32)[None, :]
    return total
