"""Several degradations, removed one after another: look, restore, look again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dfpir.degradation import Degradation, Diagnosis

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeAlias

    from torch import Tensor

    Look: TypeAlias = Callable[[Tensor], Diagnosis]
    Remove: TypeAlias = Callable[[Tensor, Diagnosis], Tensor]

MOST_STEPS = 3
"""More than this many degradations are not removed from one image."""


def check_steps(most: int) -> None:
    """Refuse a number of steps that is out of range.

    Raises
    ------
    ValueError
        If it is not from 1 to `MOST_STEPS`.
    """
    if not 1 <= most <= MOST_STEPS:
        message = f"most_steps is {most}; expected 1 to {MOST_STEPS}."
        raise ValueError(message)


def restore_by_steps(
    pixels: Tensor,
    found: Diagnosis,
    look: Look,
    remove: Remove,
    most: int,
    known: Sequence[Degradation] = tuple(Degradation),
) -> tuple[Tensor, tuple[Degradation, ...]]:
    """Remove what is found, look again, and go on while something else is surely found.

    A step after which what it removed seems no less likely than before is undone, and ends it. No
    kind is removed twice; noise of any level is one. What is not `known` ends it too.

    Parameters
    ----------
    pixels : Tensor, (1, 3, H, W)
    found : Diagnosis
        Of `pixels`.
    look : callable
        Returns the diagnosis of an image.
    remove : callable
        Returns an image without what its diagnosis, given beside it, has found.
    most : int
        Steps at the most. With one there is nothing to look for afterwards, and no step is undone.
    known : sequence of Degradation
        What can be removed.

    Returns
    -------
    image : Tensor, (1, 3, H, W)
    steps : tuple of Degradation
        What was removed, in this order.
    """
    steps: list[Degradation] = []
    while (kind := found.degradation) and found.verdict == "degraded" and len(steps) < most:
        if kind not in known or any(kind is step or (kind.sigma and step.sigma) for step in steps):
            break
        restored = remove(pixels, found)
        if most > 1:
            after = look(restored)
            if after.probability(kind) >= found.probability(kind):
                break
            found = after
        pixels = restored
        steps.append(kind)
    return pixels, tuple(steps)
