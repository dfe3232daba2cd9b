"""The depthwise 3x3 filter of training and its two gradients.

cuDNN computes the gradient of depthwise weights many times slower than memory would allow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfpir.kernels.triton_depthwise import by_tap, depthwise, pixels_of

PROGRAMS = 1024
"""Programs in all that share the sums over pixels, about."""


@triton.jit  # type: ignore[untyped-decorator]
def filter_kernel(  # type: ignore[no-untyped-def]
    features,  # (N, H, W, C), contiguous
    filters,  # (9, C), float32
    filtered,  # (N, H, W, C), contiguous
    height,
    width,
    channels,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Compute y[p, c] = sum over t of filters[t, c] x[p + t, c]; see `reference.depthwise`."""
    P: tl.constexpr = BLOCK_ROWS * BLOCK_COLUMNS
    tile = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    start = tl.program_id(2).to(tl.int64) * height * width * channels
    known = channel < channels
    row, column = pixels_of(tile, width, BLOCK_ROWS, BLOCK_COLUMNS)
    inside = (row < height) & (column < width)
    result = depthwise(
        features + start,
        filters,
        row,
        column,
        inside,
        channel,
        known,
        height,
        width,
        width * channels,
        channels,
        1,
        channels,
        P,
        BLOCK_CHANNELS,
    )
    tl.store(
        filtered + start + ((row * width + column) * channels)[:, None] + channel[None, :],
        result.to(filtered.dtype.element_ty),
        mask=inside[:, None] & known[None, :],
    )


@triton.jit  # type: ignore[untyped-decorator]
def filter_weights_kernel(  # type: ignore[no-untyped-def]
    features,  # (N, H, W, C), contiguous
    slope,  # (N, H, W, C), contiguous: of the loss by what was filtered
    sums,  # (splits, N, 9, C), float32
    height,
    width,
    channels,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Compute, for some of the tiles, s[t, c] = sum over p of slope[p, c] x[p + t, c]."""
    split, image = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    splits, images = tl.num_programs(0), tl.num_programs(2)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    start = image * height * width * channels
    known = channel < channels
    tiles = tl.cdiv(width, BLOCK_COLUMNS) * tl.cdiv(height, BLOCK_ROWS)
    tap = tl.arange(0, 16)
    total = tl.zeros((16, BLOCK_CHANNELS), dtype=tl.float32)
    for tile in range(split, tiles, splits):
        row, column = pixels_of(tile, width, BLOCK_ROWS, BLOCK_COLUMNS)
        inside = (row < height) & (column < width)
        at = start + ((row * width + column) * channels)[:, None] + channel[None, :]
        out = tl.load(slope + at, mask=inside[:, None] & known[None, :], other=0.0).to(tl.float32)
        for step in tl.static_range(9):
            at_row = row + (step // 3 - 1)
            at_column = column + (step % 3 - 1)
            seen = inside & (at_row >= 0) & (at_row < height)
            seen = seen & (at_column >= 0) & (at_column < width)
            near = start + ((at_row * width + at_column) * channels)[:, None] + channel[None, :]
            x = tl.load(features + near, mask=seen[:, None] & known[None, :], other=0.0)
            part = tl.sum(out * x.to(tl.float32), axis=0)
            total += tl.where(tap[:, None] == step, part[None, :], 0.0)
    place = ((split * images + image) * 9 + tap) * channels
    tl.store(
        sums + place[:, None] + channel[None, :],
        total,
        mask=(tap < 9)[:, None] & known[None, :],
    )


def blocks(channels: int, *, sums: bool) -> dict[str, int]:
    """Return the block sizes for so many channels, and the warps that share a block.

    Of those that spill no registers the fastest on an H200, where eight warps took twice as long
    as four. `sums` over pixels take larger blocks than the filter itself.
    """
    return {
        "BLOCK_ROWS": 4,
        "BLOCK_COLUMNS": 16 if sums else 8,
        "BLOCK_CHANNELS": 64 if channels % 64 == 0 else 32,
        "num_warps": 4,
    }


def launch(features: Tensor, filters: Tensor) -> Tensor:
    """Return the filtered features (N, H, W, C)."""
    count, height, width, channels = features.shape
    features, filters = features.contiguous(), by_tap(filters)
    sizes = blocks(channels, sums=False)
    filtered = torch.empty_like(features)
    tiles = triton.cdiv(height, sizes["BLOCK_ROWS"]) * triton.cdiv(width, sizes["BLOCK_COLUMNS"])
    filter_kernel[(tiles, triton.cdiv(channels, sizes["BLOCK_CHANNELS"]), count)](
        features, filters, filtered, height, width, channels, **sizes
    )
    return filtered


def launch_weights(features: Tensor, slope: Tensor) -> Tensor:
    """Return the gradient of the filters (C, 1, 3, 3), float32."""
    count, height, width, channels = features.shape
    features, slope = features.contiguous(), slope.contiguous()
    sizes = blocks(channels, sums=True)
    groups = triton.cdiv(channels, sizes["BLOCK_CHANNELS"])
    tiles = triton.cdiv(height, sizes["BLOCK_ROWS"]) * triton.cdiv(width, sizes["BLOCK_COLUMNS"])
    splits = min(tiles, max(PROGRAMS // (groups * count), 1))
    sums = torch.empty((splits, count, 9, channels), dtype=torch.float32, device=features.device)
    filter_weights_kernel[(splits, groups, count)](
        features, slope, sums, height, width, channels, **sizes
    )
    return sums.sum(dim=(0, 1)).T.reshape(channels, 1, 3, 3).contiguous()
