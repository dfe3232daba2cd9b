"""The ComfyUI pack of dfpir: restore pictures, find what degraded them, choose weights.

Works as a folder of its own in ``custom_nodes`` beside an installed dfpir, and inside a checkout of
dfpir, whose sources it then uses without an installation.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "./web"

# A checkout's own sources fit the pack beside them better than whatever is installed. The folder
# holds this one package, so that nothing else can be found there by accident.
source = Path(__file__).resolve().parents[1] / "src"
if (source / "dfpir" / "__init__.py").is_file() and str(source) not in sys.path:
    sys.path.insert(0, str(source))

if find_spec("dfpir") is None:
    message = (
        "The package dfpir is missing: run `python -m pip install dfpir` with ComfyUI's Python."
    )
    raise ImportError(message)


async def comfy_entrypoint() -> ComfyExtension:
    """Return the extension; ComfyUI calls this once, at its start."""
    from .nodes import DFPIRExtension

    return DFPIRExtension()
