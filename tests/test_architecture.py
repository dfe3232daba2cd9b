"""The plan of the house: import contracts, a light front door, every module with its docstring."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "src/dfpir").rglob("*.py"))


def run_python(code):
    # A bare checkout that is on the path but not installed has to pass too.
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_import_contracts_hold():
    pytest.importorskip("importlinter")
    result = run_python(
        "import sys\n"
        "from importlinter.cli import lint_imports\n"
        "sys.exit(lint_imports(no_cache=True))"
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_import_leaves_torch_alone():
    result = run_python("import sys, dfpir; print('torch' in sys.modules)")
    assert result.stdout.strip() == "False", result.stdout + result.stderr


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_module_has_a_docstring(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
