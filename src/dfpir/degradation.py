"""The words every other module shares: which degradations exist, and what a diagnosis says."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal

CLEAN = "clean"
Verdict = Literal["degraded", "clean", "unsure"]


class Degradation(Enum):
    """What can be wrong with a picture; the order is the network's prompt index.

    Attributes
    ----------
    value : str
        The name used at the command line, in files and in records, such as ``"noise-25"``.
    label : str
        A few words for people, such as ``"Gaussian noise, sigma 25"``.
    prompt : str
        The sentence whose CLIP text code selects this degradation in a published checkpoint.
    sigma : float or None
        For noise, the standard deviation in grey levels of 0..255.

    References
    ----------
    .. [1] Tian et al., "Degradation-Aware Feature Perturbation for All-in-One Image
       Restoration", CVPR 2025, section 4 (the five- and three-degradation settings).
    """

    NOISE_15 = (
        "noise-15",
        "Gaussian noise, sigma 15",
        "Gaussian noise with a standard deviation of 15",
    )
    NOISE_25 = (
        "noise-25",
        "Gaussian noise, sigma 25",
        "Gaussian noise with a standard deviation of 25",
    )
    NOISE_50 = (
        "noise-50",
        "Gaussian noise, sigma 50",
        "Gaussian noise with a standard deviation of 50",
    )
    RAIN = ("rain", "rain streaks", "Rain degradation with rain lines")
    HAZE = ("haze", "haze", "Hazy degradation with normal haze")
    BLUR = ("blur", "motion blur", "Blur degradation with motion blur")
    LOW_LIGHT = ("low-light", "low light", "Lowlight degradation")

    label: str
    prompt: str

    def __new__(cls, value: str, label: str, prompt: str) -> Degradation:
        """Make a member whose value is its name, with label and prompt as attributes."""
        member = object.__new__(cls)
        member._value_ = value
        member.label = label
        member.prompt = prompt
        return member

    @property
    def index(self) -> int:
        """Position in the network's tables of permutations."""
        return list(Degradation).index(self)

    @property
    def sigma(self) -> float | None:
        """Noise standard deviation in grey levels of 0..255, None where it is not noise."""
        prefix, _, number = self.value.partition("-")
        return float(number) if prefix == "noise" else None

    @classmethod
    def from_name(cls, name: str | Degradation) -> Degradation:
        """Return the member called `name`.

        Raises
        ------
        ValueError
            If there is no such degradation; the message lists those there are.
        """
        for member in cls:
            if name in (member, member.value):
                return member
        names = ", ".join(member.value for member in cls)
        message = f"Unknown degradation {name!r}; expected one of: {names}."
        raise ValueError(message)

    @classmethod
    def nearest_noise(cls, sigma: float) -> Degradation:
        """Return the noise prompt for a standard deviation of `sigma` grey levels of 0..255.

        Nearness is judged on a logarithmic scale, on which the prompts are about evenly apart.
        """
        return tuple(NOISES)[bisect.bisect_right(NOISE_BORDERS, sigma)]


NOISES = {kind: kind.sigma for kind in Degradation if kind.sigma is not None}
"""The prompts of noise, weakest first, with their sigmas."""

NOISE_BORDERS = tuple((low * high) ** 0.5 for low, high in itertools.pairwise(NOISES.values()))
"""Sigmas from which on the next prompt is nearer, on a logarithmic scale."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What the classifier found in one image, or the user said about it.

    Attributes
    ----------
    verdict : {"degraded", "clean", "unsure"}
        Only "degraded" lets automatic restoration act.
    degradation : Degradation or None
        The likeliest degradation; None on the verdict "clean".
    probabilities : mapping of str to float
        One entry per degradation's name and ``"clean"``; they sum to 1.
    sigma : float or None
        Estimated noise standard deviation in grey levels of 0..255; None if not estimated.
    told : bool
        True when the caller named the degradation and nothing was estimated.
    """

    verdict: Verdict
    degradation: Degradation | None
    probabilities: Mapping[str, float]
    sigma: float | None = None
    told: bool = False

    @classmethod
    def from_user(cls, degradation: Degradation) -> Diagnosis:
        """Return the diagnosis for a degradation that the caller has named."""
        return cls("degraded", degradation, {degradation.value: 1.0}, told=True)

    @property
    def name(self) -> str:
        """What can be handed on to `restore`: the degradation if that is sure, else the verdict."""
        if self.verdict == "degraded" and self.degradation:
            return str(self.degradation.value)
        return self.verdict

    @property
    def words(self) -> str:
        """What was found, for people, such as ``"rain streaks (97% sure)"``."""
        name = self.degradation.label if self.degradation else self.verdict
        if self.told:
            return f"{name}, as told"
        if self.degradation and self.degradation.sigma is not None and self.sigma is not None:
            name = f"Gaussian noise, sigma about {self.sigma:.0f}"
        doubt = "unsure, perhaps " if self.verdict == "unsure" else ""
        return f"{doubt}{name} ({self.confidence:.0%} sure)"

    @property
    def confidence(self) -> float:
        """Probability of what the verdict names, all noise levels counted together."""
        return self.probability(self.degradation)

    def probability(self, degradation: Degradation | None) -> float:
        """Return how likely a degradation is, all noise levels counted together; None is clean."""
        if degradation is None:
            return self.probabilities.get(CLEAN, 0.0)
        if degradation.sigma is None:
            return self.probabilities.get(degradation.value, 0.0)
        return sum(self.probabilities.get(member.value, 0.0) for member in NOISES)


INVENTING = frozenset({Degradation.RAIN, Degradation.HAZE, Degradation.LOW_LIGHT})
"""Degradations of outdoor photographs; their removal fills in what could not be seen."""


def headline(diagnosis: Diagnosis) -> str:
    """Return a verdict in a few plain words, such as ``"Unsure, perhaps haze (43 %)"``."""
    sure = f"{diagnosis.confidence * 100:.0f} %"
    if diagnosis.degradation is None:
        return f"Clean ({sure} sure): nothing to restore"
    words = diagnosis.degradation.label
    if diagnosis.degradation.sigma is not None and diagnosis.sigma is not None:
        words = f"Gaussian noise, sigma about {diagnosis.sigma:.0f} of 255"
    if diagnosis.verdict == "unsure":
        return f"Unsure, perhaps {words} ({sure}): automatic restoration leaves it alone"
    return f"{words[0].upper()}{words[1:]} ({sure} sure)"


def caution(degradation: Degradation, *, rgb: bool) -> str | None:
    """Return what a user should hear before this restoration of such an image, or None."""
    if rgb or degradation not in INVENTING:
        return None
    return (
        f"{degradation.label} is a matter of outdoor photographs. On a grey scientific image its "
        "removal has no physical meaning and changes intensities: for looking only."
    )
