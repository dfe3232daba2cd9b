"""Look at pixels and say what is wrong with them: the kind of degradation, and how much noise.

Noise, streaks and blur live in single pixels, which shrinking would remove: so up to twelve crops
at native resolution are looked at, every place in them gives a vote and a weight, and the weighted
mean counts. But a soft lens is told from a moving hand, and haze from a grey wall, only by the
look of the whole: so the same is done with the picture at a half and at a quarter of its size, and
an `Overview` weighs the three outcomes together with the statistics of its tones, of its sharpness
along each direction and of its veil, and with what the restoring network sees on its way down,
before it is told anything: to restore, it had to learn what is picture and what is damage.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfpir import picture_statistics
from dfpir.checkpoint import CheckpointError, mismatches, read_tensors, write_tensors
from dfpir.degradation import CLEAN, NOISES, Degradation, Diagnosis, Verdict
from dfpir.model import DFPIRConfig, Encoder
from dfpir.tiling import spread, windows

FORMAT = "dfpir-classifier-4"
"""Value of ``format`` in the metadata of classifier files."""

NOISE = "noise"
KINDS = (NOISE, *(member.value for member in Degradation if member not in NOISES), CLEAN)
"""What the network tells apart, in the order of its logits; noise of any strength is one kind."""

CROP = 128
"""Side in pixels of a crop."""

MOST_CROPS = 12
SMALLEST_CROP = 32
"""A picture with a shorter side than this is continued by reflection."""

SHRUNK = (1, 2, 4)
"""By how much a picture is shrunk, by averaging, before each of the looks that are taken at it."""

ENCODER, LEVELS = DFPIRConfig.compact(), 2
"""Sizes of the encoder, a copy of the first levels of the bundled network."""

WINDOW, MOST_WINDOWS = 384, 4
"""The encoder sees a picture whole, or this many windows of this side, if they are fewer pixels."""

FEATURES = (
    len(SHRUNK) * (len(KINDS) + 1)
    + picture_statistics.COUNT
    + 2 * sum(ENCODER.channels(depth) for depth in range(LEVELS))
)
"""Numbers by which `Overview` knows a picture."""

FARTHEST = 6.0
"""Standard deviations from the mean beyond which one number is as odd as another."""

LEAST_LOG_PROBABILITY = -12.0
"""Below this, one impossible kind is as impossible as another."""

DECISION = 0.6
"""A verdict other than "unsure" needs at least this probability."""

NOISE_SPREAD = 0.2
"""How softly noise is dealt to its prompts: a standard deviation in natural log of sigma."""

TYPICAL_SIGMA = 20.0
"""The noise regression predicts the logarithm of sigma relative to this many grey levels."""


@dataclass(frozen=True, slots=True)
class ClassifierConfig:
    """Sizes of the network.

    Attributes
    ----------
    widths : tuple of int
        Channels at a half, a quarter, ... of the resolution.
    hidden : int
        Channels between the last of these and the votes.
    overview : int
        Units of the hidden layer of `Overview`.
    """

    widths: tuple[int, ...] = (16, 32, 64, 128)
    hidden: int = 128
    overview: int = 64


class ResidualConvolution(nn.Module):
    """Halve the resolution with one convolution, then refine with another around which x skips."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.reduce_norm = nn.BatchNorm2d(outputs)
        self.refine = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.refine_norm = nn.BatchNorm2d(outputs)

    def forward(self, features: Tensor) -> Tensor:
        """Return features of half the height and width."""
        reduced = F.relu(self.reduce_norm(self.reduce(features)))
        return F.relu(reduced + self.refine_norm(self.refine(reduced)))


class Overview(nn.Module):
    """Correct the judgement at full size by smaller sizes, statistics and what the encoder sees.

    Untrained, it corrects nothing.

    Parameters
    ----------
    hidden : int
        Units between the features and the correction.
    """

    mean: Tensor
    spread: Tensor
    temperature: Tensor

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("spread", torch.ones(FEATURES))
        self.register_buffer("temperature", torch.ones(1))
        self.hidden = nn.Linear(FEATURES, hidden)
        self.dropout = nn.Dropout(0.2)
        self.vote = nn.Linear(hidden, len(KINDS))
        nn.init.zeros_(self.vote.weight)
        nn.init.zeros_(self.vote.bias)

    def correction(self, features: Tensor) -> Tensor:
        """Return what is added (N, kinds) to the logits at full size."""
        units = self.hidden(((features - self.mean) / self.spread).clamp(-FARTHEST, FARTHEST))
        return self.vote(self.dropout(F.relu(units)))  # type: ignore[no-any-return]

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (N, kinds) of pictures with these features (N, `FEATURES`)."""
        corrected = features[:, : len(KINDS)] + self.correction(features)
        return corrected / self.temperature


class DegradationClassifier(nn.Module):
    """A small convolutional network whose every position votes on the kind of degradation.

    `forward` is the network alone, as it is trained on patches; `judge` and `classify` look at
    whole pictures at several sizes and ask ``overview``.

    Parameters
    ----------
    config : ClassifierConfig

    Examples
    --------
    >>> model = DegradationClassifier().eval()
    >>> logits, log_sigma = model(torch.rand(2, 3, 64, 64))
    >>> logits.shape, log_sigma.shape
    (torch.Size([2, 6]), torch.Size([2]))
    """

    temperature: Tensor

    def __init__(self, config: ClassifierConfig | None = None) -> None:
        super().__init__()
        self.config = config or ClassifierConfig()
        widths = self.config.widths
        self.stages = nn.Sequential(
            *(
                ResidualConvolution(inputs, outputs)
                for inputs, outputs in zip((6, *widths), widths, strict=False)
            )
        )
        self.hidden = nn.Conv2d(widths[-1], self.config.hidden, 1)
        self.context = nn.Linear(2 * widths[-1], self.config.hidden)
        # Logits, log sigma, and a weight for each of the two.
        self.vote = nn.Conv2d(self.config.hidden, len(KINDS) + 3, 1)
        self.register_buffer("temperature", torch.ones(1))
        self.encoder = Encoder(ENCODER, LEVELS).requires_grad_(False)
        self.overview = Overview(self.config.overview)

    @property
    def stride(self) -> int:
        """Pixels between two votes."""
        return int(2 ** len(self.config.widths))

    def votes(self, pixels: Tensor) -> Tensor:
        """Return the votes (N, kinds + 3, H / stride, W / stride) of crops (N, 3, H, W)."""
        pixels = pixels.clamp(-1, 2)
        padded = F.pad(pixels, (1, 1, 1, 1), mode="replicate")
        columns = padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:]
        mean = (columns[..., :-2, :] + columns[..., 1:-1, :] + columns[..., 2:, :]) / 9
        # Noise of a few grey levels would drown among shapes a hundred times as strong.
        detail = torch.asinh(16 * (pixels - mean))
        features = torch.cat([2 * pixels - 1, detail], dim=1)
        features = self.stages(features)
        # Whether a dim spot is darkness or a bright line a streak, its crop has to tell.
        context = self.context(torch.cat([features.mean((2, 3)), features.amax((2, 3))], dim=1))
        hidden = F.relu(self.hidden(features) + context[:, :, None, None])
        return self.vote(hidden)  # type: ignore[no-any-return]

    def count(self, votes: Tensor) -> tuple[Tensor, Tensor]:
        """Average votes (N, kinds + 3, ...) over places; see `forward` for what is returned."""
        votes = votes.flatten(2)
        kinds = len(KINDS)
        # Bounded weights, so that no single place can outvote a whole picture.
        weights = votes[:, -2:].sigmoid() + 0.01
        weights = weights / weights.sum(dim=2, keepdim=True)
        logits = (votes[:, :kinds] * weights[:, :1]).sum(dim=2)
        relative = (votes[:, kinds] * weights[:, 1]).sum(dim=1)
        return logits / self.temperature, relative + math.log(TYPICAL_SIGMA)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Judge each picture of a batch as a whole.

        Parameters
        ----------
        pixels : Tensor, (N, 3, H, W), values 0..1

        Returns
        -------
        logits : Tensor, (N, 6)
            In the order of `KINDS`.
        log_sigma : Tensor, (N,)
            Natural logarithm of the noise's standard deviation in grey levels of 0..255;
            meaningful for noisy pictures only.
        """
        return self.count(self.votes(pixels))


def reflected(length: int, wanted: int) -> Tensor:
    """Return indices 0..length - 1 that run to and fro until there are `wanted` of them."""
    steps = torch.arange(max(length, wanted)) % (2 * length)
    return torch.minimum(steps, 2 * length - 1 - steps)


def continued(pixels: Tensor) -> Tensor:
    """Return pictures (N, 3, H, W) whose sides are `SMALLEST_CROP` at least, by reflection."""
    for axis in (2, 3):
        if pixels.shape[axis] < SMALLEST_CROP:
            indices = reflected(pixels.shape[axis], SMALLEST_CROP).to(pixels.device)
            pixels = pixels.index_select(axis, indices)
    return pixels


def grid(height: int, width: int) -> tuple[int, int]:
    """Return into how many rows and columns of crops a picture is divided: 12 at most in all.

    No more than cover the picture, and spread like its sides.
    """
    rows, columns = (math.ceil(side / CROP) for side in (height, width))
    while rows * columns > MOST_CROPS:
        if rows > 1 and (columns == 1 or rows / height > columns / width):
            rows -= 1
        else:
            columns -= 1
    return rows, columns


def crops(pixels: Tensor) -> Tensor:
    """Return evenly placed crops of each picture at native resolution.

    Parameters
    ----------
    pixels : Tensor, (N, 3, H, W)

    Returns
    -------
    Tensor, (N, crops, 3, h, w)
        One to twelve crops; h and w are 32..128.
    """
    pixels = continued(pixels)
    height, width = pixels.shape[-2:]
    rows, columns = grid(height, width)
    high, wide = min(height, CROP), min(width, CROP)
    return torch.stack(
        [
            pixels[..., top : top + high, left : left + wide]
            for top in spread(height, high, rows)
            for left in spread(width, wide, columns)
        ],
        dim=1,
    )


@torch.no_grad()
def look(model: DegradationClassifier, picture: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits (1, 6) and log sigma (1,) of a picture (1, 3, H, W) at this size alone."""
    votes = model.votes(crops(picture)[0])  # (crops, kinds + 3, h, w)
    return model.count(votes.transpose(0, 1)[None])


def seen_by_encoder(picture: Tensor) -> Tensor:
    """Return a picture (1, 3, H, W), or evenly placed windows (N, 3, h, w) of a large one."""
    height, width = picture.shape[2:]
    if height * width <= MOST_WINDOWS * WINDOW**2:
        return picture
    parts = windows(height, width, WINDOW, MOST_WINDOWS)
    return torch.cat([picture[..., rows, columns] for rows, columns in parts])


@torch.no_grad()
def features_of(model: DegradationClassifier, picture: Tensor) -> tuple[Tensor, Tensor]:
    """Look at a picture (1, 3, H, W) at all sizes of `SHRUNK`, and through the encoder.

    Returns
    -------
    features : Tensor, (`FEATURES`,)
        What `Overview` asks for.
    log_sigma : Tensor, (1,)
        As seen at full size.
    """
    seen, sigmas = [], []
    smaller = picture
    for factor in SHRUNK:
        # A picture that would vanish is looked at again as it is.
        if min(picture.shape[2:]) >= 2 * factor:
            smaller = F.avg_pool2d(picture, factor)
        logits, log_sigma = look(model, smaller)
        likelihoods = logits[0].log_softmax(dim=0).clamp(min=LEAST_LOG_PROBABILITY)
        seen += [likelihoods, log_sigma]
        sigmas.append(log_sigma)
    parts = seen_by_encoder(picture)
    statistics = picture_statistics.described(continued(picture), smaller, continued(parts))
    return torch.cat([*seen, statistics, model.encoder.describe(parts)]), sigmas[0]


@torch.no_grad()
def judge(model: DegradationClassifier, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits (N, 6) and log sigma (N,) of whole pictures, in float64 on the CPU."""
    seen = [features_of(model, picture[None].float()) for picture in pixels]
    logits = [model.overview(features[None]) for features, _ in seen]
    log_sigma = [log for _, log in seen]
    return torch.cat(logits).double().cpu(), torch.cat(log_sigma).double().cpu()


def shares(sigma: float) -> dict[Degradation, float]:
    """Deal noise of standard deviation `sigma` to the three prompts; the shares sum to 1.

    The largest share belongs to `Degradation.nearest_noise(sigma)`.
    """
    distances = [math.log(sigma / level) / NOISE_SPREAD for level in NOISES.values()]
    nearest = min(map(abs, distances))
    closeness = [math.exp(0.5 * (nearest**2 - distance**2)) for distance in distances]
    # Half-way between two prompts rounding must not decide otherwise than `nearest_noise`.
    closeness[list(NOISES).index(Degradation.nearest_noise(sigma))] += 1e-6
    total = sum(closeness)
    return {level: each / total for level, each in zip(NOISES, closeness, strict=True)}


def diagnosis(kinds: Mapping[str, float], sigma: float) -> Diagnosis:
    """Turn the probabilities of `KINDS` and a noise estimate into a diagnosis."""
    dealt = {level.value: kinds[NOISE] * share for level, share in shares(sigma).items()}
    others = {name: kinds[name] for name in KINDS if name != NOISE}
    likeliest = max(kinds, key=lambda name: kinds[name])
    suspect = max((name for name in kinds if name != CLEAN), key=lambda name: kinds[name])
    verdict: Verdict = "unsure"
    if kinds[likeliest] >= DECISION:
        verdict = "clean" if likeliest == CLEAN else "degraded"
    degradation = None
    if verdict != "clean":
        noisy = suspect == NOISE
        degradation = Degradation.nearest_noise(sigma) if noisy else Degradation.from_name(suspect)
    estimate = sigma if degradation in NOISES else None
    return Diagnosis(verdict, degradation, {**dealt, **others}, estimate)


def kind_of(degradation: Degradation) -> str:
    """Return the one of `KINDS` that a degradation belongs to."""
    return NOISE if degradation in NOISES else degradation.value


def kinds_of(diagnosis: Diagnosis) -> dict[str, float]:
    """Return the probabilities of `KINDS`, in this order, from those of a diagnosis."""
    dealt = diagnosis.probabilities
    kinds = {kind: dealt.get(kind, 0.0) for kind in KINDS}
    kinds[NOISE] = sum(dealt.get(level.value, 0.0) for level in NOISES)
    return kinds


def likeliest_kind(diagnosis: Diagnosis) -> str:
    """Return the likeliest of `KINDS`, whatever the verdict."""
    kinds = kinds_of(diagnosis)
    return max(kinds, key=lambda kind: kinds[kind])


def classify(model: DegradationClassifier, pixels: Tensor) -> list[Diagnosis]:
    """Diagnose each picture of a batch.

    The result for a picture depends neither on the others nor on chance.

    Parameters
    ----------
    model : DegradationClassifier
        In evaluation mode, on the device of `pixels`.
    pixels : Tensor, (N, 3, H, W), values 0..1, any float dtype
        Whole pictures of any size; values outside 0..1, as unclipped noise has, are welcome.

    Returns
    -------
    list of Diagnosis
        The verdict is "degraded" or "clean" where that has a probability of at least
        `DECISION`, otherwise "unsure". ``sigma`` is given where noise is the likeliest
        degradation and the verdict is not "clean".

    Raises
    ------
    ValueError
        If `pixels` has not four axes with three channels and at least one pixel.

    Examples
    --------
    >>> [found] = classify(DegradationClassifier().eval(), torch.rand(1, 3, 40, 50))
    >>> round(sum(found.probabilities.values()), 6)
    1.0
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3 or 0 in pixels.shape[2:]:
        message = (
            f"Cannot classify a tensor of shape {tuple(pixels.shape)}; expected (N, 3, H, W) with "
            "at least one pixel. Convert arrays by dfpir.pixels.to_pixels."
        )
        raise ValueError(message)
    if not len(pixels):
        return []
    logits, log_sigma = judge(model, pixels)
    return [
        diagnosis(dict(zip(KINDS, probabilities, strict=True)), math.exp(min(max(log, 0.0), 5.0)))
        for probabilities, log in zip(
            logits.softmax(dim=1).tolist(), log_sigma.tolist(), strict=True
        )
    ]


def stored_state(model: DegradationClassifier) -> dict[str, Tensor]:
    """Return the tensors that a file holds: all but the step counters of training."""
    state = model.state_dict()
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def save_classifier(
    model: DegradationClassifier, path: Path, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write weights and sizes as safetensors; the file appears complete or not at all.

    Convolutions are stored in float16 (a relative error of 5e-4 per weight), the rest in float32.

    Parameters
    ----------
    model : DegradationClassifier
    path : Path
    metadata : mapping of str to str, optional
        Further facts for the header.
    """
    tensors = {
        key: value.to("cpu", torch.float16 if value.ndim == 4 else torch.float32).contiguous()
        for key, value in stored_state(model).items()
    }
    config = {**asdict(model.config), "kinds": KINDS}
    header = {**(metadata or {}), "format": FORMAT, "config": json.dumps(config)}
    write_tensors(path, tensors, header)


def load_classifier(path: Path) -> DegradationClassifier:
    """Read a file written by `save_classifier`.

    Returns
    -------
    DegradationClassifier
        In float32 and evaluation mode, on the CPU.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged, not a classifier of dfpir, or contradicts itself.
    """
    advice = "Reinstall dfpir, or give a classifier written by it."
    header, tensors = read_tensors(path)
    if header.get("format") != FORMAT:
        message = (
            f"{path}: not a classifier of dfpir: its format is {header.get('format')!r}, "
            f"expected {FORMAT!r}. {advice}"
        )
        raise CheckpointError(message)
    try:
        config = config_of(
            {key: tuple(value.shape) for key, value in tensors.items()},
            json.loads(header.get("config", "null")),
        )
        return build(config, tensors)
    except (ValueError, ArithmeticError, RuntimeError) as error:
        message = f"{path}: {str(error).removesuffix('.')}. {advice}"
        raise CheckpointError(message) from None


def config_of(shapes: Mapping[str, Sequence[int]], claimed: object) -> ClassifierConfig:
    """Read the sizes off the shapes of the tensors and compare them with what the header claims.

    Raises
    ------
    CheckpointError
        If they differ, or the kinds are not `KINDS`.
    """
    stages = sum(key.endswith("reduce.weight") for key in shapes)
    names = [f"stages.{stage}.reduce.weight" for stage in range(stages)]
    ends = ("hidden.weight", "overview.hidden.weight")
    missing = [name for name in (*names, *ends) if not shapes.get(name)]
    if missing or not stages:
        message = f"no classifier's tensors: {', '.join(missing) or 'stages'} not found."
        raise CheckpointError(message)
    config = ClassifierConfig(
        tuple(shapes[name][0] for name in names), *(shapes[name][0] for name in ends)
    )
    truth = json.loads(json.dumps({**asdict(config), "kinds": KINDS}))
    if claimed != truth:
        message = f"its header says {claimed}, its tensors and this version of dfpir {truth}."
        raise CheckpointError(message)
    return config


def build(config: ClassifierConfig, tensors: Mapping[str, Tensor]) -> DegradationClassifier:
    """Return the network of `config` with exactly these tensors, in evaluation mode.

    Raises
    ------
    CheckpointError
        If keys are missing or left over, shapes differ, or values are not finite.
    """
    model = DegradationClassifier(config)
    problems = mismatches(stored_state(model), tensors) or "; ".join(
        f"{key} is not finite" for key in sorted(tensors) if not tensors[key].isfinite().all()
    )
    if problems:
        message = f"these tensors do not make a classifier: {problems}."
        raise CheckpointError(message)
    model.load_state_dict({key: value.float() for key, value in tensors.items()}, strict=False)
    return model.eval().requires_grad_(False)
