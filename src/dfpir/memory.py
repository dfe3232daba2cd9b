"""Memory: what to do when it runs out, and how not to hand it back too soon."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
from collections.abc import Callable, Iterator, Sequence
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


TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""What `mallopt` of glibc calls them: see its manual, mallopt(3)."""

LARGEST_MMAP_THRESHOLD = 32 * 2**20
"""The most that `mallopt` takes on 64-bit machines, and what glibc comes to by itself."""


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let the C library keep what is freed for what is allocated next, and hand it back at the end.

    `dask.distributed` starts its workers with ``MALLOC_TRIM_THRESHOLD_=65536``: glibc then hands
    back to the system whatever is freed, and the next pass of the network gets it anew, page by
    page, which takes as long as the arithmetic. Where that variable is not set, or the C library
    is another, nothing is changed.
    """
    usual = os.environ.get("MALLOC_TRIM_THRESHOLD_", "")
    library = ctypes.CDLL(None) if usual.isdigit() and os.name == "posix" else None
    if library is None or not hasattr(library, "mallopt"):
        yield
        return
    library.mallopt(MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
    library.mallopt(TRIM_THRESHOLD, 2**30)
    try:
        yield
    finally:
        mapped = os.environ.get("MALLOC_MMAP_THRESHOLD_", "")
        library.mallopt(MMAP_THRESHOLD, int(mapped) if mapped.isdigit() else 128 * 2**10)
        library.mallopt(TRIM_THRESHOLD, int(usual))
        library.malloc_trim(0)
