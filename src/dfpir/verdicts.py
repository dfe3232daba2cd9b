"""How often the classifier is right, and how well it knows when it is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dfpir import weights
from dfpir.classifier import (
    KINDS,
    NOISE,
    DegradationClassifier,
    classify,
    kind_of,
    kinds_of,
    load_classifier,
)
from dfpir.degradation import CLEAN, NOISES, Degradation, Diagnosis
from dfpir.evaluation import (
    ImageSet,
    Picture,
    check_limit,
    chosen_sets,
    cropped,
    list_pairs,
    provenance,
    read_pairs,
    read_picture,
    scikit_image,
)
from dfpir.model import Progress
from dfpir.pixels import colours_of, to_pixels
from dfpir.synthesis import LEVELS, degrade

SCHEMA = 1
BINS = 15
"""Of the calibration error, each with as many pictures."""

SEVERITIES: dict[Degradation, tuple[float, ...]] = {
    Degradation.NOISE_25: (8.0, 35.0, 65.0),  # sigma in grey levels
    Degradation.RAIN: (6e-4, 2e-3, 6e-3),  # streaks of a layer per pixel
    Degradation.HAZE: (0.8, 1.6, 3.0),  # beta, depth being 1 at the farthest point
    Degradation.BLUR: (6.0, 12.0, 24.0),  # pixels across the path of the hand
    Degradation.LOW_LIGHT: (0.15, 0.05, 0.015),  # fraction of the light
}
"""What `severe_cases` does to every picture of CBSD68; see `dfpir.synthesis.degrade`."""

SHARP = "CBSD68"
"""The set whose clean pictures are degraded here."""

CLEAN_PICTURES = ("text", "page", "coins", "cell", "moon")
"""Functions of `skimage.data` whose pictures have nothing that ought to be removed."""

PUBLIC, SEVERE, UNTOUCHED = "public sets", "listed severities", "clean pictures"
"""The groups of cases."""


@dataclass(frozen=True, slots=True)
class Case:
    """A picture of which it is known what is wrong with it.

    Attributes
    ----------
    groups : tuple of str
        It belongs to; see `Verdicts.groups`.
    kind : str
        One of `dfpir.classifier.KINDS`.
    picture : ndarray, (H, W, 3) or (H, W), uint8
    sigma : float or None
        Of noise that was added, in grey levels.
    """

    groups: tuple[str, ...]
    kind: str
    picture: Picture
    sigma: float | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """What was found in a case, without its picture."""

    kind: str
    found: Diagnosis
    sigma: float | None = None

    @property
    def named(self) -> str:
        """One of `dfpir.classifier.KINDS`, or "unsure"."""
        if self.found.verdict != "degraded":
            return self.found.verdict
        assert self.found.degradation is not None
        return kind_of(self.found.degradation)


@dataclass(frozen=True, slots=True)
class Scores:
    """How good the judgements of a group are.

    Attributes
    ----------
    cases : int
    recall : dict of str to float
        Fraction of each kind's pictures that were surely and rightly named.
    untouched : float or None
        Fraction of the clean pictures that "auto" would return as they are: those called clean,
        and those it is not sure of. None if there are none.
    unsure : float
        Fraction of verdicts that are.
    calibration_error : float
        Expected calibration error of the likeliest kind's probability, in bins of equal mass.
    brier : float
        Mean over the pictures of the squared errors of all kinds' probabilities: 0..2.
    sigma_error, sigma_ratio : float or None
        Median error of estimated sigmas in grey levels, and over the larger of 1.5 and a tenth
        of sigma. None where no sigma is known.

    References
    ----------
    .. [1] Naeini, Cooper and Hauskrecht, "Obtaining well calibrated probabilities using Bayesian
       binning", AAAI 2015; with equal mass, Nixon et al., "Measuring calibration in deep
       learning", CVPR workshops 2019.
    .. [2] Brier, "Verification of forecasts expressed in terms of probability", Monthly Weather
       Review 1950.
    """

    cases: int
    recall: dict[str, float]
    untouched: float | None
    unsure: float
    calibration_error: float
    brier: float
    sigma_error: float | None
    sigma_ratio: float | None

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall of the kinds there are."""
        return sum(self.recall.values()) / len(self.recall)

    @classmethod
    def of(cls, judgements: Sequence[Judgement]) -> Scores:
        """Score some judgements, at least one."""
        right: dict[str, list[bool]] = defaultdict(list)
        for each in judgements:
            right[each.kind].append(each.named == each.kind)
        recall = {kind: sum(right[kind]) / len(right[kind]) for kind in KINDS if kind in right}
        clean = [each.found.verdict != "degraded" for each in judgements if each.kind == CLEAN]
        beliefs = np.array([list(kinds_of(each.found).values()) for each in judgements])
        truth = np.array([KINDS.index(each.kind) for each in judgements])
        errors = np.array(
            [
                (abs(each.found.sigma - each.sigma), max(1.5, 0.1 * each.sigma))
                for each in judgements
                if each.sigma is not None and each.found.sigma is not None
            ]
        ).reshape(-1, 2)
        return cls(
            len(judgements),
            recall,
            sum(clean) / len(clean) if clean else None,
            sum(each.named == "unsure" for each in judgements) / len(judgements),
            calibration_error(beliefs.max(axis=1), beliefs.argmax(axis=1) == truth),
            float(np.square(beliefs - np.eye(len(KINDS))[truth]).sum(axis=1).mean()),
            float(np.median(errors[:, 0])) if len(errors) else None,
            float(np.median(errors[:, 0] / errors[:, 1])) if len(errors) else None,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""

        def rounded(value: float | None) -> float | None:
            return None if value is None else round(value, 4)

        return {
            "cases": self.cases,
            "balanced_accuracy": rounded(self.balanced_accuracy),
            "recall": {kind: rounded(value) for kind, value in self.recall.items()},
            "untouched": rounded(self.untouched),
            "unsure": rounded(self.unsure),
            "calibration_error": rounded(self.calibration_error),
            "brier": rounded(self.brier),
            "sigma_error": rounded(self.sigma_error),
            "sigma_ratio": rounded(self.sigma_ratio),
        }


@dataclass(frozen=True, slots=True)
class Verdicts:
    """The scores of one classifier.

    Attributes
    ----------
    groups : dict of str to Scores
        Of the inputs and targets of the public sets; of pictures degraded as listed in
        `SEVERITIES`; of clean pictures alone. Those there are cases of.
    sha256 : str
        Of the classifier's file; empty for a classifier that was handed in.
    seed : int
    limit : int or None
        At most this many pictures of a set were taken, all if None.
    date : str
        ISO 8601, UTC.
    """

    groups: dict[str, Scores]
    sha256: str
    seed: int
    limit: int | None
    date: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            **provenance(SCHEMA, self.date),
            "classifier_sha256": self.sha256,
            "severities": {
                kind_of(degradation): list(values) for degradation, values in SEVERITIES.items()
            },
            "seed": self.seed,
            "limit": self.limit,
            "groups": {name: scores.as_dict() for name, scores in self.groups.items()},
        }

    def markdown(self) -> str:
        """Return a table for people, with what its columns mean."""
        heads = ["pictures", "n", "balanced", *KINDS, "untouched", "unsure", "ECE", "Brier"]
        lines = [
            f"| {' | '.join([*heads, 'sigma off'])} |",
            f"| --- |{' ---: |' * len(heads)}",
        ]
        for name, scores in self.groups.items():
            cells = [
                name,
                str(scores.cases),
                share(scores.balanced_accuracy),
                *(share(scores.recall.get(kind)) for kind in KINDS),
                share(scores.untouched),
                share(scores.unsure),
                f"{scores.calibration_error:.3f}",
                f"{scores.brier:.3f}",
                "" if scores.sigma_error is None else f"{scores.sigma_error:.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        listed = "; ".join(
            f"{kind_of(degradation)} {', '.join(f'{value:g}' for value in values)}"
            for degradation, values in SEVERITIES.items()
        )
        lines += [
            "",
            "Under each kind: how much of it was surely and rightly named, all noise being one; "
            "balanced: the mean of these; untouched: clean pictures that are returned as they are.",
            f"Listed severities: {listed} ({SHARP}; units in `dfpir.synthesis`).",
        ]
        if self.limit is not None:
            lines.append(f"Only the first {self.limit} pictures of each set: not a full score.")
        return "\n".join(lines)


def share(value: float | None) -> str:
    """Return a fraction as a cell of a table."""
    return "" if value is None else f"{value:.0%}"


def calibration_error(confidences: NDArray[np.floating], right: NDArray[np.bool_]) -> float:
    """Return the mean distance of confidence and accuracy, in `BINS` bins of equal mass."""
    order = np.argsort(confidences, kind="stable")
    return float(
        sum(
            abs(confidences[part].mean() - right[part].mean()) * len(part) / len(order)
            for part in np.array_split(order, BINS)
            if len(part)
        )
    )


def evaluate_verdicts(
    data: Path,
    *,
    classifier: DegradationClassifier | None = None,
    sets: Sequence[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Verdicts:
    """Score the classifier on folders of public pictures.

    Parameters
    ----------
    data : Path
        As for `dfpir.evaluation.evaluate`.
    classifier : DegradationClassifier, optional
        What to score; the bundled one if not given.
    sets : sequence of str, optional
        Sub-folders to take; by default all there are.
    limit : int, optional
        Take the first `limit` pictures of each set, by name; at least 1.
    seed : int
        Of all that is added to pictures, not negative.
    on_progress : callable, optional
        ``on_progress(done, total)`` in pictures judged; raising from it cancels.

    Returns
    -------
    Verdicts

    Raises
    ------
    EvaluationError, ImageFileError
        If scikit-image is missing, or the folders or pictures are not as described.

    Examples
    --------
    >>> print(evaluate_verdicts(Path("eval")).markdown())  # doctest: +SKIP
    """
    check_limit(limit)
    scikit_image("data")  # Found missing now rather than at the end.
    pairs = {each: list_pairs(data / each.name, each)[:limit] for each in chosen_sets(data, sets)}
    sharp = [path for each, found in pairs.items() if each.name == SHARP for path, _ in found]
    total = len(CLEAN_PICTURES) + len(sharp) * sum(map(len, SEVERITIES.values()))
    total += sum(len(found) * (1 + len(noise_of(each) or (None,))) for each, found in pairs.items())
    path = weights.resolve(role="classifier")
    model = classifier or load_classifier(path)
    judged: dict[str, list[Judgement]] = {}
    for done, case in enumerate(cases(pairs, sharp, seed), start=1):
        pixels, _ = to_pixels(case.picture)
        [found] = classify(model, colours_of(pixels[0]))
        for group in case.groups:
            judged.setdefault(group, []).append(Judgement(case.kind, found, case.sigma))
        if on_progress is not None:
            on_progress(done, total)
    return Verdicts(
        {group: Scores.of(judgements) for group, judgements in judged.items()},
        "" if classifier else weights.file_hash(path),
        seed,
        limit,
        datetime.now(UTC).isoformat(timespec="seconds"),
    )


def cases(
    pairs: Mapping[ImageSet, list[tuple[Path, Path]]], sharp: Sequence[Path], seed: int
) -> Iterator[Case]:
    """Yield all cases: of the public sets, of the listed severities, and clean pictures."""
    for each, found in pairs.items():
        yield from public_cases(each, found, seed)
    yield from severe_cases(sharp, seed)
    for name in CLEAN_PICTURES:
        yield Case((UNTOUCHED,), CLEAN, getattr(scikit_image("data"), name)())


def noise_of(image_set: ImageSet) -> tuple[float, ...]:
    """Return the levels of noise that the network can be told of, of those a set gets."""
    prompts = set(NOISES.values())
    return tuple(sigma for sigma in image_set.noise if sigma in prompts)


def public_cases(
    image_set: ImageSet, pairs: Sequence[tuple[Path, Path]], seed: int
) -> Iterator[Case]:
    """Yield the inputs of a set and its clean targets."""
    kind = kind_of(image_set.degradation) if image_set.degradation else NOISE
    for sigma in noise_of(image_set) or (None,):
        for given, _ in read_pairs(pairs, image_set, sigma, seed):
            yield Case((PUBLIC,), kind, given, sigma)
    for _, path in pairs:
        target = cropped(read_picture(path, grey=image_set.grey))
        groups = (PUBLIC, UNTOUCHED) if image_set.name == SHARP else (PUBLIC,)
        yield Case(groups, CLEAN, target)


def severe_cases(paths: Sequence[Path], seed: int) -> Iterator[Case]:
    """Yield every picture degraded in all ways of `SEVERITIES`."""
    for number, path in enumerate(paths):
        pixels, _ = to_pixels(cropped(read_picture(path, grey=False)))
        for degradation, severities in SEVERITIES.items():
            for place, severity in enumerate(severities):
                generator = torch.Generator().manual_seed(
                    seed + 1000 * number + 10 * degradation.index + place
                )
                degraded = degrade(pixels, degradation, generator, severity)[0]
                picture = (degraded * LEVELS).round().byte().permute(1, 2, 0).numpy()
                kind = kind_of(degradation)
                yield Case((SEVERE,), kind, picture, severity if kind == NOISE else None)
