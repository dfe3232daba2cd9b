"""Slides: pictures larger than memory, restored block by block, on one machine or on a cluster.

The network's attention between channels is measured once for each plane, on windows from all over
it or on the whole where that is no larger, and is then the same few megabytes for every block, so
that each block agrees with its neighbours. Blocks are Dask's (`dask.array.map_overlap`); which of
them is worked on where and when, and what becomes of the work of a machine that dies, is left to
its schedulers.

Verdict and value range are read from windows at once; attention and blocks are Dask's tasks.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfpir import weights as weights_module
from dfpir.degradation import Degradation, Diagnosis, caution
from dfpir.memory import freed_memory_kept
from dfpir.model import Attention
from dfpir.pixels import (
    PixelForm,
    ValueRange,
    is_grey,
    natural_range,
    to_array,
    to_pixels,
    untinted,
)
from dfpir.record import RestorationRecord, describe
from dfpir.restorer import (
    AUTO,
    SAMPLED_WINDOWS,
    Restorer,
    check_strength,
    choose_dtype,
    classify_images,
    name_of,
    shared_restorer,
    to_remove,
    vote,
)
from dfpir.stacks import OnStep, Reporter, Selection, StackRestoration
from dfpir.targets import Index, as_dask, needs, package_of, read_plane
from dfpir.tiling import OVERLAP, Tiling, windows

BLOCK = 1024
"""Side of a block in pixels, without its surroundings."""

WINDOW = 512
"""Side of the windows that attention, verdict and value range are taken from."""

CHUNKS_KEPT = (128, 2048)
"""Sides of a slide's chunks that blocks are made of, from and to; others are cut anew."""

TURNS = threading.Lock()
"""Blocks of one process take turns: the network uses all its cores, or its device, by itself.

Reading and writing go on meanwhile.
"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that a worker has to know besides the block and the attention.

    Attributes
    ----------
    weights : str
        A name of weights.json, or a file that every worker can read.
    weights_sha256 : str
        What they have to be.
    device, dtype : str
        As for `Restorer`; "auto" is chosen where the work is done.
    degradation : Degradation
    strength : float
        0..1.
    value_range : tuple of float
    rgb : bool
        Whether blocks are (h, w, 3 or 4) rather than (h, w).
    coloured : bool
        Whether any window has colour. Then a grey block is treated as its neighbours are, or its
        edges would show.
    """

    weights: str
    weights_sha256: str
    device: str
    dtype: str
    degradation: Degradation
    strength: float
    value_range: ValueRange
    rgb: bool
    coloured: bool

    def restorer(self) -> Restorer:
        """Return this process's restorer, which is loaded once.

        Raises
        ------
        ValueError
            If the weights here are not those that were meant.
        """
        restorer = shared_restorer(self.weights, self.device, self.dtype)
        if restorer.weights_sha256 != self.weights_sha256:
            message = (
                f"Weights {self.weights!r} have SHA-256 {restorer.weights_sha256} on this worker; "
                f"expected {self.weights_sha256}. Install the same version of dfpir everywhere, or "
                "name a file that all workers see."
            )
            raise ValueError(message)
        return restorer

    def pixels(self, part: NDArray[Any]) -> tuple[Tensor, PixelForm]:
        """Return network pixels of a block or window, and the way back."""
        return to_pixels(part, channel_axis=axis_of(self.rgb), value_range=self.value_range)


def axis_of(rgb: bool) -> int | None:
    """Return the axis of the channels, as `dfpir.pixels.to_pixels` takes it."""
    return -1 if rgb else None


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Wait until no other block of this process is worked on.

    A worker of `dask.distributed` gives PyTorch one thread, whatever its own number; here it gets
    as many as the worker has. Nor is memory handed back to the system within a turn.
    """
    with TURNS, freed_memory_kept():
        usual = torch.get_num_threads()
        torch.set_num_threads(threads_of_worker() or usual)
        try:
            yield
        finally:
            torch.set_num_threads(usual)


def threads_of_worker() -> int | None:
    """Return the threads of the Dask worker that runs this; None if none does."""
    try:
        from distributed import get_worker

        return int(get_worker().state.nthreads)
    except (ImportError, ValueError):
        return None


def measure_windows(parts: Sequence[NDArray[Any]], recipe: Recipe) -> Attention:
    """Return the attention of one plane, measured on equally large windows of it."""
    restorer = recipe.restorer()
    crops = torch.cat([recipe.pixels(np.asarray(part))[0] for part in parts])
    with turn():
        matrices = restorer.measure(crops, recipe.degradation)
    return tuple(each.cpu() for each in matrices)


def restore_block(block: NDArray[Any], attention: Attention, recipe: Recipe) -> NDArray[Any]:
    """Return a restored block, (h, w) or (h, w, 3 or 4), of the same dtype."""
    restorer = recipe.restorer()
    pixels, form = recipe.pixels(block)
    at_once = Tiling(max(16, *block.shape[:2]), OVERLAP, "sampled")
    given = tuple(each.to(restorer.device) for each in attention)
    with turn():
        restored = restorer.run(pixels, recipe.degradation, at_once, attention=given)
    if not recipe.coloured:
        restored = untinted(restored, pixels)
    return to_array(torch.lerp(pixels, restored, recipe.strength), form)


def samples(source: Any, part: Selection, reporter: Reporter) -> list[NDArray[Any]]:
    """Read about `SAMPLED_WINDOWS` windows from all over a selection."""
    voters = part.voters()
    here = windows(*part.size, WINDOW, max(SAMPLED_WINDOWS // len(voters), 1))
    read = []
    for index, share in reporter.each(voters, "reading windows of plane"):
        for number, (rows, columns) in enumerate(here):
            read.append(read_plane(source[(*index, rows, columns)], ()))
            share.say("reading windows", number + 1, len(here))
    return read


def range_of(parts: Sequence[NDArray[Any]], *, rgb: bool) -> ValueRange:
    """Return the natural range of windows."""
    return natural_range(np.concatenate([part.ravel() for part in parts]), grey=not rgb)


def has_colour(parts: Sequence[NDArray[Any]], seen: ValueRange, *, rgb: bool) -> bool:
    """Say whether any window is other than grey."""
    pixels = (to_pixels(each, channel_axis=axis_of(rgb), value_range=seen)[0] for each in parts)
    return not all(bool(is_grey(each)) for each in pixels)


def judge(parts: Sequence[NDArray[Any]], seen: ValueRange, *, rgb: bool) -> Diagnosis:
    """Return the verdict on a slide, by vote of the half of its windows with the most contrast.

    The empty glass of a slide tells nothing about it.
    """
    ranked = sorted(parts, key=lambda part: -float(part.std()))
    found = []
    for part in ranked[: -(-len(ranked) // 2)]:
        found += classify_images(to_pixels(part, channel_axis=axis_of(rgb), value_range=seen)[0])
    return vote(found)


def restore_lazily(
    slide: Any,
    degradation: str | Degradation = AUTO,
    *,
    weights: str | Path | None = None,
    device: str = AUTO,
    dtype: str = AUTO,
    rgb: bool = False,
    channel_axis: int | None = None,
    strength: float = 1.0,
    value_range: ValueRange | None = None,
    block: int | None = None,
    on_step: OnStep | None = None,
) -> StackRestoration:
    """Restore an array larger than memory lazily: a block is computed where it is looked at.

    Parameters
    ----------
    slide : array_like
        (..., H, W), or (..., H, W, 3 or 4) with `rgb`: dask, zarr, xarray, a memory map, ...
    degradation : str or Degradation
        What to remove; "auto" lets the half of about 16 windows with the most contrast vote, and
        acts on the verdict "degraded" only.
    weights, device, dtype
        See `Restorer`. Every worker loads the weights for itself and finds its own device.
    rgb : bool
        Whether the last axis is colours. Otherwise every plane is grey.
    channel_axis : int, optional
        A leading axis whose entries are different things (stains, detectors): each gets its own
        value range, verdict and record.
    strength : float
        0..1, see `Restorer.restore`.
    value_range : tuple of float, optional
        Values that count as black and white; by default those of
        `dfpir.pixels.natural_range` of the windows.
    block : int, optional
        Side of the blocks, a multiple of 16 and at least 64; by default about 1024, whole chunks
        of the slide where those allow.
    on_step : callable, optional
        Called with each `dfpir.stacks.Step` of reading windows; raising from it cancels.

    Returns
    -------
    StackRestoration
        Its image is a Dask array of the slide's shape and dtype, within xarray if the slide is;
        it is the slide itself where nothing is to be done.

    Raises
    ------
    ValueError
        If the slide or an argument does not fit; see the message.
    ImportError
        If dask is missing.

    Examples
    --------
    >>> slide = np.random.default_rng(0).integers(0, 256, (96, 160), dtype=np.uint8)
    >>> lazy = restore_lazily(slide, "noise-25", block=64, device="cpu").image
    >>> lazy.chunks, lazy.dtype, np.asarray(lazy).shape
    (((96,), (64, 96)), dtype('uint8'), (96, 160))
    """
    check_strength(strength)
    if block is not None and (block < OVERLAP or block % 16):
        message = f"block is {block}; expected a multiple of 16, at least {OVERLAP}."
        raise ValueError(message)
    told = None if degradation == AUTO else Degradation.from_name(degradation)
    path = weights_module.resolve(weights)
    name = str(weights or weights_module.default_name())
    # A file's name has to mean the same to workers that were started elsewhere.
    everywhere = str(path.absolute()) if weights and Path(weights) == path else name
    digest = weights_module.file_hash(path)
    selection = Selection.of(slide, rgb=rgb, channel_axis=channel_axis)
    source = as_dask(slide)
    leading = len(selection.leading)
    side = block or side_of(*(each[0] for each in source.chunks[leading : leading + 2]))
    channels = selection.channels()
    # Bundled weights know them all, and what is told is not asked about.
    asked = weights is not None and told is None
    known = weights_module.load_model(path).config.degradations if asked else tuple(Degradation)
    restored: dict[Index, Any] = {}
    diagnoses, records = [], []
    for number, part in enumerate(channels):
        share = Reporter(on_step).part(number / len(channels), (number + 1) / len(channels))
        read = samples(source, part, share)
        seen = value_range or range_of(read, rgb=rgb)
        diagnosis = Diagnosis.from_user(told) if told else judge(read, seen, rgb=rgb)
        kind, note = to_remove(diagnosis, known, strength)
        if kind is not None:
            coloured = has_colour(read, seen, rgb=rgb)
            recipe = Recipe(everywhere, digest, device, dtype, kind, strength, seen, rgb, coloured)
            for index in part.planes:
                restored[index] = restored_plane(source[index], recipe, side)
            note = caution(kind, rgb=rgb)
        diagnoses.append(diagnosis)
        records.append(
            RestorationRecord(
                weights=name,
                weights_sha256=digest,
                diagnosis=describe(diagnosis),
                steps=(kind.value,) if kind else (),
                strength=strength,
                masked=False,
                statistics="whole" if len(places(part.size)) == 1 else "sampled",
                value_range=seen,
                device=device,
                dtype=name_of(choose_dtype(dtype, torch.device("cpu"))),
                notes=(note,) if note else (),
                scope=part.scope(source),
            )
        )
    image = assembled(source, selection, restored) if restored else slide
    if restored and package_of(slide) == "xarray":
        image = slide.copy(data=image)
    return StackRestoration(image, tuple(diagnoses), tuple(records))


def places(size: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Return where the attention of a plane is measured: everywhere, if windows would hold as much.

    Then it is what the whole plane in one piece would have.
    """
    if size[0] * size[1] <= SAMPLED_WINDOWS * WINDOW**2:
        return [(slice(0, size[0]), slice(0, size[1]))]
    return windows(*size, WINDOW, SAMPLED_WINDOWS)


def side_of(*chunks: int) -> int:
    """Return a side for blocks: about `BLOCK`, whole chunks (of these sides) where they allow."""
    low, high = CHUNKS_KEPT
    side = chunks[0]
    if len(set(chunks)) > 1 or side % 16 or not low <= side <= high:
        return BLOCK
    return side * max(BLOCK // side, 1)


def blocks(length: int, side: int) -> tuple[int, ...]:
    """Cut one side of a plane; a rest smaller than what its neighbour reads of it joins it.

    Dask would move the cuts instead, and the network's pixel blocks would no longer lie where they
    lie in the whole plane.

    Examples
    --------
    >>> blocks(200, 64), blocks(230, 64), blocks(20, 64)
    ((64, 64, 72), (64, 64, 102), (20,))
    """
    count, rest = divmod(length, side)
    if count and rest < OVERLAP:
        return (*[side] * (count - 1), side + rest)
    return (*[side] * count, rest)


def restored_plane(plane: Any, recipe: Recipe, side: int) -> Any:
    """Return the lazy restored plane, (H, W) or (H, W, 3 or 4)."""
    dask = needs("dask")
    dask_array = needs("dask.array")
    parts = [plane[rows, columns] for rows, columns in places(plane.shape[:2])]
    attention = dask.delayed(measure_windows, pure=True)(parts, recipe)
    colours = plane.shape[2:]
    cuts = [blocks(length, side) for length in plane.shape[:2]]
    # A side that is not cut has no neighbours, and may be shorter than what is read of them.
    depths = [OVERLAP if len(each) > 1 else 0 for each in cuts]
    return dask_array.map_overlap(
        restore_block,
        plane.rechunk((*cuts, *colours)),
        depth=(*depths, *(0 for _ in colours)),
        boundary="none",
        dtype=plane.dtype,
        meta=np.empty((0,) * plane.ndim, plane.dtype),
        attention=attention,
        recipe=recipe,
    )


def assembled(source: Any, selection: Selection, planes: Mapping[Index, Any]) -> Any:
    """Return one array of all planes; those that are not in `planes` are the source's."""
    if not selection.leading:
        return planes[()]
    dask_array = needs("dask.array")
    chunks = next(iter(planes.values())).chunks
    every = [
        planes.get(index, source[index].rechunk(chunks)) for index in np.ndindex(*selection.leading)
    ]
    for length in reversed(selection.leading[1:]):
        every = [
            dask_array.stack(every[first : first + length])
            for first in range(0, len(every), length)
        ]
    return dask_array.stack(every)
