"""Trying again with less when memory runs out; keeping what is freed."""

import os
import subprocess
import sys

import pytest
import torch

from dfpir import memory as module
from dfpir.memory import first_that_fits, ran_out, release

CPU = torch.device("cpu")


def failing(error):
    def attempt():
        raise error

    return attempt


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.cuda.OutOfMemoryError("any words"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_running_out_is_noticed_on_every_device(error):
    assert ran_out(error)
    assert first_that_fits([failing(error), lambda: "less"], CPU) == (1, "less")


@pytest.mark.parametrize("error", [ValueError("out of memory"), RuntimeError("size mismatch")])
def test_anything_else_is_passed_on(error):
    with pytest.raises(type(error)):
        first_that_fits([failing(error), lambda: "less"], CPU)


def test_the_last_attempt_may_fail():
    with pytest.raises(MemoryError):
        first_that_fits([failing(MemoryError()), failing(MemoryError())], CPU)


def test_cached_memory_is_handed_back_between_attempts(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("cuda"))
    release(torch.device("cuda"))
    release(CPU)
    assert calls == ["cuda"]


def test_what_an_attempt_held_is_free_before_the_next():
    import weakref

    held = []

    def large():
        tensor = torch.zeros(4)
        held.append(weakref.ref(tensor))
        raise MemoryError

    assert first_that_fits([large, lambda: held[0]() is None], CPU) == (1, True)


COUNT_FAULTS = """
import contextlib, resource
import numpy as np
from dfpir.memory import freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        np.ones(2**21)  # 16 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults()
with freed_memory_kept():
    np.ones(2**21)
    print(usual, faults())
held = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
with freed_memory_kept():
    np.ones(2**23)
print(int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() - held)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_what_is_freed_is_kept_where_dask_says_otherwise():
    # As dask.distributed starts its workers.
    given = os.environ | {"MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", COUNT_FAULTS]
    done = subprocess.run(command, env=given, capture_output=True, text=True, check=True)
    (usual, kept), (grown,) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert kept < usual / 10
    assert grown < 2**24  # handed back in the end


def test_elsewhere_nothing_is_changed(monkeypatch):
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    monkeypatch.setattr(module.ctypes, "CDLL", lambda name: pytest.fail("asked for the C library"))
    with module.freed_memory_kept():
        pass
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    monkeypatch.setattr(module.ctypes, "CDLL", lambda name: object())  # another C library
    with module.freed_memory_kept():
        pass
