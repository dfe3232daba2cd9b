"""What the kernels share: a block of pixels, its 3x3 neighbourhood, the precision of products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def precision(tensor: torch.Tensor) -> str:
    """Return how float32 products are formed: as PyTorch is told to form its own."""
    allowed = tensor.is_cuda and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def hopper(tensor: torch.Tensor) -> bool:
    """Whether the tensor is on a card such as the H100 and H200, sm_90, and no other."""
    if not tensor.is_cuda or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(tensor.device)[0] == 9


def by_tap(filters: torch.Tensor) -> torch.Tensor:
    """Lay filters (C, 1, 3, 3) out as (9, C), float32: converted once, not for every pixel."""
    kept = torch.contiguous_format
    return filters.flatten(1).T.to(torch.float32, copy=True, memory_format=kept)


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
def pixels_of(  # type: ignore[no-untyped-def]
    tile,  # int64, counted along the rows of tiles
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Return rows and columns (P,), int64, of the pixels of a tile, which may reach beyond."""
    index = tl.arange(0, BLOCK_ROWS * BLOCK_COLUMNS)
    across = tl.cdiv(width, BLOCK_COLUMNS)
    row = tile // across * BLOCK_ROWS + index // BLOCK_COLUMNS
    column = tile % across * BLOCK_COLUMNS + index % BLOCK_COLUMNS
    return row, column


@triton.jit  # type: ignore[untyped-decorator]
def depthwise(  # type: ignore[no-untyped-def]
    source,  # pointer to pixel (0, 0) of an image (H, W, C)
    filters,  # (9, all channels), float32
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
    stride_tap,  # how many channels there are in all
    P: tl.constexpr,
    K: tl.constexpr,
):
    """Return y[p, k] = sum over t of filters[t, k] x[p + t, k], float32; zeros beyond the image.

    The filters are laid out like the features, so that a thread loads those of its channels at
    once: channel by channel, they would take eight times the loads of the features.
    """
    total = tl.zeros((P, K), dtype=tl.float32)
    for tap in tl.static_range(9):
        at_row = row + (tap // 3 - 1)
        at_column = column + (tap % 3 - 1)
        seen = inside & (at_row >= 0) & (at_row < height) & (at_column >= 0) & (at_column < width)
        start = at_row * stride_row + at_column * stride_column  # (P,)
        mask = seen[:, None] & known[None, :]
        x = tl.load(
            source + start[:, None] + channel[None, :] * stride_channel, mask=mask, other=0.0
        )  # (P, K)
        # Loaded for every pixel again: a row of weights in another layout would take a barrier.
        weight = tl.load(
            filters + tap * stride_tap + channel[None, :] + 0 * start[:, None],
            mask=mask,
            other=0.0,
        )
        total += x.to(tl.float32) * weight
    return total
