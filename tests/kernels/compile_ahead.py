"""Compile every kernel for cards that are not here, and print what each takes as JSON lines.

A program of its own: Triton decides on import whether kernels are compiled or interpreted.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # its default is announced to change

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dfpir.kernels import (
    triton_correlate,
    triton_filter,
    triton_gate,
    triton_mix_values,
    triton_project,
)
from dfpir.model import DFPIRConfig

OPERANDS = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
POINTERS = {
    "project": {"features": 0, "weight": 0, "bias": 0, "projected": 0},
    "correlate": dict.fromkeys(["query", "key"], 0)
    | dict.fromkeys(["query_filters", "key_filters", "products", "squares"], "fp32"),
    "mix_values": dict.fromkeys(["values", "matrix", "residual", "mixed"], 0) | {"filters": "fp32"},
    "gate": dict.fromkeys(["hidden", "project_out", "residual", "gated"], 0) | {"filters": "fp32"},
    "filter": {"features": 0, "filters": "fp32", "filtered": 0},
    "filter_weights": {"features": 0, "slope": 0, "sums": "fp32"},
}
KERNELS = {
    "project": triton_project.project_kernel,
    "correlate": triton_correlate.correlate_kernel,
    "mix_values": triton_mix_values.mix_values_kernel,
    "gate": triton_gate.gate_kernel,
    "filter": triton_filter.filter_kernel,
    "filter_weights": triton_filter.filter_weights_kernel,
}


def cases(capability):
    """Yield operation, shape, block sizes and constants of every shape of both presets, once."""
    seen = set()
    for preset in ("paper", "compact"):
        config = getattr(DFPIRConfig, preset)()
        levels = [(config.channels(depth), config.heads[depth]) for depth in range(4)]
        for channels, heads in [*levels, (2 * config.width, config.heads[0])]:
            hidden = -(-int(channels * config.expansion) // 8) * 8
            for case in shapes(channels, channels // heads, hidden, hopper=capability >= 90):
                if case[:2] not in seen:
                    seen.add(case[:2])
                    yield case
    for channels in (96, 128):
        for sums in (False, True):
            blocks = triton_filter.blocks(channels, sums=sums)
            yield "filter_weights" if sums else "filter", f"C={channels}", blocks, {}


def shapes(channels, each, hidden, *, hopper):
    """Yield the same for a block of `channels`, heads of `each` and `hidden` features."""
    for outputs in (channels, 2 * channels, 2 * hidden):
        constants = {"C": channels, "O": outputs, "EPSILON": 1e-5}
        blocks = triton_project.blocks(channels, outputs)
        yield "project", f"C={channels} O={outputs}", blocks, constants
    blocks = triton_correlate.blocks(each, hopper=hopper)
    yield "correlate", f"D={each}", blocks, {"D": each, "HOPPER": hopper}
    constants = {"C": channels, "RESIDUAL": True}
    blocks = triton_mix_values.blocks(channels, hopper=hopper)
    yield "mix_values", f"C={channels}", blocks, constants
    constants = {"C": channels, "HIDDEN": hidden}
    blocks = triton_gate.blocks(channels, hidden, hopper=hopper)
    yield "gate", f"C={channels} h={hidden}", blocks, constants


def compile_one(name, blocks, constants, dtype, capability):
    """Return shared memory in bytes, registers a thread and bytes spilled."""
    kernel = KERNELS[name]
    blocks = dict(blocks)
    options = {"num_warps": blocks.pop("num_warps"), "num_stages": blocks.pop("num_stages", 3)}
    constants = {**constants, **blocks}
    if "PRECISION" in kernel.arg_names:  # kernels with products
        constants |= {"PRECISION": "ieee", "OPERAND": OPERANDS[dtype]}
    signature, attributes = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in POINTERS[name]:
            signature[argument] = "*" + (POINTERS[name][argument] or dtype)
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif argument.endswith("_channel") or argument == "stride_channel":
            signature[argument], constants[argument] = "constexpr", 1
        else:
            signature[argument] = "i32"
            if argument not in ("height", "width", "above", "written", "pixels"):
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=options)
    registers, spilled = resources(compiled.asm["ptx"], capability)
    return compiled.metadata.shared, registers, spilled


def resources(ptx, capability):
    """Return registers a thread and bytes spilled, as the assembler says."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"\.target (\w+)", ptx).group(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        said = subprocess.run(
            [
                get_ptxas(capability).path,
                "-v",
                f"--gpu-name={target}",
                path,
                "-o",
                path.with_suffix(".cubin"),
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    return int(re.search(r"Used (\d+) registers", said).group(1)), int(
        re.search(r"(\d+) bytes spill stores", said).group(1)
    )


def main(chosen):
    for capability in (80, 90):
        for (name, shape, blocks, constants), dtype in itertools.product(
            cases(capability), OPERANDS
        ):
            if chosen and not any(
                word in f"{name} {shape} {dtype} sm_{capability}" for word in chosen
            ):
                continue
            shared, registers, spilled = compile_one(name, blocks, constants, dtype, capability)
            print(  # noqa: T201
                json.dumps(
                    {
                        "kernel": name,
                        "shape": shape,
                        "dtype": dtype,
                        "target": f"sm_{capability}",
                        "warps": blocks["num_warps"],
                        "shared": shared,
                        "registers": registers,
                        "spilled": spilled,
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
