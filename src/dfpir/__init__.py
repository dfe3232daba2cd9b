"""dfpir makes pictures good again: it finds what degraded them and restores them.

>>> import dfpir
>>> import numpy as np
>>> dfpir.classify(np.zeros((32, 32, 3), np.uint8)).verdict in ("degraded", "clean", "unsure")
True
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dfpir.degradation import Degradation, Diagnosis

if TYPE_CHECKING:
    from dfpir.model import DFPIR, DFPIRConfig
    from dfpir.record import RestorationRecord
    from dfpir.restorer import Restoration, Restorer, classify, restore
    from dfpir.tiling import Tiling
    from dfpir.weights import load_model

__all__ = [
    "DFPIR",
    "DFPIRConfig",
    "Degradation",
    "Diagnosis",
    "Restoration",
    "RestorationRecord",
    "Restorer",
    "Tiling",
    "classify",
    "load_model",
    "restore",
]

# PyTorch takes a second to import: only what needs it brings it in, when it is first used.
HOMES = {
    "DFPIR": "model",
    "DFPIRConfig": "model",
    "Restoration": "restorer",
    "RestorationRecord": "record",
    "Restorer": "restorer",
    "Tiling": "tiling",
    "classify": "restorer",
    "load_model": "weights",
    "restore": "restorer",
}


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(f"dfpir.{HOMES[name]}"), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("dfpir")
    message = f"module 'dfpir' has no attribute {name!r}"
    raise AttributeError(message)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
