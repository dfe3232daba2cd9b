"""What "auto" makes of pictures that suffer from two things at once, at listed strengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfpir.degradation import Degradation
from dfpir.evaluation import (
    IMAGE_SETS,
    Picture,
    check_limit,
    compare,
    cropped,
    list_pictures,
    provenance,
    read_picture,
    scikit_image,
)
from dfpir.model import Progress
from dfpir.pixels import to_pixels
from dfpir.restorer import Restorer
from dfpir.routing import check_steps
from dfpir.synthesis import LEVELS, degrade

SCHEMA = 1

NOTICEABLE = 0.5
"""An image that loses more than this many dB is worse."""

Mixture = tuple[tuple[Degradation, float], ...]

MIXTURES: dict[str, Mixture] = {
    "low light, noise": ((Degradation.LOW_LIGHT, 0.05), (Degradation.NOISE_15, 15.0)),
    "haze, noise": ((Degradation.HAZE, 1.6), (Degradation.NOISE_25, 25.0)),
    "haze, rain": ((Degradation.HAZE, 1.6), (Degradation.RAIN, 2e-3)),
    "blur, noise": ((Degradation.BLUR, 12.0), (Degradation.NOISE_25, 25.0)),
}
"""What is done to a picture, in this order, and how severely; see `dfpir.synthesis.degrade`."""


@dataclass(frozen=True, slots=True)
class MixtureScore:
    """What became of the pictures that suffer from one mixture.

    Attributes
    ----------
    images : int
    before, after : float
        Mean PSNR in dB of the degraded pictures and of what "auto" made of them.
    improved : float
        Fraction of the pictures with a higher PSNR than before.
    worsened : float
        Fraction that lost more than `NOTICEABLE`.
    steps : float
        Mean number of steps.
    """

    images: int
    before: float
    after: float
    improved: float
    worsened: float
    steps: float

    @classmethod
    def of(cls, results: Sequence[tuple[float, float, int]]) -> MixtureScore:
        """Score pictures by their PSNR before and after, and the number of steps."""
        before, after, steps = np.array(results, dtype=float).T
        return cls(
            len(results),
            float(before.mean()),
            float(after.mean()),
            float((after > before).mean()),
            float((after < before - NOTICEABLE).mean()),
            float(steps.mean()),
        )

    def as_dict(self) -> dict[str, float]:
        """Return plain values, ready for JSON."""
        return {name: round(getattr(self, name), 4) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class MixtureEvaluation:
    """The scores of one set of weights and the bundled classifier.

    Attributes
    ----------
    scores : dict of str to MixtureScore
        By the names of `MIXTURES`.
    most_steps : int
    weights, weights_sha256 : str
        File or name, and hash; empty for a network that was handed over.
    seed : int
    limit : int or None
    date : str
        ISO 8601, UTC.
    """

    scores: dict[str, MixtureScore]
    most_steps: int
    weights: str
    weights_sha256: str
    seed: int
    limit: int | None
    date: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            **provenance(SCHEMA, self.date),
            "weights": {"name": self.weights, "sha256": self.weights_sha256},
            "most_steps": self.most_steps,
            "seed": self.seed,
            "limit": self.limit,
            "mixtures": {
                name: [[kind.value, severity] for kind, severity in parts]
                for name, parts in MIXTURES.items()
            },
            "scores": {name: score.as_dict() for name, score in self.scores.items()},
        }

    def markdown(self) -> str:
        """Return a table for people."""
        lines = [
            "| mixture | n | input | auto | improved | worse | steps |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for name, score in self.scores.items():
            strengths = " and ".join(f"{severity:g}" for _, severity in MIXTURES[name])
            lines.append(
                f"| {name} ({strengths}) | {score.images} | {score.before:.2f} | {score.after:.2f} "
                f"| {score.improved:.0%} | {score.worsened:.0%} | {score.steps:.2f} |"
            )
        lines += [
            "",
            f"CBSD68, PSNR in dB, at most {self.most_steps} steps; worse: by more than "
            f"{NOTICEABLE} dB. Weights: {self.weights or 'a network handed over'}.",
        ]
        if self.limit is not None:
            lines.append(f"Only the first {self.limit} pictures: not a full score.")
        return "\n".join(lines)


def evaluate_mixtures(
    data: Path,
    *,
    restorer: Restorer | None = None,
    most_steps: int = 3,
    limit: int | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> MixtureEvaluation:
    """Score "auto" on clean pictures that are degraded here by each of `MIXTURES`.

    Parameters
    ----------
    data : Path
        A folder with a sub-folder ``CBSD68`` of clean 8-bit RGB pictures.
    restorer : Restorer, optional
        The bundled default on the best device if not given.
    most_steps : int
        See `Restorer.restore`.
    limit : int, optional
        Take the first `limit` pictures, by name; at least 1.
    seed : int
        Of the degradations, not negative.
    on_progress : callable, optional
        ``on_progress(done, total)`` in pictures; raising from it cancels.

    Returns
    -------
    MixtureEvaluation

    Raises
    ------
    EvaluationError, ImageFileError
        If scikit-image is missing, or the folder or its pictures are not as described.
    ValueError
        If `most_steps` is out of range.
    """
    check_limit(limit)
    check_steps(most_steps)
    scikit_image("metrics")
    paths = list_pictures(data / IMAGE_SETS[0].name)[:limit]
    restorer = restorer or Restorer()
    scores: dict[str, MixtureScore] = {}
    for place, (name, mixture) in enumerate(MIXTURES.items()):
        results = []
        for number, (given, clean) in enumerate(pairs(paths, mixture, seed + 1000 * place)):
            pixels, _ = to_pixels(given)
            done = restorer.restore_pixels(pixels, most_steps=most_steps)
            assert isinstance(done.image, Tensor)
            restored = done.image[0].float().clamp(0, 1).permute(1, 2, 0).numpy()
            before, after = (compare(image, clean).psnr for image in (given, restored))
            results.append((before, after, len(done.steps)))
            if on_progress is not None:
                on_progress(place * len(paths) + number + 1, len(MIXTURES) * len(paths))
        scores[name] = MixtureScore.of(results)
    return MixtureEvaluation(
        scores,
        most_steps,
        Path(restorer.weights).name,
        restorer.weights_sha256,
        seed,
        limit,
        datetime.now(UTC).isoformat(timespec="seconds"),
    )


def pairs(paths: Sequence[Path], mixture: Mixture, seed: int) -> Iterator[tuple[Picture, Picture]]:
    """Yield each picture with all parts of a mixture, and as it was."""
    for number, path in enumerate(paths):
        clean = cropped(read_picture(path, grey=False))
        pixels, _ = to_pixels(clean)
        generator = torch.Generator().manual_seed(seed + number)
        for degradation, severity in mixture:
            pixels = degrade(pixels, degradation, generator, severity)
        yield (pixels[0] * LEVELS).round().byte().permute(1, 2, 0).numpy(), clean
