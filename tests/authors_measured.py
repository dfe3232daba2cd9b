"""How fast the package is beside the authors' own code, on the same weights in one process.

    python tests/authors_measured.py CHECKOUT [--sides 256 512] [--rounds 3]

CHECKOUT is a clone of https://github.com/TxpHome/DFPIR. Their code has no licence and is therefore
not part of this project; it needs einops, and what else it imports, but inference does not use, is
replaced by empty modules. Both networks have the paper's size and the same random weights. Printed
for each variant are the relative L2 distance from their result and the median time: of their code,
of the plain definition and of what the package runs, in float32 and, where the processor multiplies
it faster, in bfloat16. The variants take turns.
"""

# ruff: noqa: T201 - a script; printing is what it is for

import argparse
import copy
import statistics
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

from conftest import distance
from dfpir import benchmark, checkpoint
from dfpir.degradation import Degradation
from dfpir.training import fast_bfloat16

KIND = Degradation.RAIN
CPU = torch.device("cpu")


def authors_network(folder):
    """Return their network of the paper's size, with random weights."""
    for name in ("clip", "huggingface_hub", "torchvision", "torchvision.transforms"):
        sys.modules.setdefault(name, ModuleType(name))
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
    sys.modules["huggingface_hub"].PyTorchModelHubMixin = object
    sys.path.insert(0, str(folder))
    from net.model import ChannelShuffle_skip_textguaid

    torch.manual_seed(0)
    return ChannelShuffle_skip_textguaid(device="cpu").eval().requires_grad_(False)


def compare(variants, rounds):
    """Run all in turn; print how far each is from the first, its time, and its gain over that."""
    expected = next(iter(variants.values()))()
    seconds = {name: [] for name in variants}
    far = {name: distance(run(), expected) for name, run in variants.items()}
    for _ in range(rounds):
        for name, run in variants.items():
            seconds[name].append(benchmark.timed(run, CPU)[0])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    baseline = next(iter(medians.values()))
    for name, median in medians.items():
        spread = max(seconds[name]) - min(seconds[name])
        print(
            f"{name:28} {far[name]:.1e}  {median:7.3f} s (range {spread:.3f})  "
            f"{baseline / median:.2f}x",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    theirs = authors_network(options.checkout)
    codes = torch.randn(len(Degradation), 512, generator=torch.Generator().manual_seed(0))
    ours = checkpoint.from_published(
        theirs.state_dict(), dict(zip(Degradation, codes, strict=True))
    ).eval()
    code = codes[KIND.index][None]
    print(f"{benchmark.processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for side in options.sides:
        pixels = benchmark.picture(side, side)
        variants = {
            "the authors', float32": partial(theirs, pixels, code),
            "definition, float32": partial(ours.define, pixels, KIND),
            "package, float32": partial(ours, pixels, KIND),
        }
        if fast_bfloat16():
            half, coarse = copy.deepcopy(ours).bfloat16(), pixels.bfloat16()
            variants["definition, bfloat16"] = partial(half.define, coarse, KIND)
            variants["package, bfloat16"] = partial(half, coarse, KIND)
        print(f"{side}x{side}: distance, time, gain")
        with torch.inference_mode():
            compare(variants, options.rounds)


if __name__ == "__main__":
    main()
