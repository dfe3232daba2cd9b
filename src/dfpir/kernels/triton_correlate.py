"""K2: filter queries and keys and sum their products over pixels; only partial sums are written."""

from __future__ import annotations

import torch
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

PROGRAMS = 1056
"""Programs in all, about: a few for each processor of a large card."""


@triton.jit  # type: ignore[untyped-decorator]
def correlate_kernel(  # type: ignore[no-untyped-def]
    query,  # (N, H, W, C)
    key,  # (N, H, W, C), of the same strides
    query_filters,  # (9, C), float32
    key_filters,  # (9, C), float32
    products,  # (splits, N, heads, D, D), float32
    squares,  # (splits, N, heads, 2, D), float32
    height,
    width,
    above,
    written,  # rows of the result: height without those above and below
    stride_image,
    stride_row,
    stride_column,
    stride_channel,
    D: tl.constexpr,
    HOPPER: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Compute G[i, j] = sum over p of q[p, i] k[p, j], and squares; see `reference.correlate`.

    A program has all queries of a head and a block of its keys.
    """
    P: tl.constexpr = BLOCK_ROWS * BLOCK_COLUMNS
    KEY_BLOCKS: tl.constexpr = (D + BLOCK_KEYS - 1) // BLOCK_KEYS
    split = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64) // KEY_BLOCKS
    key_block = tl.program_id(1) % KEY_BLOCKS
    image = tl.program_id(2).to(tl.int64)
    splits, heads, images = tl.num_programs(0), tl.num_programs(1) // KEY_BLOCKS, tl.num_programs(2)
    within = tl.arange(0, BLOCK_D)
    known = within < D
    channel = head * D + within
    key_within = key_block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    key_known = key_within < D
    key_channel = head * D + key_within
    tiles = tl.cdiv(width, BLOCK_COLUMNS) * tl.cdiv(written, BLOCK_ROWS)
    identity = within[:, None] == within[None, :]
    gram = tl.zeros((BLOCK_D, BLOCK_KEYS), dtype=tl.float32)
    query_squares = tl.zeros((BLOCK_D,), dtype=tl.float32)
    key_squares = tl.zeros((BLOCK_KEYS,), dtype=tl.float32)
    for tile in range(split, tiles, splits):
        row, column = pixels_of(tile, width, BLOCK_ROWS, BLOCK_COLUMNS)
        inside = (row < written) & (column < width)
        left = depthwise(
            query + image * stride_image,
            query_filters,
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
            heads * D,
            P,
            BLOCK_D,
        ).to(query.dtype.element_ty)  # (P, D)
        right = depthwise(
            key + image * stride_image,
            key_filters,
            row + above,
            column,
            inside,
            key_channel,
            key_known,
            height,
            width,
            stride_row,
            stride_column,
            stride_channel,
            heads * D,
            P,
            BLOCK_KEYS,
        ).to(key.dtype.element_ty)
        first = tl.trans(left.to(OPERAND))
        if HOPPER and left.dtype.primitive_bitwidth == 16:
            # Through a product with the identity, which changes nothing: as a first factor, each
            # tap's load would be rearranged; what comes out of a product need not be.
            first = tl.dot(identity.to(OPERAND), first).to(OPERAND)
        gram = tl.dot(first, right.to(OPERAND), gram, input_precision=PRECISION)
        # Of the rounded values, so that no correlation exceeds one.
        query_squares += tl.sum(left.to(tl.float32) * left.to(tl.float32), axis=0)
        key_squares += tl.sum(right.to(tl.float32) * right.to(tl.float32), axis=0)
    place = (split * images + image) * heads + head
    tl.store(
        products + place * D * D + within[:, None] * D + key_within[None, :],
        gram,
        mask=known[:, None] & key_known[None, :],
    )
    # Every block of keys has the same queries; the first one tells their squares.
    if key_block == 0:
        tl.store(squares + place * 2 * D + within, query_squares, mask=known)
    tl.store(squares + place * 2 * D + D + key_within, key_squares, mask=key_known)


def blocks(each: int, *, hopper: bool) -> dict[str, int]:
    """Return the block sizes for heads of so many channels, and the warps that share a block.

    The fastest of those tried on an H200 that spill no registers, and on other cards the largest
    that spill none. Loads are not staged ahead: nine taps of each would fill the shared memory.
    """
    wide = max(triton.next_power_of_2(each), 16)
    return {
        "BLOCK_ROWS": 4 if hopper and wide > 32 else 2,
        "BLOCK_COLUMNS": 8,
        "BLOCK_D": wide,
        "BLOCK_KEYS": wide if wide <= 64 else 64 if hopper else 16,
        "num_warps": 4 if wide <= 32 else 8,
        "num_stages": 1,
    }


def launch(
    query: Tensor,
    key: Tensor,
    query_filters: Tensor,
    key_filters: Tensor,
    heads: int,
    above: int,
    below: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return products and squares of the filtered queries and keys (N, H, W, C), float32."""
    if query.stride() != key.stride():
        query, key = query.contiguous(), key.contiguous()
    count, height, width, channels = query.shape
    each, written = channels // heads, height - above - below
    sizes = blocks(each, hopper=hopper(query))
    tiles = triton.cdiv(written, sizes["BLOCK_ROWS"]) * triton.cdiv(width, sizes["BLOCK_COLUMNS"])
    splits = min(tiles, max(PROGRAMS // (heads * count), 1))
    products = torch.empty(
        (splits, count, heads, each, each), dtype=torch.float32, device=query.device
    )
    squares = torch.empty((splits, count, heads, 2, each), dtype=torch.float32, device=query.device)
    correlate_kernel[(splits, heads * triton.cdiv(each, sizes["BLOCK_KEYS"]), count)](
        query,
        key,
        by_tap(query_filters),
        by_tap(key_filters),
        products,
        squares,
        height,
        width,
        above,
        written,
        *query.stride(),
        D=each,
        HOPPER=hopper(query),
        PRECISION=precision(query),
        OPERAND=operand(query),
        **sizes,
    )
    query_squares, key_squares = squares.sum(dim=0).unbind(dim=2)
    return products.sum(dim=0), query_squares.contiguous(), key_squares.contiguous()
