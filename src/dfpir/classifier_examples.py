"""Pictures for the classifier to learn from and to be scored on, degraded as they are drawn.

What "clean" looks like is most of the work: photographs bright and dark, soft, grey, flat and
busy; dim grey micrographs; scans of text; drawings and smooth textures. A network that has seen
none of these takes every fluorescence image for low light and every page for haze.
"""

from __future__ import annotations

import io
import math
import string
from dataclasses import dataclass

import numpy as np
import torch
from kornia.filters import gaussian_blur2d
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Generator, Tensor
from torch.nn import functional as F

from dfpir.classifier import KINDS, NOISE
from dfpir.degradation import CLEAN, Degradation
from dfpir.pixels import is_grey
from dfpir.synthesis import (
    LEVELS,
    degrade,
    gaussian_noise,
    haze,
    lit_from_near,
    log_uniform,
    normal_like,
    prompted,
    quantised,
    scene_depth,
    smooth_field,
    uniform,
)
from dfpir.training import Pictures, cut

SHARES = {NOISE: 0.18, "rain": 0.13, "haze": 0.15, "blur": 0.15, "low-light": 0.09, CLEAN: 0.30}
"""Fraction of the patches that each kind gets."""

MICROGRAPH_SHARE = {NOISE: 0.3, CLEAN: 0.35}
"""Fraction of a kind's patches cut from micrographs, which know neither weather nor darkness."""

STAINED_SHARE = 0.35
"""Fraction of these cut from micrographs in colour: they are few, and soft as if blurred."""

DRAWING_SHARE = 0.12
FAINT = (2.0, 5.0)
"""Noise between these sigmas is neither clean nor noisy: the level is learned, the kind is not."""

STRONGEST = 75.0

FAINTEST = {"haze": 0.13, "blur": 0.032}
"""A root mean square change of a reference texture below this is no example of its kind."""

FAINTEST_RAIN = 0.012
"""The same for the picture itself, when wholes are judged: few streaks may lie in dark places."""

WHOLE_SHARES = {
    NOISE: 0.15,
    "rain": 0.13,
    "haze": 0.16,
    "blur": 0.15,
    "low-light": 0.12,
    CLEAN: 0.29,
}
"""Fraction of the whole pictures that each kind gets."""

LONGEST_WHOLE = 640
SHORTEST_WHOLE = 160
MOST_ENLARGED = 2.2
MOST_SHRUNK = 0.4


def chance(probability: float, generator: Generator) -> bool:
    """Return True with the given probability."""
    return float(torch.rand((), generator=generator)) < probability


def between(low: float, high: float, generator: Generator) -> float:
    """Draw one number from low..high."""
    return low + (high - low) * float(torch.rand((), generator=generator))


def whole(low: int, high: int, generator: Generator) -> int:
    """Draw one integer from low..high - 1."""
    return int(torch.randint(low, high, (), generator=generator))


Copies = list[NDArray[np.uint8]]
"""A picture (H, W, 3) and the same at a half, a quarter, ... of its size."""


@dataclass(frozen=True, slots=True)
class Pools:
    """What sharp patches are cut from."""

    photographs: list[Copies]
    fluorescent: list[Copies]
    stained: list[Copies]
    drawings: list[Copies]

    @classmethod
    def of(cls, pictures: Pictures, drawings: list[Copies]) -> Pools:
        """Sort training pictures into pools; micrographs in colour are the stained ones."""
        flat = [bool((np.ptp(copies[-1], axis=-1) == 0).all()) for copies in pictures.micrographs]
        micrographs = list(zip(flat, pictures.micrographs, strict=True))
        return cls(
            pictures.photographs,
            [copies for grey, copies in micrographs if grey],
            [copies for grey, copies in micrographs if not grey],
            drawings,
        )


def page(side: int, generator: Generator) -> Image.Image:
    """Set lines of random words in one size, sometimes tilted."""
    paper = whole(120, 256, generator)
    ink = whole(0, max(paper - 70, 1), generator)
    if chance(0.25, generator):
        paper, ink = ink, paper
    image = Image.new("L", (2 * side, 2 * side), paper)
    draw = ImageDraw.Draw(image)
    size = int(math.exp(between(math.log(9), math.log(56), generator)))
    font = ImageFont.load_default(size)
    spacing, top = between(1.05, 1.9, generator), 0.0
    while top < 2 * side:
        length = 5 * side // size  # enough to run off the page
        letters = torch.randint(len(string.ascii_letters), (length,), generator=generator)
        spaces = torch.rand(length, generator=generator) < 0.18
        line = "".join(
            " " if space else string.ascii_letters[letter]
            for letter, space in zip(letters.tolist(), spaces.tolist(), strict=True)
        )
        if chance(0.92, generator):
            draw.text((whole(-20, 20, generator), top), line, fill=ink, font=font)
        top += size * spacing
    turned = image.rotate(between(-8, 8, generator), Image.Resampling.BICUBIC)
    return turned.crop((side // 2, side // 2, side // 2 + side, side // 2 + side))


def drawing(side: int, generator: Generator) -> Image.Image:
    """Scatter filled shapes and lines of random greys or colours, some with soft shading."""
    coloured = chance(0.5, generator)

    def shade() -> tuple[int, ...]:
        values = torch.randint(256, (3,), generator=generator).tolist()
        return tuple(values if coloured else [values[0]] * 3)

    image = Image.new("RGB", (side, side), shade())
    draw = ImageDraw.Draw(image)
    largest = int(math.exp(between(math.log(12), math.log(side), generator)))
    for _ in range(whole(4, 60, generator)):
        left, top = whole(-largest, side, generator), whole(-largest, side, generator)
        right, bottom = left + whole(3, largest, generator), top + whole(3, largest, generator)
        form = whole(0, 4, generator)
        if form == 0:
            draw.rectangle((left, top, right, bottom), fill=shade())
        elif form == 1:
            draw.ellipse((left, top, right, bottom), fill=shade())
        elif form == 2:
            draw.line((left, top, right, bottom), fill=shade(), width=whole(1, 5, generator))
        else:
            draw.polygon([(left, top), (right, top), (left, bottom)], fill=shade())
    return image


def texture(side: int, generator: Generator) -> Tensor:
    """Return a fractal surface (1, 3, side, side), values 0..1."""
    falling = between(1.3, 2.6, generator)
    layers = [
        smooth_field(1, side, side, cells, generator) * falling ** -math.log2(cells)
        for cells in (2, 4, 8, 16, 32, 64, 128)
    ]
    surface = torch.stack(layers).sum(dim=0)
    surface = (surface - surface.amin()) / (surface.amax() - surface.amin())
    colours = torch.rand(2, 3, 1, 1, generator=generator)
    if chance(0.6, generator):
        colours = colours[:, :1].expand(-1, 3, -1, -1)
    return colours[:1] + (colours[1:] - colours[:1]) * surface


def make_drawings(count: int, seed: int, side: int = 384) -> list[Copies]:
    """Return pages, drawings and textures (side, side, 3), each under uneven light, rather soft."""
    generator = Generator().manual_seed(seed)
    made = []
    for number in range(count):
        if number % 4 == 3:
            pixels = texture(side, generator)
        else:
            image = (drawing if number % 4 == 2 else page)(side, generator).convert("RGB")
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / LEVELS
        if chance(0.6, generator):
            light = smooth_field(1, side, side, 3, generator).clamp(0, 1)
            pixels = pixels * (1 - between(0.1, 0.6, generator) * light)
        if chance(0.6, generator):
            softness = between(0.4, 1.3, generator)
            pixels = gaussian_blur2d(pixels, (9, 9), (softness, softness))
        pixels = gaussian_noise(pixels, between(0.0, 1.5, generator), generator)
        made.append([(quantised(pixels)[0] * LEVELS).byte().permute(1, 2, 0).numpy()])
    return made


def resampled_cut(copies: Copies, size: int, generator: Generator) -> Tensor:
    """Return a patch (3, size, size), values 0..1, of a picture at a random scale."""
    scale = 1.0
    if chance(0.35, generator):
        scale = between(1.0, 2.0, generator)
    elif chance(0.12, generator):
        scale = between(0.75, 1.0, generator)
    # All kinds alike are cut from smaller copies too, or scale would give the kind away.
    anywhere = Degradation.HAZE if chance(0.35, generator) else None
    patch = cut(copies, anywhere, round(size * scale), generator).float() / LEVELS
    if patch.shape[-1] != size:
        patch = F.interpolate(
            patch[None], (size, size), mode="bicubic", antialias=True, align_corners=False
        )[0]
    return patch.clamp(0, 1)


def soft(patch: Tensor, deviation: float) -> Tensor:
    """Blur a picture (3, H, W) alike in all directions, as lenses and enlarging do, not motion."""
    size = 2 * math.ceil(3 * deviation) + 1
    return gaussian_blur2d(patch[None], (size, size), (deviation, deviation))[0]


def toned(patch: Tensor, kind: str, generator: Generator) -> Tensor:
    """Return a photograph or drawing as another camera or hand might have rendered it."""
    if chance(0.08, generator):
        patch = patch[torch.randperm(3, generator=generator)]
    if chance(0.35, generator):
        patch = patch ** math.exp(between(math.log(0.6), math.log(1.8), generator))
    grey = chance(0.25, generator)
    if grey:
        patch = (patch * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
        patch = patch.expand(3, -1, -1)
    # A flat colour photograph cannot be told from a hazy one; flat grey ones are what microscopes
    # and telescopes deliver, and soft ones.
    instrument = grey and kind in (CLEAN, NOISE)
    if chance(0.4 if instrument else 0.25, generator):
        patch = soft(patch, between(0.5, 1.8, generator))
    flattest = 0.25 if instrument else 0.75
    if chance(0.6 if instrument else 0.2, generator):
        contrast = between(flattest, 1.0, generator)
        patch = contrast * patch + (1 - contrast) * between(0.0, 0.6, generator)
    return patch


def displayed(patch: Tensor, generator: Generator) -> Tensor:
    """Return a micrograph as an instrument or a viewer might have shown it."""
    # The grey steps of an 8-bit file would become a comb when stretched.
    patch = patch + (torch.rand(patch.shape[1:], generator=generator) - 0.5) / LEVELS
    if chance(0.4, generator):
        patch = soft(patch, math.exp(between(math.log(0.5), math.log(3.0), generator)))
    if chance(0.6, generator):
        low, high = float(patch.amin()), float(patch.amax())
        patch = (patch - low) / max(high - low, 0.1)
    if chance(0.4, generator):
        patch = patch * between(0.15, 1.0, generator)
    if chance(0.3, generator):
        patch = patch + between(0.0, 0.25, generator)
    if chance(0.15, generator):
        tint = (
            torch.eye(3)[whole(0, 3, generator)]
            if chance(0.6, generator)
            else torch.rand(3, generator=generator)
        )
        patch = patch * tint[:, None, None]
    return patch.clamp(0, 1)


def add_noise(pixels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return noisy pixels (N, 3, H, W) and the sigmas (N,) in grey levels.

    Noise is coloured or, mostly on grey pictures, grey; a quarter of it grows with the signal;
    two fifths is a camera's raw counts: dimmed, on a pedestal, neither clipped nor quantised.
    """
    count = len(pixels)
    exact = prompted(count, generator)
    sigma = log_uniform(count, 3, STRONGEST, generator)
    sigma = torch.where(uniform(count, 0, 1, generator) < 0.25, exact, sigma)
    raw = uniform(count, 0, 1, generator) < 0.4
    gain = torch.where(raw, uniform(count, 0.3, 1.0, generator), torch.ones(()))
    pedestal = torch.where(raw, uniform(count, 0.0, 0.3, generator), torch.zeros(()))
    sharp = pixels * gain + pedestal
    signal = sharp / sharp.mean(dim=(1, 2, 3), keepdim=True).clamp(min=0.02)
    growing = uniform(count, -3.0, 1.0, generator).clamp(min=0)
    deviation = sigma * (1 - growing + growing * signal).clamp(min=0).sqrt()
    coloured = normal_like(pixels, generator)
    shared = uniform(count, 0, 1, generator) < torch.where(is_grey(pixels), 0.6, 0.1)
    noise = torch.where(shared, coloured[:, :1], coloured)
    noisy = sharp + noise * deviation / LEVELS
    return torch.where(raw, noisy, quantised(noisy)), sigma.flatten()


def finished(patch: Tensor, kind: str, generator: Generator) -> Tensor:
    """Return a degraded or clean patch with what files have besides: faint noise, grey, JPEG."""
    if kind != CLEAN and chance(0.08, generator):
        patch = patch.mean(dim=0, keepdim=True).expand(3, -1, -1)
    if chance(0.3, generator):
        noise = torch.randn(patch.shape, generator=generator)
        if bool(is_grey(patch[None])):
            noise = noise[:1]
        patch = patch + noise * between(0.0, 1.5, generator) / LEVELS
    patch = quantised(patch)
    if chance(0.3, generator):
        image = Image.fromarray((patch * LEVELS).byte().permute(1, 2, 0).numpy())
        file = io.BytesIO()
        image.save(file, "JPEG", quality=whole(65, 97, generator))
        decoded = np.array(Image.open(file))
        patch = torch.from_numpy(decoded).permute(2, 0, 1).float() / LEVELS
    return patch


def as_lit(sharp: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return scenes (N, 3, H, W), many lit from near, and depths (N, 1, H, W) that suit that.

    All kinds alike: neither what is dark far away nor what is bright there may give one away.
    """
    depth = scene_depth(sharp, generator)
    return (lit_from_near(sharp, depth, generator) if chance(0.5, generator) else sharp), depth


def spoilt(sharp: Tensor, degradation: Degradation, depth: Tensor, generator: Generator) -> Tensor:
    """Degrade scenes (N, 3, H, W) of the given depths, which count for haze, in one way."""
    if degradation is Degradation.HAZE:
        return haze(sharp, generator, depth=depth)
    return degrade(sharp, degradation, generator)


def change_of_reference(depth: Tensor, degradation: Degradation, generator: Generator) -> Tensor:
    """Return how much (N,) a fixed texture changes under the degradation about to be drawn.

    `generator` is left as it was.
    """
    ahead = Generator().manual_seed(0)
    texture = F.avg_pool2d(torch.rand(1, 3, *depth.shape[2:], generator=ahead), 3, 1, 1)
    reference = 0.6 * texture.expand(len(depth), -1, -1, -1)
    ahead.set_state(generator.get_state())
    changed = spoilt(reference, degradation, depth, ahead)
    return (changed - reference).square().mean(dim=(1, 2, 3)).sqrt()


def draw_copies(
    pools: Pools,
    kind: str,
    generator: Generator,
    *,
    micrographs: float = 1.0,
    drawings: float = 1.0,
) -> tuple[Copies, bool]:
    """Return a picture from a pool that suits `kind`, and whether it is a micrograph.

    Parameters
    ----------
    micrographs, drawings : float
        How often these are drawn, as a multiple of `MICROGRAPH_SHARE` and `DRAWING_SHARE`.
    """
    source = float(torch.rand((), generator=generator))
    pool = pools.stained if chance(STAINED_SHARE, generator) else pools.fluorescent
    micrograph = source < micrographs * MICROGRAPH_SHARE.get(kind, 0.0) and bool(pool)
    if not micrograph:
        pool = pools.drawings if source > 1 - drawings * DRAWING_SHARE else pools.photographs
    return pool[whole(0, len(pool), generator)], micrograph


def draw_patch(pools: Pools, kind: str, size: int, generator: Generator) -> Tensor:
    """Return a sharp patch (3, size, size), values 0..1, from a pool that suits `kind`."""
    copies, micrograph = draw_copies(pools, kind, generator)
    patch = resampled_cut(copies, size, generator)
    return displayed(patch, generator) if micrograph else toned(patch, kind, generator)


def draw_whole(pools: Pools, kind: str, generator: Generator) -> Tensor:
    """Return a sharp or softened picture (3, H, W), values 0..1, at a size of its own.

    Enlarged pictures are soft, as those of many cameras are, without any motion.
    """
    copies, micrograph = draw_copies(pools, kind, generator, micrographs=0.8, drawings=0.6)
    array = copies[0]
    scale = 1.0
    if chance(0.35, generator):
        scale = math.exp(between(0, math.log(MOST_ENLARGED), generator))
    elif chance(0.45, generator):
        scale = between(MOST_SHRUNK, 1.0, generator)
    extents = [scale * extent for extent in array.shape[:2]]
    height = int(min(between(SHORTEST_WHOLE, LONGEST_WHOLE, generator), *extents))
    width = int(min(height * between(1, 1.5, generator), extents[1]))
    sides = [max(int(side / scale), 16) for side in (height, width)]
    top, left = (
        whole(0, max(extent - side, 0) + 1, generator)
        for extent, side in zip(array.shape[:2], sides, strict=True)
    )
    part = array[top : top + sides[0], left : left + sides[1]].copy()
    picture = torch.from_numpy(part).permute(2, 0, 1).float() / LEVELS
    if picture.shape[1:] != (height, width):
        picture = F.interpolate(
            picture[None], (height, width), mode="bicubic", antialias=True, align_corners=False
        )[0].clamp(0, 1)
    if chance(0.5, generator):
        picture = picture.flip(-1)
    if micrograph:
        return displayed(picture, generator)
    return toned(picture, kind, generator)


def draw_example(pools: Pools, generator: Generator) -> tuple[Tensor, int] | None:
    """Return a whole picture (1, 3, H, W) and the number of its kind; None if it is too faint."""
    shares = torch.tensor([WHOLE_SHARES[kind] for kind in KINDS])
    number = int(torch.multinomial(shares, 1, generator=generator))
    kind = KINDS[number]
    sharp, depth = as_lit(draw_whole(pools, kind, generator)[None], generator)
    if kind == NOISE:
        noisy, sigmas = add_noise(sharp, generator)
        return None if float(sigmas) < FAINT[1] else (noisy, number)
    degraded = sharp
    if kind != CLEAN:
        degradation = Degradation.from_name(kind)
        if kind in FAINTEST:
            change = change_of_reference(depth, degradation, generator)
            if float(change) < FAINTEST[kind]:
                return None
        degraded = spoilt(sharp, degradation, depth, generator)
        if kind == "rain" and float((degraded - sharp).square().mean().sqrt()) < FAINTEST_RAIN:
            return None
    return finished(degraded[0], kind, generator)[None], number


SOFT_IN_VALIDATION = (0.7, 1.2, 1.8)
"""Standard deviations in pixels by which held-out photographs are softened, in turn."""

Case = tuple[str, str, float, Tensor]
"""Group, kind, sigma and pixels (1, 3, H, W) of a held-out picture."""


def validation_set(pictures: Pictures, side: int = 256) -> list[Case]:
    """Return group, kind, sigma and pixels (1, 3, H, W) of degraded and clean held-out pictures.

    Photographs, as they are, grey and soft, suffer everything; micrographs, as they are and
    stretched, noise alone.
    """
    cases = []
    for number, (path, array) in enumerate(pictures.validation):
        micrograph = "micrographs" in path.parent.parts
        top, left = (max(extent - side, 0) // 2 for extent in array.shape[:2])
        crop = array[top : top + side, left : left + side]
        sharp = torch.from_numpy(crop.copy()).permute(2, 0, 1)[None].float() / LEVELS
        grey = sharp.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
        generator = Generator().manual_seed(number)
        stretched = (sharp - sharp.amin()) / (sharp.amax() - sharp.amin()).clamp(min=0.1)
        clean = {
            "micrographs" if micrograph else "photographs": sharp,
            "stretched" if micrograph else "grey": stretched if micrograph else quantised(grey),
        }
        if not micrograph:
            deviation = SOFT_IN_VALIDATION[number % len(SOFT_IN_VALIDATION)]
            clean["soft"] = quantised(soft(sharp[0], deviation)[None])
        for group, pixels in clean.items():
            cases.append((group, CLEAN, 0.0, pixels))
            for sigma in (8.0, 15.0, 25.0, 35.0, 50.0, 65.0):
                noise = normal_like(pixels, generator) * (sigma / LEVELS)
                if group in ("micrographs", "stretched"):
                    noise = noise[:, :1]
                noisy = pixels + noise
                noisy = noisy if group == "stretched" else quantised(noisy)
                cases.append((group, NOISE, sigma, noisy))
            if not micrograph:
                cases.extend(
                    (group, kind.value, 0.0, degrade(pixels, kind, generator))
                    for kind in Degradation
                    if kind.sigma is None
                )
    return cases
