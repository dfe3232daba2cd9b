"""What was done to an image, as facts that can be written down beside it."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
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
    value_range : tuple of float
        The input values that the network saw as 0 and 1.
    device, dtype : str
        Where, and in which precision, the network ran.
    input_sha256 : str
        See `array_hash`; empty for tensors.
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
    notes: tuple[str, ...] = ()
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
