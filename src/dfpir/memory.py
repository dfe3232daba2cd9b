"""What to do when memory runs out: notice it, hand back what is held, try again with less."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")

WORDS = ("out of memory", "can't allocate memory", "not enough memory")
"""What PyTorch says where it has no exception of its own: on processors and some devices."""


def ran_out(error: BaseException) -> bool:
    """Tell whether an error means that memory ran out, on whatever device."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(each in str(error).lower() for each in WORDS)


def release(device: torch.device) -> None:
    """Hand back the memory of a device that PyTorch keeps for later."""
    module = getattr(torch, device.type, None)
    empty_cache = getattr(module, "empty_cache", None)
    if device.type != "cpu" and empty_cache is not None:
        empty_cache()


def first_that_fits(attempts: Sequence[Callable[[], T]], device: torch.device) -> tuple[int, T]:
    """Return the number and the result of the first attempt that does not run out of memory.

    Examples
    --------
    >>> first_that_fits([lambda: "whole", lambda: "in parts"], torch.device("cpu"))
    (0, 'whole')

    Raises
    ------
    RuntimeError, MemoryError
        If the last attempt runs out of memory too; any other error of an attempt at once.
    """
    for number, attempt in enumerate(attempts[:-1]):
        try:
            return number, attempt()
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            reason = str(error).partition("\n")[0]
        # Not in the except block, where the traceback still holds the tensors.
        logger.warning("Memory ran out; trying again with less. (%s)", reason)
        release(device)
    return len(attempts) - 1, attempts[-1]()
