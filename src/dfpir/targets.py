"""Where planes are read from and restored ones go: memory, zarr, levels of resolution.

The last two axes of an array, or three with colours, are a plane; the `leading` axes before them
number the planes. Sources are read one plane at a time and never written to.
"""

from __future__ import annotations

import importlib
import itertools
import math
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from dfpir.pixels import PixelError, check

Index = tuple[int, ...]


class ArrayLike(Protocol):
    """What a stack has to be: an array that can be indexed."""

    shape: Any
    dtype: Any

    def __getitem__(self, key: Any, /) -> Any:
        """Return a part."""


def read_plane(stack: ArrayLike, index: Index) -> NDArray[Any]:
    """Return one plane as a NumPy array; nothing else is read.

    Raises
    ------
    PixelError
        If it is not an image; the message names the plane.
    """
    plane = np.asarray(stack[(*index, ...)])
    try:
        check(plane)
    except PixelError as error:
        message = f"Plane {index}: {error}" if index else str(error)
        raise PixelError(message) from None
    return plane


def is_lazy(stack: ArrayLike) -> bool:
    """Return whether a stack may lie outside the memory."""
    return not isinstance(stack, np.ndarray) or isinstance(stack, np.memmap)


def package_of(array: object) -> str:
    """Return the package whose array it is: "numpy", "dask", "zarr", "xarray", ..."""
    return type(array).__module__.partition(".")[0]


def needs(package: str) -> Any:
    """Import a package of the extra `stacks`.

    Raises
    ------
    ImportError
        With what to do.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        message = (
            f"A stack that is not in memory needs {package}, which is missing; run: "
            'pip install "dfpir[stacks]".'
        )
        raise ImportError(message) from error


def as_dask(array: Any) -> Any:
    """Return an array as a Dask array, whose chunks are read where they are worked on."""
    dask = needs("dask.array")
    if package_of(array) == "xarray":
        # One that is opened from a file would be read as a whole.
        array = (array if array.chunks else array.chunk("auto")).data
    if hasattr(array, "dask"):
        return array
    chunks = getattr(array, "shards", None) or getattr(array, "chunks", None) or "auto"
    return dask.from_array(array, chunks=chunks, name=False)


class MemoryTarget:
    """Takes restored planes into a copy of an array."""

    def __init__(self, source: NDArray[Any]) -> None:
        self.array = np.array(source)

    def write(self, index: Index, plane: NDArray[Any]) -> None:
        """Put one plane in."""
        self.array[index] = plane

    def result(self) -> NDArray[Any]:
        """Return the array."""
        return self.array

    def discard(self) -> None:
        """Leave nothing behind."""


class ZarrTarget:
    """Takes restored planes into a new zarr array beside a source that is only read.

    Parameters
    ----------
    source : array_like
    leading : int
        Number of axes that number the planes.
    output : Path or None
        Of the new array; None for a folder that goes when the array does.
    """

    def __init__(self, source: ArrayLike, leading: int, output: Path | None) -> None:
        zarr = needs("zarr")
        self.source, self.leading, self.output = source, leading, output
        self.written: set[Index] = set()
        if output is None:
            self.folder = Path(tempfile.mkdtemp(prefix="dfpir-"))
        elif output.exists():
            message = f"{output} exists and was left as it is; choose another output."
            raise ValueError(message)
        else:
            self.folder = output.with_name(f".{output.name}.part")
            shutil.rmtree(self.folder, ignore_errors=True)
        shape = tuple(source.shape)
        spatial = shape[leading:]
        chunks = (*[1] * leading, *(min(side, 1024) for side in spatial[:2]), *spatial[2:])
        self.array = zarr.open_array(
            str(self.folder), mode="w", shape=shape, chunks=chunks, dtype=source.dtype, fill_value=0
        )

    def write(self, index: Index, plane: NDArray[Any]) -> None:
        """Put one plane in.

        Raises
        ------
        OSError
            If the disk is full.
        """
        free = shutil.disk_usage(self.folder).free
        if free < plane.nbytes:
            message = (
                f"The disk of {self.folder} has {free / 1e9:.1f} GB left, too little for a plane; "
                "free some space or choose another output."
            )
            raise OSError(message)
        self.array[(*index, ...)] = plane
        self.written.add(index)

    def result(self) -> Any:
        """Return an array of the source's kind: the restored planes, the others as they are."""
        if self.output is not None:
            # Whoever opens the folder later has no other source for them.
            for index in np.ndindex(*self.source.shape[: self.leading]):
                if index not in self.written:
                    self.write(index, read_plane(self.source, index))
            self.folder.rename(self.output)
            self.array = needs("zarr").open_array(str(self.output), mode="r")
        else:
            # The array is in every graph that reads from it, so the folder stays that long.
            weakref.finalize(self.array, shutil.rmtree, self.folder, ignore_errors=True)
        every = math.prod(self.source.shape[: self.leading])
        kind = package_of(self.source)
        if len(self.written) == every and kind not in ("dask", "xarray"):
            return self.array
        dask = needs("dask.array")
        parts: Any = self.array
        if len(self.written) < every:
            parts = Overlay(self.source, self.array, frozenset(self.written), self.leading)
        restored = dask.from_array(parts, chunks=self.array.chunks, name=False)
        return self.source.copy(data=restored) if kind == "xarray" else restored  # type: ignore[attr-defined]

    def discard(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Overlay:
    """A stack of which some planes are read from another one."""

    source: ArrayLike
    other: ArrayLike
    planes: frozenset[Index]
    leading: int
    shape: tuple[int, ...] = field(init=False)
    dtype: np.dtype[Any] = field(init=False)
    ndim: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.source.shape))
        object.__setattr__(self, "dtype", np.dtype(self.source.dtype))
        object.__setattr__(self, "ndim", len(self.shape))

    def __getitem__(self, key: Any) -> NDArray[Any]:
        """Read a part, plane by plane; `key` holds integers and slices."""
        key = key if isinstance(key, tuple) else (key,)
        if Ellipsis in key:
            at = key.index(Ellipsis)
            missing = self.ndim - len(key) + 1
            key = key[:at] + (slice(None),) * missing + key[at + 1 :]
        key += (slice(None),) * (self.ndim - len(key))
        before, within = key[: self.leading], key[self.leading :]
        ranges = [
            range(*each.indices(length)) if isinstance(each, slice) else [int(each)]
            for each, length in zip(before, self.shape, strict=False)
        ]
        parts = [
            np.asarray((self.other if index in self.planes else self.source)[(*index, *within)])
            for index in itertools.product(*ranges)
        ]
        lengths = [
            len(each) for each, part in zip(ranges, before, strict=True) if isinstance(part, slice)
        ]
        inner = parts[0].shape if parts else ()
        return np.asarray(parts, self.dtype).reshape(*lengths, *inner)


def target_for(source: ArrayLike, leading: int, output: Path | None) -> MemoryTarget | ZarrTarget:
    """Return what takes the restored planes of a stack."""
    if output is None and not is_lazy(source):
        assert isinstance(source, np.ndarray)
        return MemoryTarget(source)
    return ZarrTarget(source, leading, output)


def shrunk(plane: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """Return a plane at a coarser level: means over areas, rounded for integers."""
    colours = plane[..., None] if plane.ndim == 2 else plane
    values = torch.from_numpy(np.moveaxis(colours, -1, 0).astype(np.float64))
    pooled = F.adaptive_avg_pool2d(values[None], size)[0].numpy()
    if np.issubdtype(plane.dtype, np.integer):
        pooled = np.rint(pooled)
    coarse = np.moveaxis(pooled, 0, -1).astype(plane.dtype)
    return coarse[..., 0] if plane.ndim == 2 else coarse


class Pyramid:
    """The levels of a stack and where their restored planes go.

    Coarser levels are made from the restored finest one. Where a mask keeps the input, they keep
    theirs, however that was made.
    """

    def __init__(self, levels: Sequence[ArrayLike], leading: int, output: Path | None) -> None:
        self.levels, self.leading = levels, leading
        self.targets = [target_for(level, leading, output) for level in levels]

    def write(self, index: Index, plane: NDArray[Any], mask: NDArray[Any] | None) -> None:
        """Put a plane of the finest level in, and its like at the coarser ones."""
        self.targets[0].write(index, plane)
        finest = self.levels[0].shape[: self.leading]
        for level, target in zip(self.levels[1:], self.targets[1:], strict=True):
            height, width = level.shape[self.leading : self.leading + 2]
            coarse = shrunk(plane, (height, width))
            kept = None if mask is None else shrunk(mask, (height, width)) == 0
            lengths = level.shape[: self.leading]
            # A level may have fewer planes: each takes after the first of those it stands for.
            sources = [
                [at for at in range(few) if at * many // few == i]
                for i, many, few in zip(index, finest, lengths, strict=True)
            ]
            for each in itertools.product(*sources):
                result = coarse
                if kept is not None:
                    result = coarse.copy()
                    result[kept] = read_plane(level, each)[kept]
                target.write(each, result)

    def result(self) -> list[Any]:
        """Return the levels."""
        return [target.result() for target in self.targets]

    def discard(self) -> None:
        """Leave nothing behind."""
        for target in self.targets:
            target.discard()


def levels_of(stack: Any) -> list[Any]:
    """Return the levels of a stack, one if it is a plain array.

    Raises
    ------
    PixelError
        If there are none.
    """
    if hasattr(stack, "__array__") and not isinstance(stack, Sequence):
        return [stack]
    levels = list(stack) if isinstance(stack, Sequence) else [stack]
    if not levels:
        message = "Expected a stack or its levels of resolution; found an empty list."
        raise PixelError(message)
    return levels
