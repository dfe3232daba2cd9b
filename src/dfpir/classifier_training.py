"""Training of the degradation classifier on sharp pictures, degraded as they are drawn.

What "clean" looks like is most of the work: photographs bright and dark, soft, grey, flat and
busy; dim grey micrographs; scans of text; drawings and smooth textures. A network that has seen
none of these takes every fluorescence image for low light and every page for haze.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import string
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from kornia.filters import gaussian_blur2d
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Generator, Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dfpir.classifier import (
    KINDS,
    NOISE,
    DegradationClassifier,
    classify,
    judge,
    likeliest_kind,
    save_classifier,
)
from dfpir.degradation import CLEAN, Degradation
from dfpir.synthesis import (
    LEVELS,
    degrade,
    gaussian_noise,
    is_grey,
    log_uniform,
    normal_like,
    quantised,
    smooth_field,
    uniform,
)
from dfpir.training import Pictures, cut, part_generator

logger = logging.getLogger(__name__)

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

PATCHES = 72_000
"""Seen in training, unless told otherwise."""


@dataclass(frozen=True, slots=True)
class ClassifierSettings:
    """Everything that decides what a run computes, apart from the pictures.

    Attributes
    ----------
    patches : int
        Patches seen by the end; the learning rate falls along a cosine over them.
    batch : int
        Patches per step.
    sizes : tuple of int
        Sides of patches in pixels; each step draws one.
    learning_rate : float
        Of AdamW, at its highest.
    average : float
        Decay of the exponential moving average of the weights, which is what is kept.
    smoothing : float
        Of the labels.
    drawings : int
        Pages of text, drawings and textures that are made before the first step.
    """

    patches: int = PATCHES
    batch: int = 32
    sizes: tuple[int, ...] = (64, 96, 128)
    learning_rate: float = 3e-3
    warmup: int = 2_000
    average: float = 0.998
    weight_decay: float = 1e-3
    smoothing: float = 0.02
    drawings: int = 160
    seed: int = 1


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
    # A flat colour photograph cannot be told from a hazy one, nor a soft one from one out of
    # focus; flat and soft grey ones are what microscopes and telescopes deliver.
    instrument = grey and kind in (CLEAN, NOISE)
    if instrument and chance(0.4, generator):
        softness = between(0.5, 1.8, generator)
        patch = gaussian_blur2d(patch[None], (11, 11), (softness, softness))[0]
    flattest = 0.25 if instrument else 0.75
    if chance(0.6 if instrument else 0.2, generator):
        contrast = between(flattest, 1.0, generator)
        patch = contrast * patch + (1 - contrast) * between(0.0, 0.6, generator)
    return patch


def displayed(patch: Tensor, generator: Generator) -> Tensor:
    """Return a micrograph as an instrument or a viewer might have shown it."""
    # The grey steps of an 8-bit file would become a comb when stretched.
    patch = patch + (torch.rand(patch.shape[1:], generator=generator) - 0.5) / LEVELS
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
    prompts = torch.tensor([15.0, 25.0, 50.0])
    exact = prompts[torch.randint(3, (count,), generator=generator)].reshape(-1, 1, 1, 1)
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
        if bool((patch[:1] == patch).all()):
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


def change_of_reference(
    shape: torch.Size, degradation: Degradation, generator: Generator
) -> Tensor:
    """Return how much (N,) a fixed texture changes under the degradation about to be drawn.

    `generator` is left as it was.
    """
    ahead = Generator().manual_seed(0)
    texture = F.avg_pool2d(torch.rand(1, 3, *shape[2:], generator=ahead), 3, 1, 1)
    reference = 0.6 * texture.expand(shape)
    ahead.set_state(generator.get_state())
    changed = degrade(reference, degradation, ahead)
    return (changed - reference).square().mean(dim=(1, 2, 3)).sqrt()


def draw_patch(pools: Pools, kind: str, size: int, generator: Generator) -> Tensor:
    """Return a sharp patch (3, size, size), values 0..1, from a pool that suits `kind`."""
    source = float(torch.rand((), generator=generator))
    micrographs = pools.stained if chance(STAINED_SHARE, generator) else pools.fluorescent
    micrograph = source < MICROGRAPH_SHARE.get(kind, 0.0) and bool(micrographs)
    pool = micrographs if micrograph else pools.photographs
    if source > 1 - DRAWING_SHARE:
        pool = pools.drawings
    patch = resampled_cut(pool[whole(0, len(pool), generator)], size, generator)
    return displayed(patch, generator) if micrograph else toned(patch, kind, generator)


def draw_batch(
    pools: Pools, settings: ClassifierSettings, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the patches of one step, their kinds and sigmas (0 where there is no noise).

    A kind is -1 where the degradation is too faint for the patch to be an example of anything.
    """
    generator = part_generator(settings.seed, step, 0)
    size = settings.sizes[whole(0, len(settings.sizes), generator)]
    kinds = torch.multinomial(
        torch.tensor([SHARES[kind] for kind in KINDS]),
        settings.batch,
        replacement=True,
        generator=generator,
    )
    pixels = torch.empty(settings.batch, 3, size, size)
    sigmas = torch.zeros(settings.batch)
    for number, kind in enumerate(KINDS):
        places = (kinds == number).nonzero().flatten().tolist()
        # Depth varies less within a part of a scene than within the whole.
        margin = 2 if kind == "haze" and chance(0.5, generator) else 1
        sharp = [draw_patch(pools, kind, size * margin, generator) for _ in places]
        if not places:
            continue
        batch = torch.stack(sharp)
        if kind == NOISE:
            pixels[places], sigmas[places] = add_noise(batch, generator)
            faint = (sigmas > FAINT[0]) & (sigmas < FAINT[1])
            kinds[faint] = -1
            continue
        if kind != CLEAN:
            degradation = Degradation.from_name(kind)
            if kind in FAINTEST:
                change = change_of_reference(batch.shape, degradation, generator)
                kinds[torch.tensor(places)[change < FAINTEST[kind]]] = -1
            batch = degrade(batch, degradation, generator)[..., :size, -size:]
        pixels[places] = torch.stack([finished(patch, kind, generator) for patch in batch])
    return pixels, kinds, sigmas


def learning_rate(settings: ClassifierSettings, seen: int) -> float:
    """Return the learning rate after `seen` patches: a linear rise, then half a cosine."""
    rise = min(1.0, (seen + settings.batch) / settings.warmup)
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, seen / settings.patches)))
    return settings.learning_rate * rise * (0.002 + 0.998 * fall)


def validation_set(pictures: Pictures, side: int = 256) -> list[tuple[str, str, float, Tensor]]:
    """Return group, kind, sigma and pixels (1, 3, H, W) of degraded and clean held-out pictures.

    Photographs suffer everything; micrographs, as they are and stretched, noise alone.
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


def validate(
    model: DegradationClassifier, cases: list[tuple[str, str, float, Tensor]]
) -> dict[str, object]:
    """Score the classifier on the cases of `validation_set`.

    Returns
    -------
    dict
        ``recall`` of each kind and their mean, ``balanced_accuracy``; ``confusion`` (rows are
        the truth, both in the order of `KINDS`); ``unsure``, the fraction of such verdicts;
        ``wrong``, the fraction of confident verdicts that are false; ``clean_kept`` by group;
        ``prompt_accuracy`` at sigma 15, 25, 50; ``sigma_error``, the median of the relative one.
    """
    model.eval()
    confusion = {truth: dict.fromkeys(KINDS, 0) for truth in KINDS}
    kept: dict[str, list[bool]] = {}
    unsure, wrong, errors, prompts = 0, 0, [], []
    for group, kind, sigma, pixels in cases:
        [found] = classify(model, pixels)
        answer = likeliest_kind(found)
        confusion[kind][answer] += 1
        unsure += found.verdict == "unsure"
        wrong += found.verdict != "unsure" and answer != kind
        if kind == CLEAN:
            kept.setdefault(group, []).append(found.verdict == CLEAN)
        if kind == NOISE:
            estimate = math.exp(float(judge(model, pixels)[1]))
            errors.append(abs(estimate / sigma - 1))
            if sigma in (15.0, 25.0, 50.0):
                prompts.append(Degradation.nearest_noise(estimate).sigma == sigma)
    recall = {kind: row[kind] / max(sum(row.values()), 1) for kind, row in confusion.items()}
    return {
        "balanced_accuracy": round(sum(recall.values()) / len(recall), 4),
        "recall": {kind: round(value, 4) for kind, value in recall.items()},
        "confusion": [list(row.values()) for row in confusion.values()],
        "unsure": round(unsure / len(cases), 4),
        "wrong": round(wrong / len(cases), 4),
        "clean_kept": {group: round(sum(each) / len(each), 4) for group, each in kept.items()},
        "prompt_accuracy": round(sum(prompts) / len(prompts), 4),
        "sigma_error": round(float(np.median(errors)), 4),
        "cases": len(cases),
    }


@torch.no_grad()
def calibrate(model: DegradationClassifier, cases: list[tuple[str, str, float, Tensor]]) -> float:
    """Set the temperature that makes held-out probabilities likeliest, kinds counting alike."""
    model.eval()
    model.temperature.fill_(1.0)
    logits = torch.cat([judge(model, pixels)[0] for *_, pixels in cases])
    truth = torch.tensor([KINDS.index(kind) for _, kind, _, _ in cases])
    weights = 1.0 / torch.bincount(truth, minlength=len(KINDS)).clamp(min=1).double()
    candidates = [math.exp(i / 20) for i in range(-40, 21)]
    losses = [float(F.cross_entropy(logits / t, truth, weight=weights)) for t in candidates]
    best = candidates[losses.index(min(losses))]
    model.temperature.fill_(best)
    return best


class ClassifierTrainer:
    """State of one run: the network, its average, the optimiser.

    Parameters
    ----------
    settings : ClassifierSettings
    pictures : Pictures
    state_file : Path
        Written atomically every minute; `resume` continues from it.
    """

    def __init__(self, settings: ClassifierSettings, pictures: Pictures, state_file: Path) -> None:
        self.settings, self.pictures, self.state_file = settings, pictures, state_file
        torch.manual_seed(settings.seed)
        self.model = DegradationClassifier()
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # exists
        self.average = DegradationClassifier(self.model.config).eval().requires_grad_(False)
        self.average.load_state_dict(self.model.state_dict())
        values = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": [value for value in values if value.ndim > 1],
                    "weight_decay": settings.weight_decay,
                },
                {"params": [value for value in values if value.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=settings.learning_rate,
        )
        self.pools = Pools.of(pictures, make_drawings(settings.drawings, settings.seed))
        self.step = 0
        self.seconds = 0.0

    @property
    def seen(self) -> int:
        """Patches seen so far."""
        return self.step * self.settings.batch

    def save(self) -> None:
        """Write the whole state, so that the run goes on exactly after `resume`."""
        partial = self.state_file.with_name(self.state_file.name + ".partial")
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "settings": json.dumps(asdict(self.settings)),
        }
        torch.save(state, partial)
        partial.replace(self.state_file)

    def resume(self) -> None:
        """Continue from the state file.

        Raises
        ------
        ValueError
            If it is missing, or belongs to a run with other settings.
        """
        if not self.state_file.exists():
            message = f"{self.state_file}: no state to resume from. Start without resuming."
            raise ValueError(message)
        state = torch.load(self.state_file, weights_only=True)
        if state["settings"] != json.dumps(asdict(self.settings)):
            message = (
                f"{self.state_file}: the state of a run with the settings {state['settings']}; "
                f"expected {json.dumps(asdict(self.settings))}. Resume with the same ones, or "
                "start anew."
            )
            raise ValueError(message)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    def train_step(self, drawn: tuple[Tensor, Tensor, Tensor] | None = None) -> float:
        """Take one step and return its loss; what it learns from may have been drawn before."""
        settings = self.settings
        pixels, kinds, sigmas = drawn or draw_batch(self.pools, settings, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, self.seen)
        self.model.train()
        logits, log_sigma = self.model(pixels.contiguous(memory_format=torch.channels_last))
        noisy = sigmas > 0
        loss = F.cross_entropy(logits, kinds, ignore_index=-1, label_smoothing=settings.smoothing)
        if bool(noisy.any()):
            loss = loss + F.smooth_l1_loss(log_sigma[noisy], sigmas[noisy].log(), beta=0.1)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.optimizer.step()
        self.follow()
        self.step += 1
        return float(loss.detach())

    @torch.no_grad()
    def follow(self) -> None:
        """Move the average towards the network, its normalisation statistics included."""
        # A short memory at first, so that the random start is soon forgotten.
        decay = min(self.settings.average, (self.step + 1) / (self.step + 10))
        latest = self.model.state_dict()
        for key, value in self.average.state_dict().items():
            if value.is_floating_point():
                value.lerp_(latest[key], 1 - decay)

    def run(self, *, save_seconds: float = 60.0) -> None:
        """Train to the end of the settings' patches."""
        losses: list[float] = []
        started = saved = time.monotonic()
        before = self.seconds
        with (
            tqdm(total=self.settings.patches, initial=self.seen, unit="patch") as bar,
            ThreadPoolExecutor(1) as drawer,
        ):
            # The next patches are drawn while the network learns from these.
            drawn = drawer.submit(draw_batch, self.pools, self.settings, self.step)
            while self.seen < self.settings.patches:
                ahead = drawer.submit(draw_batch, self.pools, self.settings, self.step + 1)
                losses.append(self.train_step(drawn.result()))
                drawn = ahead
                self.seconds = before + time.monotonic() - started
                bar.update(self.settings.batch)
                bar.set_postfix(loss=f"{np.mean(losses[-100:]):.3f}")
                if time.monotonic() - saved > save_seconds:
                    self.save()
                    saved = time.monotonic()
        self.save()


def train_classifier(
    data: Path,
    output: Path,
    *,
    patches: int = PATCHES,
    seed: int = 1,
    resume: bool = False,
) -> dict[str, object]:
    """Train a classifier, calibrate and score it on held-out pictures, and write it.

    Parameters
    ----------
    data : Path
        A folder of sharp pictures; those below a folder ``micrographs`` are micrographs.
    output : Path
        The safetensors file to write. Beside it stands a ``.state`` file while training.
    patches : int
        To be seen in all.
    seed : int
        The same seed and pictures give the same classifier on the same machine.
    resume : bool
        Continue from the state file of an earlier run with the same patches and seed.

    Returns
    -------
    dict
        The record: settings, seconds, scores, and the file's size and hash.

    Raises
    ------
    ValueError
        If there are too few pictures, or nothing to resume.
    """
    settings = ClassifierSettings(patches=patches, seed=seed)
    trainer = ClassifierTrainer(settings, Pictures.load(data), output.with_suffix(".state"))
    if resume:
        trainer.resume()
    trainer.run()
    cases = validation_set(trainer.pictures)
    # Calibrated and scored as it will be read: with its convolutions rounded to float16.
    for value in trainer.average.parameters():
        if value.ndim == 4:
            value.copy_(value.half())
    temperature = calibrate(trainer.average, cases)
    record: dict[str, object] = {
        "patches": trainer.seen,
        "seed": seed,
        "seconds": round(trainer.seconds, 1),
        "settings": asdict(settings),
        "config": asdict(trainer.average.config),
        "values": sum(value.numel() for value in trainer.average.parameters()),
        "temperature": round(temperature, 4),
        "kinds": list(KINDS),
        "scores": validate(trainer.average, cases),
        "torch": torch.__version__,
    }
    save_classifier(trainer.average, output, metadata={"patches": str(trainer.seen)})
    content = output.read_bytes()
    record |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    logger.info("%s", json.dumps(record))
    return record
