"""The best that classical filters do for each degradation: what a network has to beat.

Only permissively licensed implementations (scikit-image, kornia) and a few lines of arithmetic.
Their parameters were chosen on the validation pictures, as `tune` does; no test picture took part.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dfpir.degradation import Degradation

Image = NDArray[np.float32]
"""(H, W, 3), or (H, W) where it is grey; values 0..1."""


def scikit_image(name: str) -> Any:
    """Return a submodule of scikit-image, which a small installation lacks."""
    return importlib.import_module(f"skimage.{name}")


def non_local_means(image: Image, sigma: float, *, strength: float, patch: int = 5) -> Image:
    """Average pixels whose surroundings look alike, knowing the noise's standard deviation.

    Parameters
    ----------
    sigma : float
        In grey levels of 0..255.
    strength : float
        Of the smoothing, relative to sigma.
    patch : int
        Side of the surroundings in pixels.

    References
    ----------
    .. [1] Buades, Coll and Morel, "A non-local algorithm for image denoising", CVPR 2005.
    """
    restored: Image = scikit_image("restoration").denoise_nl_means(
        image,
        patch_size=patch,
        patch_distance=6,
        h=strength * sigma / 255,
        sigma=sigma / 255,
        fast_mode=True,
        channel_axis=-1 if image.ndim == 3 else None,
    )
    return restored


def row_median(image: Image, *, width: int) -> Image:
    """Take the median along rows: streaks of rain stand nearly upright and are thinner."""
    if image.ndim == 2:
        filtered: Image = scikit_image("filters").median(image, np.ones((1, width)), mode="reflect")
        return filtered
    return np.stack([row_median(channel, width=width) for channel in np.moveaxis(image, -1, 0)], -1)


def dark_channel(image: Image, *, keep: float, radius: int) -> Image:
    """Remove haze by the dark channel prior, its transmission refined by a guided filter.

    Parameters
    ----------
    keep : float
        Fraction of the estimated haze that is removed, so that the distance does not turn black.
    radius : int
        Half the side of the neighbourhood, in pixels.

    References
    ----------
    .. [1] He, Sun and Tang, "Single image haze removal using dark channel prior", CVPR 2009.
    """
    from kornia.filters import guided_blur

    erosion = scikit_image("morphology").erosion
    footprint = np.ones((2 * radius + 1, 2 * radius + 1))
    dark = erosion(image.min(axis=-1), footprint)
    brightest = dark >= np.quantile(dark, 0.999)
    light = np.maximum(image[brightest].mean(axis=0), 0.1)
    haze = erosion((image / light).min(axis=-1), footprint)
    rough = torch.from_numpy(np.ascontiguousarray(1 - keep * haze, dtype=np.float32))[None, None]
    guide = torch.from_numpy(np.ascontiguousarray(image.mean(axis=-1)))[None, None]
    side = 8 * radius + 1
    fine = guided_blur(guide, rough, (side, side), 1e-3, border_type="reflect", subsample=4)
    transmission = fine[0, 0].numpy().clip(0.1, 1)[..., None]
    restored: Image = (image - light) / transmission + light
    return restored


def local_equalisation(image: Image, *, limit: float) -> Image:
    """Equalise the histogram of each neighbourhood (CLAHE)."""
    restored: Image = scikit_image("exposure").equalize_adapthist(
        image.clip(0, 1), clip_limit=limit
    )
    return restored


def gain_to_mean(image: Image, *, mean: float, gamma: float) -> Image:
    """Raise the brightness to a mean, after a gamma curve."""
    curved = (image.clip(0, 1) ** gamma).astype(np.float32)
    return curved * np.float32(mean / max(float(curved.mean()), 1e-3))


def unsharp(image: Image, *, radius: float, amount: float) -> Image:
    """Add what a Gaussian blur takes away."""
    # Not scikit-image's own `unsharp_mask`: version 0.26 returns NaN for colour.
    axis = -1 if image.ndim == 3 else None
    blurred: Image = scikit_image("filters").gaussian(image, radius, channel_axis=axis)
    return image + np.float32(amount) * (image - blurred)


def deconvolution(image: Image, *, spread: float, seed: int = 0) -> Image:
    """Undo a Gaussian blur of `spread` pixels by the unsupervised Wiener filter.

    References
    ----------
    .. [1] Orieux, Giovannelli and Rodet, "Bayesian estimation of regularization and point spread
       function parameters for Wiener-Hunt deconvolution", JOSA A 27(7), 2010.
    """
    wiener = scikit_image("restoration").unsupervised_wiener
    reach = round(3 * spread)
    steps = np.arange(-reach, reach + 1)
    line = np.exp(-0.5 * (steps / spread) ** 2)
    kernel = np.outer(line, line) / line.sum() ** 2
    channels = image[..., None] if image.ndim == 2 else image
    padded = np.pad(channels, ((16, 16), (16, 16), (0, 0)), mode="reflect")
    restored = [
        wiener(channel, kernel, clip=False, rng=seed)[0][16:-16, 16:-16]
        for channel in np.moveaxis(padded, -1, 0)
    ]
    return np.stack(restored, axis=-1).reshape(image.shape)


def untouched(image: Image) -> Image:
    """Leave the image as it is: often the best that can be done by hand."""
    return image


@dataclass(frozen=True, slots=True)
class Tool:
    """A filter with its parameters.

    Attributes
    ----------
    name : str
        For the tables.
    filter : callable
    parameters : mapping
    """

    name: str
    filter: Callable[..., Image]
    parameters: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    def __call__(self, image: Image, sigma: float | None = None) -> Image:
        """Restore an image; `sigma` in grey levels where it is noise."""
        known = {} if sigma is None else {"sigma": sigma}
        return self.filter(image, **known, **self.parameters).astype(np.float32)


def choices(name: str, function: Callable[..., Image], **values: Iterable[float]) -> list[Tool]:
    """Return a tool for every combination of parameter values."""
    return [
        Tool(name, function, dict(zip(values, each, strict=True)))
        for each in itertools.product(*values.values())
    ]


def candidates(degradation: Degradation) -> list[Tool]:
    """Return the tools that `tune` compares."""
    if degradation.sigma is not None:
        strengths = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
        return choices("non-local means", non_local_means, strength=strengths, patch=(3, 5, 7))
    same = [Tool("untouched", untouched)]
    if degradation is Degradation.RAIN:
        return [*same, *choices("median along rows", row_median, width=(3, 5, 7, 9))]
    if degradation is Degradation.HAZE:
        return [
            *same,
            *choices(
                "dark channel", dark_channel, keep=(0.75, 0.85, 0.95, 1.0), radius=(3, 7, 11, 15)
            ),
            *choices("local equalisation", local_equalisation, limit=(0.003, 0.01, 0.02)),
        ]
    if degradation is Degradation.BLUR:
        return [
            *same,
            *choices("unsharp mask", unsharp, radius=(1.0, 2.0, 4.0), amount=(0.1, 0.25, 0.5, 1.0)),
            *choices("unsupervised Wiener", deconvolution, spread=(0.7, 1.0, 1.5)),
        ]
    gammas, means = (0.6, 0.7, 0.8, 0.9, 1.0), (0.4, 0.45, 0.5, 0.55)
    return [*same, *choices("gain to mean, gamma", gain_to_mean, mean=means, gamma=gammas)]


def tune(
    degradation: Degradation, pairs: Iterable[tuple[Image, Image]]
) -> tuple[Tool, dict[str, float]]:
    """Return the tool with the highest mean PSNR on (degraded, sharp) images, and all means.

    Parameters
    ----------
    degradation : Degradation
    pairs : iterable of tuple of ndarray, (H, W, 3), float32, values 0..1

    Returns
    -------
    Tool
    dict
        dB by tool and parameters.
    """
    tools, kept = candidates(degradation), list(pairs)
    means: dict[str, float] = {}
    for tool in tools:
        errors = [
            float(np.square(tool(given, degradation.sigma).clip(0, 1) - sharp).mean())
            for given, sharp in kept
        ]
        described = f"{tool.name} {dict(tool.parameters)}"
        means[described] = float(np.mean([-10 * np.log10(max(each, 1e-10)) for each in errors]))
    best = max(range(len(tools)), key=lambda number: list(means.values())[number])
    return tools[best], means


BEST = {
    Degradation.NOISE_15: Tool("non-local means", non_local_means, {"strength": 0.5, "patch": 3}),
    Degradation.NOISE_25: Tool("non-local means", non_local_means, {"strength": 0.6, "patch": 5}),
    Degradation.NOISE_50: Tool("non-local means", non_local_means, {"strength": 0.4, "patch": 5}),
    Degradation.RAIN: Tool("median along rows", row_median, {"width": 5}),
    Degradation.HAZE: Tool("dark channel", dark_channel, {"keep": 0.95, "radius": 11}),
    Degradation.BLUR: Tool("unsharp mask", unsharp, {"radius": 4.0, "amount": 0.25}),
    Degradation.LOW_LIGHT: Tool("gain to mean, gamma", gain_to_mean, {"mean": 0.45, "gamma": 0.8}),
}
"""What `tune` chose for each degradation, on the middles of the validation photographs."""


def restore(image: NDArray[Any], degradation: Degradation, sigma: float | None = None) -> Image:
    """Restore an image by the best classical tool.

    Parameters
    ----------
    image : ndarray, (H, W, 3) or (H, W), values 0..1
    degradation : Degradation
    sigma : float, optional
        Level of the noise in grey levels, where it is not the one in the degradation's name.

    Returns
    -------
    ndarray
        float32, of the same shape, clipped to 0..1.
    """
    level = None if degradation.sigma is None else (sigma or degradation.sigma)
    return BEST[degradation](image.astype(np.float32), level).clip(0, 1)
