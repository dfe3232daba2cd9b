"""The manifest, and from a name to a verified file."""

import json

import pytest
import torch

from conftest import SMALL, random_model
from dfpir import checkpoint, weights
from dfpir.weights import WeightsError


@pytest.fixture
def other_manifest(tmp_path, monkeypatch):
    """A manifest of one's own, beside a folder of weights."""
    folder = tmp_path / "weights"
    folder.mkdir()
    path = folder / "mine.safetensors"
    checkpoint.save(random_model(SMALL), path)
    entry = {
        "role": "restorer",
        "summary": "a test",
        "filename": path.name,
        "sha256": weights.file_hash(path),
        "source": "by-hand",
        "page": "https://example.org/page",
        "command": "dfpir weights import FILE",
        "licence": "none",
    }
    content = {"schema": 1, "default": {"restorer": "mine"}, "files": {"mine": entry}}
    manifest = tmp_path / "weights.json"
    manifest.write_text(json.dumps(content))
    monkeypatch.setattr(weights, "manifest_path", lambda: manifest)
    monkeypatch.setenv(weights.FOLDER_VARIABLE, str(folder))
    weights.manifest.cache_clear()
    yield path
    weights.manifest.cache_clear()


def test_bundled_files_are_what_the_manifest_says():
    for entry in weights.entries():
        if entry.source == "bundled":
            path = weights.verified(entry)
            assert path.stat().st_size == entry.bytes
    assert {entry.role for entry in weights.entries()} == {"restorer", "classifier"}


def test_bundled_entries_tell_where_they_come_from():
    for entry in weights.entries():
        assert entry.summary and entry.licence and entry.page
        if entry.source == "bundled":
            assert entry.licence == "CC-BY-SA-4.0"
            assert entry.facts["training"] and entry.facts["trained_on"]
            assert entry.bytes < 14e6


def test_default_loads():
    model = weights.load_model()
    assert not any(value.requires_grad for value in model.parameters())
    assert model.config.width == 32


def test_names_and_paths_resolve(other_manifest):
    assert weights.resolve() == other_manifest
    assert weights.resolve("mine") == other_manifest
    assert weights.resolve(other_manifest) == other_manifest
    assert isinstance(weights.load_model("mine"), torch.nn.Module)


def test_a_changed_file_is_refused(other_manifest):
    data = bytearray(other_manifest.read_bytes())
    data[-1] ^= 1
    other_manifest.write_bytes(data)
    with pytest.raises(WeightsError, match=r"expected SHA-256 \w{64}, found \w{64}"):
        weights.resolve("mine")


def test_an_absent_file_says_where_to_get_it(other_manifest):
    other_manifest.unlink()
    with pytest.raises(WeightsError, match=r"by hand from https://example\.org/page.*import FILE"):
        weights.resolve("mine")


def test_unknown_names_list_the_known(other_manifest):
    with pytest.raises(WeightsError, match="Unknown weights 'yours'; expected one of: mine"):
        weights.resolve("yours")


def test_absent_paths_are_named(other_manifest, tmp_path):
    with pytest.raises(WeightsError, match=r"absent\.safetensors: no such weights file"):
        weights.resolve(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("content", "message"), [("{", "cannot be read"), ('{"schema": 2}', "schema is 2")]
)
def test_a_damaged_manifest_is_refused(tmp_path, monkeypatch, content, message):
    path = tmp_path / "weights.json"
    path.write_text(content)
    monkeypatch.setattr(weights, "manifest_path", lambda: path)
    weights.manifest.cache_clear()
    with pytest.raises(WeightsError, match=message):
        weights.manifest()
    weights.manifest.cache_clear()
