"""Who computes the passes: Triton's kernels, or plain PyTorch.

The environment variable ``DFPIR_KERNELS`` decides: ``auto`` (default) takes Triton for CUDA tensors
where a probe of every kernel succeeds, and PyTorch everywhere else; ``torch`` never takes Triton;
``triton`` insists, and raises where it cannot be. Triton's interpreter serves it too, on a CPU.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import torch
from torch import Tensor

from dfpir.kernels import reference

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Precisions that the kernels know."""

CHOICES = ("auto", "torch", "triton")

probed: dict[str, str] = {}
"""By device: why the kernels fail there; nothing where they do not."""


def requested() -> str:
    """Return the value of ``DFPIR_KERNELS``.

    Raises
    ------
    ValueError
        If it is none of auto, torch and triton.
    """
    value = os.environ.get("DFPIR_KERNELS", "") or "auto"
    if value not in CHOICES:
        message = (
            f"DFPIR_KERNELS is {value!r}; expected {', '.join(CHOICES)}. Set it to one of them."
        )
        raise ValueError(message)
    return value


def interpreted() -> bool:
    """Whether Triton is told to interpret kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


def obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Return why the kernels cannot serve such tensors, or nothing if they can."""
    if dtype not in DTYPES:
        return f"the kernels know float32, float16 and bfloat16, not {dtype}"
    if device.type != "cuda" and not interpreted():
        return f"the tensors are on {device.type}, not on cuda, and TRITON_INTERPRET is not set"
    return probe(device)


def use_triton(device: torch.device, dtype: torch.dtype, gradient: bool) -> bool:
    """Whether the kernels serve tensors of this device and precision, where no gradient is wanted.

    Raises
    ------
    RuntimeError
        If ``DFPIR_KERNELS`` is ``triton`` and they cannot.
    """
    wanted = requested()
    if gradient or wanted == "torch" or (wanted == "auto" and device.type != "cuda"):
        return False
    if device.type == "cpu" and torch.cuda.is_available():
        return False  # beside the card, where the classifier works
    reason = obstacle(device, dtype)
    if reason and wanted == "triton":
        message = (
            f"DFPIR_KERNELS is 'triton', but {reason}. Set it to 'auto' for the kernels where they "
            "can be, or to 'torch'."
        )
        raise RuntimeError(message)
    return not reason


def use_filter(features: Tensor) -> bool:
    """Whether the kernel of the depthwise filter, which has a gradient, serves these features."""
    return (
        torch.is_grad_enabled()
        and features.requires_grad  # else the others serve, which know no kernel
        and features.dtype in DTYPES
        and (features.is_cuda or (interpreted() and requested() == "triton"))
        and requested() != "torch"
        and not probe(features.device)
    )


def probe(device: torch.device) -> str:
    """Run every kernel once on a device; return what failed, or nothing.

    A failure is logged, once for the process, and whoever asks gets PyTorch from then on.
    """
    name = str(device)
    if name not in probed:
        if torch.compiler.is_compiling():
            return "the probe cannot be compiled; run the network once before"
        probed[name] = ""
        try:
            with torch.inference_mode():
                check(device)
        except Exception as error:  # whatever a missing compiler or an odd card may raise
            probed[name] = reason = f"they fail here ({type(error).__name__}: {first_line(error)})"
            logger.warning("Triton kernels: %s; PyTorch computes instead on %s.", reason, name)
    return probed[name]


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).splitlines() or [""])[0]


def check(device: torch.device) -> None:
    """Compare each kernel with its definition on a few pixels.

    Raises
    ------
    RuntimeError
        If one differs; or whatever a kernel that does not run raises.
    """
    from dfpir.kernels import operators  # noqa: F401

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    image, filters, square, bias = draw(1, 5, 6, 16), draw(16, 1, 3, 3), draw(16, 16), draw(16)
    wide, narrow = draw(32, 1, 3, 3), draw(16, 16)
    kernels = torch.ops.dfpir
    out = torch.empty_like(image)

    def written(write: Callable[..., None], *arguments: Tensor) -> Tensor:
        write(*arguments, out, 0, 0)
        return out.clone()

    both = torch.cat([image, image.flip(1)], dim=-1)
    pairs = {
        "project": (kernels.project(image, square, bias), reference.project(image, square, bias)),
        "correlate": (
            kernels.correlate(image, image.flip(2), filters, filters, 2, 0, 0)[0],
            reference.correlate(image, image.flip(2), filters, filters, 2)[0],
        ),
        "mix_values": (
            written(kernels.mix_values, image, filters, square[None], image),
            reference.mix_values(image, filters, square[None], image),
        ),
        "filter": (
            kernels.filter(image, filters),
            reference.depthwise_rows(image, filters, 0, 0),
        ),
        "filter_weights": (
            kernels.filter_weights(image, image)[:, 0, 1, 1],
            image.square().sum(dim=(0, 1, 2)),
        ),
        "gate": (
            written(kernels.gate, both, wide, narrow, image),
            reference.gate(both, wide, narrow, image),
        ),
    }
    for name, (found, expected) in pairs.items():
        distance = float((found - expected).norm() / expected.norm())
        if not distance < 1e-2:  # TF32 may be on
            message = f"{name} differs from its definition by {distance:.1e}"
            raise RuntimeError(message)
