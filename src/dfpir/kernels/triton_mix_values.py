"""K3: filter values, multiply by the attention matrix, add the residual, at once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dfpir.kernels.triton_depthwise import (
    by_tap,
    depthwise,
    hopper,
    operand,
    pixels_of,
    precision,
)


@triton.jit  # type: ignore[untyped-decorator]
def mix_values_kernel(  # type: ignore[no-untyped-def]
    values,  # (N, H, W, C)
    filters,  # (9, C), float32
    matrix,  # (N or 1, C, C)
    residual,  # (N, written, W, C), or any pointer
    mixed,  # (N, written, W, C)
    height,
    width,
    above,
    written,
    stride_image,
    stride_row,
    stride_column,
    stride_channel,
    stride_matrix,
    residual_image,
    residual_row,
    residual_column,
    residual_channel,
    mixed_image,
    mixed_row,
    mixed_column,
    mixed_channel,
    C: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Compute y = M depthwise(v) + x; see `reference.mix_values`."""
    P: tl.constexpr = BLOCK_ROWS * BLOCK_COLUMNS
    tile = tl.program_id(0).to(tl.int64)
    image = tl.program_id(1).to(tl.int64)
    row, column = pixels_of(tile, width, BLOCK_ROWS, BLOCK_COLUMNS)
    inside = (row < written) & (column < width)
    output = tl.arange(0, BLOCK_CHANNELS)  # (C,)
    result = tl.zeros((BLOCK_CHANNELS, P), dtype=tl.float32)
    for first in range(0, C, BLOCK_INPUTS):
        channel = first + tl.arange(0, BLOCK_INPUTS)
        filtered = depthwise(
            values + image * stride_image,
            filters,
            row + above,
            column,
            inside,
            channel,
            channel < C,
            height,
            width,
            stride_row,
            stride_column,
            stride_channel,
            C,
            P,
            BLOCK_INPUTS,
        )  # (P, K)
        weight = tl.load(
            matrix + image * stride_matrix + output[:, None] * C + channel[None, :],
            mask=(output < C)[:, None] & (channel < C)[None, :],
            other=0.0,
        )  # (C, K)
        # The filtered values come second: as first factor, each tap's load would be rearranged.
        result = tl.dot(
            weight.to(OPERAND),
            tl.trans(filtered.to(weight.dtype).to(OPERAND)),
            result,
            input_precision=PRECISION,
        )
    summed = tl.trans(result)  # (P, C)
    here = inside[:, None] & (output < C)[None, :]
    if RESIDUAL:
        at = image * residual_image + row * residual_row + column * residual_column
        x = tl.load(
            residual + at[:, None] + output[None, :] * residual_channel, mask=here, other=0.0
        )
        summed += x.to(tl.float32)
    at = image * mixed_image + row * mixed_row + column * mixed_column
    tl.store(
        mixed + at[:, None] + output[None, :] * mixed_channel,
        summed.to(mixed.dtype.element_ty),
        mask=here,
    )


def blocks(channels: int, *, hopper: bool) -> dict[str, int]:
    """Return the block sizes for so many channels, and the warps that share a block.

    The fastest of those tried on an H200; other cards get smaller ones where these would spill
    registers. Loads are not staged ahead: nine taps of each would fill the shared memory.
    """
    wide = max(triton.next_power_of_2(channels), 16)
    return {
        "BLOCK_ROWS": 8 if channels <= (64 if hopper else 48) else 4,
        "BLOCK_COLUMNS": 8,
        "BLOCK_INPUTS": 32 if channels % 32 == 0 else 16,
        "BLOCK_CHANNELS": wide,
        "num_warps": 4 if wide <= 128 else 8,
        "num_stages": 1,
    }


def launch(
    values: Tensor,
    filters: Tensor,
    matrix: Tensor,
    residual: Tensor | None,
    out: Tensor,
    above: int,
    below: int,
) -> None:
    """Write M depthwise(values) + residual into `out` (N, H - above - below, W, C)."""
    count, height, width, channels = values.shape
    sizes, written = blocks(channels, hopper=hopper(values)), height - above - below
    added = out if residual is None else residual
    tiles = triton.cdiv(written, sizes["BLOCK_ROWS"]) * triton.cdiv(width, sizes["BLOCK_COLUMNS"])
    matrix = matrix.contiguous()
    mix_values_kernel[(tiles, count)](
        values,
        by_tap(filters),
        matrix,
        added,
        out,
        height,
        width,
        above,
        written,
        *values.stride(),
        channels * channels if len(matrix) > 1 else 0,
        *added.stride(),
        *out.stride(),
        C=channels,
        RESIDUAL=residual is not None,
        PRECISION=precision(values),
        OPERAND=operand(values),
        **sizes,
    )
