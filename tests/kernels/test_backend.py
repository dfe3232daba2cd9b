"""Who computes: the choice, and every way back to plain PyTorch."""

import logging
from types import SimpleNamespace

import pytest
import torch

from dfpir import kernels
from dfpir.kernels import backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("DFPIR_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "probed", {})


def works(monkeypatch):
    monkeypatch.setattr(backend, "check", lambda device: None)


def fails(monkeypatch, error):
    def check(device):
        raise error

    monkeypatch.setattr(backend, "check", check)


def test_auto_takes_triton_on_cuda(monkeypatch):
    works(monkeypatch)
    for dtype in backend.DTYPES:
        assert backend.use_triton(CUDA, dtype, False)


@pytest.mark.parametrize("kind", ["cpu", "mps", "xpu"])
def test_auto_takes_torch_elsewhere(monkeypatch, kind):
    fails(monkeypatch, AssertionError("the probe is not to run"))
    assert not backend.use_triton(torch.device(kind), torch.float32, False)


def test_auto_takes_torch_for_gradients_and_double_precision(monkeypatch):
    works(monkeypatch)
    assert not backend.use_triton(CUDA, torch.float32, True)
    assert not backend.use_triton(CUDA, torch.float64, False)


def test_torch_is_taken_when_told(monkeypatch):
    works(monkeypatch)
    monkeypatch.setenv("DFPIR_KERNELS", "torch")
    assert not backend.use_triton(CUDA, torch.float32, False)


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'triton'"),
        RuntimeError("Failed to find C compiler"),
        RuntimeError("gate differs from its definition by 1.0e+00"),
    ],
)
def test_a_failed_probe_is_one_line_in_the_log(monkeypatch, caplog, error):
    fails(monkeypatch, error)
    with caplog.at_level(logging.WARNING, logger="dfpir"):
        assert not backend.use_triton(CUDA, torch.float32, False)
        assert not backend.use_triton(CUDA, torch.bfloat16, False)
    assert [str(error) in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        (CUDA, torch.float64, "float64"),
        (CPU, torch.float32, "on cpu"),
        (torch.device("mps"), torch.float32, "on mps"),
        (CUDA, torch.float32, "no compiler"),
    ],
)
def test_insisting_on_triton_tells_the_reason(monkeypatch, device, dtype, reason):
    monkeypatch.setenv("DFPIR_KERNELS", "triton")
    fails(monkeypatch, RuntimeError("no compiler"))
    with pytest.raises(RuntimeError, match=rf"'triton', but .*{reason}.*'torch'"):
        backend.use_triton(device, dtype, gradient=False)


def test_nothing_is_insisted_on_for_gradients_or_beside_the_card(monkeypatch):
    """Training has its own kernel, and the classifier stays on the processor."""
    monkeypatch.setenv("DFPIR_KERNELS", "triton")
    works(monkeypatch)
    assert not backend.use_triton(CUDA, torch.float32, gradient=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not backend.use_triton(CPU, torch.float32, gradient=False)


def features(dtype=torch.float32, device=CUDA, requires_grad=True):
    """What the choice looks at."""
    is_cuda = device.type == "cuda"
    return SimpleNamespace(dtype=dtype, device=device, is_cuda=is_cuda, requires_grad=requires_grad)


def test_the_filter_s_kernel_is_for_gradients_on_cuda(monkeypatch):
    works(monkeypatch)
    for dtype in backend.DTYPES:
        assert backend.use_filter(features(dtype))
    assert not backend.use_filter(features(torch.float64))
    with torch.no_grad():
        assert not backend.use_filter(features())
    assert not backend.use_filter(features(requires_grad=False))
    monkeypatch.setenv("DFPIR_KERNELS", "torch")
    assert not backend.use_filter(features())


@pytest.mark.parametrize("kind", ["cpu", "mps", "xpu"])
def test_the_filter_s_kernel_is_not_for_other_devices(monkeypatch, kind):
    fails(monkeypatch, AssertionError("the probe is not to run"))
    assert not backend.use_filter(features(device=torch.device(kind)))


def test_interpreted_the_filter_s_kernel_is_taken_when_told(monkeypatch):
    works(monkeypatch)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not backend.use_filter(features(device=CPU))
    monkeypatch.setenv("DFPIR_KERNELS", "triton")
    assert backend.use_filter(features(device=CPU))


def test_a_failed_probe_leaves_the_filter_to_pytorch(monkeypatch, caplog):
    fails(monkeypatch, RuntimeError("no compiler"))
    with caplog.at_level(logging.WARNING, logger="dfpir"):
        assert not backend.use_filter(features())
    assert "no compiler" in caplog.text


def test_an_unknown_choice_is_named(monkeypatch):
    monkeypatch.setenv("DFPIR_KERNELS", "cuda")
    with pytest.raises(ValueError, match=r"'cuda'; expected auto, torch, triton"):
        backend.use_triton(CPU, torch.float32, False)


def test_the_passes_follow_the_choice(monkeypatch):
    x = torch.zeros(1)
    with torch.no_grad():
        assert kernels.passes_for(x).__name__ == "dfpir.kernels.cpu"
        monkeypatch.setattr(backend, "use_triton", lambda *_: True)
        assert kernels.passes_for(x).__name__ == "dfpir.kernels.fused"
    monkeypatch.undo()
    assert kernels.passes_for(x).__name__ == "dfpir.kernels.generic"
    with torch.no_grad():
        assert kernels.passes_for(x.to("meta")).__name__ == "dfpir.kernels.generic"
