"""Folders of pictures: planned, resumed, never half done, nothing replaced unasked."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dfpir import folders
from dfpir.cli import main
from dfpir.files import read_image, write_image
from dfpir.folders import JOURNAL, Job, Journal, PlanError, Settings, plan
from dfpir.restorer import Restorer


@pytest.fixture(scope="module")
def restorer():
    return Restorer(device="cpu")


@pytest.fixture
def tree(tmp_path):
    """Four pictures, one of them a level deeper."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "in"
    (folder / "deeper").mkdir(parents=True)
    for name in ("a.png", "b.png", "c.tif", "deeper/a.png"):
        write_image(folder / name, generator.integers(0, 256, (16, 24, 3), dtype=np.uint8))
    return folder


def run(*arguments):
    return main([str(argument) for argument in arguments])


def restore(jobs, restorer, output, **settings):
    settings, journal = Settings("rain", **settings), Journal(output)
    folders.check(jobs, settings, journal)
    return list(
        folders.restore_files(
            jobs,
            restorer,
            settings,
            journal=journal,
            progress_of=lambda job: contextlib.nullcontext(lambda done, total: None),
        )
    )


def statuses(outcomes):
    return [outcome.status for outcome in outcomes]


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != JOURNAL
    }


def test_subfolders_are_kept(tree, tmp_path):
    output = tmp_path / "out"
    flat = plan([tree], output)
    assert [job.target.name for job in flat] == ["a.png", "b.png", "c.tif"]
    deep = plan([tree], output, recursive=True)
    assert {job.target for job in deep} == {
        output / name for name in ("a.png", "b.png", "c.tif", "deeper/a.png")
    }


def test_the_output_below_the_input_is_no_input(tree):
    output = tree / "restored"
    output.mkdir()
    write_image(output / "a.png", np.zeros((16, 16), np.uint8))
    assert all(output not in job.source.parents for job in plan([tree], output, recursive=True))
    with pytest.raises(PlanError, match="name another output"):
        plan([output], tree)


def test_two_inputs_for_one_output_are_refused(tree, tmp_path):
    with pytest.raises(PlanError, match="would both become"):
        plan([tree / "a.png", tree / "deeper" / "a.png"], tmp_path / "out")
    with pytest.raises(PlanError, match="names one picture, but there are 3 inputs"):
        plan([tree], tmp_path / "out.png")


def test_a_second_run_does_only_what_is_missing(tree, tmp_path, restorer):
    output = tmp_path / "out"
    jobs = plan([tree], output, recursive=True)
    assert statuses(restore(jobs, restorer, output)) == ["restored"] * 4
    first = contents(output)
    (output / "b.png").unlink()
    again = restore(jobs, restorer, output, resume=True)
    assert sorted(statuses(again)) == ["restored", "skipped", "skipped", "skipped"]
    assert contents(output) == first


def test_a_changed_input_or_setting_replaces_nothing_unasked(tree, tmp_path, restorer):
    output = tmp_path / "out"
    jobs = plan([tree / "a.png"], output)
    restore(jobs, restorer, output)
    before = contents(output)
    [changed] = restore(jobs, restorer, output, resume=True, strength=0.5)
    assert changed.status == "failed" and "other settings; add --overwrite" in changed.text
    assert contents(output) == before
    assert statuses(restore(jobs, restorer, output, resume=True)) == ["skipped"]
    options = {"resume": True, "strength": 0.5, "overwrite": True}
    assert statuses(restore(jobs, restorer, output, **options)) == ["restored"]
    assert contents(output) != before


def test_somebody_else_s_file_is_never_replaced(tree, tmp_path, restorer):
    output = tmp_path / "out"
    output.mkdir()
    (output / "b.png").write_bytes(b"mine")
    for resume in (False, True):
        with pytest.raises(PlanError, match=r"b\.png exists; add --overwrite"):
            restore(plan([tree], output), restorer, output, resume=resume)
    assert contents(output) == {"b.png": b"mine"}


def test_what_was_not_checked_is_not_replaced_either(tree, tmp_path, restorer):
    target = tmp_path / "mine.png"
    target.write_bytes(b"mine")
    [outcome] = folders.restore_files(
        [Job(tree / "a.png", target)],
        restorer,
        Settings("rain"),
        progress_of=lambda job: contextlib.nullcontext(lambda done, total: None),
    )
    assert outcome.status == "failed" and "add --overwrite" in outcome.text
    assert target.read_bytes() == b"mine"


def test_failures_are_remembered_and_retried_on_demand(tree, tmp_path, restorer):
    output = tmp_path / "out"
    whole = (tree / "b.png").read_bytes()
    (tree / "b.png").write_bytes(whole[:60])
    jobs = plan([tree], output)
    assert statuses(restore(jobs, restorer, output)) == ["restored", "failed", "restored"]
    remembered = restore(jobs, restorer, output, resume=True)
    assert statuses(remembered) == ["skipped", "failed", "skipped"]
    assert "b.png" in remembered[1].text and "--retry-failed" in remembered[1].text
    assert remembered[1].seconds == 0
    assert "b.png" not in contents(output)
    options = {"resume": True, "retry_failed": True}
    assert restore(jobs, restorer, output, **options)[1].seconds > 0
    # A mended file has another hash: it is no longer the one that failed.
    (tree / "b.png").write_bytes(whole)
    assert statuses(restore(jobs, restorer, output, resume=True)) == [
        "skipped",
        "restored",
        "skipped",
    ]


@pytest.mark.parametrize("keep", range(0, 400, 37))
def test_a_journal_cut_short_anywhere_is_read(tree, tmp_path, restorer, keep):
    output = tmp_path / "out"
    journal = Journal(output)
    jobs = [Job(tree / name, output / name) for name in ("a.png", "b.png")]
    for job in jobs:
        journal.add(job, "begun", input_sha256="0", settings="1")
        journal.add(job, "done", input_sha256="0", settings="1")
    journal.path.write_bytes(journal.path.read_bytes()[:keep])
    lines = journal.path.read_text().count("\n")
    found = Journal(output)
    assert [found.of(job).get("state") for job in jobs] == [
        (None, "begun", "done")[min(lines, 2)],
        (None, "begun", "done")[min(max(lines - 2, 0), 2)],
    ]
    found.add(jobs[1], "done", input_sha256="2", settings="3")
    assert Journal(output).of(jobs[1])["input_sha256"] == "2"


def test_the_report_lists_every_file(tree, tmp_path, capsys):
    (tree / "b.png").write_bytes(b"damaged")
    report = tmp_path / "report.json"
    arguments = ["restore", tree, "-o", tmp_path / "out", "--degradation", "rain"]
    assert run(*arguments, "--recursive", "--report", report) == 1
    facts = json.loads(report.read_text())
    assert facts["counts"] == {"restored": 3, "failed": 1}
    assert {each["status"] for each in facts["files"] if "b.png" in each["source"]} == {"failed"}
    assert run(*arguments, "--recursive", "--resume") == 1
    assert "3 of 4 pictures were done before" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(tree, tmp_path, capsys):
    (tree / "b.png").write_bytes(b"damaged")
    assert run("restore", tree, "-o", tmp_path / "out", "--dry-run", "--device", "cpu") == 1
    assert not (tmp_path / "out").exists()
    captured = capsys.readouterr()
    assert "2 pictures, 0.0 megapixels" in captured.out and "Nothing was written" in captured.out
    assert "in strips" not in captured.out  # of graphics cards only
    assert captured.err.count("would fail") == 1


def test_a_dry_run_refuses_what_the_run_would_refuse(tree, tmp_path, capsys):
    arguments = ["restore", tree / "a.png", "-o", tmp_path / "out", "--degradation", "rain"]
    assert run(*arguments) == 0
    assert run(*arguments, "--dry-run") == 2
    assert "exists; add --overwrite" in capsys.readouterr().err
    assert run(*arguments, "--dry-run", "--resume") == 0
    assert "0 pictures" in capsys.readouterr().out
    (tree / "a.jpe").write_bytes((tree / "a.png").read_bytes())
    assert run("restore", tree / "a.jpe", "-o", tmp_path / "new", "--dry-run") == 2
    assert "does not end in one of" in capsys.readouterr().err


def test_comparisons_take_nobodys_place(tree, tmp_path, capsys):
    out = tmp_path / "out"
    (tree / "a.webp").write_bytes((tree / "a.png").read_bytes())
    options = ["-o", out, "--degradation", "rain", "--compare"]
    assert run("restore", tree / "a.png", tree / "a.webp", *options) == 2
    assert "would replace another picture" in capsys.readouterr().err
    (tree / "a-compare.png").write_bytes((tree / "a.png").read_bytes())
    assert run("restore", tree / "a.png", tree / "a-compare.png", *options, "--overwrite") == 2
    assert not out.exists()
    out.mkdir()
    (out / "a-compare.png").write_bytes(b"somebody's")
    assert run("restore", tree / "a.png", *options) == 2
    assert (out / "a-compare.png").read_bytes() == b"somebody's" and not (out / "a.png").exists()


def test_a_comparison_of_floats_shows_their_range():
    ramp = np.linspace(100, 5000, 24 * 32, dtype=np.float32).reshape(24, 32)
    both = folders.side_by_side(ramp, ramp[::-1], (100.0, 5000.0))
    assert both.shape == (24, 72) and both.min() == 0 and both.max() == 1
    np.testing.assert_allclose(both[:, :32], (ramp - 100) / 4900, rtol=1e-6)
    np.testing.assert_array_equal(both[:, 32:40], 1)


def test_a_refused_run_leaves_the_report_of_another(tree, tmp_path, capsys):
    report = tmp_path / "report.json"
    arguments = ["restore", tree, "-o", tmp_path / "out", "--degradation", "rain"]
    assert run(*arguments, "--report", report) == 0
    before = report.read_text()
    assert run(*arguments, "--report", report) == 2
    assert report.read_text() == before
    assert "are left" not in capsys.readouterr().err
    assert run(*arguments, "--overwrite", "--report", tmp_path / "no" / "report.json") == 2
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--resume", "--retry-failed"])
def test_resuming_needs_a_folder(tree, tmp_path, capsys, option):
    assert run("restore", tree / "a.png", "-o", tmp_path / "out.png", option) == 2
    assert f"{option} needs an output folder" in capsys.readouterr().err


def test_pictures_have_no_blocks(tree, tmp_path, capsys):
    assert run("restore", tree / "a.png", "-o", tmp_path / "out.png", "--block", "64") == 2
    assert "--block is for a .zarr" in capsys.readouterr().err


def test_kill_at_any_moment_then_resume(tree, tmp_path, restorer, thorough):
    """SIGKILL leaves whole outputs only; what follows does each file once more at most."""
    generator = np.random.default_rng(1)
    for number in range(200 if thorough else 16):
        picture = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        write_image(tree / f"{number}.png", picture)
    expected = tmp_path / "expected"
    restore(plan([tree], expected), restorer, expected)
    output = tmp_path / "out"
    command = [sys.executable, "-m", "dfpir", "restore", tree, "-o", output, "--degradation"]
    command = [*map(str, command), "rain", "--device", "cpu", "--resume"]
    moments = random.Random(0)
    for _ in range(20 if thorough else 2):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        process.stdout.readline()  # it has begun
        time.sleep(moments.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for path in output.glob("*.png"):
            assert np.array_equal(read_image(path).array, read_image(expected / path.name).array)
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    found = {name: data for name, data in contents(output).items() if not name.startswith(".")}
    assert found == contents(expected)
    lines = (output / JOURNAL).read_text().splitlines()
    done = [
        event["target"]
        for event in map(json.loads, filter(None, lines))
        if event["state"] == "done"
    ]
    assert len(done) == len(set(done)) == len(found)


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to a child alone")
def test_an_interrupt_keeps_what_is_finished(tree, tmp_path):
    output = tmp_path / "out"
    for number in range(20):
        write_image(tree / f"{number}.png", np.full((48, 48, 3), number, np.uint8))
    command = [sys.executable, "-m", "dfpir", "restore", str(tree), "-o", str(output)]
    process = subprocess.Popen(
        [*command, "--degradation", "haze", "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore the signal, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, complaints = process.communicate(timeout=60)
    assert process.returncode == 130 and "go on with --resume" in complaints
    assert "Traceback" not in complaints
    assert not list(output.glob(".dfpir-*.part"))
