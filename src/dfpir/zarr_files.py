"""Zarr and OME-Zarr on disk: restored into a copy of the same layout, with its pyramid.

The copy has the original's metadata, labels and whatever else lies in its folder; only the levels
of the picture itself are new. It is written in a draft beside the output and moved to its name when
it is whole. A draft keeps a list of the parts that are finished, so that a run that was interrupted
can be resumed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfpir.degradation import Degradation
from dfpir.record import RestorationRecord
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

RECORDS = "dfpir"
"""Attribute of an output that holds its records."""

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


class Draft:
    """An output that is not whole yet, in a hidden folder beside its final place.

    Parameters
    ----------
    output : Path
        Its final place.
    key : str
        What the parts depend on; those of another key are of no use.
    """

    def __init__(self, output: Path, key: str) -> None:
        self.output, self.key = output, key
        self.folder = beside(output, "part")
        self.picture = self.folder / "picture"
        self.list = self.folder / "finished.txt"
        self.finished: set[str] = set()

    def resume(self) -> bool:
        """Take over the parts of an earlier run; return whether there are any.

        Raises
        ------
        ValueError
            If they were made from another input or with other settings.
        """
        if not self.list.is_file():
            return False
        key, *names = self.list.read_text(encoding="utf-8").split("\n")
        if key != self.key:
            message = (
                f"{self.folder} was begun from another input, with other settings or weights; "
                "leave out resume to begin anew."
            )
            raise ValueError(message)
        self.finished = set(names[:-1])  # The last line may have been cut short.
        return bool(self.finished)

    def begin(self) -> None:
        """Start with an empty folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.finished = set()

    def finish(self, name: str) -> None:
        """Note that a part is written."""
        text = f"{name}\n" if self.list.exists() else f"{self.key}\n{name}\n"
        with self.list.open("a", encoding="utf-8") as file:
            file.write(text)
        self.finished.add(name)

    def drop_if_empty(self) -> None:
        """Leave nothing behind if nothing in it is of use."""
        if not self.finished:
            shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self) -> None:
        """Put the whole picture in its place.

        A folder cannot replace another at one stroke. If the process dies between the two moves,
        `recover` brings the old output back.
        """
        old = beside(self.output, "old")
        if self.output.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.output.rename(old)
        self.picture.rename(self.output)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def beside(output: Path, what: str) -> Path:
    """Name a hidden folder beside an output."""
    return output.with_name(f".{output.name}.{what}")


def can_resume(output: Path) -> bool:
    """Tell whether an interrupted run has left finished parts of an output."""
    return Draft(output, "").list.is_file()


def recover(output: Path) -> None:
    """Bring back an output that a run moved away and did not live to replace."""
    old = beside(output, "old")
    if old.exists() and not output.exists():
        old.rename(output)


def decisive(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return those entries of records on which the values of an output depend."""
    return [{name: each.get(name) for name in DECISIVE} for each in records]


def source_key(source: Path, records: Sequence[RestorationRecord], side: int) -> str:
    """Return a hash of all that the blocks of an output depend on.

    Files of the source stand for their contents by name, size and time of change.
    """
    files = sorted(path for path in source.rglob("*") if path.is_file())
    seen = [(path.relative_to(source).as_posix(), path.stat()) for path in files]
    listed = [(name, facts.st_size, facts.st_mtime_ns) for name, facts in seen]
    text = json.dumps([listed, decisive([each.as_dict() for each in records]), side])
    return hashlib.sha256(text.encode()).hexdigest()


def is_zarr(path: Path) -> bool:
    """Tell whether a path is meant as a zarr folder, by its name."""
    return path.suffix.lower() == SUFFIX


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
        If it is a group that is no OME-Zarr picture.
    """
    opened = open_zarr(path)
    if hasattr(opened, "chunks"):
        colours = opened.ndim - 1 if opened.ndim > 2 and opened.shape[-1] in COLOURS else None
        return Layout(("",), colours, None)
    attributes = dict(opened.attrs)
    scales = attributes.get("ome", attributes).get("multiscales") or []
    try:
        paths = tuple(str(each["path"]) for each in scales[0]["datasets"])
        axes = [each if isinstance(each, str) else each["name"] for each in scales[0]["axes"]]
        levels = [opened[each] for each in paths]
        fits = all(level.ndim == len(axes) for level in levels) and axes[-2:] == ["y", "x"]
    except (IndexError, KeyError, TypeError):
        fits = False
    if not fits:
        message = (
            f"{path}: a group, but not of an OME-Zarr picture whose axes end with y and x. Name "
            "the array inside it."
        )
        raise ValueError(message)
    channels = axes.index("c") if "c" in axes else None
    finest = levels[0]
    if channels is not None and finest.dtype == np.uint8 and finest.shape[channels] in COLOURS:
        return Layout(paths, channels, None)
    return Layout(paths, None, channels)


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
        Whether `output` may be replaced.
    resume : bool
        Whether to go on from what an interrupted run with the same settings has finished. It lies
        in a hidden folder beside the output, which any other run for this output removes. An
        output that is whole and has the same record is left as it is.
    block : int, optional
        Side of the blocks; see `dfpir.slides.restore_lazily`.
    on_step : callable, optional
        Called with each `dfpir.stacks.Step`; raising from it interrupts.
    **options
        `weights`, `device`, `dtype`, `strength`, `value_range`: see `restore_lazily`.

    Returns
    -------
    StackRestoration
        Its image is the finest level, as a zarr array on disk. Its records are attributes of the
        output, ``"dfpir"``. Where nothing was to be done the output is a copy.

    Raises
    ------
    ValueError
        If the source is no such picture, the output exists, what is to be resumed was made
        otherwise, or an argument does not fit.
    OSError
        If the scheduler does not answer, or the disk is full.
    """
    source, output = Path(source), Path(output)
    if output.resolve() == source.resolve():
        message = f"{output} is the input; choose another output."
        raise ValueError(message)
    recover(output)
    if output.exists() and not (overwrite or resume):
        message = f"{output} exists; add overwrite to replace it, or choose another output."
        raise ValueError(message)
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
    if output.exists() and not overwrite:
        made = dict(open_zarr(output).attrs).get(RECORDS, [])
        if decisive(made) != decisive([each.as_dict() for each in done.records]):
            message = (
                f"{output} exists and was made otherwise; add overwrite to replace it, or choose "
                "another output."
            )
            raise ValueError(message)
        return StackRestoration(open_level(output, layout.paths[0]), done.diagnoses, done.records)
    draft = Draft(output, source_key(source, done.records, side))
    if not (resume and draft.resume()):
        draft.begin()
    try:
        if done.changed:
            image = done.image
            if layout.colours is not None:
                image = needs("dask.array").moveaxis(image, -1, layout.colours)
            unit = unit_for(levels[0], layout, side)
            if not draft.finished:
                lay_out(source, draft.picture, layout, levels, unit)
            write_levels(draft, layout, image, scheduler, writing)
            consolidate_like(source, draft.picture)
        else:
            shutil.copytree(source, draft.picture)
        opened = open_zarr(draft.picture, "r+")
        opened.attrs[RECORDS] = [each.as_dict() for each in done.records]
    except BaseException:
        draft.drop_if_empty()
        raise
    draft.publish()
    reporter.say("done", 1, 1)
    return StackRestoration(open_level(output, layout.paths[0]), done.diagnoses, done.records)


def open_level(folder: Path, path: str) -> Any:
    """Open one level of a folder for reading."""
    opened = open_zarr(folder)
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
        inside = {source / path for path in layout.paths}
        shutil.copytree(
            source,
            folder,
            ignore=lambda at, names: [name for name in names if Path(at) / name in inside],
        )
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
    draft: Draft, layout: Layout, image: Any, scheduler: str | None, reporter: Reporter
) -> None:
    """Write a restored picture, and the coarser levels made of it, where they are not yet."""
    delayed = needs("dask").delayed
    opened = open_zarr(draft.picture, "r+")
    levels = [opened[path] if path else opened for path in layout.paths]
    total = sum(level.size for level in levels)
    begun = 0
    with runner(scheduler) as run:
        for number, level in enumerate(levels):
            share = reporter.part(begun / total, (begun + level.size) / total)
            begun += level.size
            if number == 0:
                regions = needs("dask.array.core").slices_from_chunks(image.chunks)
                blocks = zip(image.to_delayed().ravel(), regions, strict=True)
                tasks = [delayed(put)(block, level, region) for block, region in blocks]
            else:
                finer, regions = levels[number - 1], regions_of(level, layout)
                tasks = [delayed(shrink)(finer, level, region) for region in regions]
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


def put(block: NDArray[Any], target: Any, region: Region) -> None:
    """Write one block."""
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


def shrink(finer: Any, coarser: Any, region: Region) -> None:
    """Write one region of a coarser level: means of the finer one, rounded for integers.

    A level is smaller by whole numbers, rounded up or down; edges stand for what is missing.
    """
    factors = [
        max(round(fine / coarse), 1)
        for fine, coarse in zip(finer.shape, coarser.shape, strict=True)
    ]
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
    """Return what computes named tasks and calls with the name of each that is done.

    It works here, or on a cluster.

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
    """Compute tasks on a cluster; what a worker that dies had to do is done by another."""
    futures = client.compute(list(tasks.values()), retries=RETRIES)
    names = dict(zip(futures, tasks, strict=True))
    try:
        for future in needs("distributed").as_completed(futures):
            future.result()
            on_finished(names[future])
    finally:
        client.cancel(futures)
