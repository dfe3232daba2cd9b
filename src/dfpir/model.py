"""The network, in the paper's order: LayerNorm, MDTA, GDFN, DGCPM, CAAPM, DGPB, DFPIR."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfpir import kernels
from dfpir.degradation import Degradation
from dfpir.kernels import Projection, reference

LEVELS = (
    ("embed", "encoder.0", "perturbations.0", "decoder.0", "refinement", "details", "output"),
    ("down.0", "encoder.1", "perturbations.1", "up.0", "reduce.0", "decoder.1"),
    ("down.1", "encoder.2", "perturbations.2", "up.1", "reduce.1", "decoder.2"),
    ("down.2", "latent", "perturbations.3", "up.2"),
)
"""The network's modules by level; what leads from one to another belongs to the lower one."""

PERTURBED = 4
"""Places of the network with a DGPB: the three skip connections and the latent."""

HIDDEN_MULTIPLE = 8
"""Hidden channels are padded with zeros to a multiple of this: aligned memory, same result."""

PIXELS_PER_STEP = 2**17
"""Pixels of the first level in a step of progress; every pass counts its own."""

CONVOLVED_PIXELS = 2**14
"""Pixels of a strip in the 3x3 convolutions between levels, whose memory it bounds."""

Attention = tuple[Tensor, ...]
"""The matrix of every block in the order of the forward pass, each (N or 1, C, C)."""

Progress = Callable[[int, int], None]
"""Called as ``on_progress(done, total)``."""

DegradationArgument = Degradation | Sequence[Degradation] | Tensor


@dataclass(frozen=True, slots=True)
class DFPIRConfig:
    """Sizes of the network; the defaults are the paper's.

    Attributes
    ----------
    width : int
        Channels of the first level; each level below has twice as many.
    blocks : tuple of 4 int
        Transformer blocks of the three encoder levels (the decoder has the same) and the latent.
    refinement_blocks : int
        Transformer blocks after the decoder, at the first level's resolution.
    heads : tuple of 4 int
        Attention heads of the three levels and the latent.
    expansion : float
        Hidden channels of the feed-forward network over its input channels, rounded down.
    stem : int
        Resolution divisor of the first level: 1, or 2 for pixel-unshuffled input.
    degradations : tuple of Degradation
        Those that the network has been trained for.
    perturbation_skip : bool
        Add the input of each DGPB to its output. The paper's network has no such connection; a
        small one trained from the start hardly learns without it.
    details : int
        Residual blocks of two 3x3 convolutions after the refinement; the paper's network has none.
        A small one has few filters at its first level, where what is fine is decided, and these
        are what a processor computes fastest.
    """

    width: int = 48
    blocks: tuple[int, int, int, int] = (4, 6, 6, 8)
    refinement_blocks: int = 4
    heads: tuple[int, int, int, int] = (1, 2, 4, 8)
    expansion: float = 2.66
    stem: int = 1
    degradations: tuple[Degradation, ...] = tuple(Degradation)
    perturbation_skip: bool = False
    details: int = 0

    @classmethod
    def paper(cls) -> DFPIRConfig:
        """Return the paper's sizes: 31.1 million values with the unused text projections."""
        return cls()

    @classmethod
    def compact(cls) -> DFPIRConfig:
        """Return the sizes of the bundled weights: 5.9 million values at half resolution."""
        return cls(
            width=32,
            blocks=(1, 2, 2, 3),
            refinement_blocks=1,
            expansion=2.0,
            stem=2,
            perturbation_skip=True,
        )

    @classmethod
    def specialist(cls) -> DFPIRConfig:
        """Return the sizes of the bundled weights' specialists: compact, with details."""
        return replace(cls.compact(), details=2)

    @property
    def multiple(self) -> int:
        """Height and width are padded to a multiple of this inside the network."""
        return 8 * self.stem

    def channels(self, level: int) -> int:
        """Channels of level 0, 1, 2 or 3 (the latent)."""
        return self.width << level

    def kept(self, level: int) -> int:
        """Scores per row that CAAPM keeps: nine tenths of a head's channels, rounded down."""
        return self.channels(level) // self.heads[level] * 9 // 10


def pointwise(inputs: int, outputs: int, *, bias: bool = False) -> nn.Conv2d:
    """Return a 1x1 convolution."""
    return nn.Conv2d(inputs, outputs, 1, bias=bias)


def depthwise(channels: int) -> nn.Conv2d:
    """Return a 3x3 convolution of each channel on its own."""
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)


def full(inputs: int, outputs: int) -> nn.Conv2d:
    """Return a 3x3 convolution."""
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)


class LayerNorm(nn.Module):
    """Normalisation over the channels of each pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        return reference.layer_norm(features, self.weight, self.bias)


class MDTA(nn.Module):
    """Multi-Dconv head transposed attention: attention between channels, over all pixels.

    References
    ----------
    .. [1] Zamir et al., "Restormer", CVPR 2022, section 3.1.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.qkv = pointwise(channels, 3 * channels)
        self.depthwise = depthwise(3 * channels)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.project_out = pointwise(channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        """Map normalised features (N, C, H, W) to the same shape."""
        query, key, value = self.depthwise(self.qkv(features)).chunk(3, dim=1)
        attended = reference.channel_attention(query, key, value, self.temperature)
        projected: Tensor = self.project_out(attended)
        return projected


class GDFN(nn.Module):
    """Gated-Dconv feed-forward network.

    References
    ----------
    .. [1] Zamir et al., "Restormer", CVPR 2022, section 3.2.
    """

    def __init__(self, channels: int, expansion: float) -> None:
        super().__init__()
        hidden = int(channels * expansion)
        self.project_in = pointwise(channels, 2 * hidden)
        self.depthwise = depthwise(2 * hidden)
        self.project_out = pointwise(hidden, channels)

    def forward(self, features: Tensor) -> Tensor:
        """Map normalised features (N, C, H, W) to the same shape."""
        hidden = self.project_in(features)
        gated = reference.gated_feed_forward(hidden, self.depthwise.weight)
        projected: Tensor = self.project_out(gated)
        return projected


class Detail(nn.Module):
    """x + second ReLU(first x), two 3x3 convolutions; at first the second one adds nothing."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = full(channels, channels)
        self.second = full(channels, channels)
        nn.init.zeros_(self.second.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        added: Tensor = self.second(F.relu(self.first(features)))
        return features + added

    def infer(self, features: Tensor, run: _Passes) -> Tensor:
        """Map (N, H, W, C) to the same shape by `dfpir.kernels`; `features` may be overwritten."""
        hidden = run.convolve(self.first, features, F.relu)
        return run.convolve(self.second, hidden, residual=features)


Folded = TypeVar("Folded")


class _FoldedBlock(NamedTuple):
    query_key: Projection
    value: Projection
    attention_out: Tensor
    hidden: Projection
    project_out: Tensor


class _FoldedDGPB(NamedTuple):
    query: Projection
    key: Projection
    value: Projection
    attention_out: Tensor
    hidden: Projection
    project_out: Tensor
    mixing: Tensor
    offset: Tensor


class _Folding(nn.Module):
    """A block that keeps its folded matrices until a parameter changes or moves."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: tuple[object, object] | None = None

    def folded(self, fold: Callable[[], Folded]) -> Folded:
        """Return what `fold` makes of the parameters, kept where no gradient is wanted.

        A change is seen by the parameters' version counters, which writing to ``parameter.data``
        does not move.
        """
        values = list(self.parameters())
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or any(value.is_inference() for value in values)
        ):
            return fold()
        state = [(id(value), value.data_ptr(), value._version) for value in values]
        if self._kept is None or self._kept[0] != state:
            self._kept = state, fold()
        kept: Folded = self._kept[1]  # type: ignore[assignment]
        return kept

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._kept = None  # hosts move models to free a device's memory
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class TransformerBlock(_Folding):
    """x + MDTA(LN x), then x + GDFN(LN x)."""

    def __init__(self, channels: int, heads: int, expansion: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attention = MDTA(channels, heads)
        self.norm2 = LayerNorm(channels)
        self.feed_forward = GDFN(channels, expansion)

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        features = features + self.attention(self.norm1(features))
        result: Tensor = features + self.feed_forward(self.norm2(features))
        return result

    def infer(self, features: Tensor, run: _Passes) -> Tensor:
        """Map (N, H, W, C) to the same shape by `dfpir.kernels`; `features` may be overwritten."""
        folded = self.folded(self.fold)
        attention = self.attention
        matrix = run.matrix(
            features, [folded.query_key], attention.temperature, folded.attention_out
        )
        features = run.attend(features, folded.value, matrix, skip=True)
        return run.feed_forward(features, folded.hidden, folded.project_out)

    def fold(self) -> _FoldedBlock:
        """Return the block's matrices with all that folds into them."""
        channels, attention = self.norm1.weight.shape[0], self.attention
        joint = fold(self.norm1, attention.qkv, attention.depthwise)
        return _FoldedBlock(
            Projection(*(part[: 2 * channels] for part in joint[:3])),
            Projection(*(part[2 * channels :] for part in joint[:3])),
            attention.project_out.weight.flatten(1),
            *fold_feed_forward(self.norm2, self.feed_forward),
        )


class DGCPM(nn.Module):
    """Degradation-guided channel perturbation: expand, reorder channels, project back.

    In a published checkpoint the order is that of a projection of the prompt's text code; it is
    all that reaches the network, so the orders themselves are kept here, as integers.

    References
    ----------
    .. [1] Tian et al., CVPR 2025, section 3.2.
    """

    permutations: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = pointwise(channels, 2 * channels, bias=True)
        self.project = pointwise(2 * channels, channels, bias=True)
        orders = torch.arange(2 * channels).repeat(len(Degradation), 1)
        self.register_buffer("permutations", orders)

    def forward(self, features: Tensor, indices: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape; `indices` (N,) name each image's degradation."""
        expanded = self.expand(features)
        reordered = reference.permute_channels(expanded, self.permutations[indices])
        projected: Tensor = self.project(reordered)
        return projected

    def fold(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the one matrix (N, C, C) and offset (N, 1, 1, C) that this amounts to.

        expand, reorder and project are all linear in the channels of a pixel.
        """
        orders = self.permutations[indices]  # (N, 2C)
        project = self.project.weight.flatten(1)
        expand, bias = self.expand.weight.flatten(1), self.expand.bias
        assert bias is not None and self.project.bias is not None
        # Not `expand[orders]`, whose gradient would be summed in any order, differing each time.
        reordered = expand.index_select(0, orders.flatten()).view(*orders.shape, -1)
        matrix = project @ reordered  # (N, C, C)
        offset = bias.index_select(0, orders.flatten()).view_as(orders) @ project.T
        offset = offset + self.project.bias
        return matrix, offset[:, None, None, :]


class CAAPM(nn.Module):
    """Channel-adapted attention perturbation: attend with the largest nine tenths of the scores.

    References
    ----------
    .. [1] Tian et al., CVPR 2025, section 3.3.
    """

    def __init__(self, channels: int, heads: int, kept: int) -> None:
        super().__init__()
        self.kept = kept
        self.query = pointwise(channels, channels)
        self.query_depthwise = depthwise(channels)
        self.key_value = pointwise(channels, 2 * channels)
        self.key_value_depthwise = depthwise(2 * channels)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.scale = nn.Parameter(torch.full((1,), 0.2))
        self.project_out = pointwise(channels, channels)

    def forward(self, perturbed: Tensor, features: Tensor) -> Tensor:
        """Map normalised `perturbed` and `features`, both (N, C, H, W), to the same shape."""
        query = self.query_depthwise(self.query(perturbed))
        key, value = self.key_value_depthwise(self.key_value(features)).chunk(2, dim=1)
        mixed = reference.channel_attention(
            query, key, value, self.temperature, kept=self.kept, scale=self.scale
        )
        projected: Tensor = self.project_out(mixed)
        return projected


class DGPB(_Folding):
    """Degradation-guided perturbation block: A = CAAPM(LN DGCPM(x), LN x), then A + GDFN(LN A).

    References
    ----------
    .. [1] Tian et al., CVPR 2025, section 3.1.
    """

    def __init__(
        self, channels: int, heads: int, kept: int, expansion: float, *, skip: bool
    ) -> None:
        super().__init__()
        self.skip = skip
        self.perturbation = DGCPM(channels)
        self.norm1 = LayerNorm(channels)
        self.norm2 = LayerNorm(channels)
        self.attention = CAAPM(channels, heads, kept)
        self.norm3 = LayerNorm(channels)
        self.feed_forward = GDFN(channels, expansion)

    def forward(self, features: Tensor, indices: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape; `indices` (N,) name each image's degradation."""
        perturbed = self.perturbation(features, indices)
        attended = self.attention(self.norm1(perturbed), self.norm2(features))
        if self.skip:
            attended = features + attended
        result: Tensor = attended + self.feed_forward(self.norm3(attended))
        return result

    def infer(self, features: Tensor, indices: Tensor, run: _Passes) -> Tensor:
        """Map (N, H, W, C) to the same shape by `dfpir.kernels`; `features` may be overwritten."""
        folded = self.folded(self.fold)
        attention = self.attention
        query = folded.query._replace(
            mixing=folded.mixing.index_select(0, indices),
            offset=folded.offset.index_select(0, indices),
        )
        matrix = run.matrix(
            features,
            [query, folded.key],
            attention.temperature,
            folded.attention_out,
            kept=attention.kept,
            scale=attention.scale,
        )
        features = run.attend(features, folded.value, matrix, skip=self.skip)
        return run.feed_forward(features, folded.hidden, folded.project_out)

    def fold(self) -> _FoldedDGPB:
        """Return the block's matrices with all that folds into them, for every degradation."""
        attention = self.attention
        channels = self.norm2.weight.shape[0]
        joint = fold(self.norm2, attention.key_value, attention.key_value_depthwise)
        return _FoldedDGPB(
            fold(self.norm1, attention.query, attention.query_depthwise),
            Projection(*(part[:channels] for part in joint[:3])),
            Projection(*(part[channels:] for part in joint[:3])),
            attention.project_out.weight.flatten(1),
            *fold_feed_forward(self.norm3, self.feed_forward),
            *self.perturbation.fold(torch.arange(len(Degradation), device=joint.weight.device)),
        )


def fold(norm: LayerNorm, project: nn.Conv2d, filters: nn.Conv2d) -> Projection:
    """Fold the affine part of a normalisation into the projection that follows it."""
    weight = project.weight.flatten(1)
    return Projection(weight * norm.weight, weight @ norm.bias, filters.weight)


def fold_feed_forward(norm: LayerNorm, network: GDFN) -> tuple[Projection, Tensor]:
    """Fold a normalisation into a feed-forward network and pad its hidden channels."""
    folded = fold(norm, network.project_in, network.depthwise)
    project_out = network.project_out.weight.flatten(1)
    missing = -project_out.shape[1] % HIDDEN_MULTIPLE
    if missing:
        both = (part.view(2, -1, *part.shape[1:]) for part in folded[:3])  # gate and content
        padded = (F.pad(part, (0, 0) * (part.ndim - 2) + (0, missing)) for part in both)
        folded = Projection(*(part.flatten(0, 1) for part in padded))
        project_out = F.pad(project_out, (0, missing))
    return folded, project_out


def to_rows(features: Tensor) -> Tensor:
    """(N, C, H, W) to contiguous (N, H, W, C)."""
    return features.permute(0, 2, 3, 1).contiguous()


def from_rows(features: Tensor) -> Tensor:
    """(N, H, W, C) to (N, C, H, W) in channels-last memory."""
    return features.permute(0, 3, 1, 2)


def unshuffle(rows: Tensor) -> Tensor:
    """(N, H, W, C) to (N, H/2, W/2, 4C), as `pixel_unshuffle` orders them."""
    count, height, width, channels = rows.shape
    parts = rows.reshape(count, height // 2, 2, width // 2, 2, channels)
    return parts.permute(0, 1, 3, 5, 2, 4).reshape(count, height // 2, width // 2, 4 * channels)


def shuffle(rows: Tensor) -> Tensor:
    """(N, H, W, 4C) to (N, 2H, 2W, C), as `pixel_shuffle` orders them."""
    count, height, width, channels = rows.shape
    parts = rows.reshape(count, height, width, channels // 4, 2, 2)
    return parts.permute(0, 1, 4, 2, 5, 3).reshape(count, 2 * height, 2 * width, channels // 4)


def pad_to_multiple(pixels: Tensor, multiple: int) -> Tensor:
    """Pad below and on the right, by reflection as far as the image reaches, then by its edge."""
    for dimension in (-2, -1):
        size = pixels.shape[dimension]
        missing = -size % multiple
        mirrored = min(missing, size - 1)
        parts = [pixels]
        if mirrored:
            parts.append(pixels.narrow(dimension, size - 1 - mirrored, mirrored).flip(dimension))
        if missing > mirrored:
            edge = parts[-1].narrow(dimension, parts[-1].shape[dimension] - 1, 1)
            repeats = [1] * pixels.ndim
            repeats[dimension] = missing - mirrored
            parts.append(edge.repeat(repeats))
        if missing:
            pixels = torch.cat(parts, dim=dimension)
    return pixels


def convolution(module: nn.Module) -> nn.Conv2d:
    """Return a member of a list of convolutions as one."""
    assert isinstance(module, nn.Conv2d)
    return module


def blocks_of(level: nn.Module) -> Iterator[TransformerBlock]:
    """Yield the transformer blocks of a level."""
    for block in level.children():
        assert isinstance(block, TransformerBlock)
        yield block


class _Definition:
    """The parts of the network as `dfpir.kernels.reference` defines them, (N, C, H, W)."""

    def __init__(self, indices: Tensor) -> None:
        self.indices = indices

    def arrange(self, pixels: Tensor) -> Tensor:
        return pixels

    def transform(self, block: TransformerBlock, features: Tensor) -> Tensor:
        transformed: Tensor = block(features)
        return transformed

    def perturb(self, block: DGPB, features: Tensor) -> Tensor:
        perturbed: Tensor = block(features, self.indices)
        return perturbed

    def detail(self, block: Detail, features: Tensor) -> Tensor:
        detailed: Tensor = block(features)
        return detailed

    def convolve(self, convolution: nn.Conv2d, features: Tensor) -> Tensor:
        convolved: Tensor = convolution(features)
        return convolved

    def down(self, convolution: nn.Conv2d, features: Tensor) -> Tensor:
        return F.pixel_unshuffle(convolution(features), 2)

    def join(self, convolution: nn.Conv2d, features: Tensor, skip: Tensor) -> Tensor:
        return torch.cat([F.pixel_shuffle(convolution(features), 2), skip], dim=1)

    def reduce(self, convolution: nn.Conv2d, features: Tensor) -> Tensor:
        reduced: Tensor = convolution(features)
        return reduced

    def picture(self, features: Tensor) -> Tensor:
        return features


class _Passes:
    """The same parts by the passes of `dfpir.kernels`, (N, H, W, C), with their progress."""

    def __init__(
        self,
        indices: Tensor,
        given: Attention | None,
        *,
        shared: bool,
        rows: int | None,
        on_progress: Progress | None,
        pixels: int,
        passes: int,
    ) -> None:
        self.indices, self.shared, self.rows = indices, shared, rows
        self.given: Iterator[Tensor] | None = None if given is None else iter(given)
        self.matrices: list[Tensor] = []
        self.on_progress = on_progress
        self.steps_per_pass = max(round(pixels / PIXELS_PER_STEP), 1)
        self.total = self.steps_per_pass * passes
        self.begun = self.done = self.pixels = self.all_pixels = 0

    def begin(self, features: Tensor) -> None:
        """Begin a pass over `features`."""
        self.begun += 1
        self.pixels, self.all_pixels = 0, features[..., 0].numel()

    def advance(self, pixels: int) -> None:
        """Count pixels of this pass, and report the steps that they complete."""
        self.pixels += pixels
        before = (self.begun - 1) * self.steps_per_pass
        reached = before + self.pixels * self.steps_per_pass // self.all_pixels
        while self.done < reached:
            self.done += 1
            if self.on_progress is not None:
                self.on_progress(self.done, self.total)

    def arrange(self, pixels: Tensor) -> Tensor:
        return to_rows(pixels)

    def transform(self, block: TransformerBlock, features: Tensor) -> Tensor:
        return block.infer(features, self)

    def perturb(self, block: DGPB, features: Tensor) -> Tensor:
        return block.infer(features, self.indices, self)

    def detail(self, block: Detail, features: Tensor) -> Tensor:
        return block.infer(features, self)

    def convolve(
        self,
        convolution: nn.Conv2d,
        features: Tensor,
        finish: Callable[[Tensor], Tensor] | None = None,
        out: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Convolve by strips, see `dfpir.kernels.convolve`."""
        self.begin(features)
        rows = self.rows
        if features.device.type == "cpu":
            rows = CONVOLVED_PIXELS // features.shape[2]
        return kernels.convolve(
            features,
            convolution.weight,
            finish,
            rows=rows,
            advance=self.advance,
            out=out,
            residual=residual,
        )

    def down(self, convolution: nn.Conv2d, features: Tensor) -> Tensor:
        return self.convolve(convolution, features, unshuffle)

    def join(self, convolution: nn.Conv2d, features: Tensor, skip: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return torch.cat([self.convolve(convolution, features, shuffle), skip], dim=-1)
        channels = skip.shape[-1]
        joined = skip.new_empty(*skip.shape[:-1], 2 * channels)
        joined[..., channels:] = skip
        del skip  # the largest tensors meet here
        self.convolve(convolution, features, shuffle, out=joined[..., :channels])
        return joined

    def reduce(self, convolution: nn.Conv2d, features: Tensor) -> Tensor:
        return F.linear(features, convolution.weight.flatten(1))

    def picture(self, features: Tensor) -> Tensor:
        return from_rows(features)

    def matrix(
        self,
        features: Tensor,
        projections: Sequence[Projection],
        temperature: Tensor,
        project_out: Tensor,
        *,
        kept: int | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Return the next block's attention matrix: the one given, or that of these features."""
        if self.given is not None:
            return next(self.given)
        self.begin(features)
        heads = temperature.shape[0]
        sums = kernels.gram(features, projections, heads, rows=self.rows, advance=self.advance)
        if self.shared:
            products, queries, keys = (each.sum(dim=0, keepdim=True) for each in sums)
            sums = products, queries, keys
        matrix = kernels.attention_matrix(sums, temperature, project_out, kept=kept, scale=scale)
        self.matrices.append(matrix)
        return matrix

    def attend(self, features: Tensor, value: Projection, matrix: Tensor, *, skip: bool) -> Tensor:
        """Apply a block's attention matrix to its values."""
        self.begin(features)
        return kernels.attend(
            features, value, matrix, skip=skip, rows=self.rows, advance=self.advance
        )

    def feed_forward(self, features: Tensor, hidden: Projection, project_out: Tensor) -> Tensor:
        """Add the feed-forward network of the normalised features to the features."""
        self.begin(features)
        return kernels.feed_forward(
            features, hidden, project_out, rows=self.rows, advance=self.advance
        )


def portion(
    on_progress: Progress | None, number: int, count: int, *, begun: int = 0
) -> Progress | None:
    """Return a callable that reports one image's progress as a part of all `count` images'.

    Parameters
    ----------
    begun : int
        Steps that went before the first image.
    """
    if on_progress is None:
        return None
    report: Callable[[int, int], None] = on_progress
    return lambda done, total: report(begun + number * total + done, begun + count * total)


class _Part(NamedTuple):
    """Images of a batch that go through one network: `indices` name their degradations."""

    network: DFPIR
    indices: Tensor
    images: Tensor | slice


def in_order(restored: Sequence[Tensor], parts: Sequence[_Part]) -> Tensor:
    """Put what the networks made of the parts of a batch back into one."""
    if len(parts) == 1:
        return restored[0]
    places = [part.images for part in parts if isinstance(part.images, Tensor)]
    return torch.cat(list(restored))[torch.cat(places).argsort()]


def level(config: DFPIRConfig, channels: int, depth: int, count: int) -> nn.ModuleList:
    """Return `count` transformer blocks."""
    heads, expansion = config.heads[depth], config.expansion
    return nn.ModuleList(TransformerBlock(channels, heads, expansion) for _ in range(count))


class Encoder(nn.Module):
    """The first levels of the network, before it is told a degradation.

    They have to find out for themselves what is picture and what is damage; `describe` says what
    they see.

    Parameters
    ----------
    config : DFPIRConfig
    levels : int
        How many of the three.
    """

    def __init__(self, config: DFPIRConfig, levels: int) -> None:
        super().__init__()
        self.config = config
        self.embed = full(3 * config.stem**2, config.width)
        self.encoder = nn.ModuleList(
            level(config, config.channels(depth), depth, config.blocks[depth])
            for depth in range(levels)
        )
        self.down = nn.ModuleList(
            full(config.channels(depth), config.channels(depth) // 2) for depth in range(levels - 1)
        )

    def descend(self, pixels: Tensor, way: _Definition | _Passes) -> Iterator[Tensor]:
        """Yield the features of each level, whoever computes them."""
        stem = self.config.stem
        features = way.arrange(F.pixel_unshuffle(pixels, stem) if stem > 1 else pixels)
        features = way.convolve(self.embed, features)
        for depth, blocks in enumerate(self.encoder):
            if depth > 0:
                features = way.down(convolution(self.down[depth - 1]), features)
            for block in blocks_of(blocks):
                features = way.transform(block, features)
            yield features

    @torch.no_grad()
    def describe(self, windows: Tensor) -> Tensor:
        """Return mean and standard deviation of every channel over all pixels of `windows`.

        Parameters
        ----------
        windows : Tensor, (N, 3, H, W), values about 0..1
            Parts of one picture, which share their attention.

        Returns
        -------
        Tensor, (2 * channels of all levels,)
            Level by level the means, then the deviations.
        """
        padded = pad_to_multiple(windows, self.config.multiple)
        untold = torch.zeros(len(windows), dtype=torch.int64, device=windows.device)
        run = _Passes(untold, None, shared=True, rows=None, on_progress=None, pixels=1, passes=1)
        described = []
        for features in self.descend(padded, run):
            deviation, mean = torch.std_mean(features, dim=(0, 1, 2), correction=0)
            described += [mean, deviation]
        return torch.cat(described)


class DFPIR(Encoder):
    """All-in-one restoration network: Restormer's U with a DGPB on each skip and the latent.

    Some degradations may have a specialist: a network with first levels of its own, where what is
    fine is decided, and the same lower levels. The paper's has none. One set of first levels for
    everything is a compromise: taught nothing but noise for three minutes, a small network gains
    0.3 dB there and loses 0.6 to 2 dB in haze and low light; taught in its first two levels alone,
    it gains as much.

    Attributes
    ----------
    specialists : ModuleDict of DFPIR
        By name; see `specialise`.
    """

    def __init__(self, config: DFPIRConfig | None = None) -> None:
        config = config or DFPIRConfig.paper()
        super().__init__(config, levels=3)
        width, stem = config.width, config.stem
        self.down.append(full(config.channels(2), config.channels(2) // 2))
        self.latent = level(config, config.channels(3), 3, config.blocks[3])
        self.perturbations = nn.ModuleList(
            DGPB(
                config.channels(depth),
                config.heads[depth],
                config.kept(depth),
                config.expansion,
                skip=config.perturbation_skip,
            )
            for depth in range(PERTURBED)
        )
        self.up = nn.ModuleList(
            full(config.channels(depth + 1), 2 * config.channels(depth + 1)) for depth in range(3)
        )
        self.reduce = nn.ModuleList(
            pointwise(2 * config.channels(depth), config.channels(depth)) for depth in (1, 2)
        )
        self.decoder = nn.ModuleList(
            level(
                config,
                2 * width if depth == 0 else config.channels(depth),
                depth,
                config.blocks[depth],
            )
            for depth in range(3)
        )
        self.refinement = level(config, 2 * width, 0, config.refinement_blocks)
        self.details = nn.ModuleList(Detail(2 * width) for _ in range(config.details))
        self.output = full(2 * width, 3 * stem**2)
        self.specialists = nn.ModuleDict()

    def specialise(self, name: str, network: DFPIR, shared: Sequence[str]) -> None:
        """Leave the degradations of `network` to it, and let it use modules of this one.

        Parameters
        ----------
        name : str
        network : DFPIR
            Changed: the modules `shared` are replaced.
        shared : sequence of str
            Names out of `LEVELS`.

        Raises
        ------
        ValueError
            If it is of other sizes, only `details` and `degradations` may differ; or if its
            degradations are none, not this network's, or another specialist's.
        """
        own = network.config
        expected = replace(self.config, details=own.details, degradations=own.degradations)
        if own != expected:
            message = f"Specialist {name!r} is a {own}; expected {expected}. Use another preset."
            raise ValueError(message)
        others = [each for known, each in self.named_specialists() if known != name]
        taken = {member for each in others for member in each.config.degradations}
        if not own.degradations or not set(own.degradations) <= {*self.config.degradations} - taken:
            names = ", ".join(member.value for member in own.degradations)
            message = (
                f"Specialist {name!r} is for {names or 'nothing'}; expected degradations of the "
                "network that no other specialist has. Use another weights file."
            )
            raise ValueError(message)
        for path in shared:
            parent, _, child = path.rpartition(".")
            setattr(network.get_submodule(parent), child, self.get_submodule(path))
        self.specialists[name] = network

    def network_for(self, degradation: Degradation) -> DFPIR:
        """Return the network that restores a degradation: a specialist, or this one."""
        for _, network in self.named_specialists():
            if degradation in network.config.degradations:
                return network
        return self

    def named_specialists(self) -> Iterator[tuple[str, DFPIR]]:
        """Yield name and network of every specialist."""
        for name, network in self.specialists.items():
            assert isinstance(network, DFPIR)
            yield name, network

    def forward(
        self,
        pixels: Tensor,
        degradation: DegradationArgument,
        *,
        attention: Attention | None = None,
        rows: int | None = None,
        on_progress: Progress | None = None,
    ) -> Tensor:
        """Restore a batch of images.

        The function is that of `define`, through the passes of `dfpir.kernels`; it can be
        differentiated.

        Parameters
        ----------
        pixels : Tensor, (N, 3, H, W), values about 0..1, any floating dtype
            Any H and W of at least 1; padded inside by reflection to `config.multiple`.
        degradation : Degradation, sequence of Degradation, or Tensor of int64, (N,)
            One for all images or one for each.
        attention : Attention, optional
            Matrices from `measure`; without them they are those of each whole image.
        rows : int, optional
            Height of the strips in which a block's hidden features are computed: less memory, the
            same answer. On a CPU they are small anyway, unless a gradient is wanted; elsewhere the
            image is one strip by default.
        on_progress : callable, optional
            Called as ``on_progress(done, total)`` several times in every pass, for large images;
            raising from it cancels.

        Returns
        -------
        Tensor, (N, 3, H, W), not clipped

        Raises
        ------
        ValueError
            If the shapes or the number of degradations do not fit, or the weights were not trained
            for a degradation.
        """
        parts = self._by_network(degradation, pixels)
        restored = []
        for number, (network, indices, images) in enumerate(parts):
            given = attention
            if attention is not None and len(parts) > 1:
                given = tuple(each if len(each) == 1 else each[images] for each in attention)
            report = portion(on_progress, number, len(parts))
            each, _ = network._restore(pixels[images], indices, given, rows, report, shared=False)
            restored.append(each)
        return in_order(restored, parts)

    def define(self, pixels: Tensor, degradation: DegradationArgument) -> Tensor:
        """Restore like `forward`, by the definition in `dfpir.kernels.reference`.

        Plain PyTorch, operation by operation in the paper's order: what tests and benchmarks
        compare with.
        """
        height, width = pixels.shape[-2:]
        padded = pad_to_multiple(pixels, self.config.multiple)
        parts = self._by_network(degradation, pixels)
        restored = [
            network._walk(padded[images], _Definition(indices))
            for network, indices, images in parts
        ]
        return in_order(restored, parts)[..., :height, :width]

    def measure(
        self,
        windows: Tensor,
        degradation: DegradationArgument,
        *,
        rows: int | None = None,
        on_progress: Progress | None = None,
    ) -> Attention:
        """Return the attention matrices that `windows` of one image share.

        The sums over pixels behind each matrix run over all windows (N, 3, H, W) together. With
        the whole image as the only window these are the matrices that `forward` uses itself.
        `rows` and `on_progress` are those of `forward`.

        Raises
        ------
        ValueError
            As from `forward`; or if different networks would have to restore the windows.
        """
        parts = self._by_network(degradation, windows)
        if len(parts) > 1:
            message = (
                "Windows of one image have one degradation; found some for different specialists. "
                "Measure each image by itself."
            )
            raise ValueError(message)
        [(network, indices, _)] = parts
        with torch.no_grad():
            return network._restore(windows, indices, None, rows, on_progress, shared=True)[1]

    def _restore(
        self,
        pixels: Tensor,
        indices: Tensor,
        attention: Attention | None,
        rows: int | None,
        on_progress: Progress | None,
        *,
        shared: bool,
    ) -> tuple[Tensor, Attention]:
        height, width = pixels.shape[-2:]
        padded = pad_to_multiple(pixels, self.config.multiple)
        run = _Passes(
            indices,
            attention,
            shared=shared,
            rows=rows,
            on_progress=on_progress,
            pixels=padded[:, 0].numel() // self.config.stem**2,
            passes=self.passes(measured=attention is None),
        )
        restored = self._walk(padded, run)[..., :height, :width]
        return restored, tuple(run.matrices)

    def _by_network(self, degradation: DegradationArgument, pixels: Tensor) -> list[_Part]:
        """Return the networks that a batch needs, each with its images."""
        indices = self._indices(degradation, pixels)
        if not self.specialists:
            return [_Part(self, indices, slice(None))]
        if isinstance(degradation, Degradation):  # nothing has to be read from the device
            return [_Part(self.network_for(degradation), indices, slice(None))]
        members = list(Degradation)
        networks = [self.network_for(members[index]) for index in indices.tolist()]
        if len(set(networks)) == 1:
            return [_Part(networks[0], indices, slice(None))]
        parts = []
        for network in dict.fromkeys(networks):
            chosen = [number for number, each in enumerate(networks) if each is network]
            images = torch.tensor(chosen, device=pixels.device)
            parts.append(_Part(network, indices[images], images))
        return parts

    def _indices(self, degradation: DegradationArgument, pixels: Tensor) -> Tensor:
        if pixels.ndim != 4 or pixels.shape[1] != 3 or 0 in pixels.shape:
            message = (
                "DFPIR takes pixels of shape (N, 3, H, W) with no empty side; found "
                f"{tuple(pixels.shape)}. Use dfpir.pixels.to_pixels to convert an array."
            )
            raise ValueError(message)
        if isinstance(degradation, Degradation):
            degradation = [degradation] * len(pixels)
        if not isinstance(degradation, Tensor):
            for member in degradation:
                if member not in self.config.degradations:
                    known = ", ".join(each.value for each in self.config.degradations)
                    message = (
                        f"These weights were not trained for {member.value!r}; they know: {known}. "
                        "Choose one of those, or other weights."
                    )
                    raise ValueError(message)
            chosen = [member.index for member in degradation]
            degradation = torch.tensor(chosen, dtype=torch.int64, device=pixels.device)
        if degradation.shape != (len(pixels),):
            message = (
                f"Expected one degradation, or one for each of {len(pixels)} images; found "
                f"{tuple(degradation.shape)}."
            )
            raise ValueError(message)
        return degradation

    def passes(self, *, measured: bool = True) -> int:
        """Return how many passes over the pixels `forward` takes."""
        config = self.config
        blocks = 2 * sum(config.blocks[:3]) + config.blocks[3] + config.refinement_blocks
        convolutions = len(self.down) + len(self.up) + 2 * config.details + 2
        return (blocks + PERTURBED) * (2 + int(measured)) + convolutions

    def perturbation(self, place: int) -> DGPB:
        """Return the DGPB of skip 0, 1 or 2, or of the latent, 3."""
        block = self.perturbations[place]
        assert isinstance(block, DGPB)
        return block

    def _walk(self, pixels: Tensor, way: _Definition | _Passes) -> Tensor:
        """Go down and up the U, whoever computes its parts."""
        # The correction is added to pixels as they were given, not rounded to a half precision of
        # the weights.
        skips = list(self.descend(pixels.to(self.embed.weight.dtype), way))
        features = way.down(convolution(self.down[2]), skips[-1])
        for block in blocks_of(self.latent):
            features = way.transform(block, features)
        features = way.perturb(self.perturbation(3), features)
        for depth in (2, 1, 0):
            # No name for the perturbed skip: `join` lets go of it as soon as it can.
            features = way.join(
                convolution(self.up[depth]),
                features,
                way.perturb(self.perturbation(depth), skips.pop()),
            )
            if depth > 0:
                features = way.reduce(convolution(self.reduce[depth - 1]), features)
            for block in blocks_of(self.decoder[depth]):
                features = way.transform(block, features)
        for block in blocks_of(self.refinement):
            features = way.transform(block, features)
        for detail in self.details:
            assert isinstance(detail, Detail)
            features = way.detail(detail, features)
        correction = way.picture(way.convolve(self.output, features))
        if self.config.stem > 1:
            correction = F.pixel_shuffle(correction, self.config.stem)
        restored: Tensor = pixels + correction
        return restored
