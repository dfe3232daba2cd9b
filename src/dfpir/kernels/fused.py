"""The passes by the fused kernels K1 to K5, `torch.ops.dfpir`, where no gradient is wanted.

A pass is one or two kernels for each strip of rows. Strips bound the memory of what lies between
the two kernels; each is read with a row more on either side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dfpir.kernels import operators as operators  # registers them
from dfpir.kernels.generic import mix
from dfpir.kernels.passes import Advance, Projection, strips

STRIP_BYTES = 2**27
"""Projected features of a strip, where the caller leaves its height open."""


def projected_strips(
    features: Tensor, projections: Sequence[Projection], rows: int | None
) -> Iterator[tuple[int, int, list[Tensor], int, int]]:
    """Yield rows top..bottom, what is projected there, and how many rows more lie around it."""
    count, height, width, _ = features.shape
    if rows is None:
        outputs = sum(projection.weight.shape[0] for projection in projections)
        rows = max(STRIP_BYTES // (count * width * outputs * features.element_size()), 8)
    for top, bottom in strips(height, rows):
        first, last = max(top - 1, 0), min(bottom + 1, height)
        strip = features[:, first:last]
        projected = []
        for weight, bias, _, mixing, offset in projections:
            mixed = strip if mixing is None or offset is None else mix(strip, mixing) + offset
            projected.append(torch.ops.dfpir.project(mixed, weight, bias))
        yield top, bottom, projected, top - first, last - bottom


def gram(
    features: Tensor,
    projections: Sequence[Projection],
    heads: int,
    *,
    rows: int | None,
    advance: Advance,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dfpir.kernels.gram`."""
    channels = features.shape[-1]
    filters = torch.cat([projection.filters for projection in projections])
    sums: list[Tensor] = []
    for top, bottom, sides, above, below in projected_strips(features, projections, rows):
        query, key = sides if len(sides) == 2 else sides[0].chunk(2, dim=-1)
        part = torch.ops.dfpir.correlate(
            query, key, filters[:channels], filters[channels:], heads, above, below
        )
        sums = [one + other for one, other in zip(sums, part, strict=True)] if sums else list(part)
        advance(features.shape[0] * (bottom - top) * features.shape[2])
    products, query_squares, key_squares = sums
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
    """See `dfpir.kernels.attend`."""
    attended = torch.empty_like(features)
    for top, bottom, (values,), above, below in projected_strips(features, [value], rows):
        residual = features[:, top:bottom] if skip else None
        torch.ops.dfpir.mix_values(
            values, value.filters, matrix, residual, attended[:, top:bottom], above, below
        )
        advance(features.shape[0] * (bottom - top) * features.shape[2])
    return attended


def feed_forward(
    features: Tensor,
    hidden: Projection,
    project_out: Tensor,
    *,
    rows: int | None,
    advance: Advance,
) -> Tensor:
    """See `dfpir.kernels.feed_forward`."""
    result = torch.empty_like(features)
    for top, bottom, (wide,), above, below in projected_strips(features, [hidden], rows):
        torch.ops.dfpir.gate(
            wide,
            hidden.filters,
            project_out,
            features[:, top:bottom],
            result[:, top:bottom],
            above,
            below,
        )
        advance(features.shape[0] * (bottom - top) * features.shape[2])
    return result
