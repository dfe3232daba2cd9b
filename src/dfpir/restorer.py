"""Pixels, diagnosis, restoration, array: the one road every entrance leads to."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional as F

from dfpir import weights as weights_module
from dfpir.classifier import DegradationClassifier, kind_of, load_classifier
from dfpir.classifier import classify as classify_with
from dfpir.degradation import CLEAN, Degradation, Diagnosis, Verdict
from dfpir.kernels.cpu import TILE_BYTES
from dfpir.memory import first_that_fits
from dfpir.model import CONVOLVED_PIXELS, DFPIR, Attention, DFPIRConfig, Progress, portion
from dfpir.noise import contrast_for, with_contrast
from dfpir.pixels import (
    PixelError,
    ValueRange,
    check_pixels,
    clamped,
    colours_of,
    put_colours,
    to_array,
    to_pixels,
    untinted,
)
from dfpir.record import RestorationRecord, array_hash, describe
from dfpir.routing import check_steps, restore_by_steps
from dfpir.tiling import Tiling, plan, windows

AUTO = "auto"
PRECISIONS = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
STRONG_NOISE = (
    "The noise is stronger than the network has learnt, so the contrast was lowered for it and "
    "raised again."
)
"""A note of the record."""

STRIP_PIXELS = 2**14
"""Pixels of a strip at the network's own resolution, where memory is short: a step of well under a
second, so that progress is seen and a cancelled run ends soon."""

FEWEST_ROWS = 8
"""Height of the lowest strip; a strip reads two rows more than it writes."""

TILE_SIZES = (512, 256, 128)
"""Sizes of tiles, with sampled statistics, where not even the lowest strips fit."""

FREE_SHARE = 0.6
"""Fraction of the free memory that a whole image may take."""

SAMPLED_WINDOWS = 16
"""Windows on which the attention is measured with ``statistics="sampled"``."""


LEAVE: tuple[Verdict, ...] = ("clean", "unsure")
"""Verdicts that callers may hand on from `classify` in the place of a degradation."""

Way: TypeAlias = int | Tiling | None
"""How to work on an image: in strips of so many rows, in tiles, or at once."""


@dataclass(frozen=True, slots=True)
class Restoration:
    """A restored image and how it came about.

    Attributes
    ----------
    image : ndarray or Tensor
        Of the input's shape, dtype and value range.
    diagnosis : Diagnosis
        What was found, by vote if there are several images, or what the caller named.
    steps : tuple of Degradation
        What was restored, in this order; empty when the image was left alone.
    record : RestorationRecord
    diagnoses : tuple of Diagnosis
        One for each image where each had a verdict of its own; otherwise empty.
    taken : tuple of tuple of Degradation
        Likewise: what of `steps` was taken on each image.
    consistency : ndarray or Tensor, optional
        With `ensemble`: (H, W) or (N, H, W), how far apart the eight answers are at each pixel, as
        their standard deviation in the units of the image; 0 where nothing was restored. It tells
        where the network contradicts itself. It is no error bar: where all eight are wrong alike
        it is small.
    """

    image: NDArray[Any] | Tensor
    diagnosis: Diagnosis
    steps: tuple[Degradation, ...]
    record: RestorationRecord
    diagnoses: tuple[Diagnosis, ...] = ()
    taken: tuple[tuple[Degradation, ...], ...] = ()
    consistency: NDArray[np.float32] | Tensor | None = None

    @property
    def summary(self) -> str:
        """For people: what was found and what was done, a line for each run of images alike."""
        return summarise(self.diagnoses or (self.diagnosis,), self.taken or (self.steps,))

    @property
    def report(self) -> str:
        """`summary`, then how it was done and what the user should know of that."""
        record = self.record
        how = (
            f"Strength {record.strength:.0%}{', within the mask' if record.masked else ''}; "
            f"{record.statistics} statistics, {record.dtype} on {record.device}"
        )
        return "\n".join([self.summary, *([how] if self.steps else []), *record.notes])


def summarise(
    diagnoses: Sequence[Diagnosis], taken: Sequence[Sequence[Degradation]] | None = None
) -> str:
    """Return a line for people for each run of images of which the same is to be said.

    Parameters
    ----------
    diagnoses : sequence of Diagnosis
        One for each image.
    taken : sequence of sequence of Degradation, optional
        What was restored in each; without it the lines tell what was found and no more.
    """
    steps = (None,) * len(diagnoses) if taken is None else map(tuple, taken)
    images = list(zip(diagnoses, steps, strict=True))
    lines, first = [], 1
    for (_, _, alike), run in groupby(
        images, key=lambda image: (image[0].verdict, image[0].degradation, image[1])
    ):
        found = [each for each, _ in run]
        last = first + len(found) - 1
        place = f"image {first}" if first == last else f"images {first}-{last}"
        line = outcome(vote(found), alike)
        lines.append(line if len(images) == 1 else f"{place}: {line}")
        first = last + 1
    return "\n".join(lines)


def outcome(found: Diagnosis, taken: Sequence[Degradation] | None) -> str:
    """Return what was found and, given what was restored, what came of it."""
    if taken is None:
        return found.words
    acted = found.verdict == "degraded" and found.degradation in taken
    later = "".join(f", then {step.label}" for step in taken if step is not found.degradation)
    return f"{found.words}; {'restored' if acted else 'left as it is'}{later}"


@dataclass(slots=True)
class Course:
    """How to work on a batch, and how that goes, for its record.

    Attributes
    ----------
    tiling : Tiling, optional
    ensemble : bool
        Both as for `Restorer.restore`.
    attention : Attention, optional
        For the first step of each image, if it was measured on the batch.
    statistics : str
        See `RestorationRecord`.
    notes : list of str
        What the user should know.
    """

    tiling: Tiling | None
    ensemble: bool
    attention: Attention | None = None
    statistics: str = field(init=False)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.statistics = self.tiling.statistics if self.tiling else "whole"

    def remark(self, note: str) -> None:
        """Note something, once."""
        if note not in self.notes:
            self.notes.append(note)

    def fall_back(self, tiling: Tiling) -> None:
        """Note that an image had to be restored in tiles for want of memory."""
        self.statistics = tiling.statistics
        self.remark(
            f"Memory was short: worked in tiles of {tiling.size} pixels with sampled statistics, "
            "which come close to the exact result."
        )


def memory_needed(
    config: DFPIRConfig,
    size: tuple[int, int],
    dtype: torch.dtype,
    *,
    rows: int | None = None,
    device: torch.device | None = None,
) -> int:
    """Estimate the most bytes that restoring one image takes beside the weights.

    The widest place is the decoder's first level, whose features have twice the network's width.

    Parameters
    ----------
    config : DFPIRConfig
    size : tuple of int
        Height and width of the image.
    dtype : torch.dtype
    rows : int, optional
        Height of the strips; the whole image by default. On a processor they do not matter.
    device : torch.device, optional
        Without it, or on another device than a processor, the estimate is for plain PyTorch's
        passes, which need the most.
    """
    height, width = (-(-side // config.multiple) * config.multiple for side in size)
    level_height, level_width = height // config.stem, width // config.stem
    channels = 2 * config.width
    each = torch.empty((), dtype=dtype).element_size()
    planes = 12 * height * width
    if device is not None and device.type == "cpu":
        # The features, and what a block of details makes of them; a network without any has the
        # skip, a quarter of the pixels from below and both together, an eighth less.
        held = level_height * level_width * 2 * channels
        strips = CONVOLVED_PIXELS * 5 * channels  # seen, convolved, rearranged
        # Queries and keys of a perturbation block are projected side by side.
        return (held + planes + strips) * each + 11 * TILE_BYTES
    hidden = int(channels * config.expansion)
    held = 3 * channels + 2 * config.width  # input, result, one copy on the way; the skips
    strip = channels + 3 * 2 * hidden  # normalised; projected, padded, filtered
    tall = min((rows or level_height) + 2, level_height)
    return (level_width * (level_height * held + tall * strip) + planes) * each


def free_memory(device: torch.device) -> int:
    """Return the bytes still free on a device; 4 GiB where that cannot be told."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept  # PyTorch keeps it for our use
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        facts = dict(line.split(":", 1) for line in lines)
        return int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 4 * 2**30


def choose_device(name: str | torch.device = AUTO) -> torch.device:
    """Return the device of that name; "auto" takes the first of cuda, mps, xpu and cpu there is.

    Raises
    ------
    ValueError
        If the name is not a device, or there is no such device here.
    """
    if name == AUTO:
        for kind in ("cuda", "mps", "xpu"):
            module = getattr(torch, kind, None)
            if module is not None and module.is_available():
                return torch.device(kind)
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        message = f"Device {str(name)!r} cannot be used ({reason}); try 'auto' or 'cpu'."
        raise ValueError(message) from None
    return device


def name_of(dtype: torch.dtype) -> str:
    """Return a precision's name, such as ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def choose_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the precision of that name; "auto" is float32.

    Raises
    ------
    ValueError
        If the name is not a precision, or the device has none such.
    """
    if name == AUTO:
        return torch.float32
    dtype = PRECISIONS.get(str(name).removeprefix("torch."))
    if dtype is None or (dtype is torch.float64 and device.type == "mps"):
        names = ", ".join(PRECISIONS)
        message = f"Precision {name!r} cannot be used on {device.type}; expected auto or {names}."
        raise ValueError(message)
    return dtype


def to_remove(
    found: Diagnosis, known: Sequence[Degradation], strength: float
) -> tuple[Degradation | None, str | None]:
    """Return what to remove from an image, if anything, and what to remark about it.

    Where the classifier found what the weights were not trained for, the image is left as it is.
    What a user names must be known: the network says so.
    """
    kind = found.degradation if found.verdict == "degraded" else None
    if kind is None or found.told or kind in known:
        return (kind if strength > 0 else None), None
    return None, (
        f"These weights were not trained for {kind.value!r}, which was found: it was left as it is."
    )


def vote(diagnoses: Sequence[Diagnosis]) -> Diagnosis:
    """Return one diagnosis for all images of a stack: the most frequent verdict.

    Noise of any level is one kind. Probabilities are averaged over the stack, sigma over the images
    that agree, and the level of noise is the one nearest to that. A diagnosis alone is the result.
    """
    if len(diagnoses) == 1:
        return diagnoses[0]
    parties: dict[tuple[str, str], list[Diagnosis]] = {}
    for each in diagnoses:
        kind = kind_of(each.degradation) if each.degradation else CLEAN
        parties.setdefault((each.verdict, kind), []).append(each)
    names = diagnoses[0].probabilities
    mean = {
        name: sum(each.probabilities[name] for each in diagnoses) / len(diagnoses) for name in names
    }
    together = Diagnosis("unsure", None, mean)
    chosen = max(
        parties.values(),
        key=lambda party: (len(party), together.probability(party[0].degradation)),
    )
    degradation = Counter(each.degradation for each in chosen).most_common(1)[0][0]
    sigmas = [each.sigma for each in chosen if each.sigma is not None]
    sigma = sum(sigmas) / len(sigmas) if sigmas else None
    if sigma is not None:
        degradation = Degradation.nearest_noise(sigma)
    return Diagnosis(chosen[0].verdict, degradation, mean, sigma)


def put_outside(
    image: NDArray[Any], array: NDArray[Any], outside: NDArray[np.bool_], channel_axis: int | None
) -> None:
    """Bring back, to the last bit, what lies outside of a mask.

    The way to pixels and back rounds floats and large integers. `outside` is (H, W) or (N, H, W).
    """
    after, before = image, array
    if channel_axis is not None:
        after, before = (np.moveaxis(each, channel_axis, -1) for each in (after, before))
        outside = outside[..., None]
    if outside.ndim > after.ndim:
        outside = outside[0]
    np.copyto(after, before, where=outside)


class Restorer:
    """Restores images with one set of weights on one device.

    Parameters
    ----------
    weights : str or Path, optional
        A name of weights.json or a safetensors file; the bundled default if not given.
    model : DFPIR, optional
        A network to use instead. It is never moved or changed: its owner chose its device.
    device : str or torch.device
        "auto", "cpu", "cuda", "cuda:1", "mps", "xpu".
    dtype : str
        "auto" (float32: few processors are fast in less, and on none of them is the answer the
        same), "float32", "float64", "bfloat16" or "float16".

    Raises
    ------
    ValueError
        If weights, device or precision cannot be had; the message says what to do.

    Examples
    --------
    >>> restorer = Restorer(device="cpu")
    >>> noisy = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    >>> restorer.restore(noisy, "noise-50").image.shape
    (32, 40, 3)
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        model: DFPIR | None = None,
        device: str | torch.device = AUTO,
        dtype: str | torch.dtype = AUTO,
    ) -> None:
        self.weights, self.weights_sha256 = "", ""
        if model is not None:
            if weights is not None:
                message = "Give weights or a model, not both."
                raise ValueError(message)
            self.model = model
            return
        chosen = choose_device(device)
        path = weights_module.resolve(weights)
        self.weights = str(weights or weights_module.default_name())
        self.weights_sha256 = weights_module.file_hash(path)
        loaded = weights_module.load_model(path)
        self.model = loaded.to(chosen, choose_dtype(dtype, chosen))

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the network."""
        return next(self.model.parameters()).dtype

    def classify_pixels(
        self, pixels: Tensor, *, on_progress: Progress | None = None
    ) -> list[Diagnosis]:
        """Diagnose each image of (N, C, H, W) with values about 0..1; C is 1, 3 or 4.

        Raises
        ------
        PixelError
            If these are not such images; see the message.
        """
        return classify_images(pixels, on_progress)

    def restore(
        self,
        array: ArrayLike,
        degradation: str | Degradation = AUTO,
        *,
        strength: float = 1.0,
        mask: ArrayLike | None = None,
        value_range: ValueRange | None = None,
        channel_axis: int | None = None,
        tiling: Tiling | None = None,
        ensemble: bool = False,
        most_steps: int = 1,
        on_progress: Progress | None = None,
    ) -> Restoration:
        """Restore an image, or a stack of images that suffer alike.

        Parameters
        ----------
        array : array_like
            (H, W), (H, W, C) or (N, H, W, C), other layouts by `channel_axis`; C is 1, 3 or 4,
            alpha is carried through. Any integers of up to 32 bits, or floats.
        degradation : str or Degradation
            What to remove; "auto" lets the classifier say, and acts on its verdict "degraded" only.
        strength : float
            0 keeps the input, 1 takes the restored image, anything between blends.
        mask : array_like, optional
            (H, W) or (N, H, W), 0..1 or boolean: where to restore.
        value_range : tuple of float, optional
            Input values that count as black and white; by default see
            `dfpir.pixels.natural_range`. One range holds for the whole stack.
        channel_axis : int, optional
        tiling : Tiling, optional
            How to work in parts; by default in strips or at once, with one answer either way.
        ensemble : bool
            Take the mean of what the network makes of the eight flips and quarter turns of the
            image, for eight times the work (Timofte et al., "Seven ways to improve example-based
            single image super resolution", CVPR 2016, section 3.5), and tell their `consistency`.
        most_steps : int
            With "auto" and more than 1: look again after restoring, and go on while something else
            is surely found, up to three times; see `dfpir.routing.restore_by_steps`.
        on_progress : callable, optional
            ``on_progress(done, total)``; raising from it cancels.

        Returns
        -------
        Restoration
            Its image has the array's shape, dtype and value range.

        Raises
        ------
        ValueError
            If the array is not such an image, or an argument does not fit; see the message.
        """
        array = np.asarray(array)
        pixels, form = to_pixels(array, channel_axis=channel_axis, value_range=value_range)
        weight = None if mask is None else torch.from_numpy(np.ascontiguousarray(mask, np.float32))
        if weight is not None and weight.shape[-2:] != pixels.shape[-2:]:
            height, width = pixels.shape[-2:]
            message = (
                f"Mask has shape {tuple(weight.shape)}; expected ({height}, {width}), the image's. "
                "Resize it first."
            )
            raise PixelError(message)
        done = self.restore_pixels(
            pixels,
            degradation,
            strength=strength,
            mask=weight,
            tiling=tiling,
            ensemble=ensemble,
            most_steps=most_steps,
            on_progress=on_progress,
        )
        assert isinstance(done.image, Tensor)
        image = to_array(done.image, form) if done.steps else array.copy()
        if weight is not None and done.steps:
            put_outside(image, array, weight.numpy() == 0, form.channel_axis)
        consistency = None
        if isinstance(done.consistency, Tensor):
            low, high = form.value_range
            spread = done.consistency.numpy() * (high - low)
            stack = array.ndim == (3 if form.channel_axis is None else 4)
            consistency = (spread if stack else spread[0]).astype(np.float32)
        record = replace(
            done.record,
            value_range=form.value_range,
            input_sha256=array_hash(array),
            notes=(*form.notes, *done.record.notes),
        )
        return replace(done, image=image, record=record, consistency=consistency)

    def restore_pixels(
        self,
        pixels: Tensor,
        degradation: str | Degradation = AUTO,
        *,
        strength: float = 1.0,
        mask: Tensor | None = None,
        tiling: Tiling | None = None,
        ensemble: bool = False,
        most_steps: int = 1,
        one_verdict: bool = True,
        on_progress: Progress | None = None,
        on_image: Callable[[int, Tensor], None] | None = None,
    ) -> Restoration:
        """Restore a batch of images, one at a time; the middle of `restore`, without its doors.

        With sampled statistics and one verdict the attention is measured once, on windows from all
        over the batch, which is faster and keeps the frames of a video from flickering.

        Parameters
        ----------
        pixels : Tensor, (N, C, H, W), values about 0..1, any floating dtype and device
            C is 1 (grey), 3 (RGB) or 4 (RGBA; alpha is carried through).
        degradation : str or Degradation
            As for `restore`. "clean" and "unsure", verdicts handed on, leave the images alone.
        mask : Tensor, (H, W) or (N, H, W), optional
            0..1: where to restore. It is stretched to the size of the images.
        ensemble : bool
            As for `restore`. The attention is measured on each image, flip and turn.
        most_steps : int
            As for `restore`. One verdict for several images is one step, found by vote.
        one_verdict : bool
            With "auto": whether one verdict, found by vote, rules all images, or each its own.
        on_progress : callable, optional
            ``on_progress(done, total)``; with 0 done after each image that is judged.
        on_image : callable, optional
            ``on_image(number, image)`` after each image, with its restored pixels (C, H, W).

        Returns
        -------
        Restoration
            Its image has the shape, strides, dtype and device of `pixels`, and is `pixels` itself
            where nothing was to be done.

        Raises
        ------
        ValueError
            If the pixels or an argument do not fit; see the message.
        """
        check_strength(strength)
        check_steps(most_steps)
        check_pixels(pixels)
        weight = checked_mask(mask, len(pixels))
        diagnosis, diagnoses = judge(pixels, degradation, one_verdict, on_progress)
        course = Course(tiling, ensemble)
        verdicts = diagnoses or (diagnosis,) * len(pixels)
        known = self.model.config.degradations
        acting = []
        for found in verdicts:
            kind, remark = to_remove(found, known, strength)
            acting.append(kind is not None)
            if remark:
                course.remark(remark)
        if any(acting) and weight is not None and not weight.any():
            acting = [False] * len(pixels)
            course.remark("The mask is empty, so nothing was restored.")
        image = pixels
        if any(acting):
            image = torch.empty_like(pixels)
            sampled = tiling is not None and tiling.statistics == "sampled"
            if tiling is not None and sampled and not diagnoses and not ensemble:
                assert diagnosis.degradation is not None
                course.attention = self.sample(pixels, diagnosis.degradation, tiling, on_progress)
        measured = 0 if course.attention is None else SAMPLED_WINDOWS
        spread = torch.zeros(len(pixels), *pixels.shape[2:]) if ensemble else None
        most = 1 if diagnosis.told or (len(pixels) > 1 and not diagnoses) else most_steps
        taken: list[tuple[Degradation, ...]] = [()] * len(pixels)
        for number, found in enumerate(verdicts if any(acting) else ()):
            image[number] = pixels[number]
            if acting[number]:
                colours = colours_of(pixels[number])
                progress = portion(on_progress, number, len(pixels), begun=measured)
                share = blend(strength, weight, number, colours)
                restored, taken[number], deviation = self.run_steps(
                    colours, found, most, course, progress
                )
                restored = untinted(restored, colours).to(colours.dtype)
                put_colours(image[number], torch.lerp(colours, restored, share))
                if spread is not None:
                    spread[number] = (share * deviation)[0, 0]
            if on_image is not None:
                on_image(number, image[number])
        steps = tuple(dict.fromkeys(step for each in taken for step in each))
        image = image if steps else pixels
        record = RestorationRecord(
            weights=self.weights,
            weights_sha256=self.weights_sha256,
            diagnosis=describe(diagnosis),
            steps=tuple(step.value for step in steps),
            strength=strength,
            masked=mask is not None,
            statistics=course.statistics,
            value_range=(0.0, 1.0),
            device=str(self.device),
            dtype=name_of(self.dtype),
            ensemble=ensemble,
            notes=tuple(course.notes),
        )
        return Restoration(
            image, diagnosis, steps, record, diagnoses, tuple(taken) if diagnoses else (), spread
        )

    def run_steps(
        self,
        pixels: Tensor,
        found: Diagnosis,
        most: int,
        course: Course,
        on_progress: Progress | None,
    ) -> tuple[Tensor, tuple[Degradation, ...], Tensor]:
        """Restore one image (1, 3, H, W) as found, and as found again afterwards; see `restore`.

        Returns
        -------
        image : Tensor, (1, 3, H, W)
        steps : tuple of Degradation
        deviation : Tensor, (1, 1, H, W)
            With an ensemble: of the answers, over all steps; otherwise zeros.
        """
        begun: list[Degradation] = []
        variances: list[Tensor] = []

        def look(image: Tensor) -> Diagnosis:
            return classify_images(image)[0]

        def remove(given: Tensor, seen: Diagnosis) -> Tensor:
            kind = seen.degradation
            assert kind is not None
            begun.append(kind)
            # A later step makes the way longer, at the place that has been reached.
            progress = portion(on_progress, len(begun) - 1, len(begun))
            if course.attention is not None and len(begun) == 1:
                return self.run(given, kind, course.tiling, progress, course.attention, course)
            # Only of the strongest noise is it asked whether it is stronger still.
            contrast = 1.0
            if kind is Degradation.NOISE_50:
                contrast = contrast_for(seen.sigma or look(given).sigma)
            if contrast < 1:
                course.remark(STRONG_NOISE)

            def attempt(lowered: Tensor) -> Tensor:
                if not course.ensemble:
                    return self.run(lowered, kind, course.tiling, progress, None, course)
                restored, deviation = self.run_turned(lowered, kind, course, progress)
                variances.append((deviation / contrast) ** 2)
                return restored

            return with_contrast(given, contrast, attempt)

        known = tuple(Degradation) if found.told else self.model.config.degradations
        restored, steps = restore_by_steps(pixels, found, look, remove, most, known)
        for kind in begun[len(steps) :]:
            course.remark(f"Removing {kind.label} was undone: it seemed no less likely afterwards.")
        variance = torch.zeros_like(pixels[:, :1], dtype=torch.float32)
        for each in variances[: len(steps)]:  # one that was undone leaves no doubt
            variance = variance + each
        return restored, steps, variance.sqrt()

    def run_turned(
        self,
        pixels: Tensor,
        degradation: Degradation,
        course: Course,
        on_progress: Progress | None,
    ) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of eight answers; see `ensemble` of `restore`.

        The deviation, (1, 1, H, W), is the root mean square of those of the colours.
        """
        mean, squares = (torch.zeros_like(pixels, dtype=torch.float32) for _ in range(2))
        for number in range(8):
            progress = portion(on_progress, number, 8)
            answer = self.run(
                turned(pixels, number), degradation, course.tiling, progress, None, course
            )
            change = turned(answer, number, back=True) - mean
            mean += change / (number + 1)
            squares += change**2 * (
                number / (number + 1)
            )  # Welford's sum, steady in any precision.
        return mean, (squares / 7).mean(dim=1, keepdim=True).sqrt()

    def run(
        self,
        pixels: Tensor,
        degradation: Degradation,
        tiling: Tiling | None = None,
        on_progress: Progress | None = None,
        attention: Attention | None = None,
        course: Course | None = None,
    ) -> Tensor:
        """Apply the network to one image (1, 3, H, W), whole, by strips or by tiles.

        Where memory runs out it is tried again with less: in lower strips, which give the same
        answer, and at last in tiles with sampled statistics. What overflows in half precision is
        done again in single.

        Parameters
        ----------
        attention : Attention, optional
            For sampled statistics; measured on this image if not given.
        course : Course, optional
            Is told what had to be done otherwise than asked for.

        Returns
        -------
        Tensor
            Of the dtype and device of `pixels`; it does not leave the range that 0..1 and the
            input span.

        Raises
        ------
        ValueError
            If the network's answer is not finite.
        """
        ways = self.ways((pixels.shape[-2], pixels.shape[-1]), tiling)
        attempts = [
            partial(self.run_once, pixels, degradation, way, on_progress, attention) for way in ways
        ]
        taken, restored = first_that_fits(attempts, self.device)
        way = ways[taken]
        if course is not None and isinstance(way, Tiling) and way != tiling:
            course.fall_back(way)
        if not bool(restored.isfinite().all()):
            if self.dtype is torch.float32 or self.dtype is torch.float64:
                message = "The network's answer is not finite; its weights may be damaged."
                raise ValueError(message)
            if course is not None:
                course.remark(f"Values overflowed in {name_of(self.dtype)}; restored in float32.")
            single = Restorer(model=copy.deepcopy(self.model).float())
            return single.run(pixels, degradation, tiling, on_progress, None, course)
        # Out of inference mode, so that callers may go on with an ordinary tensor.
        return clamped(restored, pixels).to(pixels.device, pixels.dtype).clone()

    @property
    def takes_strips(self) -> bool:
        """Whether strips save memory; a processor's passes work in small tiles of their own."""
        return self.device.type != "cpu"

    def strip_rows(self, size: tuple[int, int]) -> int | None:
        """Return the height of the strips an image (height, width) is worked through in.

        None, all rows at once, on a processor, and elsewhere where the memory allows.
        """
        if not self.takes_strips:
            return None
        config = self.model.config
        needed = memory_needed(config, size, self.dtype, device=self.device)
        if needed < FREE_SHARE * free_memory(self.device):
            return None
        return max(STRIP_PIXELS * config.stem // size[1], FEWEST_ROWS)

    def ways(self, size: tuple[int, int], tiling: Tiling | None) -> list[Way]:
        """Return ways to work on an image (height, width), each with less memory than the last."""
        if tiling is not None and tiling.statistics == "sampled":
            smaller = [replace(tiling, size=side) for side in TILE_SIZES if side < tiling.size]
            return [tiling, *smaller]
        rows = self.strip_rows(size)
        if tiling is not None:
            rows = max(tiling.size // self.model.config.stem, 1)
        lowered = self.takes_strips and (rows is None or rows > FEWEST_ROWS)
        lower = [FEWEST_ROWS] if lowered else []
        return [rows, *lower, *(Tiling(side, statistics="sampled") for side in TILE_SIZES)]

    def run_once(
        self,
        pixels: Tensor,
        degradation: Degradation,
        way: Way,
        on_progress: Progress | None,
        attention: Attention | None,
    ) -> Tensor:
        """Apply the network to one image in one way; the result is on the network's device."""
        with torch.inference_mode():
            # The correction of a network in half precision is added to pixels that are not rounded.
            given = pixels.to(self.device, torch.promote_types(self.dtype, torch.float32))
            if not isinstance(way, Tiling):
                return self.model(given, degradation, rows=way, on_progress=on_progress)  # type: ignore[no-any-return]
            if attention is None:
                attention = self.sample(pixels, degradation, way, on_progress)
                on_progress = portion(on_progress, 0, 1, begun=SAMPLED_WINDOWS)
            return self.run_tiles(given, degradation, way, on_progress, attention)

    def sample(
        self,
        pixels: Tensor,
        degradation: Degradation,
        tiling: Tiling,
        on_progress: Progress | None = None,
    ) -> Attention:
        """Measure the attention on windows from all over a batch (N, C, H, W).

        Progress counts this as `SAMPLED_WINDOWS` steps, before one for each tile of the batch.
        """
        count, _, height, width = pixels.shape
        tiles = count * len(plan(height, width, tiling, self.model.config.multiple))

        def report(done: int, total: int) -> None:
            if on_progress is not None:
                on_progress(done * SAMPLED_WINDOWS // total, SAMPLED_WINDOWS + tiles)

        def measure(side: int) -> Attention:
            side = min(side, height, width)
            places = windows(height, width, side, SAMPLED_WINDOWS)
            total = max(len(places), min(count, SAMPLED_WINDOWS))
            crops = []
            for number in range(total):
                rows, columns = places[number % len(places)]
                colours = colours_of(pixels[number * count // total])
                crops.append(colours[..., rows, columns])
            return self.measure(torch.cat(crops), degradation, report)

        sides = [tiling.size, *(side for side in TILE_SIZES if side < tiling.size)]
        return first_that_fits([partial(measure, side) for side in sides], self.device)[1]

    def measure(
        self, crops: Tensor, degradation: Degradation, on_progress: Progress | None = None
    ) -> Attention:
        """Measure the attention on crops (N, 3, H, W) of one image together."""
        count, _, height, width = crops.shape
        with torch.inference_mode():
            return self.model.measure(
                crops.to(self.device, self.dtype),
                degradation,
                rows=self.strip_rows((height * count, width)),
                on_progress=on_progress,
            )

    def run_tiles(
        self,
        pixels: Tensor,
        degradation: Degradation,
        tiling: Tiling,
        on_progress: Progress | None,
        attention: Attention,
    ) -> Tensor:
        """Apply the network with the given attention, tile by tile."""
        height, width = pixels.shape[-2:]
        tiles = plan(height, width, tiling, self.model.config.multiple)
        restored = torch.empty_like(pixels)
        for number, tile in enumerate(tiles):
            part = self.model(
                pixels[..., tile.read_rows, tile.read_columns], degradation, attention=attention
            )
            restored[..., tile.rows, tile.columns] = part[(..., *tile.inner)]
            if on_progress is not None:
                on_progress(number + 1, len(tiles))
        return restored


def turned(pixels: Tensor, number: int, *, back: bool = False) -> Tensor:
    """Return one of the eight flips and quarter turns of (..., H, W), or undo it."""
    quarters = number % 4
    if back:
        pixels = torch.rot90(pixels, -quarters, (-2, -1))
        return pixels.flip(-1) if number >= 4 else pixels
    return torch.rot90(pixels.flip(-1) if number >= 4 else pixels, quarters, (-2, -1))


@lru_cache(maxsize=1)
def bundled_classifier() -> DegradationClassifier:
    """Return the classifier that ships in the package."""
    return load_classifier(weights_module.resolve(role="classifier"))


def judge(
    pixels: Tensor,
    degradation: str | Degradation,
    one_verdict: bool,
    on_progress: Progress | None,
) -> tuple[Diagnosis, tuple[Diagnosis, ...]]:
    """Return the verdict on a batch and, where each image is to have its own, those."""
    if degradation == AUTO:

        def alive(_: int, total: int) -> None:
            if on_progress is not None:
                on_progress(0, total)

        found = classify_images(pixels, alive)
        return vote(found), () if one_verdict or len(found) == 1 else tuple(found)
    for verdict in LEAVE:
        if degradation == verdict:
            return Diagnosis(verdict, None, {CLEAN: 1.0}, told=True), ()
    return Diagnosis.from_user(Degradation.from_name(degradation)), ()


def classify_images(pixels: Tensor, on_progress: Progress | None = None) -> list[Diagnosis]:
    """Diagnose each image of a batch on the processor; see `Restorer.classify_pixels`."""
    check_pixels(pixels)
    found: list[Diagnosis] = []
    for image in pixels:
        found += classify_with(bundled_classifier(), colours_of(image).to("cpu", torch.float32))
        if on_progress is not None:
            on_progress(len(found), len(pixels))
    return found


def check_strength(strength: float) -> None:
    """Refuse a strength that is not a fraction.

    Raises
    ------
    ValueError
    """
    if not 0 <= strength <= 1:
        message = f"strength is {strength}; expected 0 (nothing) to 1 (fully restored)."
        raise ValueError(message)


def checked_mask(mask: Tensor | None, count: int) -> Tensor | None:
    """Return a mask for `count` images as (1 or N, H, W), having checked it.

    Raises
    ------
    PixelError
        If its shape or values do not fit.
    """
    if mask is None:
        return None
    weight = mask[None] if mask.ndim == 2 else mask
    if weight.ndim != 3 or weight.numel() == 0 or len(weight) not in (1, count):
        message = (
            f"Mask has shape {tuple(mask.shape)}; expected (H, W), or (N, H, W) for N={count} "
            "images. Select or repeat masks first."
        )
        raise PixelError(message)
    if not bool(((weight >= 0) & (weight <= 1)).all()):
        message = "Mask has values outside 0..1; expected 0 (keep) to 1 (restore). Scale it first."
        raise PixelError(message)
    return weight


def blend(strength: float, weight: Tensor | None, number: int, image: Tensor) -> Tensor:
    """Return the share that the restored image number `number` has in the result.

    Parameters
    ----------
    weight : Tensor, (1 or N, H, W), optional
        A mask, which is stretched to the size of the image.
    image : Tensor, (1, 3, H, W)
    """
    if weight is None:
        return torch.as_tensor(strength).to(image)
    own = weight[number % len(weight)][None, None].to(image.device, torch.float32)
    if own.shape[-2:] != image.shape[-2:]:
        own = F.interpolate(own, size=image.shape[-2:], mode="bilinear")
    return (strength * own).to(image)


@lru_cache(maxsize=2)
def shared_restorer(weights: str | None, device: str, dtype: str) -> Restorer:
    """Return a restorer that repeated calls of `restore` share."""
    return Restorer(weights, device=device, dtype=dtype)


def restore(
    image: ArrayLike,
    degradation: str | Degradation = AUTO,
    *,
    weights: str | Path | None = None,
    device: str = AUTO,
    dtype: str = AUTO,
    strength: float = 1.0,
    mask: ArrayLike | None = None,
    value_range: ValueRange | None = None,
    channel_axis: int | None = None,
    tiling: Tiling | None = None,
    on_progress: Progress | None = None,
) -> NDArray[Any]:
    """Restore an image and return it; see `Restorer.restore` for the arguments.

    Parameters
    ----------
    image : array_like
        (H, W), (H, W, C) or (N, H, W, C), any integers of up to 32 bits, or floats.
    degradation : str or Degradation
        "auto", or what to remove.
    weights, device, dtype
        See `Restorer`; the network is kept for the next call.

    Returns
    -------
    ndarray
        Of the image's shape, dtype and value range.

    Raises
    ------
    ValueError
        If the image or an argument does not fit; see the message.

    Examples
    --------
    >>> import dfpir
    >>> dark = np.full((16, 16, 3), 9, np.uint8)
    >>> dfpir.restore(dark, "low-light", device="cpu").dtype
    dtype('uint8')
    """
    restorer = shared_restorer(None if weights is None else str(weights), device, dtype)
    done = restorer.restore(
        image,
        degradation,
        strength=strength,
        mask=mask,
        value_range=value_range,
        channel_axis=channel_axis,
        tiling=tiling,
        on_progress=on_progress,
    )
    assert isinstance(done.image, np.ndarray)
    return done.image


def classify(
    image: ArrayLike,
    *,
    channel_axis: int | None = None,
    value_range: ValueRange | None = None,
) -> Diagnosis:
    """Say what is wrong with an image, or with a stack of images by vote.

    Parameters
    ----------
    image : array_like
        As for `restore`.
    channel_axis : int, optional
    value_range : tuple of float, optional

    Returns
    -------
    Diagnosis

    Raises
    ------
    ValueError
        If the image does not fit; see the message.
    """
    pixels, _ = to_pixels(np.asarray(image), channel_axis=channel_axis, value_range=value_range)
    return vote(classify_images(pixels))
