"""What ComfyUI offers and asks for: a folder of weights, devices, precisions, progress, cancel."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
import torch
from PIL import Image
from server import PromptServer

from dfpir import Restorer, load_model, weights
from dfpir.pixels import colours_of
from dfpir.restorer import PRECISIONS, memory_needed

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

FOLDER = "dfpir"
"""Name of our folder of weights: ``models/dfpir``, or what extra_model_paths.yaml says."""

AUTO = "auto"
PREVIEW_SIDE = 512
"""Longest side in pixels of a preview."""


def register_folder() -> None:
    """Tell ComfyUI of the folder for weights, and make it."""
    folder = Path(folder_paths.models_dir) / FOLDER
    folder_paths.add_model_folder_path(FOLDER, str(folder), is_default=True)
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {".safetensors"})
    with contextlib.suppress(OSError):  # of a shared installation that may only be read
        folder.mkdir(parents=True, exist_ok=True)


def bundled_names() -> list[str]:
    """Return the names of the weights that ship with dfpir, the default first."""
    default = weights.default_name()
    names = [each.name for each in weights.entries("restorer") if each.source == "bundled"]
    return sorted(names, key=lambda name: name != default)


def weights_names() -> list[str]:
    """Return what there is to choose from: the bundled weights, then the folder's files."""
    return [*bundled_names(), *folder_paths.get_filename_list(FOLDER)]


def absence(name: str) -> str:
    """Say that weights are absent, and how to get them."""
    folder = folder_paths.get_folder_paths(FOLDER)[0]
    for entry in weights.entries("restorer"):
        if name == entry.filename and entry.source != "bundled":
            return (
                f"{name} is not in {folder}: fetch the checkpoint by hand from {entry.page} "
                f"(SHA-256 {entry.sha256 or 'not published'}), run `{entry.facts['command']}` with "
                "that folder, then press R."
            )
    return f"{name} is not in {folder}: put the file there, then press R, or choose other weights."


@dataclass(frozen=True)
class Weights:
    """A verified weights file; what travels over a DFPIR_MODEL wire.

    Attributes
    ----------
    path : str
    stamp : tuple of int
        Time of the last change in nanoseconds, and size in bytes: a changed file is read again.
    """

    path: str
    stamp: tuple[int, int]

    @classmethod
    def find(cls, name: str | None = None) -> Weights:
        """Return the weights of a name in `weights_names`; the bundled default if none is given.

        Raises
        ------
        ValueError
            If they are absent or damaged.
        """
        if name is None or name in bundled_names():
            path = weights.resolve(name)
        else:
            found = folder_paths.get_full_path(FOLDER, name)
            if found is None:
                raise ValueError(absence(name))
            path = Path(found)
        facts = path.stat()
        return cls(str(path), (facts.st_mtime_ns, facts.st_size))

    def patcher(self, dtype: torch.dtype = torch.float32) -> ModelPatcher:
        """Return the network, read once, in ComfyUI's care.

        Raises
        ------
        ValueError
            If the file is not a DFPIR network.
        """
        return read(self.path, self.stamp, dtype)


@lru_cache(maxsize=2)
def read(path: str, stamp: tuple[int, int], dtype: torch.dtype) -> ModelPatcher:
    """Read weights; two networks are kept."""
    with torch.inference_mode(False):  # ordinary tensors, whose folded matrices can be kept
        model = load_model(path).to(dtype)
    # Not CoreModelPatcher, which may be a dynamic one that wants layers of comfy.ops.
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
        # By itself it would count what specialists share once for each of them.
        size=sum(value.nbytes for value in itertools.chain(model.parameters(), model.buffers())),
    )


def choose_dtype(precision: str) -> torch.dtype:
    """Return the dtype of a name; "auto" is float32 unless ComfyUI's own flags say otherwise."""
    if precision != AUTO:
        return PRECISIONS[precision]
    flagged = comfy.model_management.unet_dtype(
        device=comfy.model_management.get_torch_device(), supported_dtypes=[torch.float32]
    )
    return flagged if flagged in PRECISIONS.values() else torch.float32


def loaded_restorer(chosen: Weights, precision: str, image: torch.Tensor) -> Restorer:
    """Have ComfyUI make room and load the network whole; return a restorer on it."""
    dtype = choose_dtype(precision)
    patcher = chosen.patcher(dtype)
    size = (image.shape[-3], image.shape[-2])
    needed = memory_needed(patcher.model.config, size, dtype)
    comfy.model_management.load_models_gpu([patcher], memory_required=needed, force_full_load=True)
    # --novram loads in parts all the same and leaves parameters behind; nothing moves otherwise.
    patcher.model.to(patcher.load_device)
    return Restorer(model=patcher.model)


def to_intermediate(image: torch.Tensor) -> torch.Tensor:
    """Return an image where and as ComfyUI keeps images between nodes."""
    kept = getattr(comfy.model_management, "intermediate_dtype", lambda: torch.float32)
    return image.to(comfy.model_management.intermediate_device(), kept())


def show_text(text: str, node_id: str) -> None:
    """Show a text on a node of the page, below its widgets."""
    # A new node has room for two short lines. One page breaks longer ones within words, the other
    # joins lines: hence short ones that end like sentences, the verdict and what came of it first.
    lines = []
    for line in text.splitlines():
        at, broken = (" (", "\n(") if " (" in line else ("; ", ";\n")
        lines.append(line.removesuffix(".").replace(at, broken) + ".\n")
    PromptServer.instance.send_progress_text("".join(lines), node_id)


class Progress:
    """Passes progress and previews on to ComfyUI, and its wish to cancel back.

    Parameters
    ----------
    count : int
        How many images there are.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.bar = comfy.utils.ProgressBar(1)

    def __call__(self, done: int, total: int) -> None:
        """Report progress; raises ComfyUI's InterruptProcessingException to cancel."""
        # The bar looks for it only when it is not throttled.
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.bar.update_absolute(done, total)

    def show(self, number: int, image: torch.Tensor) -> None:
        """Show a restored image (C, H, W) on the node while there are more to come."""
        if number + 1 == self.count:
            return
        levels = (colours_of(image)[0].float().clamp(0, 1) * 255).byte().movedim(0, -1)
        preview = ("JPEG", Image.fromarray(levels.cpu().numpy()), PREVIEW_SIDE)
        self.bar.update_absolute(self.bar.current, self.bar.total, preview)
