"""The passes on a CPU where no gradient is wanted: small tiles, kept in cache, result in place.

A tile is projected with a pixel more on every side, which its neighbours project again: that costs
less than to keep them. What a neighbour has overwritten by then is kept, in the few channels that
it had before it was projected. Everything is the same sum in the same order as for the whole image
at once, but for the sums of `gram`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dfpir.kernels.passes import Advance, Projection
from dfpir.kernels.reference import EPSILON

TILE_BYTES = 2**22
"""Projected features of a tile: about what the caches of a few cores hold, and work enough for all.

It is the same for any number of cores, so that sums over tiles are the same on every machine."""

TILE_ROWS = 32
"""Rows of a tile at most. Fewer have more pixels on their border, more leave too few columns."""

ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]

Tile = tuple[slice, slice]
"""Rows and columns of the image."""


def tile_shape(height: int, width: int, bytes_per_pixel: int, rows: int | None) -> tuple[int, int]:
    """Return rows and columns of the tiles of an image."""
    pixels = max(TILE_BYTES // bytes_per_pixel, 1)
    columns = min(max(pixels // TILE_ROWS, 16), width)
    columns = -(-width // -(-width // columns))  # as many columns of tiles, of equal width
    tall = min(max(pixels // columns, 1), rows or height, height)
    return -(-height // -(-height // tall)), columns


def product(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Mix the channels of (rows, columns, C) by a matrix (O, C), and add a bias (O,).

    In float32 as a 1x1 convolution: oneDNN, which computes those, uses the widest instructions of
    every processor. What multiplies matrices does not; on AMD's with AVX-512 it takes twice as
    long. Rows are its images: of at least 16, PyTorch leaves it to oneDNN on a single thread too.
    """
    if features.dtype is not torch.float32 or not ONEDNN:
        return F.linear(features, weight, bias)
    images = features.unsqueeze(1).permute(0, 3, 1, 2)  # (rows, C, 1, columns)
    mixed: Tensor = F.conv2d(images, weight[:, :, None, None], bias)
    return mixed.permute(0, 2, 3, 1).squeeze(1)


def filtered_tiles(
    image: Tensor, projection: Projection, number: int, rows: int | None
) -> Iterator[tuple[Tile, Tensor]]:
    """Yield every tile of (H, W, C) and its projected and filtered features, (rows, columns, O).

    Whoever consumes a tile may change the image there before asking for the next one.
    """
    height, width, channels = image.shape
    outputs = projection.weight.shape[0]
    tall, wide = tile_shape(height, width, outputs * image.element_size(), rows)
    above = image.new_zeros(width + 2, channels)  # the row over these tiles, as it was
    for top in range(0, height, tall):
        bottom = min(top + tall, height)
        last = min(bottom + 1, height)
        kept = F.pad(image[bottom - 1], (0, 0, 1, 1))
        before = image.new_zeros(last - top, 1, channels)  # the column left of a tile, as it was
        for left in range(0, width, wide):
            right = min(left + wide, width)
            end = min(right + 1, width)
            seen = image.new_zeros(bottom - top + 2, right - left + 2, channels)
            seen[0] = above[left : right + 2]
            seen[1 : 1 + last - top, :1] = before
            seen[1 : 1 + last - top, 1 : 1 + end - left] = image[top:last, left:end]
            before = image[top:last, right - 1 : right].clone()
            projected = project(seen, projection, number)
            # Beyond the image the filter sees zeros, not the projection of anything.
            for side, beyond in (
                (projected[0], top == 0),
                (projected[-1], bottom == height),
                (projected[:, 0], left == 0),
                (projected[:, -1], right == width),
            ):
                if beyond:
                    side.zero_()
            filtered = F.conv2d(
                projected[None].permute(0, 3, 1, 2), projection.filters, groups=outputs
            )
            yield (slice(top, bottom), slice(left, right)), filtered.permute(0, 2, 3, 1)[0]
        above = kept


def project(pixels: Tensor, projection: Projection, number: int) -> Tensor:
    """Normalise and project (rows, columns, C) of an image, of this number in its batch."""
    if projection.mixing is not None and projection.offset is not None:
        pixels = product(pixels, projection.mixing[number], projection.offset[number].flatten())
    normal = F.layer_norm(pixels, pixels.shape[-1:], eps=EPSILON)
    return product(normal, projection.weight, projection.bias)


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
        sources = [filtered_tiles(image, each, number, rows) for each in projections]
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
        for tile, values in filtered_tiles(image, value, number, rows):
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
        for tile, values in filtered_tiles(image, hidden, number, rows):
            gate, content = values.chunk(2, dim=-1)
            gated = F.gelu(gate).mul_(content)
            image[tile].add_(product(gated, project_out))
            advance(gated.shape[0] * gated.shape[1])
    return features
