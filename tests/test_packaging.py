"""What a user gets: the wheel's contents, and the manifest from every kind of installation."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("build")
pytest.importorskip("hatchling")


def run(*arguments, cwd=ROOT, **environment):
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def unpack(folder):
    """Lay the one wheel in `folder` out as pip would, and give the place back."""
    (wheel,) = folder.glob("dfpir-*.whl")
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def manifest_path(site, cwd):
    """Where the package finds its manifest when it is imported from `site`."""
    code = "import dfpir.weights; print(dfpir.weights.manifest_path())"
    return Path(run("-c", code, cwd=cwd, PYTHONPATH=str(site)).strip())


# No isolation: the build backend is installed with the tests, so that no index is asked for it.


@pytest.fixture(scope="module")
def wheel_site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run("-m", "build", "--no-isolation", "--wheel", "--outdir", folder)
    return unpack(folder)


@pytest.fixture(scope="module")
def sdist_wheel_site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    run("-m", "build", "--no-isolation", "--outdir", folder)  # the wheel comes out of the sdist
    return unpack(folder)


def contents(site):
    return {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}


def test_wheel_holds_what_it_needs(wheel_site):
    names = contents(wheel_site)
    assert {
        "dfpir/__init__.py",
        "dfpir/py.typed",
        "dfpir/weights.json",
        "dfpir_napari/__init__.py",
    } <= names
    assert any(name.startswith("dfpir/assets/") and name.endswith(".safetensors") for name in names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_holds_nothing_else(wheel_site):
    tops = {name.split("/")[0].split("-")[0] for name in contents(wheel_site)}
    assert tops == {"dfpir", "dfpir_napari"}


def test_sdist_builds_the_same_wheel(wheel_site, sdist_wheel_site):
    assert contents(wheel_site) == contents(sdist_wheel_site)


def test_manifest_is_found_from_a_wheel(wheel_site, tmp_path):
    assert manifest_path(wheel_site, tmp_path).samefile(wheel_site / "dfpir/weights.json")


def test_manifest_is_found_from_a_wheel_of_the_sdist(sdist_wheel_site, tmp_path):
    expected = sdist_wheel_site / "dfpir/weights.json"
    assert manifest_path(sdist_wheel_site, tmp_path).samefile(expected)


def test_manifest_is_found_from_an_editable_installation(tmp_path):
    # An editable wheel is a .pth file that leads back to the checkout. Its paths are handed over
    # by hand, since Python reads .pth files in site-packages only and nothing shall be installed.
    code = "import sys; from hatchling.build import build_editable; build_editable(sys.argv[1])"
    run("-c", code, tmp_path)
    site = unpack(tmp_path)
    (pth,) = site.glob("*.pth")
    found = manifest_path(os.pathsep.join([str(site), *pth.read_text().splitlines()]), tmp_path)
    assert found.samefile(ROOT / "weights.json")


def test_manifest_is_found_from_a_bare_checkout(tmp_path):
    assert manifest_path(ROOT / "src", tmp_path).samefile(ROOT / "weights.json")
