"""Fixtures of the tests with a real ComfyUI server; a plugin of the modules that use them."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_server import PACK, ROOT, start

from dfpir import Degradation, synthesis


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with dfpir as pip installs it, for PYTHONPATH."""
    site = tmp_path_factory.mktemp("site")
    command = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--target", str(site), str(ROOT)]
    subprocess.run([sys.executable, *command], check=True)
    return site


@pytest.fixture(scope="module")
def server(tmp_path_factory, installed):
    """The pack's folder, copied, beside an installed dfpir."""
    base = tmp_path_factory.mktemp("comfyui")

    def place(nodes):
        shutil.copytree(PACK, nodes / "dfpir", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(Path(__file__).with_name("comfyui_probe.py"), nodes)

    started = start(base, place, PYTHONPATH=str(installed))
    yield started.wait()
    started.stop()


@pytest.fixture(scope="module")
def degraded():
    """Pictures (H, W, 3) of uint8 by name."""
    from skimage.data import astronaut

    pixels = torch.from_numpy(np.ascontiguousarray(astronaut()[:200, 130:370]))
    pixels = pixels.movedim(-1, 0)[None].float() / 255
    pictures = {"clean": pixels}
    for number, name in enumerate(("noise-25", "rain", "haze", "blur", "low-light")):
        generator = torch.Generator().manual_seed(number)
        pictures[name] = synthesis.degrade(pixels, Degradation.from_name(name), generator)
    return {
        name: (value[0].movedim(0, -1) * 255).round().byte().numpy()
        for name, value in pictures.items()
    }
