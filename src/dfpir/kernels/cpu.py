"""The three passes of a transformer block in channels-last PyTorch, strip by strip of rows.

Features are (N, H, W, C) and contiguous. Every pass has the same beginning: normalise over
channels, project with a matrix, filter each channel with 3x3 weights. A strip of rows is read with
one row more on either side, so that strips of any height give the whole image's answer, while the
wide hidden features exist for one strip at a time.

The affine part of the normalisation is folded into the projection, the projection after the
attention into the attention matrix (`dfpir.kernels.attention_matrix`). Both are exact in real
arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dfpir.kernels.reference import EPSILON

Advance = Callable[[], None]
"""Called after every strip; may raise to cancel."""


class Projection(NamedTuple):
    """Normalise, project, filter: depthwise(weight normalise(x) + bias, filters).

    `weight` is (O, C), `bias` (O,), `filters` (O, 1, 3, 3). Where `mixing` (N, C, C) and `offset`
    (N, 1, 1, C) are given, x is first replaced by mixing x + offset, a matrix for each image.
    """

    weight: Tensor
    bias: Tensor
    filters: Tensor
    mixing: Tensor | None = None
    offset: Tensor | None = None


def mix(features: Tensor, matrix: Tensor) -> Tensor:
    """Multiply the channels of every pixel of (N, H, W, C) by a matrix (N or 1, C, C)."""
    count, height, width, channels = features.shape
    flat = features.reshape(count, height * width, channels)
    return torch.matmul(flat, matrix.transpose(1, 2)).view(count, height, width, -1)


def filtered(features: Tensor, projection: Projection, top: int, bottom: int) -> Tensor:
    """Return rows top..bottom of the projected and filtered features, (N, rows, W, O)."""
    height = features.shape[1]
    first, last = max(top - 1, 0), min(bottom + 1, height)
    strip = features[:, first:last]
    if projection.mixing is not None and projection.offset is not None:
        strip = mix(strip, projection.mixing) + projection.offset
    strip = F.layer_norm(strip, strip.shape[-1:], eps=EPSILON)
    projected = F.linear(strip, projection.weight, projection.bias).permute(0, 3, 1, 2)
    # Beyond the image the filter sees zeros, not the projection of anything.
    above, below = int(first == top), int(last == bottom)
    if above != below:
        projected = F.pad(projected, (0, 0, above, below))
        projected = projected.contiguous(memory_format=torch.channels_last)
        above = 0
    rows = F.conv2d(
        projected, projection.filters, padding=(above, 1), groups=projection.filters.shape[0]
    )
    return rows.permute(0, 2, 3, 1)


def strips(height: int, rows: int | None) -> Iterator[tuple[int, int]]:
    """Cut `height` rows into strips of `rows`, or take them as one."""
    step = rows or height
    for top in range(0, height, step):
        yield top, min(top + step, height)


def by_strips(
    features: Tensor, rows: int | None, strip: Callable[[int, int], Tensor], advance: Advance
) -> Tensor:
    """Return what `strip` makes of rows top..bottom, for all rows of `features`."""
    height = features.shape[1]
    if rows is None or rows >= height:
        result = strip(0, height)
        advance()
        return result
    result = torch.empty_like(features)
    for top, bottom in strips(height, rows):
        result[:, top:bottom] = strip(top, bottom)
        advance()
    return result


def gram(
    features: Tensor,
    projections: Sequence[Projection],
    heads: int,
    rows: int | None,
    advance: Advance,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over all pixels what the attention between channels needs.

    Parameters
    ----------
    features : Tensor, (N, H, W, C)
    projections : sequence of Projection
        One of 2C outputs, or one of C for the queries and one of C for the keys.

    Returns
    -------
    products : Tensor, (N, heads, C/heads, C/heads), float32
        Queries times transposed keys.
    query_squares, key_squares : Tensor, (N, heads, C/heads), float32
    """
    count, height, _, channels = features.shape
    each = channels // heads
    products = features.new_zeros(count, heads, each, each, dtype=torch.float32)
    squares = features.new_zeros(count, 2 * channels, dtype=torch.float32)
    for top, bottom in strips(height, rows):
        outputs = [filtered(features, projection, top, bottom) for projection in projections]
        query, key = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
        query, key = (side.flatten(1, 2).float() for side in (query, key))  # (N, pixels, C)
        for head in range(heads):
            part = slice(head * each, (head + 1) * each)
            products[:, head] += query[..., part].transpose(1, 2) @ key[..., part]
        squares += torch.cat([query.square().sum(dim=1), key.square().sum(dim=1)], dim=1)
        advance()
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
    """Return matrix v, plus the features themselves where `skip` is set, (N, H, W, C)."""

    def strip(top: int, bottom: int) -> Tensor:
        mixed = mix(filtered(features, value, top, bottom), matrix)
        if skip:
            mixed += features[:, top:bottom]
        return mixed

    return by_strips(features, rows, strip, advance)


def feed_forward(
    features: Tensor,
    hidden: Projection,
    project_out: Tensor,
    rows: int | None,
    advance: Advance,
) -> Tensor:
    """Return features + project_out (GELU(a) * b), a and b being halves of the hidden features."""

    def strip(top: int, bottom: int) -> Tensor:
        gate, content = filtered(features, hidden, top, bottom).chunk(2, dim=-1)
        update = F.linear(F.gelu(gate) * content, project_out)
        update += features[:, top:bottom]
        return update

    return by_strips(features, rows, strip, advance)
