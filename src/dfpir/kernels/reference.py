"""The definition of every operation, in plain NCHW PyTorch, in the paper's order.

Nothing here is fused, folded or reordered. The faster paths are tested against these functions,
and benchmarks take them as the baseline.

Shapes: N images, C channels, H rows, W columns; ``heads`` divides C.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-5
"""Added to the variance in `layer_norm`."""


def layer_norm(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise over channels at every pixel: (x - mean) / sqrt(variance + 1e-5) * weight + bias.

    The variance is the population's. `features` is (N, C, H, W), `weight` and `bias` are (C,).
    """
    return F.layer_norm(
        features.permute(0, 2, 3, 1), (features.shape[1],), weight, bias, EPSILON
    ).permute(0, 3, 1, 2)


def pointwise(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Mix channels at every pixel: a 1x1 convolution with `weight` (out, C, 1, 1)."""
    return F.conv2d(features, weight, bias)


def depthwise(features: Tensor, weight: Tensor) -> Tensor:
    """Filter each channel by a 3x3 convolution with zero padding, `weight` (C, 1, 3, 3)."""
    return F.conv2d(features, weight, padding=1, groups=features.shape[1])


def split_heads(features: Tensor, heads: int) -> Tensor:
    """Reshape (N, C, H, W) to (N, heads, C/heads, H*W)."""
    batch, channels, height, width = features.shape
    return features.reshape(batch, heads, channels // heads, height * width)


def keep_largest(scores: Tensor, kept: int) -> Tensor:
    """Set all but the `kept` largest entries of each row to minus infinity."""
    chosen = scores.topk(kept, dim=-1).indices
    masked = torch.full_like(scores, float("-inf"))
    return masked.scatter(-1, chosen, scores.gather(-1, chosen))


def channel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    temperature: Tensor,
    *,
    kept: int | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Attend between channels: softmax(normalise(q) normalise(k)^T * temperature) v.

    Parameters
    ----------
    query, key, value : Tensor, (N, C, H, W)
        Queries and keys are divided by their norms over all pixels (never less than 1e-12).
    temperature : Tensor, (heads, 1, 1)
        Learned factor of the scores.
    kept : int, optional
        Keep this many of the largest scores of each row (CAAPM); all of them by default (MDTA).
    scale : Tensor, (1,), optional
        Learned factor of the result (CAAPM).

    Returns
    -------
    Tensor, (N, C, H, W)
    """
    heads = temperature.shape[0]
    query, key = split_heads(query, heads), split_heads(key, heads)
    query_norm, key_norm = (
        torch.linalg.vector_norm(side, dim=-1, keepdim=True).clamp_min(1e-12)
        for side in (query, key)
    )
    scores = (
        (query @ key.transpose(-2, -1)) / (query_norm * key_norm.transpose(-2, -1)) * temperature
    )
    if kept is not None:
        scores = keep_largest(scores, kept)
    mixed: Tensor = scores.softmax(dim=-1) @ split_heads(value, heads)
    if scale is not None:
        mixed = mixed * scale
    return mixed.reshape(value.shape)


def gated_feed_forward(hidden: Tensor, depthwise_weight: Tensor) -> Tensor:
    """Gate one half of the filtered features by the other: GELU(a) * b, from 2h channels to h."""
    gate, content = depthwise(hidden, depthwise_weight).chunk(2, dim=1)
    return F.gelu(gate) * content


def permute_channels(features: Tensor, permutation: Tensor) -> Tensor:
    """Reorder the channels of (N, C, H, W), each image by its row of `permutation` (N, C)."""
    images = torch.arange(features.shape[0], device=features.device)
    return features[images[:, None], permutation]


def project(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise over channels, then mix them: (N, H, W, C) to (N, H, W, O).

    `weight` (O, C) and `bias` (O,) have the affine part of the normalisation in them.
    """
    return F.linear(F.layer_norm(features, features.shape[-1:], eps=EPSILON), weight, bias)


def depthwise_rows(features: Tensor, weight: Tensor, above: int, below: int) -> Tensor:
    """Filter (N, H, W, C) as `depthwise` does, and leave rows out at the top and the bottom."""
    filtered = depthwise(features.permute(0, 3, 1, 2), weight).permute(0, 2, 3, 1)
    return filtered[:, above : features.shape[1] - below]


def correlate(
    query: Tensor,
    key: Tensor,
    query_filters: Tensor,
    key_filters: Tensor,
    heads: int,
    above: int = 0,
    below: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Filter queries and keys (N, H, W, C), then sum over all pixels what attention needs.

    Returns
    -------
    products : Tensor, (N, heads, C/heads, C/heads), float32
    query_squares, key_squares : Tensor, (N, heads, C/heads), float32
    """
    query, key = (
        split_heads(depthwise_rows(*side, above, below).permute(0, 3, 1, 2), heads).float()
        for side in ((query, query_filters), (key, key_filters))
    )
    return query @ key.transpose(-2, -1), query.square().sum(-1), key.square().sum(-1)


def mix_values(
    values: Tensor,
    filters: Tensor,
    matrix: Tensor,
    residual: Tensor | None,
    above: int = 0,
    below: int = 0,
) -> Tensor:
    """Filter values (N, H, W, C), mix their channels by `matrix` (N or 1, C, C), add `residual`."""
    filtered = depthwise_rows(values, filters, above, below)
    mixed = torch.einsum("nhwc,noc->nhwo", filtered, matrix.expand(len(values), -1, -1))
    return mixed if residual is None else mixed + residual


def gate(
    hidden: Tensor,
    filters: Tensor,
    project_out: Tensor,
    residual: Tensor,
    above: int = 0,
    below: int = 0,
) -> Tensor:
    """Return residual + project_out (GELU(a) * b), a, b halves of the filtered (N, H, W, 2h)."""
    gated, content = depthwise_rows(hidden, filters, above, below).chunk(2, dim=-1)
    return residual + F.linear(F.gelu(gated) * content, project_out)
