"""The command line, as a user meets it."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dfpir.cli import main
from test_checkpoint import published_weights


@pytest.fixture
def picture(tmp_path, photograph):
    path = tmp_path / "picture.png"
    Image.fromarray(photograph[:48, :64]).save(path, dpi=(200, 200))
    return path


def run(*arguments):
    return main([str(argument) for argument in arguments])


def usage_status(*arguments):
    with pytest.raises(SystemExit) as leaving:
        run(*arguments)
    return leaving.value.code


def test_restore_writes_the_picture(picture, tmp_path, capsys):
    output = tmp_path / "out.png"
    assert run("restore", picture, "-o", output, "--degradation", "rain", "--device", "cpu") == 0
    with Image.open(output) as restored, Image.open(picture) as given:
        assert restored.size == given.size and restored.mode == given.mode
        assert restored.info["dpi"] == pytest.approx((200, 200), abs=0.1)
        assert not np.array_equal(np.asarray(restored), np.asarray(given))
    assert "rain streaks, as told; restored" in capsys.readouterr().out


def test_strength_0_returns_the_same_pixels(picture, tmp_path):
    output = tmp_path / "out.png"
    assert run("restore", picture, "-o", output, "--degradation", "haze", "--strength", 0) == 0
    assert np.array_equal(np.asarray(Image.open(output)), np.asarray(Image.open(picture)))


def test_16_bits_stay_16_bits(tmp_path):
    path, output = tmp_path / "deep.tif", tmp_path / "out.tif"
    import tifffile

    deep = np.random.default_rng(0).integers(500, 9000, (40, 32), dtype=np.uint16)
    tifffile.imwrite(path, deep)
    assert run("restore", path, "-o", output, "--degradation", "noise-25") == 0
    restored = tifffile.imread(output)
    assert restored.dtype == np.uint16 and 400 < restored.mean() < 9000


def test_compare_puts_both_side_by_side(picture, tmp_path):
    output = tmp_path / "out.png"
    assert run("restore", picture, "-o", output, "--degradation", "blur", "--compare") == 0
    assert Image.open(tmp_path / "out-compare.png").size == (2 * 64 + 8, 48)


def test_a_batch_goes_on_after_a_failure(picture, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"not a picture")
    picture.rename(folder / "b.png")
    (folder / "c.png").write_bytes((folder / "b.png").read_bytes()[:500])
    output = tmp_path / "out"
    assert run("restore", folder, "-o", output, "--degradation", "rain") == 1
    assert [path.name for path in output.glob("[!.]*")] == ["b.png"]
    complaints = capsys.readouterr().err
    assert "2 of 3 pictures could not be restored" in complaints
    assert complaints.count("a.png") == 2 and complaints.count("c.png") == 2


def test_inputs_are_not_overwritten_unasked(picture, capsys):
    before = picture.read_bytes()
    assert run("restore", picture, "-o", picture, "--degradation", "rain") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert picture.read_bytes() == before
    options = ["--degradation", "rain", "--overwrite"]
    assert run("restore", picture, "-o", picture, *options) == 0
    assert picture.read_bytes() != before


def test_outputs_must_not_meet(picture, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    twin = other / picture.name
    twin.write_bytes(picture.read_bytes())
    assert run("restore", picture, twin, "-o", tmp_path / "out") == 2
    assert "would both become" in capsys.readouterr().err
    assert run("restore", picture, twin, "-o", tmp_path / "out.png") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["restore", "absent.png", "-o", "out"], "absent.png"),
        (["classify", "absent.png"], "absent.png"),
        (["weights", "path", "nothing"], "Unknown weights 'nothing'"),
        (["weights", "verify", "nothing"], "Unknown weights 'nothing'"),
        (["evaluate", "--data", "absent"], "absent"),
    ],
)
def test_failures_take_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 1
    complaint = capsys.readouterr().err
    assert message in complaint and complaint.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["restore"],
        ["restore", "a.png", "-o", "b.png", "--strength", "2"],
        ["restore", "a.png", "-o", "b.png", "--degradation", "snow"],
        ["weights"],
        ["nonsense"],
    ],
)
def test_usage_errors_take_one_line(arguments, capsys):
    assert usage_status(*arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--data", "absent", "-o", "a.safetensors"],
        ["train", "--data", ".", "-o", "a.pt"],
        ["train", "--data", ".", "-o", "a.safetensors", "--part", "0"],
        *(
            ["train", "--data", ".", "-o", "a.safetensors", "--classifier", option, value]
            for option, value in {
                "--preset": "compact",
                "--batch": "4",
                "--part": "4",
                "--patch": "64",
                "--learning-rate": "1",
                "--device": "cpu",
                "--specialist": "noise",
                "--levels": "1",
            }.items()
        ),
        ["train", "--data", ".", "-o", "a.safetensors", "--resume", "--overwrite"],
        ["train", "--data", ".", "-o", "a.safetensors", "--learning-rate", "0"],
        ["train", "--data", ".", "-o", "a.safetensors", "--learning-rate", "inf"],
    ],
)
def test_training_checks_its_arguments(arguments, capsys):
    assert run(*arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_empty_folder_is_said(tmp_path, capsys):
    assert run("restore", tmp_path, "-o", tmp_path / "out") == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_classify(picture, capsys):
    assert run("classify", picture) == 0
    assert str(picture) in capsys.readouterr().out
    assert run("classify", picture, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["file"] == str(picture) and sum(facts["probabilities"].values()) == (
        pytest.approx(1, abs=0.001)
    )


def test_weights_list_verify_path(capsys):
    assert run("weights", "list") == 0
    assert "* dfpir-compact-14" in capsys.readouterr().out
    assert run("weights", "verify") == 0
    assert capsys.readouterr().out.count("right") == 2
    assert run("weights", "path") == 0
    assert capsys.readouterr().out.strip().endswith("dfpir-compact-14.safetensors")


def test_a_bundled_file_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr("dfpir.weights.locate", lambda entry: None)
    assert run("weights", "list") == 0
    assert "install dfpir again" in capsys.readouterr().out


def test_published_weights_are_imported_and_used(picture, tmp_path, capsys):
    published, codes = tmp_path / "model.pth.tar", tmp_path / "codes.safetensors"
    torch.save({"state_dict": published_weights(7), "epoch": 1}, published)
    save_file({"rain": torch.randn(512), "haze": torch.randn(512)}, codes)
    assert run("weights", "import", published, "--text-codes", codes) == 0
    imported = tmp_path / "model.safetensors"
    assert imported.is_file() and "rain, haze" in capsys.readouterr().out
    output = tmp_path / "out.png"
    arguments = ["restore", picture, "-o", output, "--weights", imported]
    assert run(*arguments, "--degradation", "haze") == 0
    assert run(*arguments, "--degradation", "blur", "--overwrite") == 1
    assert "not trained for 'blur'" in capsys.readouterr().err
    assert run("weights", "import", published, "--text-codes", codes) == 2


def test_module_runs():
    command = [sys.executable, "-m", "dfpir", "--version"]
    assert subprocess.check_output(command, text=True).startswith("dfpir ")
