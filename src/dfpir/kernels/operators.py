"""The Triton kernels as PyTorch operators, `torch.ops.dfpir.*`, each one node to `torch.compile`.

Triton is imported when an operator first runs. Only `filter` has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("dfpir", "DEF")  # type: ignore[no-untyped-call]


def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs on the card of its first argument: Triton asks for no other."""

    @wraps(function)
    def guarded(features: Tensor, *arguments: Any) -> Any:
        with torch.cuda.device_of(features):  # type: ignore[no-untyped-call]
            return function(features, *arguments)

    return guarded


def project(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `reference.project`."""
    from dfpir.kernels.triton_project import launch

    return launch(features, weight, bias)


def correlate(
    query: Tensor,
    key: Tensor,
    query_filters: Tensor,
    key_filters: Tensor,
    heads: int,
    above: int,
    below: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.correlate`."""
    from dfpir.kernels.triton_correlate import launch

    return launch(query, key, query_filters, key_filters, heads, above, below)


def mix_values(
    values: Tensor,
    filters: Tensor,
    matrix: Tensor,
    residual: Tensor | None,
    out: Tensor,
    above: int,
    below: int,
) -> None:
    """See `reference.mix_values`."""
    from dfpir.kernels.triton_mix_values import launch

    launch(values, filters, matrix, residual, out, above, below)


def gate(
    hidden: Tensor,
    filters: Tensor,
    project_out: Tensor,
    residual: Tensor,
    out: Tensor,
    above: int,
    below: int,
) -> None:
    """See `reference.gate`."""
    from dfpir.kernels.triton_gate import launch

    launch(hidden, filters, project_out, residual, out, above, below)


def filter_channels(features: Tensor, filters: Tensor) -> Tensor:
    """Filter each channel of (N, H, W, C); see `reference.depthwise`."""
    from dfpir.kernels.triton_filter import launch

    return launch(features, filters)


def filter_weights(features: Tensor, slope: Tensor) -> Tensor:
    """Return the gradient of the filters, (C, 1, 3, 3), float32."""
    from dfpir.kernels.triton_filter import launch_weights

    return launch_weights(features, slope)


def fake_project(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return an empty tensor such as `project` returns."""
    return features.new_empty(*features.shape[:-1], weight.shape[0])


def fake_correlate(
    query: Tensor,
    key: Tensor,
    query_filters: Tensor,
    key_filters: Tensor,
    heads: int,
    above: int,
    below: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty tensors such as `correlate` returns."""
    count, each = query.shape[0], query.shape[3] // heads
    products = query.new_empty(count, heads, each, each, dtype=torch.float32)
    squares = query.new_empty(count, heads, each, dtype=torch.float32)
    return products, squares, torch.empty_like(squares)


def fake_filter(features: Tensor, filters: Tensor) -> Tensor:
    """Return an empty tensor such as `filter_channels` returns."""
    return features.new_empty(features.shape)


def fake_filter_weights(features: Tensor, slope: Tensor) -> Tensor:
    """Return an empty tensor such as `filter_weights` returns."""
    return features.new_empty(features.shape[-1], 1, 3, 3, dtype=torch.float32)


def fake_writer(*_: object) -> None:
    """Stand for an operator that only writes into `out`."""


for name, schema, function, fake in (
    ("project", "(Tensor features, Tensor weight, Tensor bias) -> Tensor", project, fake_project),
    (
        "correlate",
        "(Tensor query, Tensor key, Tensor query_filters, Tensor key_filters, int heads,"
        " int above, int below) -> (Tensor, Tensor, Tensor)",
        correlate,
        fake_correlate,
    ),
    (
        "mix_values",
        "(Tensor values, Tensor filters, Tensor matrix, Tensor? residual, Tensor(a!) out,"
        " int above, int below) -> ()",
        mix_values,
        fake_writer,
    ),
    (
        "gate",
        "(Tensor hidden, Tensor filters, Tensor project_out, Tensor residual, Tensor(a!) out,"
        " int above, int below) -> ()",
        gate,
        fake_writer,
    ),
    ("filter", "(Tensor features, Tensor filters) -> Tensor", filter_channels, fake_filter),
    (
        "filter_weights",
        "(Tensor features, Tensor slope) -> Tensor",
        filter_weights,
        fake_filter_weights,
    ),
):
    LIBRARY.define(name + schema)  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, on_its_device(function), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"dfpir::{name}", fake, lib=LIBRARY)


def keep_for_gradient(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    """Save what `filter_gradient` needs."""
    ctx.save_for_backward(*inputs)


def filter_gradient(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of features and filters; the first is a filter turned around."""
    features, filters = ctx.saved_tensors
    of_features = torch.ops.dfpir.filter(slope, filters.flip(2, 3))
    of_filters = torch.ops.dfpir.filter_weights(features, slope)
    return of_features, of_filters.to(filters.dtype)


torch.library.register_autograd(
    "dfpir::filter", filter_gradient, setup_context=keep_for_gradient, lib=LIBRARY
)
