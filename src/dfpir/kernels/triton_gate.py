"""K5: filter hidden features, gate one half by the other, project, add the residual, at once."""

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
def gate_kernel(  # type: ignore[no-untyped-def]
    hidden,  # (N, H, W, 2h)
    filters,  # (9, 2h), float32
    project_out,  # (C, h)
    residual,  # (N, written, W, C)
    gated,  # (N, written, W, C)
    height,
    width,
    above,
    written,
    stride_image,
    stride_row,
    stride_column,
    stride_channel,
    residual_image,
    residual_row,
    residual_column,
    residual_channel,
    gated_image,
    gated_row,
    gated_column,
    gated_channel,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Compute y = x + W (GELU(a) b), (a, b) = depthwise(hidden); see `reference.gate`.

    The exact GELU, a (1 + erf(a / sqrt 2)) / 2, in float32.
    """
    P: tl.constexpr = BLOCK_ROWS * BLOCK_COLUMNS
    tile = tl.program_id(0).to(tl.int64)
    image = tl.program_id(1).to(tl.int64)
    row, column = pixels_of(tile, width, BLOCK_ROWS, BLOCK_COLUMNS)
    inside = (row < written) & (column < width)
    output = tl.arange(0, BLOCK_CHANNELS)  # (C,)
    source = hidden + image * stride_image
    result = tl.zeros((BLOCK_CHANNELS, P), dtype=tl.float32)
    for first in range(0, HIDDEN, BLOCK_HIDDEN):
        channel = first + tl.arange(0, BLOCK_HIDDEN)
        known = channel < HIDDEN
        opening = depthwise(
            source,
            filters,
            row + above,
            column,
            inside,
            channel,
            known,
            height,
            width,
            stride_row,
            stride_column,
            stride_channel,
            2 * HIDDEN,
            P,
            BLOCK_HIDDEN,
        )  # (P, K)
        content = depthwise(
            source,
            filters,
            row + above,
            column,
            inside,
            channel + HIDDEN,
            known,
            height,
            width,
            stride_row,
            stride_column,
            stride_channel,
            2 * HIDDEN,
            P,
            BLOCK_HIDDEN,
        )
        product = 0.5 * opening * (1.0 + tl.erf(opening * 0.7071067811865476)) * content
        weight = tl.load(
            project_out + output[:, None] * HIDDEN + channel[None, :],
            mask=(output < C)[:, None] & known[None, :],
            other=0.0,
        )  # (C, K)
        # The filtered features come second: as first factor, each tap's load would be rearranged.
        result = tl.dot(
            weight.to(OPERAND),
            tl.trans(product.to(weight.dtype).to(OPERAND)),
            result,
            input_precision=PRECISION,
        )
    here = inside[:, None] & (output < C)[None, :]
    at = image * residual_image + row * residual_row + column * residual_column
    x = tl.load(residual + at[:, None] + output[None, :] * residual_channel, mask=here, other=0.0)
    summed = tl.trans(result) + x.to(tl.float32)
    at = image * gated_image + row * gated_row + column * gated_column
    tl.store(
        gated + at[:, None] + output[None, :] * gated_channel,
        summed.to(gated.dtype.element_ty),
        mask=here,
    )


def blocks(channels: int, hidden: int, *, hopper: bool) -> dict[str, int]:
    """Return the block sizes for so many channels, and the warps that share a block.

    The fastest of those tried on an H200; other cards get smaller ones where these would spill
    registers. Loads are not staged ahead: nine taps of each would fill the shared memory.
    """
    wide = max(triton.next_power_of_2(channels), 16)
    return {
        "BLOCK_ROWS": 4 if hopper else 2,
        "BLOCK_COLUMNS": 8,
        "BLOCK_HIDDEN": 32 if hidden % 32 == 0 else 16,
        "BLOCK_CHANNELS": wide,
        "num_warps": 4 if wide <= (128 if hopper else 64) else 8,
        "num_stages": 1,
    }


def launch(
    hidden: Tensor,
    filters: Tensor,
    project_out: Tensor,
    residual: Tensor,
    out: Tensor,
    above: int,
    below: int,
) -> None:
    """Write residual + W (GELU(a) b) into `out` (N, H - above - below, W, C)."""
    count, height, width, _ = hidden.shape
    channels, half = project_out.shape
    sizes, written = blocks(channels, half, hopper=hopper(hidden)), height - above - below
    tiles = triton.cdiv(written, sizes["BLOCK_ROWS"]) * triton.cdiv(width, sizes["BLOCK_COLUMNS"])
    gate_kernel[(tiles, count)](
        hidden,
        by_tap(filters),
        project_out.contiguous(),
        residual,
        out,
        height,
        width,
        above,
        written,
        *hidden.stride(),
        *residual.stride(),
        *out.stride(),
        C=channels,
        HIDDEN=half,
        PRECISION=precision(hidden),
        OPERAND=operand(hidden),
        **sizes,
    )
