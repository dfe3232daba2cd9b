"""What every way of computing a block's passes shares: the words they are asked with.

Each pass begins alike: normalise over channels, project with a matrix, filter each channel with 3x3
weights. The affine part of the normalisation is folded into the projection, the projection after
the attention into the attention matrix. Both are exact in real arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

Advance = Callable[[int], None]
"""Called with the number of pixels done, after every part of a pass; may raise to cancel."""


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


def strips(height: int, rows: int | None) -> Iterator[tuple[int, int]]:
    """Cut `height` rows into strips of `rows`, or take them as one."""
    step = rows or height
    for top in range(0, height, step):
        yield top, min(top + step, height)
