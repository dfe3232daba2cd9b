"""The passes on a CPU where no gradient is wanted: small tiles, kept in cache, result in place.

An image is walked in columns of tiles, from top to bottom. The last two projected rows of a tile
stay where the next one finds them, so that nothing is projected twice but one column of pixels at
either side of a column of tiles. Everything is the same sum in the same order as for the whole
image at once, but for the sums of `gram`.
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

TILE_ROWS = 8
"""Rows of a tile at most. Each tile moves two rows, so that fewer cost more."""


def tile_shape(height: int, width: int, bytes_per_pixel: int, rows: int | None) -> tuple[int, int]:
    """Return rows and columns of the tiles of an image."""
    pixels = max(TILE_BYTES // bytes_per_pixel, 1)
    columns = min(max(pixels // TILE_ROWS, 16), width)
    columns = -(-width // -(-width // columns))  # as many columns of tiles, of equal width
    tall = min(max(pixels // columns, 1), height)
    return min(tall, rows or tall), columns


Tile = tuple[slice, slice]
"""Rows and columns of the image."""


def filtered_tiles(
    image: Tensor, projection: Projection, number: int, rows: int | None
) -> Iterator[tuple[Tile, Tensor]]:
    """Yield every tile of (H, W, C) and its projected and filtered features, (rows, columns, O).

    Whoever consumes a tile may change the image there before asking for the next one.
    """
    height, width, _ = image.shape
    outputs = projection.weight.shape[0]
    tall, wide = tile_shape(height, width, outputs * image.element_size(), rows)
    storage = image.new_empty((tall + 2) * (wide + 2) * outputs)
    before = None
    for left in range(0, width, wide):
        right = min(left + wide, width)
        # The next column of tiles needs this one's last pixels as they are now.
        after = image[:, right - 1 : right].clone() if right < width else None
        column = _Column(image, projection, number, (left, right), before)
        before = after
        shape = tall + 2, right - left + 2, outputs
        window = storage[: shape[0] * shape[1] * outputs].view(shape)
        window[0] = 0
        column.project(0, 1, window[1:])
        for top in range(0, height, tall):
            bottom = min(top + tall, height)
            count = bottom - top
            column.project(top + 1, bottom + 1, window[2:])
            seen = window[None, : count + 2].permute(0, 3, 1, 2)
            result = F.conv2d(seen, projection.filters, groups=outputs).permute(0, 2, 3, 1)
            yield (slice(top, bottom), slice(left, right)), result[0]
            kept = window[count : count + 2]
            window[:2] = kept.clone() if count == 1 else kept


class _Column:
    """One column of tiles: projects its rows, with a pixel more on either side."""

    def __init__(
        self,
        image: Tensor,
        projection: Projection,
        number: int,
        sides: tuple[int, int],
        before: Tensor | None,
    ) -> None:
        self.image, self.projection, self.before = image, projection, before
        self.left, self.right = sides
        self.mixing = self.offset = None
        if projection.mixing is not None and projection.offset is not None:
            self.mixing = projection.mixing[number].t()
            self.offset = projection.offset[number].flatten()

    def project(self, first: int, last: int, out: Tensor) -> None:
        """Project rows first..last into `out`; beyond the image the filter is to see zeros."""
        height, width, channels = self.image.shape
        if last > height:
            out[height - first : last - first] = 0
            last = height
        if first >= last:
            return
        # Columns beyond the image stay as they are here: pixels do not mix before `out` is cleared.
        source = self.image.new_empty(last - first, out.shape[1], channels)
        end = min(self.right + 1, width)
        source[:, 1 : 1 + end - self.left] = self.image[first:last, self.left : end]
        if self.before is not None:
            source[:, :1] = self.before[first:last]
        flat = source.view(-1, channels)
        if self.mixing is not None and self.offset is not None:
            flat = torch.addmm(self.offset, flat, self.mixing)
        flat = F.layer_norm(flat, (channels,), eps=EPSILON)
        out = out[: last - first]
        weight, bias = self.projection.weight, self.projection.bias
        torch.addmm(bias, flat, weight.t(), out=out.view(-1, out.shape[-1]))
        if self.before is None:
            out[:, 0] = 0
        if end == self.right:
            out[:, -1] = 0


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
    matrices = matrix.transpose(1, 2).expand(len(features), -1, -1)
    for number, image in enumerate(features):
        for tile, values in filtered_tiles(image, value, number, rows):
            mixed = torch.mm(values.flatten(0, 1), matrices[number]).view_as(values)
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
            update = torch.mm(gated.flatten(0, 1), project_out.t())
            target = image[tile]
            target.add_(update.view_as(target))
            advance(len(update))
    return features
