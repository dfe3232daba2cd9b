"""The Muon optimiser, for matrices: momentum whose singular values are all made about one.

PyTorch has a Muon of its own. It takes nothing but two-dimensional parameters, which the weights
of a convolution are not, and multiplies in bfloat16 always, for which most processors have no
instructions.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic polynomial that brings singular values towards one fast, if not exactly."""

ITERATIONS = 5


def is_matrix(value: Tensor) -> bool:
    """Whether a weight mixes channels at each pixel for itself, and not just a few of them.

    Larger kernels are left out: there are few, the largest alone would take a third of the time of
    all others together. A depthwise one has no mixing to even out.
    """
    return value.ndim > 1 and value.shape[2:].numel() == 1 and min(value.shape[:2]) >= 16


def orthogonalised(matrices: Tensor) -> Tensor:
    """Return (N, rows, columns) with the singular vectors of each and singular values near one.

    Values end between about 0.7 and 1.2; those below a thousandth of the Frobenius norm, less.

    References
    ----------
    .. [1] Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    result = matrices.mT if tall else matrices
    result = result / (result.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = result @ result.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        result = torch.baddbmm(result, gram, result, beta=a)
    return result.mT if tall else result


class Muon(torch.optim.Optimizer):
    """Move every matrix by its orthogonalised momentum.

    The step has the root mean square that AdamW's typically has, so that one learning rate serves
    both (Liu et al., "Muon is scalable for LLM training", 2025, section 2.2).

    Parameters
    ----------
    parameters : iterable of Tensor
        Matrices, or weights of convolutions, which are flattened to (outputs, inputs).
    lr : float or Tensor, ()
    momentum, weight_decay : float
    dtype : torch.dtype
        In which updates are orthogonalised. bfloat16 is precise enough, and worth it where the
        processor has instructions for it.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float | Tensor,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(parameters, defaults)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters from their gradients; matrices of one shape go together."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                shapes.setdefault(parameter.flatten(1).shape, []).append(parameter)
            for shape, parameters in shapes.items():
                directions = [self.direction(each, group["momentum"]) for each in parameters]
                updates = orthogonalised(torch.stack(directions).to(self.dtype)).float()
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(update.reshape(parameter.shape) * rate)

    def direction(self, parameter: Tensor, momentum: float) -> Tensor:
        """Return the momentum after this gradient, looking a step ahead, as a matrix."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter.grad)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum"], momentum).flatten(1)
