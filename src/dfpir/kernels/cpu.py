"""The passes on a CPU where no gradient is wanted: small tiles, kept in cache, result in place.

A tile is projected with a pixel more on every side, which its neighbours project again: that costs
less than to keep them. What a neighbour has overwritten by then is kept, in the few channels that
it had before it was projected. The result differs from the whole image's at once by the rounding of
sums alone. Strips of rows, which bound the memory of the other passes, do not matter here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dfpir.kernels.passes import Advance, Projection
from dfpir.kernels.reference import EPSILON

TILE_BYTES = 2**21
"""Projected features of a tile: about what the caches of a few cores hold, and work enough for all.

It is the same for any number of cores, so that sums over tiles are the same on every machine."""

TILE_ROWS = 32
"""Rows that a tile is meant to have; more where the image is narrow.

Fewer would have a longer border for the pixels within, more would leave too few columns."""

ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]

Tile = tuple[slice, slice]
"""Rows and columns of the image."""


def tile_shape(height: int, width: int, bytes_per_pixel: int) -> tuple[int, int]:
    """Return rows and columns of the tiles of an image, as equal as can be."""
    pixels = max(TILE_BYTES // bytes_per_pixel, 1)
    columns = min(max(pixels // TILE_ROWS, 16), width)
    columns = -(-width // -(-width // columns))
    rows = min(max(pixels // columns, 1), height)
    return -(-height // -(-height // rows)), columns


def product(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Mix the channels of (rows, columns, C) by a matrix (O, C), and add a bias (O,).

    In float32 as a 1x1 convolution, which PyTorch leaves to oneDNN. Matrices it leaves to MKL in
    most builds, which takes twice as long on AMD's processors with AVX-512. Each row is passed as
    an image: where there is but one thread, it needs 16 of them to be oneDNN's.
    """
    if features.dtype is not torch.float32 or not ONEDNN:
        return F.linear(features, weight, bias)
    images = features.unsqueeze(1).permute(0, 3, 1, 2)  # (rows, C, 1, columns)
    mixed: Tensor = F.conv2d(images, weight[:, :, None, None], bias)
    return mixed.permute(0, 2, 3, 1).squeeze(1)


def filtered_tiles(
    image: Tensor, projection: Projection, number: int
) -> Iterator[tuple[Tile, Tensor]]:
    """Yield every tile of (H, W, C) and its projected and filtered features, (rows, columns, O).

    `number` is the image's in its batch. Whoever consumes a tile may change the image there before
    asking for the next one.
    """
    height, width, channels = image.shape
    rows, columns = tile_shape(height, width, len(projection.weight) * image.element_size())
    above = image.new_zeros(width + 2, channels)  # the row over these tiles, as it was
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        seen_bottom = min(bottom + 1, height)
        next_above = F.pad(image[bottom - 1], (0, 0, 1, 1))
        before = image.new_zeros(seen_bottom - top, 1, channels)  # the column left of a tile, so
        for left in range(0, width, columns):
            right = min(left + columns, width)
            seen_right = min(right + 1, width)
            seen = image.new_zeros(bottom - top + 2, right - left + 2, channels)
            seen[0] = above[left : right + 2]
            below = seen[1 : 1 + seen_bottom - top]
            below[:, :1] = before
            below[:, 1 : 1 + seen_right - left] = image[top:seen_bottom, left:seen_right]
            before = image[top:seen_bottom, right - 1 : right].clone()
            beyond = top == 0, bottom == height, left == 0, right == width
            tile = slice(top, bottom), slice(left, right)
            yield tile, project_and_filter(seen, projection, number, beyond)
        above = next_above


def project_and_filter(
    seen: Tensor, projection: Projection, number: int, beyond: tuple[bool, bool, bool, bool]
) -> Tensor:
    """Normalise, project and filter (rows + 2, columns + 2, C) to (rows, columns, O).

    `beyond` tells which border lies outside the image: above, below, left, right.
    """
    if projection.mixing is not None and projection.offset is not None:
        seen = product(seen, projection.mixing[number], projection.offset[number].flatten())
    normal = F.layer_norm(seen, seen.shape[-1:], eps=EPSILON)
    projected = product(normal, projection.weight, projection.bias)
    borders = projected[0], projected[-1], projected[:, 0], projected[:, -1]
    for border, outside in zip(borders, beyond, strict=True):
        if outside:
            border.zero_()  # the filter sees zeros there, not the projection of anything
    images = projected[None].permute(0, 3, 1, 2)
    filtered = F.conv2d(images, projection.filters, groups=len(projection.filters))
    return filtered.permute(0, 2, 3, 1)[0]


def gram(
    features: Tensor,
    projections: Sequence[Projection],
    heads: int,
    *,
    rows: int | None,
    advance: Advance,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dfpir.kernels.gram`."""
    count, _, _, channels = features.shape
    each = channels // heads
    products = features.new_zeros(count, heads, each, each, dtype=torch.float32)
    squares = features.new_zeros(count, 2 * channels, dtype=torch.float32)
    for number, image in enumerate(features):
        sources = [filtered_tiles(image, each, number) for each in projections]
        for tiles in zip(*sources, strict=True):
            sides = [values.flatten(0, 1).float() for _, values in tiles]
            squares[number] += torch.cat([side.square().sum(dim=0) for side in sides])
            query, key = sides if len(sides) == 2 else sides[0].chunk(2, dim=-1)
            query, key = (side.unflatten(-1, (heads, each)) for side in (query, key))
            products[number].baddbmm_(query.permute(1, 2, 0), key.transpose(0, 1))
            advance(len(query))
    query_squares, key_squares = squares.view(count, 2, heads, each).unbind(dim=1)
    return products, query_squares, key_squares


def attend(
    features: Tensor,
    value: Projection,
    matrix: Tensor,
    *,
    skip: bool,
    rows: int | None,
    advance: Advance,
) -> Tensor:
    """See `dfpir.kernels.attend`; the result takes the place of `features`."""
    matrices = matrix.expand(len(features), -1, -1)
    for number, image in enumerate(features):
        for tile, values in filtered_tiles(image, value, number):
            mixed = product(values, matrices[number])
            target = image[tile]
            target.add_(mixed) if skip else target.copy_(mixed)
            advance(mixed.shape[0] * mixed.shape[1])
    return features


def feed_forward(
    features: Tensor,
    hidden: Projection,
    project_out: Tensor,
    *,
    rows: int | None,
    advance: Advance,
) -> Tensor:
    """See `dfpir.kernels.feed_forward`; the result takes the place of `features`."""
    for number, image in enumerate(features):
        for tile, values in filtered_tiles(image, hidden, number):
            gate, content = values.chunk(2, dim=-1)
            gated = F.gelu(gate).mul_(content)
            image[tile].add_(product(gated, project_out))
            advance(gated.shape[0] * gated.shape[1])
    return features
