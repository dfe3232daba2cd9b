"""Training of the network on a folder of sharp pictures, degraded as they are drawn.

Runs repeat: the random numbers of a step depend on the seed and the step alone, so that a run
that was stopped and resumed sees the same pictures as one that was not.

On processors every core works on a share of each batch, with one thread of its own: shared within
every operation, the cores would spend much of their time waiting for each other.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dfpir import checkpoint
from dfpir.classifier import NOISE
from dfpir.degradation import NOISES, Degradation
from dfpir.files import find_images, read_image
from dfpir.model import DFPIR, LEVELS, PERTURBED, DFPIRConfig
from dfpir.muon import Muon, is_matrix
from dfpir.recorded_steps import RecordedSteps
from dfpir.restorer import choose_device
from dfpir.synthesis import GLOBAL, training_pairs, varied
from dfpir.weights import load_model

logger = logging.getLogger(__name__)

VALIDATION_PHOTOGRAPHS = 24
VALIDATION_MICROGRAPHS = 16
MICROGRAPHS = "micrographs"
"""Pictures in a folder of this name are fluorescence or stained tissue, not photographs."""

SHARES: dict[Degradation | None, float] = {
    None: 0.36,  # noise of any strength
    Degradation.RAIN: 0.14,
    Degradation.HAZE: 0.16,
    Degradation.BLUR: 0.13,
    Degradation.LOW_LIGHT: 0.21,
}
"""Fraction of the pixels that each degradation gets."""

SPECIALISED = 0.2
"""What has a specialist gets so much of its share: the deeper levels must not forget it."""

NO_START = "A specialist needs a network to be part of. Name one with --from."

SPECIALTIES = {NOISE if kind is None else kind.value: kind for kind in SHARES}
"""What a specialist may be trained for, by name: noise of any strength, or one degradation."""

WIDE = (*GLOBAL, Degradation.BLUR)
"""Degradations whose patches have twice the side, a quarter as many for the same work.

Haze and darkness are told from the scene, not from a corner of it, and a patch has to be wider
than the path of a blur. Their parts of a batch are apart from those of noise and rain.
"""


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """Everything that decides what a run computes, apart from the pictures.

    Attributes
    ----------
    patches : int
        Patches seen by the end; the learning rate falls along a cosine over them.
    batch, part, patch : int
        Patches per step; how many of them are drawn and go through the network together, from
        random numbers of their own; and their side in pixels. Four patches count as one of twice
        the side (see `WIDE`). A processor's core is busy with a part of 8, a graphics card wants
        100,000 pixels and more.
    learning_rate : float
        Of Muon for matrices and AdamW for the rest, at its highest.
    warmup : int
        Patches over which the learning rate rises.
    average : float
        Decay of the exponential moving average of the weights, which is what is kept.
    seed : int
        Of the weights, permutations, patches and degradations.
    specialist : str
        Name out of `SPECIALTIES`: all patches have that degradation, and the weights are those of
        a specialist for it (see `DFPIR.specialise`). Empty for the network itself.
    levels : int
        How many of the first levels are a specialist's own.
    specialised : tuple of str
        Degradations of the specialists that the network began with, which come along; they are
        `SPECIALISED`, and not validated.
    """

    patches: int = 112_000
    batch: int = 16
    part: int = 8
    patch: int = 64
    learning_rate: float = 1e-3
    warmup: int = 4_000
    average: float = 0.999
    weight_decay: float = 1e-4
    seed: int = 1
    specialist: str = ""
    levels: int = 2
    specialised: tuple[str, ...] = ()

    @property
    def shares(self) -> dict[Degradation | None, float]:
        """Fraction of the pixels that each degradation gets."""
        if self.specialist:
            return {kind: float(kind is SPECIALTIES[self.specialist]) for kind in SHARES}
        learnt = {None if kind.sigma is not None else kind for kind in self.kinds}
        shares = {
            kind: share * (1 if kind in learnt else SPECIALISED) for kind, share in SHARES.items()
        }
        total = sum(shares.values())
        return {kind: share / total for kind, share in shares.items()}

    @property
    def kinds(self) -> tuple[Degradation, ...]:
        """The degradations that are learnt to be restored: all, if all have specialists."""
        if not self.specialist:
            others = tuple(each for each in Degradation if each.value not in self.specialised)
            return others or tuple(Degradation)
        kind = SPECIALTIES[self.specialist]
        return (kind,) if kind else tuple(NOISES)


def check_output(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Make sure that no earlier training is replaced unasked.

    Raises
    ------
    ValueError
        If `output` or its state exists, and is neither to be gone on from nor to be replaced.
    """
    for path in () if resume or overwrite else (output, output.with_suffix(".state")):
        if path.exists():
            message = (
                f"{path} exists. Go on from it with --resume, replace it with --overwrite, or name "
                "another output."
            )
            raise ValueError(message)


def own_levels(network: DFPIR, name: str) -> int | None:
    """Return how many of the first levels a specialist has of its own; None if there is none."""
    specialist = dict(network.named_specialists()).get(name)
    if specialist is None:
        return None
    shared = set(checkpoint.shared_modules(network, specialist))
    return sum(not shared.issuperset(level) for level in LEVELS)


def name_hash(path: Path) -> str:
    """Return the digest that decides whether a picture is for validation."""
    return hashlib.sha256(path.name.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Pictures:
    """Training and validation pictures, those for training with copies of half, quarter, ... size.

    Attributes
    ----------
    photographs, micrographs : list of list of ndarray, (H, W, 3), uint8
        For training.
    validation : list of tuple of Path and ndarray
        Photographs, then micrographs; chosen by a hash of the file's name.
    names : list of str
        The training files, for the record.
    """

    photographs: list[list[NDArray[np.uint8]]]
    micrographs: list[list[NDArray[np.uint8]]]
    validation: list[tuple[Path, NDArray[np.uint8]]]
    names: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path, smallest: int = 96) -> Pictures:
        """Read all pictures under `folder`, splitting off the validation set."""
        paths = find_images([folder], recursive=True)
        micrographs = [path for path in paths if MICROGRAPHS in path.parent.parts]
        photographs = [path for path in paths if MICROGRAPHS not in path.parent.parts]
        held = [
            *sorted(photographs, key=name_hash)[:VALIDATION_PHOTOGRAPHS],
            *sorted(micrographs, key=name_hash)[:VALIDATION_MICROGRAPHS],
        ]
        if len(held) >= len(paths):
            message = (
                f"Training needs more than {len(held)} pictures under {folder}, of which "
                f"{VALIDATION_PHOTOGRAPHS} photographs are kept for validation; found "
                f"{len(paths)}. Point --data at a larger folder."
            )
            raise ValueError(message)

        def copies(chosen: list[Path]) -> list[list[NDArray[np.uint8]]]:
            return [pyramid(rgb(path), smallest) for path in chosen if path not in held]

        return cls(
            copies(tqdm(photographs, desc="reading photographs", leave=False)),
            copies(tqdm(micrographs, desc="reading micrographs", leave=False)),
            [(path, rgb(path)) for path in held],
            [path.name for path in paths if path not in held],
        )


def rgb(path: Path) -> NDArray[np.uint8]:
    """Read a picture as (H, W, 3) of 8 bits; grey is repeated, alpha dropped."""
    array = read_image(path).array
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=-1)
    if array.dtype == np.uint16:
        array = array // 257
    return np.ascontiguousarray(array[..., :3], dtype=np.uint8)


def pyramid(array: NDArray[np.uint8], smallest: int) -> list[NDArray[np.uint8]]:
    """Return the picture and its copies of half, a quarter, ... the size, not below `smallest`."""
    copies = [array]
    while min(copies[-1].shape[:2]) // 2 >= smallest:
        pixels = torch.from_numpy(copies[-1]).permute(2, 0, 1)[None].float()
        copies.append(F.avg_pool2d(pixels, 2).round().to(torch.uint8)[0].permute(1, 2, 0).numpy())
    return copies


def cut(
    copies: list[NDArray[np.uint8]], kind: Degradation | None, size: int, generator: Generator
) -> Tensor:
    """Return one patch (3, size, size) of 0..255, flipped and turned at random."""
    draws = torch.rand(4, generator=generator).tolist()
    usable = [copy for copy in copies if min(copy.shape[:2]) >= size]
    if not usable:
        array = copies[0]
        rows, columns = (max(size - side, 0) for side in array.shape[:2])
        usable = [np.pad(array, ((0, rows), (0, columns), (0, 0)), mode="symmetric")]
    if kind in GLOBAL:
        source = usable[int(draws[0] * len(usable))]
    else:
        source = usable[min(int(draws[0] < 0.35), len(usable) - 1)]
    top = int(draws[1] * (source.shape[0] - size + 1))
    left = int(draws[2] * (source.shape[1] - size + 1))
    patch = np.rot90(source[top : top + size, left : left + size], int(draws[3] * 8) % 4)
    if draws[3] >= 0.5:
        patch = patch[:, ::-1]
    return torch.from_numpy(patch.copy()).permute(2, 0, 1)


def is_wide(number: int, shares: Mapping[Degradation | None, float] = SHARES) -> bool:
    """Say whether a part, counted from the start of the run, is of `WIDE` degradations.

    They take turns with the others, as often as their shares want it.
    """
    share = sum(shares[kind] for kind in WIDE)
    return math.floor((number + 1) * share) > math.floor(number * share)


def draw_kinds(
    count: int,
    *,
    wide: bool,
    generator: Generator,
    shares: Mapping[Degradation | None, float] = SHARES,
) -> list[Degradation | None]:
    """Choose what each patch of a part suffers: `count`, or a quarter if `wide`.

    The shares are of pixels.
    """
    kinds = [kind for kind in shares if (kind in WIDE) == wide]
    likely = torch.tensor([shares[kind] for kind in kinds])
    count = max(1, count // 4) if wide else count
    drawn = torch.multinomial(likely, count, replacement=True, generator=generator)
    return [kinds[i] for i in drawn.tolist()]


def parts_of(settings: TrainingSettings) -> int:
    """Return in how many parts a step goes through the network."""
    return math.ceil(settings.batch / settings.part)


def part_size(settings: TrainingSettings, part: int) -> int:
    """Return how many patches of a step are in one of its parts; the last one may have fewer."""
    return min(settings.part, settings.batch - part * settings.part)


def part_generator(seed: int, step: int, part: int) -> Generator:
    """Return the source of all random numbers of one part of one step."""
    return Generator().manual_seed((seed << 40) + (step << 8) + part)


class Part(NamedTuple):
    """Examples that go through the network together.

    `inputs` and `targets` are (N, 3, H, W), `indices` (N,) name the degradations; `weight` is the
    fraction of the step that each of them counts for.
    """

    inputs: Tensor
    targets: Tensor
    indices: Tensor
    weight: float


def draw_part(
    pictures: Pictures, settings: TrainingSettings, step: int, part: int, device: torch.device
) -> Part:
    """Return one part of a step, on `device`.

    Patches are cut on the CPU, varied and degraded on the device, by random numbers drawn there. A
    part counts by its pixels, whether its patches are many or wide.
    """
    generator = part_generator(settings.seed, step, part)
    shares = settings.shares
    wide = is_wide(step * parts_of(settings) + part, shares)
    size = part_size(settings, part)
    kinds = draw_kinds(size, wide=wide, generator=generator, shares=shares)
    patches, photographs = [], []
    for kind in kinds:
        # Micrographs have no rain, haze or darkness to learn from.
        share = {None: 0.2, Degradation.BLUR: 0.1}.get(kind, 0.0) * bool(pictures.micrographs)
        photographs.append(float(torch.rand((), generator=generator)) >= share)
        pool = pictures.photographs if photographs[-1] else pictures.micrographs
        copies = pool[int(torch.randint(len(pool), (), generator=generator))]
        patches.append(cut(copies, kind, settings.patch * (2 if wide else 1), generator))
    seed = int(torch.randint(2**62, (), generator=generator))
    degrading = Generator(device).manual_seed(seed)
    pixels = torch.stack(patches).to(device).float() / 255
    pixels = varied(pixels, photographs, degrading, blend=not wide)
    inputs, targets, indices, _ = training_pairs(pixels, kinds, degrading)
    return Part(inputs, targets, indices, size / settings.batch / len(inputs))


def learning_rate(settings: TrainingSettings, seen: int) -> float:
    """Return the learning rate after `seen` patches: a linear rise, then half a cosine."""
    if seen < settings.warmup:
        return settings.learning_rate * (seen + settings.batch) / settings.warmup
    progress = min(1.0, (seen - settings.warmup) / max(1, settings.patches - settings.warmup))
    return settings.learning_rate * (0.005 + 0.995 * 0.5 * (1 + math.cos(math.pi * progress)))


def new_model(config: DFPIRConfig, seed: int) -> DFPIR:
    """Return a network with seeded weights and, per degradation, seeded channel orders."""
    torch.manual_seed(seed)
    model = DFPIR(config)
    generator = Generator().manual_seed(seed)
    for place in range(PERTURBED):
        for row in model.perturbation(place).perturbation.permutations:
            row.copy_(torch.randperm(len(row), generator=generator))
    return model


def mean_of(values: Sequence[Tensor]) -> float:
    """Return the mean of tensors of one number each."""
    return float(torch.stack(list(values)).mean())


def psnr(first: Tensor, second: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of two images with values 0..1."""
    return -10 * math.log10(max(float((first - second).square().mean()), 1e-12))


@torch.no_grad()
def validate(
    model: DFPIR,
    pictures: Pictures,
    device: torch.device,
    kinds: Sequence[Degradation] = tuple(Degradation),
    side: int = 128,
) -> dict[str, float]:
    """Return the mean PSNR per degradation on the middle of each validation picture.

    Where the whole scene matters (`GLOBAL`), the middle of its smallest copy. Micrographs count
    for noise only, as ``"<noise>, micrographs"``.
    """

    def middle(array: NDArray[np.uint8]) -> Tensor:
        top, left = ((extent - side) // 2 for extent in array.shape[:2])
        crop = array[max(top, 0) :, max(left, 0) :][:side, :side]
        sharp = torch.from_numpy(crop.copy()).permute(2, 0, 1)[None].float().to(device) / 255
        return sharp[..., : sharp.shape[-2] // 16 * 16, : sharp.shape[-1] // 16 * 16]

    scores: dict[str, list[float]] = {}
    model.eval()
    for number, (path, array) in enumerate(pictures.validation):
        micrograph = MICROGRAPHS in path.parent.parts
        closely = middle(array)
        whole = closely if micrograph else middle(pyramid(array, side)[-1])
        for kind in kinds:
            if micrograph and kind.sigma is None:
                continue
            sharp = whole if kind in GLOBAL else closely
            generator = Generator().manual_seed(number * len(Degradation) + kind.index)
            inputs, targets, indices, _ = training_pairs(sharp, [kind], generator)
            restored = model(inputs, indices).clamp(0, 1)
            name = f"{kind.value}, micrographs" if micrograph else kind.value
            scores.setdefault(name, []).append(psnr(restored, targets))
    model.train()
    return {name: round(sum(values) / len(values), 3) for name, values in scores.items()}


@lru_cache(maxsize=1)
def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones, by trying it.

    Without instructions for them it is some hundred times slower.
    """

    def seconds(dtype: torch.dtype) -> float:
        factor = torch.ones(256, 256, dtype=dtype)
        times = []
        for _ in range(5):  # other work may come in between
            started = time.perf_counter()
            torch.mm(factor, factor)
            times.append(time.perf_counter() - started)
        return min(times)

    return seconds(torch.bfloat16) < seconds(torch.float32)


def balance(errors: Tensor) -> Tensor:
    """Weight each image's error so that a percent less of it counts the same in every task.

    The error left in haze and low light is several times that left in noise, and its sign hardly
    changes over an image: unweighted, those two would decide most of every step. An error of 0.05
    has a weight of 1, whatever else is in the batch.
    """
    return 0.08 / (errors.detach() + 0.03)


def sharing(model: DFPIR) -> DFPIR:
    """Return a network with the very same values as `model` and gradients of its own."""
    replica = copy.deepcopy(model)
    state = model.state_dict()
    for name, value in [*replica.named_parameters(), *replica.named_buffers()]:
        value.data = state[name]
    return replica


def identity(described: Mapping[str, Any]) -> dict[str, object]:
    """Return what a run and one that resumes it must have in common.

    States written before there were specialists say nothing of them.
    """
    settings = described["settings"]
    known = {
        "specialist": settings.get("specialist", ""),
        "levels": settings.get("levels", 2),
        "specialised": list(settings.get("specialised", ())),
    }
    return {"details": 0, **described["config"], **known}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of names and values, empty if there are none."""
    found = hashlib.sha256()
    for key, value in tensors.items():
        found.update(key.encode() + value.cpu().numpy().tobytes())
    return found.hexdigest() if tensors else ""


@contextlib.contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Lend `count` threads; where there are several, PyTorch starts no further ones in them."""
    usual = torch.get_num_threads()
    only_one = None if count == 1 else partial(torch.set_num_threads, 1)
    with ThreadPoolExecutor(count, initializer=only_one) as pool:
        try:
            yield pool
        finally:
            torch.set_num_threads(usual)  # or every thread to come would have but one, too


class Trainer:
    """State of one run: the network, its average, the optimisers, and the log.

    Parameters
    ----------
    config : DFPIRConfig
    settings : TrainingSettings
    pictures : Pictures
    device : torch.device
    state_file : Path
        Written atomically every few minutes; `resume` continues from it. Beside it lies
        ``<name>.best.safetensors``, the average that did best in validation.
    """

    def __init__(
        self,
        config: DFPIRConfig,
        settings: TrainingSettings,
        pictures: Pictures,
        device: torch.device,
        state_file: Path,
    ) -> None:
        self.config, self.settings = config, settings
        self.pictures, self.device, self.state_file = pictures, device, state_file
        self.model = new_model(config, settings.seed).to(device)
        self.shared = [path for level in LEVELS[settings.levels :] for path in level]
        if settings.specialist:
            for path in self.shared:
                self.model.get_submodule(path).requires_grad_(False)
        self.average = new_model(config, settings.seed).to(device).requires_grad_(False)
        learnt = [value for value in self.model.parameters() if value.requires_grad]
        matrices = [value for value in learnt if is_matrix(value)]
        others = [value for value in learnt if not is_matrix(value)]
        # In a tensor each, which a recorded step reads anew.
        rates = [torch.tensor(settings.learning_rate, device=device) for _ in range(2)]
        self.bfloat16 = device.type == "cpu" and fast_bfloat16()
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(
                matrices,
                lr=rates[0],
                weight_decay=settings.weight_decay,
                dtype=torch.bfloat16 if self.bfloat16 else torch.float32,
            ),
            torch.optim.AdamW(
                others,
                lr=rates[1],
                betas=(0.9, 0.99),
                weight_decay=0.0,
                fused=True,
                capturable=device.type == "cuda",
            ),
        ]
        parts = parts_of(settings)
        workers = min(torch.get_num_threads(), parts) if device.type == "cpu" else 1
        self.replicas = [self.model, *(sharing(self.model) for _ in range(workers - 1))]
        self.shares = [range(parts)[worker::workers] for worker in range(workers)]
        self.recorded: RecordedSteps | None = None
        self.step = 0
        self.seconds = 0.0
        self.log: list[dict[str, Any]] = []
        self.best: dict[str, float] | None = None
        self.start: DFPIR | None = None
        self.along = ""  # digest of the specialists that come along

    def described(self) -> dict[str, dict[str, object]]:
        """Return settings and configuration as plain values."""
        config = asdict(self.config)
        config["degradations"] = [member.value for member in self.config.degradations]
        return {"settings": asdict(self.settings), "config": config}

    @property
    def seen(self) -> int:
        """Patches seen so far."""
        return self.step * self.settings.batch

    def save(self) -> None:
        """Write the whole state, so that the run goes on exactly after `resume`."""
        partial = self.state_file.with_suffix(".partial")
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "log": self.log,
            "best": self.best,
            "along": self.along,
            **self.described(),
        }
        torch.save(state, partial)
        partial.replace(self.state_file)

    def resume(self) -> None:
        """Continue from the state file.

        Raises
        ------
        ValueError
            If there is none, or it is of another network, specialist or start.
        """
        if not self.state_file.is_file():
            message = f"{self.state_file}: nothing to resume; start without --resume."
            raise ValueError(message)
        state = torch.load(self.state_file, map_location=self.device, weights_only=True)
        before, now = (identity(described) for described in (state, self.described()))
        if before != now:
            message = (
                f"{self.state_file}: was trained as {before}, asked for {now}. Resume with the "
                "same preset, specialist, levels and --from."
            )
            raise ValueError(message)
        if state.get("along", self.along) != self.along:
            message = f"{self.state_file}: began with other specialists; give the same --from."
            raise ValueError(message)
        if self.settings.specialist:
            theirs = self.shared_state(self.beginning().state_dict())
            if not all(torch.equal(state["model"][key].cpu(), theirs[key].cpu()) for key in theirs):
                message = f"{self.state_file}: began from other weights; give the same --from."
                raise ValueError(message)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            # The state may come from another device: what belongs to this one stays.
            [group] = optimizer.param_groups
            own: dict[str, Any] = {key: group[key] for key in ("lr", "capturable") if key in group}
            optimizer.load_state_dict(values)
            optimizer.param_groups[0].update(own)
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]
        self.best = state.get("best")

    def start_from(self, model: DFPIR) -> None:
        """Begin with the weights and channel orders of `model`.

        It may have fewer blocks of details: those that are new add nothing at first. A specialist
        goes on from the one that `model` has already, and will take its place.

        Raises
        ------
        ValueError
            If it is of another size.
        """
        begun = dict(model.named_specialists()).get(self.settings.specialist, model)
        found = begun.config
        known = min(found.details, self.config.details)
        if found != replace(self.config, details=known, degradations=found.degradations):
            message = f"Weights are of {found}; expected {self.config}. Use another preset."
            raise ValueError(message)
        if model.specialists and not self.settings.specialist:
            logger.warning(
                "The specialists of these weights (%s) come along as they are, but get other lower "
                "levels: train them anew, by --specialist, --from the result.",
                ", ".join(model.specialists),
            )
        missing = [k.value for k in self.settings.kinds if k not in model.config.degradations]
        if self.settings.specialist and missing:
            message = f"The weights know no {', '.join(missing)}; choose another specialist."
            raise ValueError(message)
        state = self.model.state_dict()
        state.update({key: value for key, value in begun.state_dict().items() if key in state})
        if self.settings.specialist:  # what had been its own may be no longer
            state.update(self.shared_state(model.state_dict()))
        self.model.load_state_dict(state)
        self.average.load_state_dict(state)
        self.start = model
        if not self.settings.specialist:
            experts = [specialist for _, specialist in model.named_specialists()]
            names = {kind.value for each in experts for kind in each.config.degradations}
            self.settings = replace(self.settings, specialised=tuple(sorted(names)))
            self.along = digest(model.specialists.state_dict())

    def shared_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return those tensors of a state that belong to modules a specialist shares."""
        modules = tuple(f"{path}." for path in self.shared)
        return {key: value for key, value in state.items() if key.startswith(modules)}

    def beginning(self) -> DFPIR:
        """Return the network that a specialist belongs to.

        Raises
        ------
        ValueError
            If there is none.
        """
        if self.start is None:
            raise ValueError(NO_START)
        return self.start

    def result(self) -> DFPIR:
        """Return the average; if it is a specialist, within the network that it began from.

        If it is a whole network, the specialists of the one that it began from are part of it.
        """
        average = copy.deepcopy(self.average)
        if not self.settings.specialist:
            if self.start is not None:
                begun = copy.deepcopy(self.start).to(self.device)
                for name, specialist in begun.named_specialists():
                    shared = checkpoint.shared_modules(begun, specialist)
                    average.specialise(name, specialist, shared)
            return average
        average.config = replace(average.config, degradations=self.settings.kinds)
        network = copy.deepcopy(self.beginning()).to(self.device)
        network.specialise(self.settings.specialist, average, self.shared)
        return network

    def keep_best(self, scores: dict[str, float]) -> None:
        """Write the average to its file if the mean of its scores is the highest so far.

        The last average need not be the best one.
        """
        mean = round(sum(scores.values()) / len(scores), 3)
        if self.best is None or mean > self.best["psnr"]:
            self.best = {"patches": self.seen, "psnr": mean}
            path = self.state_file.with_suffix(".best.safetensors")
            checkpoint.save(self.result(), path, compress=True)

    def draw(self, step: int) -> list[Part]:
        """Return all parts of a step."""
        parts = range(parts_of(self.settings))
        return [draw_part(self.pictures, self.settings, step, part, self.device) for part in parts]

    def learn(self, model: DFPIR, parts: Sequence[int]) -> Tensor:
        """Add the gradient of some parts of this step to that of `model`; return their error."""
        error = torch.zeros((), device=self.device)
        for number in parts:
            part = draw_part(self.pictures, self.settings, self.step, number, self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
                restored = model(part.inputs, part.indices)
            error += self.backward(restored, part)
        return error

    def backward(self, restored: Tensor, part: Part) -> Tensor:
        """Add the gradient of a part; return its share of the mean absolute error, ()."""
        errors = (restored.float() - part.targets).abs().mean(dim=(1, 2, 3))
        (part.weight * errors * balance(errors)).sum().backward()  # type: ignore[no-untyped-call]
        return part.weight * errors.detach().sum()

    def set_learning_rate(self, rate: float) -> None:
        """Let the optimisers' next steps be of this size."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"].fill_(rate)

    def zero_gradients(self) -> None:
        """Forget the gradients, in place where there are any."""
        for model in self.replicas:
            model.zero_grad(set_to_none=False)

    def update(self) -> None:
        """Clip the gradients and let the optimisers step."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()

    def train_step(self, pool: ThreadPoolExecutor | None = None) -> Tensor:
        """Take one step and return its loss (), the mean absolute error.

        With a pool of threads the replicas work side by side. On a graphics card nothing waits
        for the result but whoever reads it.
        """
        self.set_learning_rate(learning_rate(self.settings, self.seen))
        if self.device.type == "cuda":
            self.recorded = self.recorded or RecordedSteps(self)
            error = self.recorded.take()
        else:
            error = self.share_step(pool)
        # A short memory at first, so that the random start is soon forgotten.
        decay = min(self.settings.average, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            averaged: list[Tensor] = list(self.average.parameters())
            current: list[Tensor] = list(self.model.parameters())
            torch._foreach_lerp_(averaged, current, 1 - decay)
        self.step += 1
        return error

    def share_step(self, pool: ThreadPoolExecutor | None) -> Tensor:
        """Compute a step by the replicas, each on its own parts; return the mean error, ()."""
        self.zero_gradients()
        work = map if pool is None else pool.map
        error = torch.stack(list(work(self.learn, self.replicas, self.shares))).sum()
        for model in self.replicas[1:]:
            for mine, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
                if mine.requires_grad:
                    assert mine.grad is not None and theirs.grad is not None
                    mine.grad += theirs.grad
        self.update()
        return error

    def run(self, *, every: int = 10_000, save_seconds: float = 180.0) -> None:
        """Train to the end of the settings' patches, validating after each `every` patches."""
        if self.settings.specialist:
            self.beginning()
        losses: list[Tensor] = []
        started = saved = time.monotonic()
        before = self.seconds
        with (
            tqdm(total=self.settings.patches, initial=self.seen, unit="patch") as bar,
            threads(len(self.replicas)) as pool,
        ):
            try:
                while self.seen < self.settings.patches:
                    losses.append(self.train_step(pool))
                    self.seconds = before + time.monotonic() - started
                    bar.update(self.settings.batch)
                    if self.step % 20 == 0:  # reading a loss waits for it
                        bar.set_postfix(loss=f"{mean_of(losses[-20:]):.4f}")
                    done = self.seen >= self.settings.patches
                    if done or self.seen // every > (self.seen - self.settings.batch) // every:
                        scores = validate(
                            self.average, self.pictures, self.device, self.settings.kinds
                        )
                        self.keep_best(scores)
                        self.log.append(
                            {
                                "patches": self.seen,
                                "seconds": round(self.seconds, 1),
                                "loss": round(mean_of(losses), 5),
                                "psnr": scores,
                            }
                        )
                        losses.clear()
                        logger.info("%s", json.dumps(self.log[-1]))
                    if done or time.monotonic() - saved > save_seconds:
                        self.save()
                        saved = time.monotonic()
            except KeyboardInterrupt:
                self.save()
                raise


def plot(log: list[dict[str, Any]], path: Path) -> None:
    """Draw the validation PSNR of every degradation over the patches seen."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        patches = [entry["patches"] for entry in log]
        for name in log[-1]["psnr"]:
            axes.plot(patches, [entry["psnr"][name] for entry in log], "o-", label=name)
        axes.set(xlabel="patches seen", ylabel="PSNR on validation pictures, dB")
        axes.grid(alpha=0.3)
        axes.legend(bbox_to_anchor=(1, 1), loc="upper left", frameon=False)
        figure.savefig(path, dpi=120)


def train(
    data: Path,
    output: Path,
    *,
    preset: str = "compact",
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    start: str | Path | None = None,
    every: int = 10_000,
    **chosen: float | str,
) -> dict[str, object]:
    """Train a network and write its averaged weights, compressed (see `checkpoint.compressed`).

    Beside `output`, which has the last average, appear ``.best.safetensors`` (the one with the
    highest mean PSNR in validation), ``.state`` (everything that `resume` needs), ``.json`` (the
    log) and ``.png`` (a plot of it), the last where matplotlib is installed.

    Parameters
    ----------
    data : Path
        Folder of sharp pictures; those in a folder called ``micrographs`` count as such.
    output : Path
        The safetensors file to write.
    preset : {"compact", "paper"}
    device : str
    resume : bool
        Go on from the state beside `output`; `chosen` may change the patches to see in all.
    overwrite : bool
        Replace what an earlier run has left as `output` and beside it.
    start : str or Path, optional
        Weights to begin from, by name or file; of a specialist, those it becomes a part of.
    every : int
        Patches between validations.
    **chosen
        Fields of `TrainingSettings` that shall differ from their defaults. A specialist that
        `start` has already keeps the number of its levels unless another is chosen.

    Returns
    -------
    dict
        Settings, patches, seconds, scores, which validation was best, number of pictures: what
        weights.json records of a run.

    Raises
    ------
    ValueError
        If the folder holds too few pictures, the output exists, there is nothing to resume,
        `start` is of another size or lacking for a specialist, or there is no such specialist.
    """
    check_output(output, resume=resume, overwrite=overwrite)
    settings = replace(TrainingSettings(), **chosen)  # type: ignore[arg-type]
    config = DFPIRConfig.paper() if preset == "paper" else DFPIRConfig.compact()
    if settings.specialist:
        if settings.specialist not in SPECIALTIES:
            message = (
                f"There is no specialist for {settings.specialist!r}; choose one of: "
                f"{', '.join(SPECIALTIES)}."
            )
            raise ValueError(message)
        if not 1 <= settings.levels <= len(LEVELS):
            message = f"A specialist has 1 to {len(LEVELS)} levels; found {settings.levels}."
            raise ValueError(message)
        if start is None:  # before pictures are read for minutes
            raise ValueError(NO_START)
        config = replace(config, details=DFPIRConfig.specialist().details)
    network = None if start is None else load_model(start)
    if network is not None and settings.specialist and "levels" not in chosen:
        known = own_levels(network, settings.specialist)
        settings = replace(settings, levels=known or settings.levels)
    pictures = Pictures.load(data)
    trainer = Trainer(
        config, settings, pictures, choose_device(device), output.with_suffix(".state")
    )
    if network is not None:
        trainer.start_from(network)
    if resume:
        trainer.resume()
    output.parent.mkdir(parents=True, exist_ok=True)
    trainer.run(every=every)
    checkpoint.save(trainer.result(), output, compress=True)
    record: dict[str, object] = {
        "patches": trainer.seen,
        "seconds": round(trainer.seconds),
        **trainer.described(),
        "validation": trainer.log[-1]["psnr"],
        "best": trainer.best,
        "pictures": len(pictures.names),
        "torch": torch.__version__,
    }
    log = {**record, "log": trainer.log, "files": pictures.names}
    output.with_suffix(".json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    try:
        plot(trainer.log, output.with_suffix(".png"))
    except ImportError:
        logger.info("no plot: matplotlib is not installed")
    return record
