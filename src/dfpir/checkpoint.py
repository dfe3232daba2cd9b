"""Weights in and out of safetensors files, and the import of the authors' published checkpoints."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dfpir.degradation import Degradation
from dfpir.model import DFPIR, LEVELS, DFPIRConfig

FORMAT = "dfpir-1"
"""Value of ``format`` in the metadata of our files."""

SPECIALISTS = "specialists."
"""What the keys of specialists' tensors begin with; their names come next."""

SCALE = ".int8_scale"
"""What a key is followed by to name the scales of a tensor that is stored in eight bits."""

MANY_VALUES, MANY_A_SCALE = 2**12, 16
"""A compressed file has weights in eight bits if they are so many and more, in all and a scale."""

CODE_LENGTH = 512
"""Length of a CLIP ViT-B/32 text code."""

RENAMED_MODULES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"^patch_embed\.proj\.", "embed."),
    (r"^(encoder|decoder)_level([123])\.", lambda found: f"{found[1]}.{int(found[2]) - 1}."),
    (r"^down([123])_\d\.body\.0\.", lambda found: f"down.{int(found[1]) - 1}."),
    (r"^up\d_([123])\.body\.0\.", lambda found: f"up.{int(found[1]) - 1}."),
    (r"^reduce_chan_level([23])\.", lambda found: f"reduce.{int(found[1]) - 2}."),
    (r"^encoder_shuffle_channel([123])\.", lambda found: f"perturbations.{int(found[1]) - 1}."),
    (r"^latent_shuffle_channel\.", "perturbations.3."),
    (r"\.conv1x1\.", ".perturbation.expand."),
    (r"\.conv_out\.", ".perturbation.project."),
    (r"\.(attn|select_attn)\.", ".attention."),
    (r"\.attention\.attn4$", ".attention.scale"),
    (r"\.attention\.q\.", ".attention.query."),
    (r"\.attention\.q_dwconv\.", ".attention.query_depthwise."),
    (r"\.attention\.kv\.", ".attention.key_value."),
    (r"\.attention\.kv_dwconv\.", ".attention.key_value_depthwise."),
    (r"\.(?:qkv_)?dwconv\.", ".depthwise."),
    (r"\.ffn\.", ".feed_forward."),
    (r"\.body\.", "."),
]
"""The authors' names and ours, applied from top to bottom."""

TEXT_PROJECTION = re.compile(r"\.linear_layer[13]\.(weight|bias)$")
"""Linear maps from the text code to the channel order: needed once, for the permutations."""


class CheckpointError(ValueError):
    """A weights file cannot be used; the message says what was found and what to do."""


def rename(published: str) -> str:
    """Return our name for a key of a published state dict."""
    for pattern, replacement in RENAMED_MODULES:
        published = re.sub(pattern, replacement, published)
    return published


def channel_orders(state: Mapping[str, Tensor], prefix: str, codes: Tensor) -> Tensor:
    """Return the channel order (T, 2C) that each text code (T, 512) selects in one DGPB.

    It is the descending order of an affine projection of the code, computed in float64 because
    neighbours can be as near as 1e-6.
    """
    projected = codes.double()
    for layer in ("linear_layer1", "linear_layer3"):
        weight, bias = (state[f"{prefix}.{layer}.{part}"].double() for part in ("weight", "bias"))
        projected = projected @ weight.T + bias
    return projected.argsort(dim=1, descending=True)


def from_published(
    state_dict: Mapping[str, Tensor], text_codes: Mapping[Degradation, Tensor]
) -> DFPIR:
    """Build the network from a state dict with the authors' key names.

    Parameters
    ----------
    state_dict : mapping of str to Tensor
        All of the published checkpoint's ``state_dict``, text projections included.
    text_codes : mapping of Degradation to Tensor, (512,)
        CLIP ViT-B/32 text features of each degradation's prompt, not normalised. Only the order
        they select matters, but codes computed in half precision move 3 to 20 % of it.

    Returns
    -------
    DFPIR
        In evaluation mode; it knows the degradations of `text_codes`.

    Raises
    ------
    CheckpointError
        If keys are missing or left over, or shapes do not fit, naming all of them.
    """
    degradations = tuple(member for member in Degradation if member in text_codes)
    if not degradations:
        message = "No text codes given; expected one of 512 values for each degradation."
        raise CheckpointError(message)
    for degradation in degradations:
        shape = tuple(text_codes[degradation].shape)
        if shape != (CODE_LENGTH,):
            message = (
                f"Text code of {degradation.value!r} has shape {shape}; expected ({CODE_LENGTH},)."
            )
            raise CheckpointError(message)
    codes = torch.stack([text_codes[degradation] for degradation in degradations])
    renamed = {
        rename(key): value.float()
        for key, value in state_dict.items()
        if not TEXT_PROJECTION.search(key)
    }
    prefixes = [
        *(f"encoder_shuffle_channel{level}" for level in (1, 2, 3)),
        "latent_shuffle_channel",
    ]
    for place, prefix in enumerate(prefixes):
        try:
            orders = channel_orders(state_dict, prefix, codes)
        except KeyError as error:
            message = (
                f"Not a published DFPIR checkpoint: key {error.args[0]!r} is missing. Give the "
                "whole state dict, its linear_layer1 and linear_layer3 included."
            )
            raise CheckpointError(message) from None
        table = torch.arange(orders.shape[1]).repeat(len(Degradation), 1)
        table[[degradation.index for degradation in degradations]] = orders
        renamed[f"perturbations.{place}.perturbation.permutations"] = table
    shapes = {key: tuple(value.shape) for key, value in renamed.items()}
    config = config_of(shapes, expansion=2.66, degradations=degradations)
    return build(config, renamed)


def config_of(
    shapes: Mapping[str, Sequence[int]],
    *,
    expansion: float,
    degradations: tuple[Degradation, ...] = tuple(Degradation),
    perturbation_skip: bool = False,
) -> DFPIRConfig:
    """Read the sizes of a network off the shapes of its state dict.

    What shapes cannot tell is given: the expansion before rounding (checked against the rounded
    one), the degradations and the skip.

    Raises
    ------
    CheckpointError
        If the shapes are not those of any DFPIR.
    """

    def count(prefix: str) -> int:
        found = {key[len(prefix) :].split(".")[0] for key in shapes if key.startswith(prefix)}
        return len(found)

    try:
        width, inputs = shapes["embed.weight"][:2]
        levels = [f"encoder.{depth}." for depth in range(3)] + ["latent."]
        blocks = tuple(count(prefix) for prefix in levels)
        heads = tuple(shapes[f"{prefix}0.attention.temperature"][0] for prefix in levels)
        hidden = shapes["encoder.0.0.feed_forward.project_out.weight"][1]
    except (KeyError, IndexError, ValueError) as error:
        message = (
            f"Not the weights of a DFPIR network: {error} not found among {len(shapes)} tensors. "
            "Give a file written by dfpir, or import a published one by `dfpir weights import`."
        )
        raise CheckpointError(message) from None
    if int(width * expansion) != hidden:
        expansion = hidden / max(width, 1)
    return DFPIRConfig(
        width=width,
        blocks=blocks,  # type: ignore[arg-type]  # four, as levels are
        refinement_blocks=count("refinement."),
        heads=heads,  # type: ignore[arg-type]
        expansion=expansion,
        stem=round((inputs / 3) ** 0.5),
        degradations=degradations,
        perturbation_skip=perturbation_skip,
        details=count("details."),
    )


def mismatches(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Name the first keys that are missing, left over or of another shape; empty if none is."""
    shapes = [
        {key: tuple(value.shape) for key, value in each.items()} for each in (expected, found)
    ]
    wanted, given = shapes
    problems = [
        *(f"missing {key}" for key in sorted(wanted.keys() - given.keys())),
        *(f"unexpected {key}" for key in sorted(given.keys() - wanted.keys())),
        *(
            f"{key} is {given[key]}, expected {wanted[key]}"
            for key in sorted(wanted.keys() & given.keys())
            if wanted[key] != given[key]
        ),
    ]
    more = f"; and {len(problems) - 5} more" * (len(problems) > 5)
    return "; ".join(problems[:5]) + more


def build(config: DFPIRConfig, state: Mapping[str, Tensor]) -> DFPIR:
    """Return the network of `config` with exactly the tensors of `state`, in evaluation mode.

    Raises
    ------
    CheckpointError
        If keys are missing or left over, or shapes differ; the message names them.
    """
    with torch.device("meta"):
        model = DFPIR(config)
    problems = mismatches(model.state_dict(), state)
    if problems:
        message = (
            f"These tensors do not make a DFPIR network: {problems}. Use another weights file."
        )
        raise CheckpointError(message)
    for key, orders in state.items():
        if key.endswith("permutations"):
            channels = torch.arange(orders.shape[1])
            if not torch.equal(orders.long().sort(dim=1).values, channels.expand_as(orders)):
                message = f"{key} is not a table of permutations. Use another weights file."
                raise CheckpointError(message)
    prepared = {
        key: value.long() if key.endswith("permutations") else value.float()
        for key, value in state.items()
    }
    model.load_state_dict(prepared, assign=True)
    return model.eval()


def shared_modules(model: DFPIR, specialist: DFPIR) -> list[str]:
    """Return the names out of `LEVELS` of what a specialist uses of the whole network."""
    paths = itertools.chain.from_iterable(LEVELS)
    return [path for path in paths if specialist.get_submodule(path) is model.get_submodule(path)]


def specialise(
    model: DFPIR, own: Mapping[str, Tensor], claimed: Mapping[str, Mapping[str, Sequence[str]]]
) -> None:
    """Give a network the specialists whose own tensors and degradations were stored with it.

    Raises
    ------
    CheckpointError
        If the tensors are not those of the specialists that the file claims to have.
    """
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in claimed}
    for key, value in own.items():
        name, _, rest = key.removeprefix(SPECIALISTS).partition(".")
        if name not in parts:
            message = f"unexpected {key}. Use another weights file."
            raise CheckpointError(message)
        parts[name][rest] = value
    for name, tensors in parts.items():
        shared = claimed[name]["shared"]
        strange = set(shared).difference(*LEVELS) or not tensors
        if strange:
            message = f"specialist {name!r} shares {shared}. Use another weights file."
            raise CheckpointError(message)
        for path in shared:
            module = model.get_submodule(path)
            tensors.update({f"{path}.{key}": value for key, value in module.state_dict().items()})
        blocks = {key.split(".")[1] for key in tensors if key.startswith("details.")}
        config = replace(
            model.config,
            degradations=tuple(map(Degradation.from_name, claimed[name]["degradations"])),
            details=len(blocks),
        )
        model.specialise(name, build(config, tensors), shared)


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write safetensors; the file appears complete or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.touch()  # for the permissions of any new file: save_file alone gives the owner's only
    mode = partial.stat().st_mode
    save_file(tensors, partial, header)
    partial.chmod(mode)
    partial.replace(path)


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and the tensors of a safetensors file.

    Raises
    ------
    CheckpointError
        If there is no such file, or it is something else or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, tensors
    except FileNotFoundError:
        message = f"{path}: no such weights file. `dfpir weights list` shows those there are."
        raise CheckpointError(message) from None
    except (SafetensorError, OSError) as error:
        message = f"{path}: not a safetensors file{explanation(path, error)}."
        raise CheckpointError(message) from None


def compressed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return floating-point tensors in half precision, the large ones in eight bits.

    Those are integers of -127..127 times a scale for each output channel, a tensor of its own. On
    the bundled weights that changes no score on validation photographs by more than 0.02 dB, and
    saves two fifths of the file in half precision. Smaller ones would save little more and cost
    twice as much.

    Raises
    ------
    ValueError
        If a weight is not finite.
    """
    stored = {}
    for key, value in tensors.items():
        if not value.is_floating_point():
            stored[key] = value
            continue
        value = value.float()  # a scale of fewer bits would not do
        if not bool(value.isfinite().all()):
            message = f"{key} is not finite: there is nothing to compress. Train with a lower rate."
            raise ValueError(message)
        few = value.ndim < 2 or value[0].numel() < MANY_A_SCALE  # as depthwise filters have
        if few or value.numel() < MANY_VALUES:
            stored[key] = value.half()
        else:
            largest = value.abs().amax(dim=tuple(range(1, value.ndim)), keepdim=True)
            scale = largest.clamp(min=torch.finfo(torch.float32).tiny) / 127
            stored[key] = (value / scale).round().to(torch.int8)
            stored[key + SCALE] = scale
    return stored


def expanded(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that `compressed` was given, rounded as they have been stored.

    Raises
    ------
    CheckpointError
        If scales are missing, left over or of another shape.
    """
    tensors = {}
    for key, value in stored.items():
        if key.endswith(SCALE):
            whole = stored.get(key.removesuffix(SCALE))
            if whole is None or whole.dtype != torch.int8:
                message = f"{key} belongs to no tensor in eight bits. Use another weights file."
                raise CheckpointError(message)
        elif value.dtype == torch.int8:
            scale = stored.get(key + SCALE)
            expected = (*value.shape[:1], *(1 for _ in value.shape[1:]))
            if (
                scale is None
                or scale.dtype != torch.float32
                or scale.shape != expected
                or not bool(scale.isfinite().all())
            ):
                message = (
                    f"{key} is in eight bits without finite float32 scales of shape {expected}. "
                    "Use another weights file."
                )
                raise CheckpointError(message)
            tensors[key] = value * scale
        else:
            tensors[key] = value
    return tensors


def save(
    model: DFPIR,
    path: Path,
    *,
    compress: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the weights, the channel orders and the configuration as safetensors.

    Parameters
    ----------
    compress : bool
        Round the weights for a small file; see `compressed`.
    metadata : mapping of str to str, optional
        Further facts for the header.
    """
    config = asdict(model.config)
    config["degradations"] = [degradation.value for degradation in model.config.degradations]
    state = dict(model.state_dict())
    for name, each in model.named_specialists():
        for module in shared_modules(model, each):
            for key in each.get_submodule(module).state_dict():
                del state[f"{SPECIALISTS}{name}.{module}.{key}"]
    tensors = {
        key: (value.to(torch.int16) if key.endswith("permutations") else value).cpu().contiguous()
        for key, value in state.items()
    }
    tensors = compressed(tensors) if compress else tensors
    header = {"format": FORMAT, "config": json.dumps(config), **(metadata or {})}
    if model.specialists:
        header["specialists"] = json.dumps(
            {
                name: {
                    "degradations": [member.value for member in each.config.degradations],
                    "shared": shared_modules(model, each),
                }
                for name, each in model.named_specialists()
            }
        )
    write_tensors(path, tensors, header)


def load(path: Path) -> DFPIR:
    """Read a file written by `save` into a float32 network in evaluation mode.

    Raises
    ------
    CheckpointError
        If the file is not safetensors, not ours, or its configuration and shapes disagree.
    """
    header, tensors = read_tensors(path)
    if header.get("format") != FORMAT:
        message = (
            f"{path}: safetensors, but not written by dfpir: its format is "
            f"{header.get('format')!r}, expected {FORMAT!r}; import published weights by "
            "`dfpir weights import`."
        )
        raise CheckpointError(message)
    try:
        tensors = expanded(tensors)
        own = {key: tensors.pop(key) for key in list(tensors) if key.startswith(SPECIALISTS)}
        shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        claimed = {"details": 0, **json.loads(header["config"])}  # older files do not say
        config = config_of(
            shapes,
            expansion=float(claimed["expansion"]),
            degradations=tuple(map(Degradation.from_name, claimed["degradations"])),
            perturbation_skip=bool(claimed["perturbation_skip"]),
        )
        truth = {**asdict(config), "degradations": claimed["degradations"]}
        lies = [
            f"{name} is {claimed.get(name)!r}, the tensors say {value!r}"
            for name, value in json.loads(json.dumps(truth)).items()
            if claimed.get(name) != value
        ]
        if lies:
            message = f"its configuration does not fit its tensors: {'; '.join(lies)}"
            raise CheckpointError(message)
        model = build(config, tensors)
        specialise(model, own, json.loads(header.get("specialists", "{}")))
        return model
    except CheckpointError as error:
        message = f"{path}: {error}"
        raise CheckpointError(message) from None
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        # What a damaged header claims may be too deep, too large or nothing at all.
        message = f"{path}: its configuration cannot be read ({error!r}). Use another weights file."
        raise CheckpointError(message) from None


def explanation(path: Path, error: Exception) -> str:
    """Say what a file is that is not safetensors, and what to do with it."""
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] in (b"PK", b"\x80\x02"):
        return (
            " but a PyTorch pickle, which can run code when opened; convert it by "
            "`dfpir weights import FILE --text-codes CODES.safetensors`"
        )
    return f", or a damaged one ({' '.join(str(error).split())}); fetch it again or choose another"


def read_published(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a published ``.pth.tar``, unpickling tensors and containers only.

    Raises
    ------
    CheckpointError
        If it holds anything else or no ``state_dict``.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        message = f"{path}: no such file."
        raise CheckpointError(message) from None
    except Exception as error:  # The unpickler raises many kinds.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        message = (
            f"{path}: cannot be read as a checkpoint of tensors ({reason}). Expected the authors' "
            ".pth.tar; a file that needs more than tensors is refused because it can run code."
        )
        raise CheckpointError(message) from None
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        message = f"{path}: holds no `state_dict` of tensors. Expected the authors' .pth.tar."
        raise CheckpointError(message)
    return state


def read_text_codes(path: Path) -> dict[Degradation, Tensor]:
    """Read text codes from safetensors with one tensor (512,) per degradation's name.

    Raises
    ------
    CheckpointError
        If the file is not safetensors or names something else.
    """
    try:
        _, tensors = read_tensors(path)
        return {Degradation.from_name(name): code for name, code in tensors.items()}
    except ValueError as error:
        message = (
            f"{path}: not a file of text codes ({error}) Expected safetensors with one tensor of "
            "512 values named after each degradation."
        )
        raise CheckpointError(message) from None
