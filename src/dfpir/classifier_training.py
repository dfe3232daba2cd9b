"""Training of the degradation classifier on what `dfpir.classifier_examples` draws."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dfpir.classifier import (
    ENCODER,
    KINDS,
    NOISE,
    DegradationClassifier,
    Overview,
    classify,
    features_of,
    judge,
    likeliest_kind,
    look,
    save_classifier,
)
from dfpir.classifier_examples import (
    FAINT,
    FAINTEST,
    SHARES,
    Case,
    Pools,
    add_noise,
    as_lit,
    chance,
    change_of_reference,
    draw_example,
    draw_patch,
    finished,
    make_drawings,
    spoilt,
    validation_set,
    whole,
)
from dfpir.degradation import CLEAN, NOISES, Degradation
from dfpir.model import DFPIR
from dfpir.training import Pictures, check_output, part_generator, threads
from dfpir.weights import file_hash, load_model, resolve

logger = logging.getLogger(__name__)

CLEAN_EMPHASIS = 1.4
"""In what `Overview` learns, kinds count alike, but clean this much more: it is the lesser mistake
to leave a picture alone."""

WHOLES = 6_000
"""Whole pictures from which `Overview` learns."""

OVERVIEW_STEPS = 2_000
OVERVIEW_BATCH = 256
BLUR_OF_FEATURES = 0.3
"""Noise on every number that `Overview` learns from, in standard deviations of the number."""

PRICE = 0.03
"""Of a correction by `Overview`: its mean square, in nats, costs this much cross-entropy."""

PATCHES = 112_000
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
    wholes : int
        Whole pictures from which `Overview` learns in the end.
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
    wholes: int = WHOLES
    seed: int = 1


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
        batch, depth = as_lit(torch.stack(sharp), generator)
        if kind == NOISE:
            pixels[places], sigmas[places] = add_noise(batch, generator)
            faint = (sigmas > FAINT[0]) & (sigmas < FAINT[1])
            kinds[faint] = -1
            continue
        if kind != CLEAN:
            degradation = Degradation.from_name(kind)
            if kind in FAINTEST:
                change = change_of_reference(depth, degradation, generator)
                kinds[torch.tensor(places)[change < FAINTEST[kind]]] = -1
            batch = spoilt(batch, degradation, depth, generator)
        batch = batch[..., :size, -size:]
        pixels[places] = torch.stack([finished(patch, kind, generator) for patch in batch])
    return pixels, kinds, sigmas


def draw_features(
    model: DegradationClassifier, pools: Pools, seed: int, numbers: Sequence[int]
) -> list[tuple[Tensor, int]]:
    """Return features and kinds of those of the numbered examples that are not too faint."""
    model.eval()

    def drawn(number: int) -> tuple[Tensor, int] | None:
        example = draw_example(pools, part_generator(seed, number, 1))
        return None if example is None else (features_of(model, example[0])[0], example[1])

    with threads(torch.get_num_threads()) as pool:
        found = tqdm(
            pool.map(drawn, numbers),
            desc="looking at whole pictures",
            total=len(numbers),
            unit="picture",
        )
        return [each for each in found if each is not None]


def fit_overview(
    model: DegradationClassifier, examples: Sequence[tuple[Tensor, int]], seed: int
) -> None:
    """Teach the overview of a trained and calibrated network.

    A hidden layer on some hundred numbers: steps are cheap, and what counts is that it trusts no
    single number (noise on all of them, units left out) and corrects only where that pays (a price
    on it).
    """
    torch.manual_seed(seed)
    overview = Overview(model.config.overview)
    features = torch.stack([each for each, _ in examples])
    kinds = torch.tensor([kind for _, kind in examples])
    overview.mean.copy_(features.mean(dim=0))
    overview.spread.copy_(features.std(dim=0) + 1e-3)
    emphasis = torch.bincount(kinds, minlength=len(KINDS)).clamp(min=1).reciprocal()
    emphasis /= emphasis.mean()
    emphasis[KINDS.index(CLEAN)] *= CLEAN_EMPHASIS
    optimizer = torch.optim.AdamW(overview.parameters(), lr=2e-3, weight_decay=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, OVERVIEW_STEPS)
    for _ in range(OVERVIEW_STEPS):
        batch = torch.randint(len(features), (OVERVIEW_BATCH,))
        exact = features[batch]
        blurred = exact + BLUR_OF_FEATURES * overview.spread * torch.randn_like(exact)
        correction = overview.correction(blurred)
        logits = exact[:, : len(KINDS)] + correction
        wrong = F.cross_entropy(logits, kinds[batch], weight=emphasis, label_smoothing=0.02)
        loss = wrong + PRICE * correction.square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    model.overview = overview.eval().requires_grad_(False)


def learning_rate(settings: ClassifierSettings, seen: int) -> float:
    """Return the learning rate after `seen` patches: a linear rise, then half a cosine."""
    rise = min(1.0, (seen + settings.batch) / settings.warmup)
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, seen / settings.patches)))
    return settings.learning_rate * rise * (0.002 + 0.998 * fall)


def validate(model: DegradationClassifier, cases: list[Case]) -> dict[str, object]:
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
            if sigma in NOISES.values():
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


def calibration(logits: Tensor, kinds: Tensor) -> float:
    """Return the temperature that makes the truth likeliest, kinds counting alike."""
    weights = 1.0 / torch.bincount(kinds, minlength=len(KINDS)).clamp(min=1).double()
    candidates = [math.exp(i / 20) for i in range(-40, 21)]
    losses = [
        float(F.cross_entropy(logits.double() / each, kinds, weight=weights)) for each in candidates
    ]
    return candidates[losses.index(min(losses))]


@torch.no_grad()
def calibrate(model: DegradationClassifier, cases: list[Case]) -> None:
    """Set the temperature of the network alone on held-out pictures."""
    model.eval()
    model.temperature.fill_(1.0)
    logits = torch.cat([look(model, pixels)[0] for *_, pixels in cases])
    model.temperature.fill_(calibration(logits, kinds_in(cases)))


@torch.no_grad()
def calibrate_overview(model: DegradationClassifier, cases: list[Case]) -> None:
    """Set the temperature of the judgement of wholes, likewise."""
    model.overview.temperature.fill_(1.0)
    logits = torch.cat([judge(model, pixels)[0] for *_, pixels in cases])
    model.overview.temperature.fill_(calibration(logits, kinds_in(cases)))


def kinds_in(cases: list[Case]) -> Tensor:
    """Return the numbers of the kinds that cases truly are of."""
    return torch.tensor([KINDS.index(kind) for _, kind, _, _ in cases])


def take_encoder(model: DegradationClassifier, network: DFPIR) -> None:
    """Copy the first levels of a trained network into the classifier.

    Raises
    ------
    ValueError
        If it is of another size.
    """
    if network.config != ENCODER:
        message = (
            f"The classifier's encoder is of {ENCODER}; found {network.config}. Take weights of "
            "the compact preset."
        )
        raise ValueError(message)
    values = network.state_dict()
    model.encoder.load_state_dict({key: values[key] for key in model.encoder.state_dict()})


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
    overwrite: bool = False,
    network: str | Path | None = None,
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
    overwrite : bool
        Replace what an earlier run has left as `output` and its state file.
    network : str or Path, optional
        Weights, by name or file, whose encoder the classifier gets; by default the bundled ones.

    Returns
    -------
    dict
        The record: settings, seconds, scores, and the file's size and hash.

    Raises
    ------
    ValueError
        If there are too few pictures, the output exists, there is nothing to resume, or the
        network has other sizes.
    """
    check_output(output, resume=resume, overwrite=overwrite)
    settings = ClassifierSettings(patches=patches, seed=seed)
    trainer = ClassifierTrainer(settings, Pictures.load(data), output.with_suffix(".state"))
    if resume:
        trainer.resume()
    seen = resolve(network)
    beginning = load_model(seen)
    for model in (trainer.model, trainer.average):
        take_encoder(model, beginning)
    trainer.run()
    cases = validation_set(trainer.pictures)
    # Calibrated and scored as it will be read: with its convolutions rounded to float16.
    for value in trainer.average.parameters():
        if value.ndim == 4:
            value.copy_(value.half())
    calibrate(trainer.average, cases)
    examples = draw_features(trainer.average, trainer.pools, seed, range(settings.wholes))
    fit_overview(trainer.average, examples, seed)
    calibrate_overview(trainer.average, cases)
    record: dict[str, object] = {
        "patches": trainer.seen,
        "seed": seed,
        "seconds": round(trainer.seconds, 1),
        "settings": asdict(settings),
        "config": asdict(trainer.average.config),
        "values": sum(value.numel() for value in trainer.average.parameters()),
        "temperature": round(float(trainer.average.temperature), 4),
        "wholes": len(examples),
        "overview_temperature": round(float(trainer.average.overview.temperature), 4),
        "kinds": list(KINDS),
        "encoder": seen.name,
        "encoder_sha256": file_hash(seen),
        "scores": validate(trainer.average, cases),
        "torch": torch.__version__,
    }
    save_classifier(trainer.average, output, metadata={"patches": str(trainer.seen)})
    content = output.read_bytes()
    record |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    logger.info("%s", json.dumps(record))
    return record
