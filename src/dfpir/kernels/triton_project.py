"""K1 and K4: normalise over channels and project, without the normalised features in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfpir.kernels.reference import EPSILON
from dfpir.kernels.triton_depthwise import operand, precision


@triton.jit  # type: ignore[untyped-decorator]
def project_kernel(  # type: ignore[no-untyped-def]
    features,  # (N, H, W, C)
    weight,  # (O, C)
    bias,  # (O,)
    projected,  # (N, H, W, O), contiguous
    pixels,  # N H W
    height,
    width,
    stride_image,
    stride_row,
    stride_column,
    stride_channel,
    C: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    EPSILON: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """Compute y = W (x - mean x) / sqrt(var x + epsilon) + b; see `reference.project`.

    Mean, then centred squares, then products: x is read three times, twice of these from cache, so
    that no large mean is taken from large squares.
    """
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)  # (P,)
    output = tl.program_id(1).to(tl.int64) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)  # (O,)
    inside = pixel < pixels
    line = pixel // width
    start = (
        line // height * stride_image + line % height * stride_row + pixel % width * stride_column
    )  # (P,)
    total = tl.zeros((BLOCK_PIXELS,), dtype=tl.float32)
    for first in range(0, C, BLOCK_CHANNELS):
        channel = first + tl.arange(0, BLOCK_CHANNELS)
        known = inside[:, None] & (channel < C)[None, :]
        at = start[:, None] + channel[None, :] * stride_channel
        x = tl.load(features + at, mask=known, other=0.0)  # (P, K)
        total += tl.sum(x.to(tl.float32), axis=1)
    mean = tl.div_rn(total, C * 1.0)  # to the nearest: a constant has no deviations
    squares = tl.zeros((BLOCK_PIXELS,), dtype=tl.float32)
    for first in range(0, C, BLOCK_CHANNELS):
        channel = first + tl.arange(0, BLOCK_CHANNELS)
        known = inside[:, None] & (channel < C)[None, :]
        at = start[:, None] + channel[None, :] * stride_channel
        x = tl.load(features + at, mask=known, other=0.0)
        centred = tl.where(known, x.to(tl.float32) - mean[:, None], 0.0)
        squares += tl.sum(centred * centred, axis=1)
    scale = 1.0 / tl.sqrt(squares / C + EPSILON)  # (P,)
    result = tl.zeros((BLOCK_PIXELS, BLOCK_OUTPUTS), dtype=tl.float32)
    for first in range(0, C, BLOCK_CHANNELS):
        channel = first + tl.arange(0, BLOCK_CHANNELS)
        known = inside[:, None] & (channel < C)[None, :]
        at = start[:, None] + channel[None, :] * stride_channel
        x = tl.load(features + at, mask=known, other=0.0)
        normalised = tl.where(known, (x.to(tl.float32) - mean[:, None]) * scale[:, None], 0.0)
        matrix = tl.load(
            weight + output[None, :] * C + channel[:, None],
            mask=(channel < C)[:, None] & (output < O)[None, :],
            other=0.0,
        )  # (K, O)
        result = tl.dot(
            normalised.to(matrix.dtype).to(OPERAND),
            matrix.to(OPERAND),
            result,
            input_precision=PRECISION,
        )
    offset = tl.load(bias + output, mask=output < O, other=0.0)  # (O,)
    result += offset.to(tl.float32)[None, :]
    tl.store(
        projected + pixel[:, None] * O + output[None, :],
        result.to(projected.dtype.element_ty),
        mask=inside[:, None] & (output < O)[None, :],
    )


def blocks(channels: int, outputs: int) -> dict[str, int]:
    """Return the block sizes for these channels, and the warps that share a block.

    The fastest of those tried on an H200.
    """
    return {
        "BLOCK_PIXELS": 64,
        "BLOCK_CHANNELS": 32 if channels % 32 == 0 else 16,
        "BLOCK_OUTPUTS": min(max(triton.next_power_of_2(outputs), 16), 256),
        "num_warps": 8 if outputs > 64 else 4,
        "num_stages": 1,
    }


def launch(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise and project (N, H, W, C), any strides, to (N, H, W, O)."""
    count, height, width, channels = features.shape
    outputs = weight.shape[0]
    projected = torch.empty(
        (count, height, width, outputs), dtype=features.dtype, device=features.device
    )
    pixels = count * height * width
    sizes = blocks(channels, outputs)
    grid = triton.cdiv(pixels, sizes["BLOCK_PIXELS"]), triton.cdiv(outputs, sizes["BLOCK_OUTPUTS"])
    project_kernel[grid](
        features,
        weight.contiguous(),
        bias.contiguous(),
        projected,
        pixels,
        height,
        width,
        *features.stride(),
        C=channels,
        O=outputs,
        EPSILON=EPSILON,
        PRECISION=precision(features),
        OPERAND=operand(features),
        **sizes,
    )
    return projected
