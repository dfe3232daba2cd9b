"""Public names vanish only on purpose, and importing them is cheap."""

import subprocess
import sys

import pytest

import dfpir

NAMES = {
    "DFPIR",
    "DFPIRConfig",
    "Degradation",
    "Diagnosis",
    "Restoration",
    "RestorationRecord",
    "Restorer",
    "Tiling",
    "classify",
    "load_model",
    "restore",
}


def test_names():
    assert set(dfpir.__all__) == NAMES
    for name in NAMES:
        assert getattr(dfpir, name).__doc__


def test_unknown_name():
    with pytest.raises(AttributeError, match="'dfpir' has no attribute 'nothing'"):
        _ = dfpir.nothing


def test_import_brings_no_torch():
    code = "import sys, dfpir; print([m for m in ('torch', 'kornia', 'PIL') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
