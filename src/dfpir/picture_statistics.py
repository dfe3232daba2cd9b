"""What the pixels of a picture say in numbers: its tones, its sharpness by direction, its veil.

Motion takes the detail along its path and leaves that across it, where a lens out of focus, or
enlarging, takes both. Rain adds bright lines of one direction. Haze lifts the darkest values of
every part of a scene, and most where it takes most of the contrast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

QUANTILES = {"darkest": (0.01, 0.1, 0.5), "mean": (0.01, 0.1, 0.5, 0.9, 0.99), "brightest": (0.99,)}
"""Of the darkest channel of every pixel, of their mean and of the brightest: see `tones`."""

MOST_TONES = 2**18
"""No more pixels than about this many are sorted for the quantiles."""

DIRECTIONS = ((0, 1), (1, 2), (1, 1), (2, 1), (1, 0), (2, -1), (1, -1), (1, -2))
"""Steps in rows and columns; across each lies the one four places on."""

REACH = 2
"""The longest of them along either axis."""

SCALES = 4
"""Sharpness is seen at full size, a half, a quarter and an eighth, as far as `SMALLEST` allows."""

SMALLEST = 16
"""Pictures are not shrunk to sides below this."""

EDGES = 0.1
"""The fraction of the pixels that are taken for edges: those that change most."""

BLOCK = 8
LONGEST_VEILED = 320
"""The veil is looked for in blocks of this side, of the picture shrunk to no more than this."""

BLOCK_QUANTILES = {
    "dark": (0.02, 0.1, 0.25, 0.5, 0.75, 0.95),
    "contrast": (0.05, 0.25, 0.5, 0.75, 0.95),
    "saturation": (0.1, 0.5, 0.9),
}
"""Of all blocks: see `veil`."""

COUNT = sum(map(len, QUANTILES.values())) + 3 + 80 + sum(map(len, BLOCK_QUANTILES.values())) + 6
"""Numbers that `described` returns."""


def described(picture: Tensor, shrunk: Tensor, windows: Tensor) -> Tensor:
    """Return all there is to say of a picture, (`COUNT`,).

    Parameters
    ----------
    picture : Tensor, (1, 3, H, W), values about 0..1
    shrunk : Tensor, (1, 3, h, w)
        A smaller copy, for what noise must not matter to.
    windows : Tensor, (N, 3, h, w)
        Parts of it at full size, or all of it, for what lies in single pixels.
    """
    return torch.cat([tones(shrunk), sharpness(windows.mean(dim=1, keepdim=True)), veil(picture)])


def tones(picture: Tensor) -> Tensor:
    """Return how light and dark are spread in a picture (1, 3, H, W): twelve numbers.

    The darkest channel is what haze lifts (He, Sun and Tang, "Single image haze removal using dark
    channel prior", CVPR 2009).
    """
    step = math.ceil(math.sqrt(picture[0, 0].numel() / MOST_TONES))
    pixels = picture[0, :, ::step, ::step].flatten(1)
    channels = {"darkest": pixels.amin(0), "mean": pixels.mean(0), "brightest": pixels.amax(0)}
    mean = channels["mean"]
    return torch.cat(
        [
            *(quantiles(channels[name], fractions) for name, fractions in QUANTILES.items()),
            torch.stack(
                [
                    mean.mean(),
                    mean.std(correction=0),
                    (channels["brightest"] - channels["darkest"]).mean(),
                ]
            ),
        ]
    )


def quantiles(values: Tensor, fractions: tuple[float, ...]) -> Tensor:
    """Return quantiles of values (N,)."""
    return torch.quantile(values, values.new_tensor(fractions))


def second_differences(planes: Tensor) -> Tensor:
    """Return how pixels of (N, 1, H, W) differ from both neighbours, (directions, pixels)."""
    height, width = planes.shape[2:]

    def moved(rows: int, columns: int) -> Tensor:
        return planes[
            ...,
            REACH + rows : height - REACH + rows,
            REACH + columns : width - REACH + columns,
        ]

    here = 2 * moved(0, 0)
    return torch.stack(
        [
            (moved(rows, columns) + moved(-rows, -columns) - here).flatten()
            for rows, columns in DIRECTIONS
        ]
    )


def over_directions(values: Tensor) -> Tensor:
    """Return least, mean and greatest of values (directions,), and the most one lacks its across.

    None of these changes when the picture is turned by a right angle or flipped.
    """
    across = values - values.roll(len(DIRECTIONS) // 2)
    return torch.stack([values.amin(), values.mean(), values.amax(), across.amin()])


def sharpness(planes: Tensor) -> Tensor:
    """Return what detail there is along each direction, at several sizes: 80 numbers.

    Of the second differences of brightness: their mean size, from each scale to the next one; how
    few of them make most of it; the same of edges alone; and how much of it is bright lines.

    Parameters
    ----------
    planes : Tensor, (N, 1, H, W)
        Parts of one picture of one brightness; sides of at least `SMALLEST`.
    """
    sizes, sparsities, edges, bright = [], [], [], []
    for _ in range(SCALES):
        differences = second_differences(planes)
        size, square = differences.abs(), differences.square()
        sizes.append((size.mean(dim=1) + 1e-4).log())
        sparsities.append(0.5 * (square.mean(dim=1) + 1e-8).log() - sizes[-1])
        strongest = size.amax(dim=0).topk(max(1, int(EDGES * size.shape[1]))).indices
        edges.append((size[:, strongest].mean(dim=1) + 1e-4).log())
        bright.append((square * (differences < 0)).mean(dim=1) / (square.mean(dim=1) + 1e-8))
        if min(planes.shape[2:]) >= 2 * SMALLEST:
            planes = F.avg_pool2d(planes, 2)
    found = []
    for scale in range(SCALES - 1):
        loss = sizes[scale] - sizes[scale + 1]
        found += [
            over_directions(loss),
            loss.sort().values,
            over_directions(sparsities[scale]),
            over_directions(edges[scale] - edges[scale + 1]),
        ]
    for each in (sizes, edges):
        found.append(over_directions(each[0] - each[2])[[0, 2, 3]])
        found.append(torch.stack([each[scale].mean() for scale in range(SCALES - 1)]))
    return torch.cat([*found, over_directions(bright[0]), over_directions(bright[1])])


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Return the correlation of two sets of values (N,); 0 where one of them is constant."""
    first, second = first - first.mean(), second - second.mean()
    scale = first.square().mean().sqrt() * second.square().mean().sqrt()
    return (first * second).mean() / (scale + 1e-4)


def veil(picture: Tensor) -> Tensor:
    """Return how dark, contrast and colour are spread and go together over blocks: 20 numbers.

    In a clear picture (1, 3, H, W) almost every block has something dark in it (He, Sun and Tang,
    CVPR 2009); in a hazy one the darkest is brightest where contrast and colour are least.
    """
    factor = math.ceil(max(picture.shape[2:]) / LONGEST_VEILED)
    if min(picture.shape[2:]) >= 2 * factor:
        picture = F.avg_pool2d(picture, factor)
    side = min(BLOCK, max(1, min(picture.shape[2:]) // 4))
    brightest, darkest = picture.amax(dim=1, keepdim=True), picture.amin(dim=1, keepdim=True)
    brightness = picture.mean(dim=1, keepdim=True)
    dark = -F.max_pool2d(-darkest, side)
    mean = F.avg_pool2d(brightness, side)
    variance = F.avg_pool2d(brightness.square(), side) - mean.square()
    blocks = {
        "dark": dark,
        "mean": mean,
        "contrast": (variance.clamp(min=0).sqrt() + 2e-3).log(),
        "saturation": F.avg_pool2d(
            (brightest - darkest) / (brightest + 0.02).clamp(min=0.02), side
        ),
        "row": torch.linspace(-1, 1, dark.shape[2], device=dark.device)[:, None].expand_as(dark),
    }
    flat = {name: each.flatten() for name, each in blocks.items()}

    def together(first: str, second: str) -> Tensor:
        return correlation(flat[first], flat[second])

    return torch.cat(
        [
            *(quantiles(flat[name], fractions) for name, fractions in BLOCK_QUANTILES.items()),
            torch.stack(
                [
                    together("dark", "contrast"),
                    together("mean", "contrast"),
                    # A picture upside down is no other picture.
                    together("row", "dark").abs(),
                    together("row", "contrast").abs(),
                    together("saturation", "dark"),
                    together("saturation", "mean"),
                ]
            ),
        ]
    )
