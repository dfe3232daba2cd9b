"""Stacks: pictures along leading axes, in memory or not, restored plane by plane.

The last two axes of a stack are rows and columns (and, with `rgb`, a last one of colours); all
axes before them only number its planes. One value range and one verdict hold for all of them.
NumPy arrays give NumPy arrays. What lives elsewhere (dask, zarr, xarray, memory maps) is read one
plane at a time and never written to: the result is a new zarr array, given back as the input's
kind of array. Several levels of resolution are a list, the finest first.

Work can be watched and cancelled in two ways: by `on_step`, which may raise, or as a generator of
steps (`restore_steps` and its like), which a host advances and closes as it likes.
"""

from __future__ import annotations

import hashlib
import math
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from dfpir.degradation import Degradation, Diagnosis, caution
from dfpir.pixels import UPPER_PERCENTILE, PixelError, ValueRange, natural_range, to_pixels
from dfpir.record import LinearitySums, RestorationRecord, describe, save_with_record
from dfpir.restorer import (
    AUTO,
    Restoration,
    Restorer,
    check_strength,
    shared_restorer,
    to_remove,
    vote,
)
from dfpir.targets import (
    ArrayLike,
    Index,
    Pyramid,
    as_dask,
    is_lazy,
    levels_of,
    read_plane,
)
from dfpir.tiling import Tiling, spread

VOTERS = 16
"""Planes that the verdict on a stack is taken from, evenly spread."""

HALO = 32
"""Pixels around a region that are read with it."""

STEP_SECONDS = 0.05
"""Steps that follow faster are not passed on to a host: it has a screen to draw."""

Box = tuple[slice, slice]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Step:
    """How far the work is.

    Attributes
    ----------
    fraction : float
        0..1, never falling.
    doing : str
        A few words, such as ``"restoring plane 3 of 12"``.
    """

    fraction: float
    doing: str


OnStep = Callable[[Step], None]


@dataclass(frozen=True, slots=True)
class StackRestoration:
    """A restored stack and how it came about.

    Attributes
    ----------
    image : array_like
        Of the stack's kind, shape and dtype; the stack itself where nothing was done. A list for
        a list of levels.
    diagnoses : tuple of Diagnosis
        One, or one for each channel that was treated on its own.
    records : tuple of RestorationRecord
        Likewise.
    """

    image: Any
    diagnoses: tuple[Diagnosis, ...]
    records: tuple[RestorationRecord, ...]

    @property
    def changed(self) -> bool:
        """Whether anything was restored."""
        return any(record.steps for record in self.records)

    @property
    def summary(self) -> str:
        """One line for people, or one for each channel."""
        lines = []
        for diagnosis, record in zip(self.diagnoses, self.records, strict=True):
            steps = tuple(Degradation.from_name(step) for step in record.steps)
            line = Restoration(self.image, diagnosis, steps, record).summary
            if "channel" in record.scope:
                line = f"channel {record.scope['channel']}: {line}"
            lines.append(line)
        return "\n".join(lines)


def spare_threads() -> int:
    """Return how many processor threads a host may give away and still answer: all but one."""
    return max(torch.get_num_threads() - 1, 1)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which planes of a stack are meant, and how it is laid out.

    Attributes
    ----------
    leading : tuple of int
        Lengths of the axes that number the planes.
    size : tuple of int
        Height and width.
    rgb : bool
    channel_axis : int or None
        The leading axis whose entries are treated on their own.
    planes : tuple of tuple of int
        The chosen ones, in order.
    """

    leading: tuple[int, ...]
    size: tuple[int, int]
    rgb: bool
    channel_axis: int | None
    planes: tuple[Index, ...]

    @property
    def whole(self) -> bool:
        """Whether all planes are chosen."""
        return len(self.planes) == math.prod(self.leading)

    @classmethod
    def of(
        cls,
        stack: ArrayLike,
        *,
        rgb: bool = False,
        channel_axis: int | None = None,
        planes: Sequence[Index] | None = None,
    ) -> Selection:
        """Read the layout of a stack and check what is asked of it.

        Raises
        ------
        PixelError
        """
        shape = tuple(int(length) for length in stack.shape)
        spatial = 3 if rgb else 2
        if len(shape) < spatial or (rgb and shape[-1] not in (3, 4)) or 0 in shape:
            wanted = "(..., H, W, 3 or 4)" if rgb else "(..., H, W)"
            message = f"Stack has shape {shape}; expected {wanted}, and no empty axis."
            raise PixelError(message)
        leading = shape[:-spatial]
        if channel_axis is not None and not 0 <= channel_axis < len(leading):
            message = (
                f"channel_axis={channel_axis} does not number the planes of a stack of shape "
                f"{shape}; expected 0 to {len(leading) - 1}, or None."
            )
            raise PixelError(message)
        every = list(np.ndindex(*leading))
        chosen = every if planes is None else [tuple(map(int, index)) for index in planes]
        if not chosen:
            message = "No plane is chosen. Leave planes out for all of them."
            raise PixelError(message)
        for index in chosen:
            inside = len(index) == len(leading)
            if not inside or not all(0 <= i < n for i, n in zip(index, leading, strict=True)):
                message = f"There is no plane {index} in a stack of shape {shape}."
                raise PixelError(message)
        height, width = shape[len(leading) : len(leading) + 2]
        return cls(leading, (height, width), rgb, channel_axis, tuple(sorted(set(chosen))))

    def channels(self) -> list[Selection]:
        """Return one selection for each channel that is treated on its own."""
        axis = self.channel_axis
        if axis is None:
            return [self]
        return [
            replace(self, planes=tuple(index for index in self.planes if index[axis] == channel))
            for channel in sorted({index[axis] for index in self.planes})
        ]

    def marked(self, mask: StackMask) -> Selection:
        """Leave out the planes in which a mask is empty.

        Raises
        ------
        PixelError
            If none is left.
        """
        if mask.mask is None:
            return self
        marked = tuple(index for index in self.planes if mask.box(index) is not None)
        if not marked:
            message = "The mask is empty; mark where to restore first."
            raise PixelError(message)
        return replace(self, planes=marked)

    def scope(self, stack: ArrayLike) -> dict[str, object]:
        """Return what a record says of where in a stack it applies."""
        scope: dict[str, object] = {"shape": [int(length) for length in stack.shape]}
        if self.leading:
            scope["planes"] = "all" if self.whole else [list(index) for index in self.planes]
        if self.channel_axis is not None and self.planes:
            scope["channel_axis"] = self.channel_axis
            scope["channel"] = self.planes[0][self.channel_axis]
        return scope

    def voters(self) -> list[Index]:
        """Return some of the planes, evenly spread, to judge the others by."""
        if len(self.planes) <= VOTERS:
            return list(self.planes)
        return [self.planes[at] for at in spread(len(self.planes), 1, VOTERS)]


class StackMask:
    """Where a stack is to be restored: one mask for all planes, or one for each.

    Raises
    ------
    PixelError
        If its shape fits neither.
    """

    def __init__(self, mask: ArrayLike | None, selection: Selection) -> None:
        self.mask = mask
        self.each = False
        if mask is None:
            return
        shape = tuple(mask.shape)
        self.each = bool(selection.leading) and shape == selection.leading + selection.size
        if not self.each and shape != selection.size:
            message = (
                f"Mask has shape {shape}; expected {selection.size}, or "
                f"{selection.leading + selection.size} to give each plane its own."
            )
            raise PixelError(message)

    def plane(self, index: Index) -> NDArray[np.float32] | None:
        """Return the weights (H, W), 0..1, of one plane; None means everywhere."""
        if self.mask is None:
            return None
        part = self.mask[(*index, ...)] if self.each else self.mask
        return np.asarray(part).astype(np.float32)

    def box(self, index: Index) -> Box | None:
        """Return the part of a plane to read, with a halo; None if the mask is empty there."""
        weights = self.plane(index)
        if weights is None:
            return slice(None), slice(None)
        sides = []
        for axis in (1, 0):
            (inside,) = np.nonzero(weights.any(axis=axis))
            if not inside.size:
                return None
            first = max(int(inside[0]) - HALO, 0) // 16 * 16
            sides.append(slice(first, int(inside[-1]) + 1 + HALO))
        return sides[0], sides[1]


class Reporter:
    """Turns the progress of single stages into that of the whole."""

    def __init__(self, on_step: OnStep | None, start: float = 0.0, stop: float = 1.0) -> None:
        self.on_step, self.start, self.stop = on_step, start, stop

    def part(self, start: float, stop: float) -> Reporter:
        """Return a reporter for a part of this one, given as fractions of it."""
        width = self.stop - self.start
        return Reporter(self.on_step, self.start + start * width, self.start + stop * width)

    def each(self, items: Sequence[Index], doing: str) -> Iterator[tuple[Index, Reporter]]:
        """Go through planes, saying which."""
        for number, item in enumerate(items):
            words = doing if len(items) == 1 else f"{doing} {number + 1} of {len(items)}"
            share = self.part(number / len(items), (number + 1) / len(items))
            share.say(words, 0, 1)
            yield item, share

    def say(self, doing: str, done: int, total: int) -> None:
        """Report `done` of `total` of this part."""
        if self.on_step is not None:
            fraction = self.start + (self.stop - self.start) * done / total
            self.on_step(Step(fraction, doing))


def measure_range(
    stack: ArrayLike, selection: Selection, planes: Sequence[Index], reporter: Reporter
) -> ValueRange:
    """Return the one value range of some planes, as `dfpir.pixels.natural_range` of all of them.

    Planes are read one after the other; only their largest values are kept.
    """
    dtype = np.dtype(stack.dtype)
    if selection.rgb or dtype == np.uint8:
        return natural_range(np.zeros((1, 1), dtype), grey=not selection.rgb)
    count = len(planes) * selection.size[0] * selection.size[1]
    # The place of a percentile among sorted values, as numpy's method "higher" has it.
    place = math.ceil((count - 1) * (UPPER_PERCENTILE / 100))
    kept = count - place
    low, top = math.inf, np.empty(0, dtype)
    for index, share in reporter.each(planes, "measuring plane"):
        plane = read_plane(stack, index).ravel()
        share.say("measuring", 0, 1)
        low = min(low, float(plane.min()))
        if len(top) == kept:
            plane = plane[plane > top[0]]
        top = np.concatenate([top, plane])
        if len(top) >= kept:
            top = np.partition(top, len(top) - kept)[-kept:]  # The least of them first.
    high = float(top.min())
    return (low, high) if high > low else (low, low + 1.0)


def judge(
    stack: ArrayLike,
    selection: Selection,
    mask: StackMask,
    value_range: ValueRange,
    restorer: Restorer,
    reporter: Reporter,
) -> Diagnosis:
    """Return the verdict on a selection, by vote of some of its planes."""
    found = []
    for index, _ in reporter.each(selection.voters(), "diagnosing plane"):
        rows, columns = mask.box(index) or (slice(None), slice(None))
        plane = read_plane(stack, index)[rows, columns]
        axis = -1 if selection.rgb else None
        pixels, _ = to_pixels(plane, channel_axis=axis, value_range=value_range)
        found += restorer.classify_pixels(pixels)
    return vote(found)


def classify_stack(
    stack: Any,
    *,
    restorer: Restorer | None = None,
    rgb: bool = False,
    channel_axis: int | None = None,
    planes: Sequence[Index] | None = None,
    mask: ArrayLike | None = None,
    value_range: ValueRange | None = None,
    on_step: OnStep | None = None,
) -> tuple[Diagnosis, ...]:
    """Say what is wrong with a stack, by vote of up to 16 of its planes.

    Parameters
    ----------
    stack, rgb, channel_axis, planes, mask, value_range, on_step
        As for `restore_stack`; a value range that is not given is that of the voting planes.

    Returns
    -------
    tuple of Diagnosis
        One, or one for each channel.

    Raises
    ------
    ValueError
        If the stack or an argument does not fit.
    """
    source = levels_of(stack)[0]
    selection = Selection.of(source, rgb=rgb, channel_axis=channel_axis, planes=planes)
    restorer = restorer or shared_restorer(None, AUTO, AUTO)
    area = StackMask(mask, selection)
    channels = selection.marked(area).channels()
    found = []
    for number, part in enumerate(channels):
        share = Reporter(on_step).part(number / len(channels), (number + 1) / len(channels))
        seen = value_range or measure_range(source, part, part.voters(), share.part(0, 0.3))
        found.append(judge(source, part, area, seen, restorer, share.part(0.3, 1)))
    return tuple(found)


def restore_stack(
    stack: Any,
    degradation: str | Degradation = AUTO,
    *,
    restorer: Restorer | None = None,
    rgb: bool = False,
    channel_axis: int | None = None,
    planes: Sequence[Index] | None = None,
    strength: float = 1.0,
    mask: ArrayLike | None = None,
    value_range: ValueRange | None = None,
    tiling: Tiling | None = None,
    output: str | Path | None = None,
    on_step: OnStep | None = None,
) -> StackRestoration:
    """Restore a stack plane by plane, with one verdict and one value range.

    Parameters
    ----------
    stack : array_like, or list of array_like
        (..., H, W), or (..., H, W, 3 or 4) with `rgb`; numpy, dask, zarr, xarray or anything that
        can be indexed like them. A list holds levels of resolution, the finest first.
    degradation : str or Degradation
        What to remove; "auto" lets up to 16 evenly spread planes vote, and acts on the verdict
        "degraded" only.
    restorer : Restorer, optional
        By default the one that `dfpir.restore` uses.
    rgb : bool
        Whether the last axis is colours. Otherwise every plane is grey and none is mixed with
        another.
    channel_axis : int, optional
        A leading axis whose entries are different things (stains, detectors): each gets its own
        value range, verdict and record.
    planes : sequence of tuple of int, optional
        Indices of the planes to restore, all by default; the others stay as they are. The value
        range is that of the chosen planes.
    strength : float
        0..1, see `Restorer.restore`.
    mask : array_like, optional
        (H, W) or (..., H, W), 0..1 or boolean: where to restore. Only its surroundings are read
        by the network: a region is a picture of its own.
    value_range : tuple of float, optional
        Values that count as black and white; by default 0..255 for uint8, all of the dtype for
        RGB (0..1 for floats), and for grey from the smallest to the 99.99th percentile of all
        chosen planes.
    tiling : Tiling, optional
    output : str or Path, optional
        Folder of a new zarr array for the result, all planes of it; it is not made where nothing
        was done. Without it, arrays that are not in memory get one in the folder for temporary
        files, which lasts as long as the result.
    on_step : callable, optional
        Called with each `Step`, in the thread that works; raising from it cancels and leaves
        nothing behind.

    Returns
    -------
    StackRestoration
        Its image is the very object that was given, if nothing was done.

    Raises
    ------
    ValueError
        If the stack or an argument does not fit; see the message.
    ImportError
        If the stack is not in memory and zarr or dask is missing.

    Examples
    --------
    >>> stack = np.random.default_rng(0).integers(100, 900, (3, 32, 40), dtype=np.uint16)
    >>> done = restore_stack(stack, "noise-25", planes=[(1,)])
    >>> done.image.dtype, bool((done.image[0] == stack[0]).all())
    (dtype('uint16'), True)
    """
    levels = levels_of(stack)
    if output is not None and len(levels) > 1:
        message = "An output folder takes one level of resolution; restore the finest alone."
        raise ValueError(message)
    selection = Selection.of(levels[0], rgb=rgb, channel_axis=channel_axis, planes=planes)
    check_strength(strength)
    if degradation != AUTO:
        degradation = Degradation.from_name(degradation)
    work = StackWork(
        levels,
        selection,
        StackMask(mask, selection),
        restorer or shared_restorer(None, AUTO, AUTO),
        degradation,
        strength,
        value_range,
        tiling,
        None if output is None else Path(output),
    )
    try:
        image, diagnoses, records = work.run(Reporter(on_step))
    except BaseException:
        work.discard()
        raise
    if image is None:
        return StackRestoration(stack, diagnoses, records)
    return StackRestoration(image if len(levels) > 1 else image[0], diagnoses, records)


@dataclass(slots=True)
class StackWork:
    """One restoration of a stack, with all that was asked for."""

    levels: list[Any]
    selection: Selection
    mask: StackMask
    restorer: Restorer
    degradation: str | Degradation
    strength: float
    value_range: ValueRange | None
    tiling: Tiling | None
    output: Path | None
    pyramid: Pyramid | None = None

    def run(
        self, reporter: Reporter
    ) -> tuple[list[Any] | None, tuple[Diagnosis, ...], tuple[RestorationRecord, ...]]:
        """Do all channels; the first value is None where nothing was to be done."""
        channels = self.selection.marked(self.mask).channels()
        diagnoses, records = [], []
        for number, part in enumerate(channels):
            share = reporter.part(number / len(channels), (number + 1) / len(channels))
            seen = self.value_range or measure_range(
                self.levels[0], part, part.planes, share.part(0, 0.05)
            )
            diagnosis = self.diagnose(part, seen, share.part(0.05, 0.1))
            diagnoses.append(diagnosis)
            records.append(self.restore(part, seen, diagnosis, share.part(0.1, 1)))
        image = None if self.pyramid is None else self.pyramid.result()
        reporter.say("done", 1, 1)
        return image, tuple(diagnoses), tuple(records)

    def diagnose(self, part: Selection, seen: ValueRange, reporter: Reporter) -> Diagnosis:
        """Ask the classifier, unless the user has said what to remove."""
        if isinstance(self.degradation, Degradation):
            return Diagnosis.from_user(self.degradation)
        return judge(self.levels[0], part, self.mask, seen, self.restorer, reporter)

    def restore(
        self, part: Selection, seen: ValueRange, diagnosis: Diagnosis, reporter: Reporter
    ) -> RestorationRecord:
        """Restore the planes of one channel into the pyramid and say what was done."""
        known = self.restorer.model.config.degradations
        degradation, remark = to_remove(diagnosis, known, self.strength)
        if degradation is None:
            notes = (remark,) if remark else ()
            return replace(self.record(part, seen, diagnosis), notes=notes)
        if self.pyramid is None:
            self.pyramid = Pyramid(self.levels, len(part.leading), self.output)
        sums = LinearitySums()
        done: list[RestorationRecord] = []
        shape = self.levels[0].shape if part.whole else self.partial_shape(part)
        digest = hashlib.sha256(f"{np.dtype(self.levels[0].dtype).str}{tuple(shape)}".encode())
        for index, share in reporter.each(part.planes, "restoring plane"):
            plane = read_plane(self.levels[0], index)
            digest.update(np.ascontiguousarray(plane).data)
            box = self.mask.box(index)
            assert box is not None  # Planes without a mark were left out.
            words = "restoring"
            if len(part.planes) > 1:
                words += f" plane {part.planes.index(index) + 1} of {len(part.planes)}"
            weights = self.mask.plane(index)
            restored, record = self.restore_box(
                plane, box, weights, degradation, seen, share, words
            )
            done.append(record)
            inside = ... if weights is None else weights > 0
            colours = np.s_[..., :3] if self.selection.rgb else ...
            sums.add(plane[inside][colours], restored[inside][colours])
            self.pyramid.write(index, restored, weights)
        return self.record(part, seen, diagnosis, digest.hexdigest(), sums, done)

    def partial_shape(self, part: Selection) -> tuple[int, ...]:
        """Return the shape of the chosen planes one after the other; of one plane, its own."""
        within = tuple(self.levels[0].shape[len(part.leading) :])
        return within if len(part.planes) == 1 else (len(part.planes), *within)

    def restore_box(
        self,
        plane: NDArray[Any],
        box: Box,
        weights: NDArray[Any] | None,
        degradation: Degradation,
        seen: ValueRange,
        reporter: Reporter,
        words: str,
    ) -> tuple[NDArray[Any], RestorationRecord]:
        """Return a copy of a plane with one box of it restored, and the record of that box."""
        done = self.restorer.restore(
            plane[box],
            degradation,
            strength=self.strength,
            mask=None if weights is None else weights[box],
            value_range=seen,
            channel_axis=-1 if self.selection.rgb else None,
            tiling=self.tiling,
            on_progress=lambda done, total: reporter.say(words, done, total),
        )
        restored = plane.copy()
        restored[box] = done.image
        return restored, done.record

    def record(
        self,
        part: Selection,
        seen: ValueRange,
        diagnosis: Diagnosis,
        input_sha256: str = "",
        sums: LinearitySums | None = None,
        done: Sequence[RestorationRecord] = (),
    ) -> RestorationRecord:
        """Write down what was done to one channel; without sums, that nothing was.

        What was remarked on its planes, which `done` has the records of, is part of it.
        """
        degradation = diagnosis.degradation
        note = caution(degradation, rgb=part.rgb) if sums and degradation else None
        notes = [note] if note else []
        notes += [remark for each in done for remark in each.notes]
        asked = self.tiling.statistics if self.tiling else "whole"
        sampled = any(each.statistics == "sampled" for each in done)
        return RestorationRecord(
            weights=self.restorer.weights,
            weights_sha256=self.restorer.weights_sha256,
            diagnosis=describe(diagnosis),
            steps=(degradation.value,) if sums and degradation else (),
            strength=self.strength,
            masked=self.mask.mask is not None,
            statistics="sampled" if sampled else asked,
            value_range=seen,
            device=str(self.restorer.device),
            dtype=str(self.restorer.dtype).removeprefix("torch."),
            input_sha256=input_sha256,
            notes=tuple(dict.fromkeys(notes)),
            scope=part.scope(self.levels[0]),
            linearity=sums.report() if sums else None,
        )

    def discard(self) -> None:
        """Leave nothing behind."""
        if self.pyramid is not None:
            self.pyramid.discard()


def preview(
    stack: Any,
    index: Index,
    box: Box,
    degradation: str | Degradation = AUTO,
    *,
    restorer: Restorer | None = None,
    rgb: bool = False,
    channel_axis: int | None = None,
    planes: Sequence[Index] | None = None,
    strength: float = 1.0,
    value_range: ValueRange | None = None,
    on_step: OnStep | None = None,
) -> StackRestoration:
    """Restore a part of one plane, as a sample of what `restore_stack` would do to `planes`.

    Value range and verdict come from up to 16 of the planes. Attention is measured on the part
    and its surroundings alone, so haze and low light may come out differently in the whole.

    Parameters
    ----------
    stack, degradation, restorer, rgb, channel_axis, planes, strength, value_range, on_step
        As for `restore_stack`.
    index : tuple of int
        Of the plane.
    box : tuple of slice
        Rows and columns, with bounds inside the plane.

    Returns
    -------
    StackRestoration
        Its image is the part, (h, w) or (h, w, 3 or 4).

    Raises
    ------
    ValueError
    """
    source = levels_of(stack)[0]
    asked = Selection.of(source, rgb=rgb, channel_axis=channel_axis, planes=planes)
    Selection.of(source, rgb=rgb, planes=[index])  # There is such a plane.
    part = next(
        (
            each
            for each in asked.channels()
            if each.channel_axis is None
            or (each.planes and each.planes[0][each.channel_axis] == index[each.channel_axis])
        ),
        asked,
    )
    restorer = restorer or shared_restorer(None, AUTO, AUTO)
    reporter = Reporter(on_step)
    seen = value_range or measure_range(source, part, part.voters(), reporter.part(0, 0.1))
    if degradation == AUTO:
        mask = StackMask(None, asked)
        diagnosis = judge(source, part, mask, seen, restorer, reporter.part(0.1, 0.3))
    else:
        diagnosis = Diagnosis.from_user(Degradation.from_name(degradation))
    plane = read_plane(source, index)
    rows, columns = (slice(max(side.start - HALO, 0) // 16 * 16, side.stop + HALO) for side in box)
    inner = tuple(
        slice(side.start - outer.start, side.stop - outer.start)
        for side, outer in zip(box, (rows, columns), strict=True)
    )
    kind, remark = to_remove(diagnosis, restorer.model.config.degradations, strength)
    restoring = reporter.part(0.3, 1)
    done = restorer.restore(
        plane[rows, columns],
        kind or Degradation.NOISE_15,
        strength=strength if kind else 0.0,
        value_range=seen,
        channel_axis=-1 if rgb else None,
        on_progress=lambda done, total: restoring.say("restoring the preview", done, total),
    )
    notes = (*done.record.notes, *([remark] if remark else []))
    record = replace(done.record, diagnosis=describe(diagnosis), strength=strength, notes=notes)
    return StackRestoration(np.asarray(done.image)[inner], (diagnosis,), (record,))


def residual(before: Any, after: Any, *, rgb: bool = False) -> Any:
    """Return before - after as float32, grey: what a restoration took away.

    Parameters
    ----------
    before, after : array_like
        Equally shaped, (..., H, W), or (..., H, W, 3 or 4) with `rgb`, of which the mean is taken.

    Returns
    -------
    array_like, (..., H, W)
        In memory if both are; otherwise a dask array that is computed where it is looked at.
    """
    sides = [before, after]
    if is_lazy(before) or is_lazy(after):
        sides = [as_dask(side) for side in sides]
    difference = sides[0].astype(np.float32) - sides[1].astype(np.float32)
    return difference[..., :3].mean(axis=-1) if rgb else difference


def save_stack(
    path: str | Path,
    stack: Any,
    records: Sequence[Any],
    *,
    rgb: bool = False,
    axes: str | None = None,
    pixel_size: dict[str, tuple[float, str]] | None = None,
    overwrite: bool = False,
    on_step: OnStep | None = None,
) -> tuple[Path, Path]:
    """Write a stack as OME-TIFF with its pixel size, plane by plane, and its records as JSON.

    Parameters
    ----------
    stack : array_like, or list of array_like
        Of several levels the finest is written.
    axes : str, optional
        Letters of the leading axes, such as ``"TZ"``; by default as many of ``TZC`` as are needed.

    Other parameters, results and errors are those of `dfpir.record.save_with_record`.
    """
    source = levels_of(stack)[0]
    selection = Selection.of(source, rgb=rgb)
    reporter = Reporter(on_step)
    letters = axes or {0: "", 1: "Z", 2: "TZ", 3: "TZC"}.get(len(selection.leading), "")
    if len(letters) != len(selection.leading) or len(set(letters)) != len(letters):
        message = (
            f"A TIFF of shape {tuple(source.shape)} needs {len(selection.leading)} different "
            f"letters of TZC for its leading axes; found {letters!r}."
        )
        raise ValueError(message)
    planes = (
        read_plane(source, index) for index, _ in reporter.each(selection.planes, "writing plane")
    )
    return save_with_record(
        path,
        planes,
        shape=source.shape,
        dtype=np.dtype(source.dtype),
        axes=letters + ("YXS" if rgb else "YX"),
        records=records,
        pixel_size=pixel_size,
        overwrite=overwrite,
    )


class Cancelled(Exception):
    """The generator that drives the work was closed."""


def steps_of(
    work: Callable[[OnStep], Result], *, threads: int | None = None
) -> Generator[Step, None, Result]:
    """Run work in a thread of its own and yield its steps; the generator returns its result.

    Closing the generator cancels the work at its next step and waits for it to end.

    Parameters
    ----------
    work : callable
        Takes `on_step` and calls it often.
    threads : int, optional
        Processor threads that PyTorch may use meanwhile. PyTorch keeps this number for each
        thread, so it is set in the one that works.

    Yields
    ------
    Step

    Raises
    ------
    Exception
        Whatever the work raises.
    """
    events: queue.SimpleQueue[tuple[Step | None, Any]] = queue.SimpleQueue()
    closed = threading.Event()
    latest = 0.0

    def on_step(step: Step) -> None:
        nonlocal latest
        if closed.is_set():
            raise Cancelled
        now = time.monotonic()
        if now - latest >= STEP_SECONDS or step.fraction >= 1:
            latest = now
            events.put((step, None))

    def run() -> None:
        usual = torch.get_num_threads()
        try:
            if threads is not None:
                torch.set_num_threads(threads)
            result, error = work(on_step), None
        except BaseException as caught:
            result, error = None, caught
        finally:
            torch.set_num_threads(usual)
        events.put((None, (result, error)))

    worker = threading.Thread(target=run, name="dfpir", daemon=True)
    worker.start()
    try:
        while True:
            step, ending = events.get()
            if step is None:
                result, error = ending
                if error is not None:
                    raise error
                return result  # type: ignore[no-any-return]
            yield step
    finally:
        closed.set()
        worker.join()


def restore_steps(
    stack: Any, degradation: str | Degradation = AUTO, *, threads: int | None = None, **options: Any
) -> Generator[Step, None, StackRestoration]:
    """Restore a stack as a generator of steps; see `restore_stack` and `steps_of`.

    Examples
    --------
    >>> steps = restore_steps(np.zeros((2, 32, 32), np.uint8), "noise-15")
    >>> all(0 <= step.fraction <= 1 for step in steps)
    True
    """
    return steps_of(
        lambda on_step: restore_stack(stack, degradation, on_step=on_step, **options),
        threads=threads,
    )


def classify_steps(
    stack: Any, *, threads: int | None = None, **options: Any
) -> Generator[Step, None, tuple[Diagnosis, ...]]:
    """Diagnose a stack as a generator of steps; see `classify_stack` and `steps_of`."""
    return steps_of(
        lambda on_step: classify_stack(stack, on_step=on_step, **options), threads=threads
    )


def save_steps(
    path: str | Path, stack: Any, records: Sequence[Any], **options: Any
) -> Generator[Step, None, tuple[Path, Path]]:
    """Write a stack as a generator of steps; see `save_stack` and `steps_of`."""
    return steps_of(lambda on_step: save_stack(path, stack, records, on_step=on_step, **options))


def preview_steps(
    stack: Any,
    index: Index,
    box: Box,
    degradation: str | Degradation = AUTO,
    *,
    threads: int | None = None,
    **options: Any,
) -> Generator[Step, None, StackRestoration]:
    """Restore a part of one plane as a generator of steps; see `preview` and `steps_of`."""
    return steps_of(
        lambda on_step: preview(stack, index, box, degradation, on_step=on_step, **options),
        threads=threads,
    )
