"""Trying again with less when memory runs out."""

import pytest
import torch

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
