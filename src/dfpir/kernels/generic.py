"""The passes in channels-last PyTorch for any device, with gradients where they are wanted.

Features are (N, H, W, C) and contiguous. A strip of rows is read with one row more on either side,
so that strips of any height give the whole image's answer, while the wide hidden features exist
for one strip at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dfpir.kernels import backend
from dfpir.kernels.passes import Advance, Projection, strips
from dfpir.kernels.reference import EPSILON


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
    projected = F.linear(strip, projection.weight, projection.bias)
    groups = projection.filters.shape[0]
    if (first, last) == (top, bottom) and backend.use_filter(projected):
        whole: Tensor = torch.ops.dfpir.filter(projected, projection.filters)
        return whole
    rows = convolve_strip(
        projected.permute(0, 3, 1, 2), projection.filters, groups, first == top, last == bottom
    )
    return rows.permute(0, 2, 3, 1)


def convolve_strip(strip: Tensor, weight: Tensor, groups: int, above: bool, below: bool) -> Tensor:
    """Convolve (N, C, rows, W) by 3x3; zeros lie left and right, and above or below if so said."""
    padding = int(above)
    # Beyond the image the filter sees zeros, not the projection of anything.
    if above != below:
        strip = F.pad(strip, (0, 0, int(above), int(below)))
        strip = strip.contiguous(memory_format=torch.channels_last)
        padding = 0
    return F.conv2d(strip, weight, padding=(padding, 1), groups=groups)


def convolve(
    features: Tensor,
    weight: Tensor,
    finish: Callable[[Tensor], Tensor] | None = None,
    *,
    rows: int | None,
    advance: Advance,
    out: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Convolve by 3x3 in strips of rows, between zeros.

    Parameters
    ----------
    features : Tensor, (N, H, W, C), contiguous
    weight : Tensor, (O, C, 3, 3)
    finish : callable, optional
        What becomes of each convolved strip (N, rows, W, O): another shape, an activation.
    rows : int, optional
        Height of a strip; the whole image where a gradient is wanted.
    advance : Advance
    out : Tensor, optional
        Where to write the result.
    residual : Tensor, optional
        What the result is added to; overwritten where no gradient is wanted.

    Returns
    -------
    Tensor
        What `finish` makes of (N, H, W, O).
    """
    count, height, width, _ = features.shape

    def strip(top: int, bottom: int) -> Tensor:
        seen = features[:, max(top - 1, 0) : min(bottom + 1, height)].permute(0, 3, 1, 2)
        made = convolve_strip(seen, weight, 1, top == 0, bottom == height).permute(0, 2, 3, 1)
        return made if finish is None else finish(made)

    if rows is None or rows >= height or torch.is_grad_enabled():
        whole = strip(0, height).contiguous()
        advance(count * height * width)
        if residual is not None:
            return residual + whole if torch.is_grad_enabled() else residual.add_(whole)
        return whole if out is None else out.copy_(whole)
    if residual is not None:
        out = residual
    written = 0
    for top, bottom in strips(height, max(rows - rows % 2, 2)):
        part = strip(top, bottom)
        if out is None:
            tall = part.shape[1] * height // (bottom - top)
            out = part.new_empty(count, tall, *part.shape[2:])
        place = out[:, written : written + part.shape[1]]
        place.copy_(part) if residual is None else place.add_(part)
        written += part.shape[1]
        advance(count * (bottom - top) * width)
    assert out is not None
    return out


def by_strips(
    features: Tensor, rows: int | None, strip: Callable[[int, int], Tensor], advance: Advance
) -> Tensor:
    """Return what `strip` makes of rows top..bottom, for all rows of `features`."""
    count, height, width, _ = features.shape
    if rows is None or rows >= height:
        result = strip(0, height)
        advance(count * height * width)
        return result
    result = torch.empty_like(features)
    for top, bottom in strips(height, rows):
        result[:, top:bottom] = strip(top, bottom)
        advance(count * (bottom - top) * width)
    return result


def gram(
    features: Tensor,
    projections: Sequence[Projection],
    heads: int,
    *,
    rows: int | None,
    advance: Advance,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dfpir.kernels.gram`."""
    count, height, width, channels = features.shape
    each = channels // heads
    products = features.new_zeros(count, heads, each, each, dtype=torch.float32)
    squares = features.new_zeros(count, 2 * channels, dtype=torch.float32)
    for top, bottom in strips(height, rows):
        outputs = [filtered(features, projection, top, bottom) for projection in projections]
        query, key = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
        query, key = (side.flatten(1, 2) for side in (query, key))  # (N, pixels, C)
        if features.dtype is torch.float16:  # sums over pixels leave its range
            query, key = query.float(), key.float()
        for head in range(heads):
            part = slice(head * each, (head + 1) * each)
            products[:, head] += query[..., part].transpose(1, 2) @ key[..., part]
        each_square = (side.square().sum(dim=1, dtype=torch.float32) for side in (query, key))
        squares += torch.cat(list(each_square), dim=1)
        advance(count * (bottom - top) * width)
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
    """See `dfpir.kernels.attend`."""

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
    *,
    rows: int | None,
    advance: Advance,
) -> Tensor:
    """See `dfpir.kernels.feed_forward`."""

    def strip(top: int, bottom: int) -> Tensor:
        gate, content = filtered(features, hidden, top, bottom).chunk(2, dim=-1)
        update = F.linear(F.gelu(gate) * content, project_out)
        update += features[:, top:bottom]
        return update

    return by_strips(features, rows, strip, advance)
