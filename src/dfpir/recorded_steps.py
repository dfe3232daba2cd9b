"""Training steps on a graphics card, recorded once and replayed.

A step is some thousands of small operations. Launched one by one from Python they take several
times longer than the card needs for them; as a CUDA graph they are one launch. Meanwhile a thread
draws the pictures of the steps to come, on a stream of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

if TYPE_CHECKING:
    from dfpir.training import Part, Trainer

AHEAD = 3
"""Steps whose pictures are drawn before they are needed."""

WARM_UPS = 3
"""Runs of a step before it is recorded, in which libraries and optimisers set themselves up."""


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    parts: list[Part]
    error: Tensor


class RecordedSteps:
    """The steps of a `Trainer` on a CUDA device.

    Weights and optimisers are float32; the network computes in bfloat16, from weights rounded
    anew for each part, and adds its correction to pixels that are not rounded.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.recordings: dict[tuple[torch.Size, ...], _Recording] = {}
        streams = [
            torch.cuda.Stream(trainer.device)  # type: ignore[no-untyped-call]
            for _ in range(2)
        ]
        self.drawing, self.working = streams
        self.drawer = ThreadPoolExecutor(1)
        # Of the first graph, for all others too: they never run together.
        self.memory: Any = None
        self.ahead: deque[Future[list[Part]]] = deque()
        self.next = trainer.step

    def take(self) -> Tensor:
        """Take one step and return its mean absolute error (), without waiting for it."""
        while len(self.ahead) < AHEAD:
            self.ahead.append(self.drawer.submit(self.draw, self.next))
            self.next += 1
        parts = self.ahead.popleft().result()
        shapes = tuple(part.inputs.shape for part in parts)
        with torch.cuda.device(self.trainer.device):
            if shapes not in self.recordings:
                wait(self.ahead)  # nothing else shall happen on the card meanwhile
                self.recordings[shapes] = self.record(parts)
            recording = self.recordings[shapes]
            stream = torch.cuda.current_stream()
            for place, part in zip(recording.parts, parts, strict=True):
                for there, here in zip(place[:3], part[:3], strict=True):
                    there.copy_(here)
                    here.record_stream(stream)
            recording.graph.replay()
            return recording.error.clone()

    def draw(self, step: int) -> list[Part]:
        """Draw the pictures of a step on the drawing stream, and wait for them."""
        with torch.cuda.stream(self.drawing):
            parts = self.trainer.draw(step)
        self.drawing.synchronize()
        return parts

    def record(self, drawn: Sequence[Part]) -> _Recording:
        """Record a step of parts with these shapes; network and optimisers stay as they are."""
        trainer = self.trainer
        parts = [
            part._replace(**{k: getattr(part, k).clone() for k in part._fields[:3]})
            for part in drawn
        ]
        for value in trainer.model.parameters():
            if value.grad is None:
                value.grad = torch.zeros_like(value)
        before = {id(value): value.clone() for value in self.changed()}
        self.working.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.working):
            trainer.set_learning_rate(0.0)
            for _ in range(WARM_UPS):
                self.compute(parts)
        torch.cuda.current_stream().wait_stream(self.working)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self.memory, stream=self.working, capture_error_mode="thread_local"
        ):
            error = self.compute(parts)
        self.memory = graph.pool()
        for changed in self.changed():
            if id(changed) in before:
                changed.copy_(before[id(changed)])
            else:
                changed.zero_()  # a moment or a count that the warm-ups began
        return _Recording(graph, parts, error)

    def changed(self) -> list[Tensor]:
        """Return the optimisers' tensors that a step changes, or that decide its size."""
        values: list[Tensor] = []
        for optimizer in self.trainer.optimizers:
            values += [group["lr"] for group in optimizer.param_groups]
            values += [value for state in optimizer.state.values() for value in state.values()]
        return values

    def compute(self, parts: Sequence[Part]) -> Tensor:
        """Compute gradients, clip them and let the optimisers step; return the mean error."""
        trainer = self.trainer
        trainer.zero_gradients()
        error = torch.zeros((), device=trainer.device)
        for part in parts:
            rounded = {name: value.bfloat16() for name, value in trainer.model.named_parameters()}
            restored = functional_call(trainer.model, rounded, (part.inputs, part.indices))
            error += trainer.backward(restored, part)
        trainer.update()
        return error
