"""Pixels, diagnosis, restoration, array: the one road every entrance leads to."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dfpir import weights as weights_module
from dfpir.classifier import DegradationClassifier, load_classifier
from dfpir.classifier import classify as classify_with
from dfpir.degradation import CLEAN, Degradation, Diagnosis
from dfpir.model import DFPIR, DFPIRConfig, Progress
from dfpir.pixels import PixelError, ValueRange, to_array, to_pixels
from dfpir.record import RestorationRecord, array_hash, describe
from dfpir.tiling import Tiling, plan, windows

AUTO = "auto"
PRECISIONS = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
STRIP_PIXELS = 2**14
"""Pixels of a strip at the network's own resolution: what a processor's cache holds best, and a
step of well under a second, so that progress is seen and a cancelled run ends soon."""

FEWEST_ROWS = 8
"""Height of the lowest strip; a strip reads two rows more than it writes."""

FREE_SHARE = 0.6
"""Fraction of the free memory that a whole image may take."""

SAMPLED_WINDOWS = 16
"""Windows on which the attention is measured with ``statistics="sampled"``."""


@dataclass(frozen=True, slots=True)
class Restoration:
    """A restored image and how it came about.

    Attributes
    ----------
    image : ndarray or Tensor
        Of the input's shape, dtype and value range.
    diagnosis : Diagnosis
        What was found, or what the caller named.
    steps : tuple of Degradation
        What was restored; empty when the image was left alone.
    record : RestorationRecord
    """

    image: NDArray[Any] | Tensor
    diagnosis: Diagnosis
    steps: tuple[Degradation, ...]
    record: RestorationRecord

    @property
    def summary(self) -> str:
        """One line for people: what was found and what was done."""
        found = self.diagnosis
        if found.told and found.degradation:
            return f"restored as told: {found.degradation.label}"
        if found.verdict == "clean":
            return f"clean ({found.confidence:.0%} sure); left as it is"
        assert found.degradation is not None
        words = f"{found.degradation.label} ({found.confidence:.0%} sure)"
        if found.degradation.sigma is not None and found.sigma is not None:
            words = f"Gaussian noise, sigma about {found.sigma:.0f} ({found.confidence:.0%} sure)"
        if found.verdict == "unsure":
            return f"unsure, perhaps {words}; left as it is"
        return f"{words}; restored" if self.steps else f"{words}; left as it is"


def memory_needed(
    config: DFPIRConfig, size: tuple[int, int], dtype: torch.dtype, *, rows: int | None = None
) -> int:
    """Estimate the most bytes that restoring one image takes beside the weights.

    The widest place is the last one: the decoder's first level, whose features have twice the
    network's width. There live the features, the result, the skips below, and, for all rows or
    for a strip, what `dfpir.kernels.cpu.filtered` makes of them.

    Parameters
    ----------
    config : DFPIRConfig
    size : tuple of int
        Height and width of the image.
    dtype : torch.dtype
    rows : int, optional
        Height of the strips; the whole image by default.
    """
    height, width = (-(-side // config.multiple) * config.multiple for side in size)
    level_height, level_width = height // config.stem, width // config.stem
    channels = 2 * config.width
    hidden = int(channels * config.expansion)
    held = 3 * channels + 2 * config.width  # input, result, one copy on the way; the skips
    strip = channels + 3 * 2 * hidden  # normalised; projected, padded, filtered
    tall = min((rows or level_height) + 2, level_height)
    elements = level_width * (level_height * held + tall * strip) + 12 * height * width
    return elements * torch.empty((), dtype=dtype).element_size()


def free_memory(device: torch.device) -> int:
    """Return the bytes still free on a device; 4 GiB where that cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
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


def vote(diagnoses: Sequence[Diagnosis]) -> Diagnosis:
    """Return one diagnosis for all images of a stack: the most frequent verdict.

    Probabilities are averaged over the stack, sigma over the images that agree.
    """
    ranked = Counter((each.verdict, each.degradation) for each in diagnoses).most_common()
    tied = [kind for kind, count in ranked if count == ranked[0][1]]
    names = diagnoses[0].probabilities
    mean = {
        name: sum(each.probabilities[name] for each in diagnoses) / len(diagnoses) for name in names
    }
    verdict, degradation = max(
        tied, key=lambda kind: mean[kind[1].value] if kind[1] else mean[CLEAN]
    )
    sigmas = [
        each.sigma
        for each in diagnoses
        if each.sigma is not None and (each.verdict, each.degradation) == (verdict, degradation)
    ]
    sigma = sum(sigmas) / len(sigmas) if sigmas else None
    return Diagnosis(verdict, degradation, mean, sigma)


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
        "auto" (float32), "float32", "float64", "bfloat16" or "float16".

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

    def classify_pixels(self, pixels: Tensor) -> list[Diagnosis]:
        """Diagnose each image of (N, 3, H, W) with values 0..1."""
        return classify_with(bundled_classifier(), pixels.to("cpu", torch.float32))

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
        done = self.restore_pixels(
            pixels,
            degradation,
            strength=strength,
            mask=None if mask is None else torch.from_numpy(np.asarray(mask, dtype=np.float32)),
            tiling=tiling,
            on_progress=on_progress,
        )
        assert isinstance(done.image, Tensor)
        image = to_array(done.image, form) if done.steps else array.copy()
        record = replace(
            done.record,
            value_range=form.value_range,
            input_sha256=array_hash(array),
            notes=form.notes,
        )
        return Restoration(image, done.diagnosis, done.steps, record)

    def restore_pixels(
        self,
        pixels: Tensor,
        degradation: str | Degradation = AUTO,
        *,
        strength: float = 1.0,
        mask: Tensor | None = None,
        tiling: Tiling | None = None,
        on_progress: Progress | None = None,
    ) -> Restoration:
        """Restore a batch of images; the middle of `restore`, without its doors.

        Parameters
        ----------
        pixels : Tensor, (N, 3, H, W), values about 0..1, any floating dtype and device
            With "auto" one verdict, found by vote, rules all of them.
        mask : Tensor, optional
            (H, W) or (N, H, W), 0..1: where to restore.

        Returns
        -------
        Restoration
            Its image has the shape, dtype and device of `pixels`.

        Raises
        ------
        ValueError
        """
        if not 0.0 <= strength <= 1.0:
            message = f"strength is {strength}; expected 0 (nothing) to 1 (fully restored)."
            raise ValueError(message)
        weight = fitted_mask(mask, pixels)
        if degradation == AUTO:
            diagnosis = vote(self.classify_pixels(pixels))
        else:
            diagnosis = Diagnosis.from_user(Degradation.from_name(degradation))
        steps: tuple[Degradation, ...] = ()
        image = pixels
        if diagnosis.verdict == "degraded" and diagnosis.degradation and strength > 0:
            steps = (diagnosis.degradation,)
            image = torch.empty_like(pixels)
            for number, each in enumerate(torch.split(pixels, 1)):
                progress = portion(on_progress, number, len(pixels))
                restored = self.run(each, diagnosis.degradation, tiling, progress)
                blend = strength if weight is None else strength * weight[number]
                image[number] = torch.lerp(each[0], restored[0], torch.as_tensor(blend).to(each))
        record = RestorationRecord(
            weights=self.weights,
            weights_sha256=self.weights_sha256,
            diagnosis=describe(diagnosis),
            steps=tuple(step.value for step in steps),
            strength=strength,
            masked=mask is not None,
            statistics=tiling.statistics if tiling else "whole",
            value_range=(0.0, 1.0),
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
        )
        return Restoration(image, diagnosis, steps, record)

    def run(
        self,
        pixels: Tensor,
        degradation: Degradation,
        tiling: Tiling | None = None,
        on_progress: Progress | None = None,
    ) -> Tensor:
        """Apply the network to one image (1, 3, H, W), whole, by strips or by tiles.

        The result has the dtype and device of `pixels` and does not leave the range that 0..1 and
        the input span.
        """
        low, high = min(float(pixels.min()), 0.0), max(float(pixels.max()), 1.0)
        model, size = self.model, (pixels.shape[-2], pixels.shape[-1])
        with torch.inference_mode():
            given = pixels.to(self.device, self.dtype)
            if tiling is not None and tiling.statistics == "sampled":
                restored = self.run_tiles(given, degradation, tiling, on_progress)
            else:
                if tiling is not None:
                    rows: int | None = max(tiling.size // model.config.stem, 1)
                else:
                    rows = self.strip_rows(size)
                restored = model(given, degradation, rows=rows, on_progress=on_progress)
        # Out of inference mode, so that callers may go on with an ordinary tensor.
        return restored.clamp(low, high).to(pixels.device, pixels.dtype).clone()

    def strip_rows(self, size: tuple[int, int]) -> int | None:
        """Return the height of the strips an image (height, width) is worked through in.

        On a processor it depends on the width alone, and so does the last bit of the result. On
        other devices None, all rows at once, where the memory allows.
        """
        config = self.model.config
        if self.device.type != "cpu":
            needed = memory_needed(config, size, self.dtype)
            if needed < FREE_SHARE * free_memory(self.device):
                return None
        return max(STRIP_PIXELS * config.stem // size[1], FEWEST_ROWS)

    def run_tiles(
        self,
        pixels: Tensor,
        degradation: Degradation,
        tiling: Tiling,
        on_progress: Progress | None,
    ) -> Tensor:
        """Measure the attention on a sample of windows, then apply it tile by tile."""
        height, width = pixels.shape[-2:]
        side = min(tiling.size, height, width)
        sample = windows(height, width, side, SAMPLED_WINDOWS)
        cropped = torch.cat([pixels[..., rows, columns] for rows, columns in sample])
        attention = self.model.measure(cropped, degradation)
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


def fitted_mask(mask: Tensor | None, pixels: Tensor) -> Tensor | None:
    """Return a mask as (N, 1, H, W) weights, having checked it.

    Raises
    ------
    PixelError
        If its shape or values do not fit.
    """
    if mask is None:
        return None
    weight = mask if mask.ndim == 3 else mask[None]
    count, _, height, width = pixels.shape
    if weight.ndim != 3 or weight.shape[1:] != (height, width) or weight.shape[0] not in (1, count):
        message = (
            f"Mask has shape {tuple(mask.shape)}; expected ({height}, {width}), the image's, or "
            f"({count}, {height}, {width}). Resize it first."
        )
        raise PixelError(message)
    if not bool(((weight >= 0) & (weight <= 1)).all()):
        message = "Mask has values outside 0..1; expected 0 (keep) to 1 (restore). Scale it first."
        raise PixelError(message)
    return weight[:, None].expand(count, 1, height, width).to(pixels)


def portion(on_progress: Progress | None, number: int, count: int) -> Progress | None:
    """Return a callable that reports one image's progress as a part of all `count` images'."""
    if on_progress is None:
        return None
    report: Callable[[int, int], None] = on_progress
    return lambda done, total: report(number * total + done, count * total)


@lru_cache(maxsize=1)
def bundled_classifier() -> DegradationClassifier:
    """Return the classifier that ships in the package."""
    return load_classifier(weights_module.resolve(role="classifier"))


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
    return vote(classify_with(bundled_classifier(), pixels))
