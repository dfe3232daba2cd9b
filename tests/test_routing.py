"""Step by step: what is removed, what is undone, and when it ends."""

import pytest
import torch

from dfpir.degradation import Degradation, Diagnosis
from dfpir.routing import restore_by_steps

RAIN, HAZE, BLUR = Degradation.RAIN, Degradation.HAZE, Degradation.BLUR
STRONG, WEAK = Degradation.NOISE_50, Degradation.NOISE_15


def seen(likely, verdict="degraded", **probabilities):
    return Diagnosis(verdict, likely, {each.value: 0.0 for each in Degradation} | probabilities)


def walk(first, *later, most=3):
    """Each step adds the place of what it removes, and ten times what was there."""
    later = iter(later)
    image, steps = restore_by_steps(
        torch.zeros(1, 3, 2, 2),
        first,
        lambda image: next(later),
        lambda image, found: 10 * image + found.degradation.index,
        most,
    )
    assert all(steps[i] is not step for i in range(len(steps)) for step in steps[i + 1 :])
    expected = 0
    for step in steps:
        expected = 10 * expected + step.index
    assert torch.equal(image, torch.full((1, 3, 2, 2), float(expected)))
    return steps


CLEAN = seen(None, "clean", clean=0.9)
SURE_OF_RAIN = seen(RAIN, rain=0.9)
SURE_OF_HAZE = seen(HAZE, haze=0.8, rain=0.1)


@pytest.mark.parametrize(
    ("found", "steps"),
    [
        ([CLEAN], ()),
        ([seen(RAIN, "unsure", rain=0.5)], ()),
        ([SURE_OF_RAIN, CLEAN], (RAIN,)),
        ([SURE_OF_RAIN, seen(HAZE, "unsure", haze=0.5, rain=0.1)], (RAIN,)),
        ([SURE_OF_RAIN, SURE_OF_HAZE, CLEAN], (RAIN, HAZE)),
        # Three at the most.
        (
            [SURE_OF_RAIN, SURE_OF_HAZE, seen(BLUR, blur=0.9), seen(STRONG)],
            (RAIN, HAZE, BLUR),
        ),
        # Rain that is as likely as before: undone. The same after haze: only haze is undone.
        ([SURE_OF_RAIN, SURE_OF_RAIN], ()),
        ([SURE_OF_RAIN, SURE_OF_HAZE, seen(HAZE, haze=0.8)], (RAIN,)),
        # Rain comes back: not again.
        ([SURE_OF_RAIN, SURE_OF_HAZE, seen(RAIN, rain=0.7)], (RAIN, HAZE)),
        # Of noise little is left, which is noise too.
        ([seen(STRONG, **{"noise-50": 0.9}), seen(WEAK, **{"noise-15": 0.7})], (STRONG,)),
        # Levels count together: it is as noisy as before.
        ([seen(STRONG, **{"noise-50": 0.9}), seen(WEAK, **{"noise-15": 0.9})], ()),
    ],
)
def test_steps(found, steps):
    assert walk(*found) == steps


def test_what_cannot_be_removed_ends_it():
    later = iter([SURE_OF_HAZE])
    image, steps = restore_by_steps(
        torch.zeros(1, 3, 2, 2),
        SURE_OF_RAIN,
        lambda image: next(later),
        lambda image, found: image + 1,
        3,
        (RAIN,),
    )
    assert steps == (RAIN,) and torch.equal(image, torch.ones(1, 3, 2, 2))


def test_with_one_step_nothing_is_looked_at_again():
    assert walk(SURE_OF_RAIN, most=1) == (RAIN,)
    assert walk(SURE_OF_RAIN, SURE_OF_HAZE, CLEAN, most=2) == (RAIN, HAZE)
