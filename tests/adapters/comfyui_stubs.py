"""As much of ComfyUI as the pack touches, without ComfyUI: for tests that always run."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

PACK = Path(__file__).resolve().parents[2] / "comfyui_nodes"


class Interrupted(BaseException):
    """InterruptProcessingException as it is since 0.19.3."""


class OldInterrupted(Exception):
    """InterruptProcessingException as it was before."""


class Socket:
    """An input or an output of a node: whatever it was declared with."""

    def __init__(self, kind, id, **facts):
        self.kind, self.id = kind, id
        self.optional = facts.pop("optional", False)
        self.facts = facts

    @property
    def tooltip(self):
        return self.facts.get("tooltip")


def socket_type(kind):
    """A class like io.Image, with the Input and the Output of one type."""

    def make(id, **facts):
        return Socket(kind, id, **facts)

    return SimpleNamespace(Input=make, Output=make, io_type=kind)


@dataclasses.dataclass
class OldSchema:
    """io.Schema of 0.3.64."""

    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list = dataclasses.field(default_factory=list)
    outputs: list = dataclasses.field(default_factory=list)
    hidden: list = dataclasses.field(default_factory=list)
    description: str = ""
    is_input_list: bool = False
    is_output_node: bool = False
    is_deprecated: bool = False
    is_experimental: bool = False
    is_api_node: bool = False
    not_idempotent: bool = False
    enable_expand: bool = False


@dataclasses.dataclass
class Schema(OldSchema):
    """io.Schema of 0.33.0, as far as it matters here."""

    search_aliases: list = dataclasses.field(default_factory=list)
    essentials_category: str | None = None
    has_intermediate_output: bool = False


class NodeOutput:
    def __init__(self, *result, ui=None):
        self.result, self.ui = result, ui


class ComfyNode:
    hidden = SimpleNamespace(unique_id="7")


class ProgressBar:
    """Keeps what it is told."""

    made = ()

    def __init__(self, total):
        self.total, self.current, self.calls = total, 0, []
        ProgressBar.made = (*ProgressBar.made, self)

    def update_absolute(self, value, total=None, preview=None):
        self.current, self.total = value, self.total if total is None else total
        self.calls.append((value, self.total, preview))


class ModelPatcher:
    def __init__(self, model, load_device, offload_device, size=0):
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.size = size


class Host:
    """A ComfyUI of straw: `modules` go into sys.modules, the rest says what happened.

    Parameters
    ----------
    base : Path
        Where models are.
    old : bool
        Be 0.3.64 in place of 0.33.0.
    """

    def __init__(self, base, *, old=False):
        self.loads = []
        self.texts = {}
        self.interrupted = False
        self.interruption = OldInterrupted if old else Interrupted
        self.flagged = torch.float32
        self.intermediate = torch.float32
        self.models = Path(base) / "models"
        ProgressBar.made = ()
        self.modules = {
            "comfy": ModuleType("comfy"),
            "comfy.model_management": self.management(old),
            "comfy.model_patcher": module("comfy.model_patcher", ModelPatcher=ModelPatcher),
            "comfy.utils": module("comfy.utils", ProgressBar=ProgressBar),
            "comfy_api": ModuleType("comfy_api"),
            "comfy_api.latest": self.api(old),
            "folder_paths": self.folders(),
            "server": self.server(),
        }
        for name in ("model_management", "model_patcher", "utils"):
            setattr(self.modules["comfy"], name, self.modules[f"comfy.{name}"])

    def management(self, old):
        def check():
            if self.interrupted:
                self.interrupted = False
                raise self.interruption

        cpu = torch.device("cpu")
        functions = {
            "get_torch_device": lambda: cpu,
            "unet_offload_device": lambda: cpu,
            "intermediate_device": lambda: cpu,
            "unet_dtype": lambda device, supported_dtypes: self.flagged,
            "load_models_gpu": lambda models, **options: self.loads.append((models, options)),
            "throw_exception_if_processing_interrupted": check,
        }
        if not old:
            functions["intermediate_dtype"] = lambda: self.intermediate
        return module("comfy.model_management", **functions)

    def api(self, old):
        kinds = ("IMAGE", "MASK", "COMBO", "FLOAT", "INT", "STRING")
        io = SimpleNamespace(
            **{kind.title(): socket_type(kind) for kind in kinds},
            Custom=socket_type,
            ComfyNode=ComfyNode,
            NodeOutput=NodeOutput,
            NumberDisplay=SimpleNamespace(slider="slider"),
            Hidden=SimpleNamespace(unique_id="UNIQUE_ID"),
            Schema=OldSchema if old else Schema,
        )
        ui = SimpleNamespace(PreviewText=lambda text: {"text": (text,)})
        return module("comfy_api.latest", io=io, ui=ui, ComfyExtension=object)

    def server(self):
        def send(text, node_id):
            self.texts[node_id] = text

        instance = SimpleNamespace(send_progress_text=send)
        return module("server", PromptServer=SimpleNamespace(instance=instance))

    def folders(self):
        table = {}

        def add(name, path, is_default=False):
            table.setdefault(name, ([path], set()))

        def files(name):
            folders, suffixes = table[name]
            found = [each for folder in folders for each in Path(folder).glob("*")]
            return sorted(each.name for each in found if each.suffix in suffixes or not suffixes)

        def full_path(name, file):
            places = [Path(folder) / file for folder in table[name][0]]
            return next((str(place) for place in places if place.is_file()), None)

        return module(
            "folder_paths",
            models_dir=str(self.models),
            folder_names_and_paths=table,
            add_model_folder_path=add,
            get_filename_list=files,
            get_full_path=full_path,
            get_folder_paths=lambda name: table[name][0],
        )


def module(name, **contents):
    made = ModuleType(name)
    vars(made).update(contents)
    return made


def load_pack(folder=PACK, name="custom_nodes_x_dfpir"):
    """Import a pack as ComfyUI does: by its path, under a name of ComfyUI's making."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    pack = importlib.util.module_from_spec(spec)
    sys.modules[name] = pack
    spec.loader.exec_module(pack)
    return pack
