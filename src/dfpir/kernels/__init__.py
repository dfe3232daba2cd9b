"""The operations of a transformer block, and the one place that chooses who computes them.

`reference` is the definition in plain NCHW PyTorch, against which everything else is tested.
Inference and training run on the passes exported here, which today are those of `cpu`, in plain
PyTorch for every device.
"""

from __future__ import annotations

from torch import Tensor

from dfpir.kernels.cpu import Advance, Projection, attend, feed_forward, gram, mix
from dfpir.kernels.reference import keep_largest

__all__ = [
    "Advance",
    "Projection",
    "attend",
    "attention_matrix",
    "feed_forward",
    "gram",
    "mix",
]


def attention_matrix(
    sums: tuple[Tensor, Tensor, Tensor],
    temperature: Tensor,
    project_out: Tensor,
    *,
    kept: int | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Turn the sums of `gram` into the one matrix that acts on the values.

    The result is project_out blockdiag(softmax(scores)) scale: attention and the projection after
    it, in one.

    Parameters
    ----------
    sums : tuple of Tensor
        What `gram` returns, (N, heads, C/heads, ...).
    temperature : Tensor, (heads, 1, 1)
    project_out : Tensor, (C, C)
    kept : int, optional
        Scores to keep in each row, all by default.
    scale : Tensor, (1,), optional

    Returns
    -------
    Tensor, (N, C, C), of the dtype of `project_out`
    """
    products, query_squares, key_squares = sums
    # Bounded before the root, whose slope at nothing is infinite: a norm is at least 1e-12.
    query_norms, key_norms = (side.clamp_min(1e-24).sqrt() for side in (query_squares, key_squares))
    norms = query_norms[..., :, None] * key_norms[..., None, :]
    scores = products / norms * temperature.float()
    if kept is not None:
        scores = keep_largest(scores, kept)
    weights = scores.softmax(dim=-1)
    if scale is not None:
        weights = weights * scale.float()
    count, heads, each, _ = weights.shape
    columns = project_out.float().view(-1, heads, each).transpose(0, 1)  # (heads, C, C/heads)
    matrix = (columns @ weights).transpose(1, 2)  # (N, C, heads, C/heads)
    return matrix.reshape(count, heads * each, heads * each).to(project_out.dtype)
