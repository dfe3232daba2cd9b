"""What was done to an image, as facts that can be written down beside it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dfpir.degradation import Diagnosis


def package_version() -> str:
    """Return the installed version, or ``"unknown"`` for a bare checkout."""
    try:
        return version("dfpir")
    except PackageNotFoundError:
        return "unknown"


def array_hash(array: NDArray[Any]) -> str:
    """Return the SHA-256 of an array's dtype, shape and values."""
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Linearity:
    """How restored values stand to the raw ones: the line raw = slope * restored + offset.

    A restoration that keeps intensities has slope 1, offset 0 and no drift. The raw values are
    regressed on the restored ones and not the reverse, because the noise is in the raw values.

    Attributes
    ----------
    slope : float or None
        None where the restored values are all the same.
    offset : float or None
        In the image's units.
    mean_drift : float
        Mean of the restored values less that of the raw ones, in the image's units.
    clipped_fraction : float
        Share of the values that reached the smallest or largest number of their dtype and were
        not there before, 0..1.
    span : float
        From the first to the 99th percentile of the raw values: the scale for offset and drift.
    values : int
        How many values were compared.
    """

    slope: float | None
    offset: float | None
    mean_drift: float
    clipped_fraction: float
    span: float
    values: int

    @property
    def summary(self) -> str:
        """One line for people."""
        line = "no line: the restored values are all the same"
        if self.slope is not None and self.offset is not None:
            line = f"raw = {self.slope:.3f} x restored {self.offset:+.4g}"
        drift = f"mean {self.mean_drift:+.3g}"
        if self.span > 0:
            drift += f" ({self.mean_drift / self.span:+.1%} of the raw 1-99 % span)"
        return f"{line}; {drift}; {self.clipped_fraction:.2%} clipped"


class LinearitySums:
    """Collects what `Linearity` needs, part by part of an image."""

    SAMPLE = 65_536
    """Raw values of a part that are kept for its percentiles."""

    def __init__(self) -> None:
        self.origin: float | None = None
        self.values = 0
        self.clipped = 0
        self.sums = np.zeros(4)  # of x, y, x x, x y: x restored, y raw, both less the origin
        self.samples: list[NDArray[Any]] = []

    def add(self, raw: NDArray[Any], restored: NDArray[Any]) -> None:
        """Count two equally shaped arrays of one dtype in."""
        if not raw.size:
            return
        raw, restored = raw.ravel(), restored.ravel()
        y, x = raw.astype(np.float64), restored.astype(np.float64)
        if self.origin is None:
            self.origin = float(y.mean())  # Keeps the squares small beside their differences.
        y -= self.origin
        x -= self.origin
        self.sums += [x.sum(), y.sum(), x @ x, x @ y]
        self.values += raw.size
        if np.issubdtype(raw.dtype, np.integer):
            limits = np.iinfo(raw.dtype)
            for limit in (limits.min, limits.max):
                self.clipped += int(((restored == limit) & (raw != limit)).sum())
        self.samples.append(raw[:: max(raw.size // self.SAMPLE, 1)].copy())

    def report(self) -> Linearity | None:
        """Return the line through all that was added, None if that is nothing."""
        if self.origin is None:
            return None
        mean_x, mean_y, mean_xx, mean_xy = self.sums / self.values
        variance = mean_xx - mean_x**2
        slope = offset = None
        if variance > 1e-12 * max(mean_xx, 1e-300):
            slope = float((mean_xy - mean_x * mean_y) / variance)
            offset = float(mean_y + self.origin - slope * (mean_x + self.origin))
        low, high = np.percentile(np.concatenate(self.samples), [1, 99])
        return Linearity(
            slope=slope,
            offset=offset,
            mean_drift=float(mean_x - mean_y),
            clipped_fraction=self.clipped / self.values,
            span=float(high) - float(low),
            values=self.values,
        )


@dataclass(frozen=True, slots=True)
class RestorationRecord:
    """Everything needed to say, or to repeat, what was done to an image.

    Attributes
    ----------
    weights, weights_sha256 : str
        Name or path of the weights, and their file's hash; empty for a model that was handed in.
    diagnosis : mapping
        Verdict, degradation, probabilities, sigma, and whether the caller named it.
    steps : tuple of str
        The degradations restored, in order; empty when the image was left alone.
    strength : float
        Weight of the restored image in the result, 0..1.
    masked : bool
        Whether a mask limited where the result was changed.
    statistics : str
        Which pixels the attention was measured on: ``"whole"`` or ``"sampled"``.
    ensemble : bool
        Whether the result is the mean over eight flips and turns.
    value_range : tuple of float
        The input values that the network saw as 0 and 1.
    device, dtype : str
        Where, and in which precision, the network ran.
    input_sha256 : str
        See `array_hash`; empty for tensors, and for a stack that was left alone. Of a stack, its
        planes one after the other, or those that were restored where not all were.
    threads : int
        Of PyTorch on the processor. The last bits of a result depend on it.
    scope : mapping
        Of a stack: which planes, channel or region; empty for a whole image.
    linearity : Linearity or None
        How the restored values stand to the raw ones, where that was measured.
    """

    weights: str
    weights_sha256: str
    diagnosis: Mapping[str, object]
    steps: tuple[str, ...]
    strength: float
    masked: bool
    statistics: str
    value_range: tuple[float, float]
    device: str
    dtype: str
    input_sha256: str = ""
    ensemble: bool = False
    notes: tuple[str, ...] = ()
    threads: int = field(default_factory=torch.get_num_threads)
    scope: Mapping[str, object] = field(default_factory=dict)
    linearity: Linearity | None = None
    dfpir: str = field(default_factory=package_version)
    torch: str = torch.__version__
    python: str = field(default_factory=platform.python_version)
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def as_dict(self) -> dict[str, object]:
        """Return plain values, ready for JSON."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]


def describe(diagnosis: Diagnosis) -> dict[str, object]:
    """Return a diagnosis as plain values, probabilities rounded to four places."""
    return {
        "verdict": diagnosis.verdict,
        "degradation": diagnosis.degradation.value if diagnosis.degradation else None,
        "probabilities": {name: round(p, 4) for name, p in diagnosis.probabilities.items()},
        "sigma": None if diagnosis.sigma is None else round(diagnosis.sigma, 2),
        "told": diagnosis.told,
    }


OME_UNITS = {
    "angstrom": "Å",
    "centimeter": "cm",
    "meter": "m",
    "micrometer": "µm",
    "micron": "µm",
    "millimeter": "mm",
    "nanometer": "nm",
    "um": "µm",
    "pixel": "pixel",
    "second": "s",
    "millisecond": "ms",
    "microsecond": "µs",
    "minute": "min",
    "hour": "h",
    "day": "d",
}
"""Names of units of length and time as hosts use them, and as OME-TIFF does."""


def save_with_record(
    path: str | os.PathLike[str],
    planes: Iterable[NDArray[Any]],
    *,
    shape: Sequence[int],
    dtype: np.dtype[Any],
    axes: str,
    records: Sequence[Mapping[str, object]],
    pixel_size: Mapping[str, tuple[float, str]] | None = None,
    overwrite: bool = False,
) -> tuple[Path, Path]:
    """Write an OME-TIFF with the pixel size, and beside it a JSON file with what was done.

    The planes are written one by one, so that a stack need not fit into memory. Both files appear
    whole or not at all.

    Parameters
    ----------
    path : str or Path
        Ends in ``.tif`` or ``.tiff``; the record has the same name with ``.json`` added.
    planes : iterable of ndarray
        (H, W) or (H, W, 3 or 4), in the order of the leading axes.
    shape : sequence of int
        Of the whole stack.
    dtype : numpy.dtype
    axes : str
        One letter of ``TZCYXS`` for each axis of `shape`; S is RGB.
    records : sequence of mapping
        Plain values, as of `RestorationRecord.as_dict`.
    pixel_size : mapping, optional
        Of ``X``, ``Y``, ``Z`` (and ``T``): size of a step and its unit.
    overwrite : bool
        Whether existing files may be replaced.

    Returns
    -------
    tuple of Path
        The picture and the record.

    Raises
    ------
    ValueError
        If the name does not end so, an output exists, or the dtype cannot stand in an OME-TIFF.
    ImportError
        If tifffile is missing.
    """
    try:
        import tifffile
    except ImportError as error:
        message = 'Writing TIFF needs tifffile, which is missing; run: pip install "dfpir[cli]".'
        raise ImportError(message) from error
    target = Path(path)
    beside = target.with_name(target.name + ".json")
    if target.suffix.lower() not in (".tif", ".tiff"):
        message = f"{target} does not end in .tif or .tiff; choose such a name."
        raise ValueError(message)
    if dtype.kind not in "uif" or dtype.itemsize > 8 or dtype in (np.float16, np.int64, np.uint64):
        message = f"An OME-TIFF cannot hold {dtype}; convert to uint16 or float32 first."
        raise ValueError(message)
    existing = [each for each in (target, beside) if each.exists() and not overwrite]
    if existing:
        message = f"{existing[0]} exists and was left as it is; choose another name."
        raise ValueError(message)
    facts: dict[str, object] = {
        "axes": axes,
        "Description": f"Restored by dfpir; see {beside.name}",
    }
    for letter, (size, unit) in (pixel_size or {}).items():
        if letter == "T" and unit == "pixel":
            continue  # frames that nobody has timed
        key = "TimeIncrement" if letter == "T" else f"PhysicalSize{letter}"
        facts[key], facts[f"{key}Unit"] = float(size), OME_UNITS.get(unit, unit)
    mark = secrets.token_hex(8)
    parts = [each.with_name(f".dfpir-{mark}-{each.name}.part") for each in (target, beside)]
    try:
        # By file object: tifffile would judge an OME-TIFF by the temporary name's ending.
        with parts[0].open("xb") as file:
            tifffile.imwrite(
                file,
                (np.ascontiguousarray(plane) for plane in planes),
                shape=tuple(shape),
                dtype=dtype,
                ome=True,
                bigtiff=int(np.prod(shape)) * dtype.itemsize > 2**31,
                photometric="rgb" if axes.endswith("S") else "minisblack",
                metadata=facts,
            )
        text = json.dumps({"image": target.name, "dfpir": list(records)}, indent=2)
        parts[1].write_text(text + "\n", encoding="utf-8")
        for part, name in zip(parts, (target, beside), strict=True):
            part.replace(name)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return target, beside
