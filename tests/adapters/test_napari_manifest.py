"""napari's manifest: valid, and everything it names is there. napari need not be."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "napari_plugin/dfpir_napari"
MODULES = sorted(PACKAGE.glob("*.py"))


@pytest.fixture(scope="module")
def manifest():
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((PACKAGE / "napari.yaml").read_text(encoding="utf-8"))


def names(manifest):
    return [command["python_name"] for command in manifest["contributions"]["commands"]]


def test_every_name_is_defined(manifest):
    for name in names(manifest):
        module, _, attribute = name.partition(":")
        path = PACKAGE / f"{module.partition('.')[2]}.py"
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert attribute in {getattr(node, "name", None) for node in body}, name


def test_what_is_shown_is_a_command(manifest):
    given = manifest["contributions"]
    commands = {command["id"] for command in given["commands"]}
    shown = [*given["widgets"], *given["sample_data"], *given["menus"]["napari/layers/filter"]]
    assert {each["command"] for each in shown} <= commands
    assert manifest["name"] == "dfpir"
    assert all(each.startswith("dfpir.") for each in commands)


def test_defaults_stand_in_both_places(manifest):
    from dfpir_napari._settings import Settings

    properties = manifest["contributions"]["configurations"]["restoration"]["properties"]
    assert Settings() == Settings(**{key: each["default"] for key, each in properties.items()})


def test_npe2_takes_it(manifest):
    npe2 = pytest.importorskip("npe2")
    npe2.PluginManifest.from_file(PACKAGE / "napari.yaml")


def test_every_name_can_be_imported(manifest):
    pytest.importorskip("napari", reason="napari is not installed")
    npe2 = pytest.importorskip("npe2")
    for name in names(manifest):
        assert callable(npe2.manifest.utils.import_python_name(name))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_the_adapter_asks_the_core_only_for_stacks(path):
    allowed = {
        "_sample_data.py": {"dfpir.degradation", "dfpir.pixels", "dfpir.synthesis"},
        "_widget.py": {"dfpir.degradation", "dfpir.stacks", "dfpir.restorer"},
    }
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    asked = {
        name if name != "dfpir" else "dfpir.stacks"
        for name in found
        if name and (name == "dfpir" or name.startswith("dfpir."))
    }
    assert asked <= allowed.get(path.name, set())


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_importing_a_module_does_not_import_torch(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_import = {
        alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names
    } | {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    heavy = ("torch", "dfpir.stacks", "dfpir.restorer", "dfpir.synthesis", "dfpir.pixels")
    assert not at_import & set(heavy)


def test_the_package_itself_needs_nothing():
    assert importlib.util.find_spec("dfpir_napari") is None or importlib.import_module(
        "dfpir_napari"
    )
