"""Pictures that come with scikit-image, degraded by `dfpir.synthesis`."""

from __future__ import annotations

from typing import Any

import numpy as np

LayerData = tuple[Any, dict[str, Any], str]


def picture(name: str) -> Any:
    """Return one of scikit-image's own pictures.

    Raises
    ------
    ImportError
        If scikit-image is missing, which napari brings.
    """
    import skimage.data

    return getattr(skimage.data, name)()


def degraded(image: Any, degradation: str, seed: int) -> Any:
    """Return an 8-bit image, (H, W) or (H, W, 3), degraded in one way."""
    import torch

    from dfpir.degradation import Degradation
    from dfpir.pixels import to_array, to_pixels
    from dfpir.synthesis import degrade

    pixels, form = to_pixels(np.ascontiguousarray(image))
    generator = torch.Generator().manual_seed(seed)
    return to_array(degrade(pixels, Degradation.from_name(degradation), generator), form)


def camera_counts(image: Any, sigma: float, seed: int) -> Any:
    """Return grey levels of 8 bits as a 16-bit camera's counts: gain 16, offset 100, noise."""
    noise = np.random.default_rng(seed).normal(0, sigma, image.shape)
    return np.clip(np.rint((image + noise) * 16 + 100), 0, 65535).astype(np.uint16)


def noisy_micrograph() -> list[LayerData]:
    """Return cells with noise, as uint16 counts with a pixel size."""
    image = camera_counts(picture("cell").astype(float), 25, seed=1)
    facts = {"name": "noisy micrograph", "scale": (0.2, 0.2), "units": "um"}
    return [(image, facts, "image")]


def noisy_stack() -> list[LayerData]:
    """Return a time series of a shallow stack, (T, Z, Y, X) of uint16."""
    clean = picture("cell").astype(float)[180:436, 150:406]
    planes = [[np.roll(clean, (3 * t, 5 * z), (0, 1)) for z in range(3)] for t in range(2)]
    image = camera_counts(np.asarray(planes), 25, seed=2)
    facts = {
        "name": "noisy stack",
        "scale": (1.0, 0.5, 0.2, 0.2),
        "axis_labels": ("t", "z", "y", "x"),
    }
    return [(image, facts, "image")]


def rainy_photograph() -> list[LayerData]:
    """Return a photograph in the rain."""
    image = degraded(picture("rocket"), "rain", seed=41)
    return [(image, {"name": "rainy photograph", "rgb": True}, "image")]


def dark_photograph() -> list[LayerData]:
    """Return a photograph that got too little light."""
    image = degraded(picture("coffee"), "low-light", seed=66)
    return [(image, {"name": "dark photograph", "rgb": True}, "image")]


def clean_photograph() -> list[LayerData]:
    """Return a photograph that nothing is wrong with."""
    return [(picture("chelsea"), {"name": "clean photograph", "rgb": True}, "image")]
