"""Time each kernel on a CUDA card, beside what PyTorch takes for the same where it has that.

    python tests/kernels/kernels_measured.py [bf16|fp16|fp32]

Medians of twenty launches in milliseconds at the shapes of the paper's network for a picture of
512x512. Block sizes are chosen by them.
"""

# ruff: noqa: T201 - a script; printing is what it is for

import statistics
import sys

import torch
from torch.nn import functional as F

from dfpir.kernels import backend, operators  # noqa: F401 - registers them

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = ((48, 1, 128, 512), (96, 1, 256, 512), (96, 2, 256, 256), (192, 4, 512, 128))
SHAPES += ((384, 8, 1024, 64),)
"""Channels, heads, hidden features, side."""

LAUNCHES = 20


def milliseconds(work):
    """Return the median time of one launch."""
    for _ in range(3):
        work()
    times = []
    for _ in range(LAUNCHES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def works(channels, heads, hidden, side, dtype):
    """Yield the name of each kernel, what it computes, and the same by PyTorch if it can."""

    def draw(*shape):
        return torch.randn(*shape, device="cuda", dtype=dtype)

    kernels = torch.ops.dfpir
    x, out, wide = (draw(1, side, side, each) for each in (channels, channels, 2 * hidden))
    both, filters = draw(1, side, side, 2 * channels), draw(2 * hidden, 1, 3, 3)
    weight, bias, back = draw(2 * hidden, channels), draw(2 * hidden), draw(channels, hidden)
    query, key = both.chunk(2, dim=-1)
    few, matrix = filters[:channels], draw(1, channels, channels)

    def conv(rows, weights):
        return F.conv2d(rows.permute(0, 3, 1, 2), weights, padding=1, groups=len(weights))

    yield (
        f"project to {2 * hidden}",
        lambda: kernels.project(x, weight, bias),
        lambda: F.linear(F.layer_norm(x, (channels,)), weight, bias),
    )
    yield "correlate", lambda: kernels.correlate(query, key, few, few, heads, 0, 0), None
    yield "mix_values", lambda: kernels.mix_values(x, few, matrix, x, out, 0, 0), None
    yield "gate", lambda: kernels.gate(wide, filters, back, x, out, 0, 0), None
    yield "filter", lambda: kernels.filter(wide, filters), lambda: conv(wide, filters)
    yield "filter_weights", lambda: kernels.filter_weights(wide, wide), None


def main(name="bf16"):
    if not torch.cuda.is_available():
        sys.exit("There is no CUDA device here, and nothing to time without one.")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {name}")
    for channels, heads, hidden, side in SHAPES:
        with torch.inference_mode():
            for kernel, ours, theirs in works(channels, heads, hidden, side, DTYPES[name]):
                beside = "" if theirs is None else f", PyTorch {milliseconds(theirs):.3f} ms"
                print(f"C={channels} {side}x{side} {kernel}: {milliseconds(ours):.3f} ms{beside}")


if __name__ == "__main__":
    main(*sys.argv[1:])
