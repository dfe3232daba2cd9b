"""Noise stronger than the network has learnt, met by lowering the contrast for a while."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from dfpir.pixels import clamped

LEARNT = 80.0
"""What noise of some 97 grey levels is estimated at once it is clipped.

In training it had 80 at the most; what is a little stronger, the network removes as well.
"""

LOWEST_CONTRAST = 0.5
"""Lower, and rounding errors and the network's own would weigh too much when it is raised again."""


def contrast_for(sigma: float | None) -> float:
    """Return the contrast at which noise estimated at `sigma` grey levels is what was learnt.

    Strong noise is cut off at black and white, which makes it seem weaker: what was 75 reads as
    about 64, what was 100 as about 82. The exponent makes up for it.
    """
    if sigma is None or sigma <= LEARNT:
        return 1.0
    return max(math.pow(LEARNT / sigma, 1.5), LOWEST_CONTRAST)


def with_contrast(pixels: Tensor, contrast: float, restore: Callable[[Tensor], Tensor]) -> Tensor:
    """Restore a picture with its contrast lowered about its mean, and raise it again.

    The result does not leave the range that 0..1 and the picture span.
    """
    if contrast == 1:
        return restore(pixels)
    mean = pixels.mean()
    lowered = mean + contrast * (pixels - mean)
    return clamped(mean + (restore(lowered) - mean) / contrast, pixels)
