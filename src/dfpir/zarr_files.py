"""Zarr and OME-Zarr on disk: restored into a copy of the same layout, with its pyramid.

The copy of an OME-Zarr picture has the original's metadata, labels and whatever else lies in its
folder; only the levels of the picture itself are new. It appears under its name when it is whole,
and a run that was interrupted is continued by the next (see `dfpir.drafts`).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfpir.degradation import Degradation
from dfpir.drafts import Draft, copy_folder, recover
from dfpir.record import RestorationRecord, package_version
from dfpir.restorer import AUTO
from dfpir.slides import BLOCK, restore_lazily, side_of
from dfpir.stacks import OnStep, Reporter, StackRestoration
from dfpir.targets import as_dask, needs

SUFFIX = ".zarr"

ANSWER_SECONDS = 20
"""How long a scheduler may take to answer."""

RETRIES = 3
"""Times that a block is tried again on a cluster before the whole is given up."""

Region = tuple[slice, ...]

OnFinished = Callable[[str], None]

Runner = Callable[[Mapping[str, Any], OnFinished], None]

RECORDS, KEY = "dfpir", "dfpir_key"
"""Attributes of an output that hold its records, and the hash of all that it depends on."""

DONE_BEFORE = "done before"
"""The last step of a run that found its output."""

METADATA = ("zarr.json", ".zarray", ".zgroup")
"""Files of which every zarr folder has one."""

DECISIVE = ("weights_sha256", "steps", "strength", "value_range", "dtype", "scope")
"""Entries of a record that the values of an output depend on, besides the input."""

COLOURS = (3, 4)
"""Lengths of an axis that may be colours."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What lies in a zarr folder.

    Attributes
    ----------
    paths : tuple of str
        Of the levels within the folder, the finest first; one empty one for a plain array.
    colours : int or None
        The axis of colours, if the picture has them.
    channels : int or None
        The axis whose entries are different things.
    """

    paths: tuple[str, ...]
    colours: int | None
    channels: int | None


def draft_key(source: Path, records: Sequence[RestorationRecord], side: int) -> str:
    """Return a hash of all that the blocks of an output depend on.

    Files of the source stand for their contents by name, size and time of change.
    """
    files = sorted(path for path in source.rglob("*") if path.is_file())
    seen = [(path.relative_to(source).as_posix(), path.stat()) for path in files]
    listed = [(name, facts.st_size, facts.st_mtime_ns) for name, facts in seen]
    made = [[getattr(each, name) for name in DECISIVE] for each in records]
    text = json.dumps([package_version(), listed, made, side])
    return hashlib.sha256(text.encode()).hexdigest()


def is_zarr(path: Path) -> bool:
    """Tell whether a path is meant as a zarr folder, by its name or by what it holds.

    The arrays within a group, such as its levels, have names of all kinds.
    """
    return path.suffix.lower() == SUFFIX or has_metadata(path)


def open_zarr(path: Path, mode: str = "r") -> Any:
    """Open an array or a group.

    Raises
    ------
    ValueError
        If there is none.
    """
    zarr = needs("zarr")
    try:
        return zarr.open(str(path), mode=mode, use_consolidated=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{path}: not a zarr array or group that can be read ({error})."
        raise ValueError(message) from None


def layout_of(path: Path) -> Layout:
    """Read where the levels are and what their axes mean.

    The colours of a plain array are its last axis, if that has 3 or 4 entries. In OME-Zarr three
    or four channels of 8 bits are colours, as those of a stained slide are; other channels are
    different things.

    Raises
    ------
    ValueError
        If it is a group that is no OME-Zarr picture, or does not hold numbers.
    """
    opened = open_zarr(path)
    if hasattr(opened, "chunks"):
        check_numbers(path, opened.dtype)
        colours = opened.ndim - 1 if opened.ndim > 2 and opened.shape[-1] in COLOURS else None
        return Layout(("",), colours, None)
    attributes = dict(opened.attrs)
    scales = attributes.get("ome", attributes).get("multiscales") or []
    try:
        paths = tuple(str(each["path"]) for each in scales[0]["datasets"])
        axes = [each if isinstance(each, str) else each["name"] for each in scales[0]["axes"]]
        levels = [opened[each] for each in paths]
        fits = all(level.ndim == len(axes) for level in levels) and axes[-2:] == ["y", "x"]
    except (AttributeError, IndexError, KeyError, TypeError):
        fits = False
    if not fits:
        message = (
            f"{path}: a group, but not of an OME-Zarr picture whose axes end with y and x. Copy "
            "the array inside it to a .zarr of its own."
        )
        raise ValueError(message)
    for level in levels:
        check_numbers(path, level.dtype)
    for finer, coarser in itertools.pairwise(levels):
        check_factors(path, finer.shape, coarser.shape)
    channels = axes.index("c") if "c" in axes else None
    finest = levels[0]
    if channels is not None and finest.dtype == np.uint8 and finest.shape[channels] in COLOURS:
        return Layout(paths, channels, None)
    return Layout(paths, None, channels)


def check_numbers(path: Path, dtype: np.dtype[Any]) -> None:
    """Make sure that an array holds numbers: objects would be unpickled when they are read.

    Raises
    ------
    ValueError
        If it does not.
    """
    if dtype.kind not in "buif":
        message = f"{path}: values of type {dtype}; expected integers or floats, as pictures have."
        raise ValueError(message)


def check_factors(path: Path, finer: Sequence[int], coarser: Sequence[int]) -> None:
    """Make sure that a level is smaller by whole numbers, rounded up or down.

    Raises
    ------
    ValueError
        If it is not.
    """
    for fine, coarse in zip(finer, coarser, strict=True):
        factor = factor_of(fine, coarse)
        if coarse not in (max(fine // factor, 1), -(-fine // factor)):
            message = (
                f"{path}: a level of {tuple(coarser)} lies below one of {tuple(finer)}; expected "
                "sides that are smaller by whole numbers. Make its levels anew."
            )
            raise ValueError(message)


def factor_of(fine: int, coarse: int) -> int:
    """Return by how much a side of a level is smaller than that of the finer one."""
    return max(round(fine / coarse), 1)


def restore_zarr(
    source: str | Path,
    output: str | Path,
    degradation: str | Degradation = AUTO,
    *,
    scheduler: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    block: int | None = None,
    on_step: OnStep | None = None,
    **options: Any,
) -> StackRestoration:
    """Restore a zarr array or an OME-Zarr picture into a new folder, whatever its size.

    Parameters
    ----------
    source, output : str or Path
        Folders; on a cluster all workers have to see them under the same names.
    degradation : str or Degradation
    scheduler : str, optional
        Address of a `dask.distributed` scheduler, such as ``"tcp://10.0.0.1:8786"``; without it
        this machine does the work.
    overwrite : bool
        Whether a zarr folder called `output` may be replaced.
    resume : bool
        Whether an output that an earlier run has made of the same input with the same settings is
        left as it is. What an interrupted run of that kind has finished is used in any case.
    block : int, optional
        Side of the blocks; see `dfpir.slides.restore_lazily`.
    on_step : callable, optional
        Called with each `dfpir.stacks.Step`; raising from it interrupts. Finished blocks are then
        kept in a hidden folder beside the output; a note on the error says so.
    **options
        `weights`, `device`, `dtype`, `strength`, `value_range`: see `restore_lazily`.

    Returns
    -------
    StackRestoration
        Its image is the finest level, as a zarr array on disk. Its records are an attribute of the
        output, ``"dfpir"``, after those that the source has there. Where nothing was to be done
        the output is a copy.

    Raises
    ------
    ValueError
        If the source is no such picture or changes meanwhile, the output exists, or an argument
        does not fit.
    OSError
        If the scheduler does not answer, workers do not see the folders or die again and again,
        or the disk is full.
    """
    # Workers of a cluster may have been started elsewhere.
    source, output = Path(source).absolute(), Path(output).absolute()
    check_places(source, output, replace=overwrite or resume)
    layout = layout_of(source)
    levels = [open_level(source, path) for path in layout.paths]
    reporter = Reporter(on_step)
    reading, writing = reporter.part(0, 0.02), reporter.part(0.02, 1)
    spatial = spatial_axes(levels[0].ndim, layout.colours)
    side = block or side_of(*(unit_of(levels[0])[axis] for axis in spatial))
    finest = as_dask(levels[0])
    if layout.colours is not None:
        finest = needs("dask.array").moveaxis(finest, layout.colours, -1)
    done = restore_lazily(
        finest,
        degradation,
        rgb=layout.colours is not None,
        channel_axis=layout.channels,
        block=side,
        on_step=lambda step: reading.say(step.doing, round(100 * step.fraction), 100),
        **options,
    )
    key = draft_key(source, done.records, side)
    if resume and output.exists() and open_zarr(output).attrs.get(KEY) == key:
        reporter.say(DONE_BEFORE, 1, 1)
        return StackRestoration(open_level(output, layout.paths[0]), done.diagnoses, done.records)
    if output.exists() and not overwrite:
        message = (
            f"{output} exists and was made from another input or with other settings; add "
            "overwrite to replace it, or choose another output."
        )
        raise ValueError(message)
    draft = Draft(output, key)
    try:
        draft.open()
        if done.changed:
            image = done.image
            if layout.colours is not None:
                image = needs("dask.array").moveaxis(image, -1, layout.colours)
            if not draft.finished:
                unit = unit_for(levels[0], layout, side)
                lay_out(source, draft.content, layout, levels, unit)
            write_levels(source, draft, layout, image, scheduler, writing)
        else:
            copy_folder(source, draft.content)
        made = [each.as_dict() for each in done.records]
        attributes = {RECORDS: [*earlier_records(source), *made], KEY: key}
        open_zarr(draft.content, "r+").attrs.update(attributes)
        consolidate_like(source, draft.content)
        if draft_key(source, done.records, side) != key:
            message = f"{source} has changed while it was restored; restore it again."
            raise ValueError(message)
        draft.publish(overwrite=overwrite)
    except BaseException as error:
        draft.interrupt(error)
        raise
    reporter.say("done", 1, 1)
    return StackRestoration(open_level(output, layout.paths[0]), done.diagnoses, done.records)


def earlier_records(source: Path) -> list[object]:
    """Return the records of a picture that was restored before."""
    found = open_zarr(source).attrs.get(RECORDS)
    return found if isinstance(found, list) else []


def check_places(source: Path, output: Path, *, replace: bool) -> None:
    """Make sure that writing the output harms nothing.

    Raises
    ------
    ValueError
        If it may not be replaced, is no zarr folder, or one path lies within the other.
    """
    here, there = source.resolve(), output.resolve()
    if here == there:
        message = f"{output} is the input; choose another output."
        raise ValueError(message)
    if here in there.parents or there in here.parents:
        message = f"{source} and {output} lie one within the other; choose another output."
        raise ValueError(message)
    recover(output)
    if output.exists() and not has_metadata(output):
        message = f"{output} exists and is no zarr folder; choose another output."
        raise ValueError(message)
    if output.exists() and not replace:
        message = f"{output} exists; add overwrite to replace it, or choose another output."
        raise ValueError(message)


def has_metadata(folder: Path) -> bool:
    """Tell whether a folder is one of zarr."""
    return any((folder / name).is_file() for name in METADATA)


def open_level(folder: Path, path: str, mode: str = "r") -> Any:
    """Open one level of a folder."""
    opened = open_zarr(folder, mode)
    return opened[path] if path else opened


def unit_of(level: Any) -> tuple[int, ...]:
    """Return the shape of what is written to one file: a shard, or a chunk."""
    return tuple(level.shards or level.chunks)


def unit_for(level: Any, layout: Layout, side: int) -> tuple[int, ...] | None:
    """Return the chunks of the restored finest level; None if they are to be the level's own.

    Blocks are written at the same time, so no two of them may share a file.
    """
    spatial = spatial_axes(level.ndim, layout.colours)
    others = set(range(level.ndim)) - {*spatial, layout.colours}
    unit = unit_of(level)
    if all(unit[axis] == 1 for axis in others) and all(side % unit[axis] == 0 for axis in spatial):
        return None
    return tuple(
        side if axis in spatial else 1 if axis in others else length
        for axis, length in enumerate(level.shape)
    )


def spatial_axes(dimensions: int, colours: int | None) -> list[int]:
    """Return the axes of rows and columns: the last two that are not colours."""
    return [axis for axis in range(dimensions) if axis != colours][-2:]


def lay_out(
    source: Path,
    folder: Path,
    layout: Layout,
    levels: Sequence[Any],
    unit: tuple[int, ...] | None,
) -> None:
    """Make a folder like the source's in which the levels of the picture are empty.

    `unit` is the shape of the finest level's chunks, if not its original's.
    """
    zarr = needs("zarr")
    if layout.paths != ("",):
        copy_folder(source, folder, {source / path for path in layout.paths})
    cut: dict[str, Any] = {} if unit is None else {"chunks": unit, "shards": None}
    for level, path in zip(levels, layout.paths, strict=True):
        zarr.from_array(
            str(folder),
            name=path or None,
            data=level,
            write_data=False,
            overwrite=True,
            fill_value=None,  # the level's own
            attributes=dict(level.attrs),
            **cut,
        )
        cut = {}


def write_levels(
    source: Path,
    draft: Draft,
    layout: Layout,
    image: Any,
    scheduler: str | None,
    reporter: Reporter,
) -> None:
    """Write a restored picture, and the coarser levels made of it, where they are not yet."""
    delayed = needs("dask").delayed
    levels = [open_level(draft.content, path, "r+") for path in layout.paths]
    folders = (source, draft.content)
    total = sum(level.size for level in levels)
    begun = 0
    with runner(scheduler) as run:
        for number, level in enumerate(levels):
            share = reporter.part(begun / total, (begun + level.size) / total)
            begun += level.size
            if number == 0:
                regions = needs("dask.array.core").slices_from_chunks(image.chunks)
                blocks = zip(image.to_delayed().ravel(), regions, strict=True)
                tasks = [delayed(put)(block, level, region, folders) for block, region in blocks]
            else:
                finer, regions = levels[number - 1], regions_of(level, layout)
                tasks = [delayed(shrink)(finer, level, region, folders) for region in regions]
            named = {f"{number} {part}": task for part, task in enumerate(tasks)}
            compute_missing(named, draft, run, share)


def compute_missing(
    tasks: Mapping[str, Any], draft: Draft, run: Runner, reporter: Reporter
) -> None:
    """Compute the tasks whose parts of a draft are not finished."""
    left = {name: task for name, task in tasks.items() if name not in draft.finished}
    done = itertools.count(len(tasks) - len(left) + 1)

    def on_finished(name: str) -> None:
        draft.finish(name)
        reporter.say("restoring blocks", next(done), len(tasks))

    run(left, on_finished)


def consolidate_like(source: Path, folder: Path) -> None:
    """Repeat all metadata in the outermost, if the source does so."""
    zarr = needs("zarr")
    metadata = zarr.open(str(source), mode="r").metadata
    if getattr(metadata, "consolidated_metadata", None) is not None:
        zarr.consolidate_metadata(str(folder))


def must_see(folders: Sequence[Path]) -> None:
    """Make sure that zarr folders are seen here; what is missing reads as empty.

    Raises
    ------
    OSError
        If one is not.
    """
    for folder in folders:
        if not has_metadata(folder):
            message = (
                f"{folder} is not seen on worker {platform.node()}; all workers need the same "
                "folders under the same names."
            )
            raise OSError(message)


def put(block: NDArray[Any], target: Any, region: Region, folders: Sequence[Path]) -> None:
    """Write one block."""
    must_see(folders)
    target[region] = block


def regions_of(level: Any, layout: Layout) -> list[Region]:
    """Cut a level into parts of about a block's size that share no file."""
    spatial = spatial_axes(level.ndim, layout.colours)
    steps = [
        unit * max(BLOCK // unit, 1) if axis in spatial else unit
        for axis, unit in enumerate(unit_of(level))
    ]
    starts = [range(0, length, step) for length, step in zip(level.shape, steps, strict=True)]
    return [
        tuple(slice(start, start + step) for start, step in zip(corner, steps, strict=True))
        for corner in itertools.product(*starts)
    ]


def shrink(finer: Any, coarser: Any, region: Region, folders: Sequence[Path]) -> None:
    """Write one region of a coarser level: means of the finer one, rounded for integers.

    A level is smaller by whole numbers, rounded up or down; edges stand for what is missing.
    """
    must_see(folders)
    factors = list(map(factor_of, finer.shape, coarser.shape))
    lengths = [
        min(part.stop, coarse) - part.start
        for part, coarse in zip(region, coarser.shape, strict=True)
    ]
    values = finer[
        tuple(
            slice(part.start * factor, (part.start + length) * factor)
            for part, length, factor in zip(region, lengths, factors, strict=True)
        )
    ]
    missing = [
        (0, length * factor - found)
        for length, factor, found in zip(lengths, factors, values.shape, strict=True)
    ]
    values = np.pad(values, missing, mode="edge").astype(np.float64)
    split = [number for pair in zip(lengths, factors, strict=True) for number in pair]
    means = values.reshape(split).mean(axis=tuple(range(1, len(split), 2)))
    if np.issubdtype(coarser.dtype, np.integer):
        means = np.rint(means)
    coarser[region] = means.astype(coarser.dtype)


@contextlib.contextmanager
def runner(scheduler: str | None) -> Iterator[Runner]:
    """Return a function that computes named tasks, here or on a cluster.

    It says the name of each that is done.

    Raises
    ------
    OSError
        If the scheduler does not answer.
    """
    if scheduler is None:
        yield run_here
        return
    distributed = needs("distributed")
    with distributed.Client(scheduler, timeout=ANSWER_SECONDS) as client:
        yield partial(run_there, client)


def run_here(tasks: Mapping[str, Any], on_finished: OnFinished) -> None:
    """Compute tasks with Dask's threads."""
    callbacks, dask = needs("dask.callbacks"), needs("dask")
    names = {task.key: name for name, task in tasks.items()}

    def report(key: Any, *_: Any) -> None:
        if key in names:
            on_finished(names[key])

    with callbacks.Callback(posttask=report):
        dask.compute(*tasks.values(), scheduler="threads")


def run_there(client: Any, tasks: Mapping[str, Any], on_finished: OnFinished) -> None:
    """Compute tasks on a cluster; what a worker that dies had to do is done by another.

    Raises
    ------
    OSError
        If workers die again and again.
    """
    distributed = needs("distributed")
    futures = client.compute(list(tasks.values()), retries=RETRIES)
    names = dict(zip(futures, tasks, strict=True))
    try:
        for future in distributed.as_completed(futures):
            future.result()
            on_finished(names.pop(future))
            # It is on disk: nobody has to do it again if this worker dies.
            future.release()
    except distributed.KilledWorker as error:
        message = f"The workers died of one block, for want of memory perhaps ({error})."
        raise OSError(message) from error
    finally:
        client.cancel(list(names))
