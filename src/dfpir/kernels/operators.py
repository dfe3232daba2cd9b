"""The Triton kernels as PyTorch operators, `torch.ops.dfpir.*`, each one node to `torch.compile`.

Triton is imported when an operator first runs. The operators have no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

LIBRARY = torch.library.Library("dfpir", "DEF")  # type: ignore[no-untyped-call]


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
):
    LIBRARY.define(name + schema)  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"dfpir::{name}", fake, lib=LIBRARY)
