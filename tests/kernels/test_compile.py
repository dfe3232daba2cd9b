"""Every kernel compiles for cards that are not here, within what a processor of theirs has."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = Path(__file__).with_name("compile_ahead.py")
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
"""Shared memory a block may have, in bytes."""

SPILLED = 8
"""Bytes a thread may spill: two registers, where the assembler rounds its own count."""


def test_kernels_compile_for_sm_80_and_sm_90():
    """The widest use of each kernel; `python tests/kernels/compile_ahead.py` does all shapes."""
    wanted = ["C=96 O=512 bf16", "D=96 bf16", "mix_values C=96 bf16", "gate C=96 h=256 bf16"]
    wanted += ["D=48 fp32 sm_80", "gate C=96 h=256 fp32 sm_90", "mix_values C=96 fp16 sm_90"]
    wanted += ["filter C=128 bf16", "filter_weights C=128 bf16", "filter_weights C=128 fp32 sm_80"]
    child = subprocess.run(
        [sys.executable, PROGRAM, *wanted], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    found = [json.loads(line) for line in child.stdout.splitlines()]
    kernels = {"project", "correlate", "mix_values", "gate", "filter", "filter_weights"}
    assert {row["kernel"] for row in found} == kernels
    assert len(found) == 16, found
    for row in found:
        assert row["shared"] <= SHARED[row["target"]], row
        assert row["spilled"] <= SPILLED, row
