"""Where tiles lie, and how large a step of work may be: pure geometry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OVERLAP = 64
"""Pixels of surroundings that a part reads on each side; a multiple of the network's own 16.

Of haze, whose specialist looks farthest, half of that would leave steps of five grey levels.
"""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How to work on an image in parts.

    Attributes
    ----------
    size : int
        Side of the square that a tile restores, in pixels, without its surroundings.
    overlap : int
        Pixels of surroundings that a tile sees on each side.
    statistics : {"whole", "sampled"}
        From which pixels the attention between channels is taken: all of them, which is exact, or
        a sample of windows, which is for what does not fit into memory otherwise.
    """

    size: int = 512
    overlap: int = OVERLAP
    statistics: Literal["whole", "sampled"] = "whole"

    def __post_init__(self) -> None:
        problem = None
        if self.size < 16:
            problem = f"size is {self.size}; expected at least 16 pixels"
        elif self.overlap < 0:
            problem = f"overlap is {self.overlap}; expected 0 or more pixels"
        elif self.statistics not in ("whole", "sampled"):
            problem = f"statistics is {self.statistics!r}; expected 'whole' or 'sampled'"
        if problem:
            message = f"Tiling: {problem}."
            raise ValueError(message)


@dataclass(frozen=True, slots=True)
class Tile:
    """One tile: the rows and columns it writes, and those it reads.

    Attributes
    ----------
    rows, columns : slice
        Of the image, written.
    read_rows, read_columns : slice
        Of the image, read; they hold the written ones.
    """

    rows: slice
    columns: slice
    read_rows: slice
    read_columns: slice

    @property
    def inner(self) -> tuple[slice, slice]:
        """The written part within what is read."""
        top = self.rows.start - self.read_rows.start
        left = self.columns.start - self.read_columns.start
        height, width = self.rows.stop - self.rows.start, self.columns.stop - self.columns.start
        return slice(top, top + height), slice(left, left + width)


def cut(length: int, size: int, overlap: int, multiple: int) -> list[tuple[slice, slice]]:
    """Cut one side of an image into parts, each with the part it reads.

    What is read begins on a multiple of `multiple`, so that the network's pixel blocks lie where
    they lie in the whole image.
    """
    parts = []
    step = max(size // multiple, 1) * multiple
    for start in range(0, length, step):
        stop = min(start + step, length)
        first = max(start - overlap, 0) // multiple * multiple
        parts.append((slice(start, stop), slice(first, min(stop + overlap, length))))
    return parts


def plan(height: int, width: int, tiling: Tiling, multiple: int) -> list[Tile]:
    """Return tiles that cover an image, each pixel once, row by row.

    Examples
    --------
    >>> [tile.rows for tile in plan(40, 16, Tiling(16, 8), 8)]
    [slice(0, 16, None), slice(16, 32, None), slice(32, 40, None)]
    """
    return [
        Tile(rows, columns, read_rows, read_columns)
        for rows, read_rows in cut(height, tiling.size, tiling.overlap, multiple)
        for columns, read_columns in cut(width, tiling.size, tiling.overlap, multiple)
    ]


def spread(length: int, side: int, count: int) -> list[int]:
    """Return where `count` windows of `side` begin so that they lie evenly along `length`."""
    if count < 2 or side >= length:
        return [max(length - side, 0) // 2]
    return [round(number * (length - side) / (count - 1)) for number in range(count)]


def windows(height: int, width: int, side: int, most: int) -> list[tuple[slice, slice]]:
    """Return evenly spread square windows, at most `most`, at least one.

    Windows are smaller than `side` where the image is.
    """
    down = min(-(-height // side), most, max(round((most * height / width) ** 0.5), 1))
    across = min(-(-width // side), max(most // down, 1))
    tall, wide = min(side, height), min(side, width)
    return [
        (slice(top, top + tall), slice(left, left + wide))
        for top in spread(height, tall, down)
        for left in spread(width, wide, across)
    ]
