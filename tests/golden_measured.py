"""How far the network is from recordings of the authors' implementation, and why.

    python tests/golden_measured.py FOLDER [--name official_full]

FOLDER holds `<name>.safetensors`, with input, text codes, outputs and channel orders, and
`<name>.keys.json`, the shapes of the weights, which are made from a seed. Printed is the relative
L2 distance from the recorded outputs for each text code: of the plain definition and of what the
package runs, in float32; of the definition in float32 with every operation computed in float64 and
rounded once, so that the order in which a processor sums does not matter; and in float64.
"""

# ruff: noqa: T201 - a script; printing is what it is for

import argparse
import copy
from pathlib import Path

import torch
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from conftest import distance
from dfpir import checkpoint
from dfpir.degradation import Degradation
from test_checkpoint import PLACES, published_weights


class RoundedOnce(TorchDispatchMode):
    """Compute in float64 what is given in float32, and round each result to float32."""

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        named = named or {}
        # Views and changes in place must keep the memory they were given.
        if operation.is_view or operation._schema.is_mutable:
            return operation(*arguments, **named)

        def precise(tensor):
            return tensor.double() if tensor.dtype == torch.float32 else tensor

        def rounded(tensor):
            return tensor.float() if tensor.dtype == torch.float64 else tensor

        given = tree_map_only(torch.Tensor, precise, (arguments, named))
        return tree_map_only(torch.Tensor, rounded, operation(*given[0], **given[1]))


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", default="official_full")
    options = parser.parse_args()
    with safe_open(str(options.folder / f"{options.name}.safetensors"), "pt") as file:
        seed = int(file.metadata()["weights_seed"])
        golden = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    codes = dict(zip(Degradation, golden["text_code"], strict=False))
    model = checkpoint.from_published(
        published_weights(seed, options.folder, options.name), codes
    ).eval()
    pixels = golden["input"]

    equal = all(
        torch.equal(each.perturbation.permutations[: len(codes)], golden[f"perm_{place}"])
        for place, each in zip(PLACES, model.perturbations, strict=True)
    )
    print(f"channel orders equal the recorded ones exactly: {equal}")

    def show(name, run):
        distances = [
            f"{distance(run(kind), golden[f'output_{number}']):.3e}"
            for number, kind in enumerate(codes)
        ]
        print(f"{name:45} {'  '.join(distances)}", flush=True)

    print(
        f"{options.name}: {tuple(pixels.shape)}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}"
    )
    show("definition, float32", lambda kind: model.define(pixels, kind))
    show("package, float32", lambda kind: model(pixels, kind))
    with RoundedOnce():
        show("definition, float32, each result rounded", lambda kind: model.define(pixels, kind))
    exact = copy.deepcopy(model).double()
    show("definition, float64", lambda kind: exact.define(pixels.double(), kind))


if __name__ == "__main__":
    main()
