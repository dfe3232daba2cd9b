"""Zarr folders: the same layout restored, whole or not at all, here and on a cluster."""

import json
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest

from dfpir import cli, zarr_files
from dfpir.slides import restore_lazily
from dfpir.zarr_files import layout_of, restore_zarr

zarr = pytest.importorskip("zarr")


def grey(*shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, 250, shape).astype(dtype)


def write(path, array, **options):
    opened = zarr.create_array(str(path), shape=array.shape, dtype=array.dtype, **options)
    opened[:] = array
    return path


def halved(array):
    return np.rint(
        np.mean([array[..., i::2, j::2].astype(float) for i in (0, 1) for j in (0, 1)], axis=0)
    ).astype(array.dtype)


def write_ome(path, levels, axes, version="0.5", **options):
    """An OME-Zarr picture with labels."""
    group = zarr.open_group(str(path), mode="w", zarr_format=2 if version == "0.4" else 3)
    for number, level in enumerate(levels):
        group.create_array(str(number), shape=level.shape, dtype=level.dtype, **options)[:] = level
    scales = {
        "axes": [{"name": name, "type": "space" if name in "zyx" else "other"} for name in axes],
        "datasets": [{"path": str(number)} for number in range(len(levels))],
    }
    if version == "0.4":
        group.attrs["multiscales"] = [{"version": "0.4", **scales}]
    else:
        group.attrs["ome"] = {"version": "0.5", "multiscales": [scales]}
    labels = group.create_array("labels/cells", shape=(4, 4), dtype="uint32", chunks=(4, 4))
    labels[:] = 7
    return path


def same(found, expected):
    np.testing.assert_array_equal(np.asarray(found[:]), expected)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_plain_array_keeps_all_but_its_values(tiny_weights, tmp_path, zarr_format):
    array = grey(150, 200, dtype=np.uint16)
    source = write(
        tmp_path / "in.zarr",
        array,
        chunks=(64, 64),
        attributes={"stain": "DAPI"},
        zarr_format=zarr_format,
        fill_value=3,
    )
    done = restore_zarr(source, tmp_path / "out.zarr", "rain", weights=tiny_weights, block=64)
    out = zarr.open(str(tmp_path / "out.zarr"), mode="r")
    assert (out.shape, out.dtype, out.chunks, out.fill_value) == ((150, 200), "uint16", (64, 64), 3)
    assert out.metadata.zarr_format == zarr_format and out.attrs["stain"] == "DAPI"
    assert out.compressors == zarr.open(str(source), mode="r").compressors
    assert out.attrs["dfpir"][0]["steps"] == ["rain"]
    same(out, np.asarray(restore_lazily(array, "rain", weights=tiny_weights, block=64).image))
    same(done.image, out[:])
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_an_ome_zarr_keeps_its_channels_labels_and_levels(tiny_weights, tmp_path, version):
    finest = grey(2, 3, 130, 161, dtype=np.uint16)
    levels = [finest, halved(np.pad(finest, ((0, 0),) * 3 + ((0, 1),), mode="edge"))]
    source = write_ome(tmp_path / "in.zarr", levels, "tcyx", version, chunks=(1, 1, 64, 64))
    done = restore_zarr(source, tmp_path / "out.zarr", "noise-25", weights=tiny_weights, block=64)
    before, after = (
        zarr.open(str(source), mode="r"),
        zarr.open(str(tmp_path / "out.zarr"), mode="r"),
    )
    assert len(done.records) == 3 and len(after.attrs["dfpir"]) == 3
    attributes = dict(after.attrs)
    del attributes["dfpir"], attributes["dfpir_key"]
    assert attributes == dict(before.attrs)
    same(after["labels/cells"], np.full((4, 4), 7))
    restored = restore_lazily(
        finest, "noise-25", weights=tiny_weights, channel_axis=1, block=64
    ).image
    same(after["0"], np.asarray(restored))
    padded = np.pad(after["0"][:], ((0, 0),) * 3 + ((0, 1),), mode="edge")
    same(after["1"], halved(padded))
    assert (after["1"].shape, after["1"].chunks) == (levels[1].shape, (1, 1, 64, 64))


def test_colours_of_a_stained_slide_stay_first(tiny_weights, tmp_path):
    finest = grey(3, 96, 128)
    source = write_ome(tmp_path / "in.zarr", [finest], "cyx", chunks=(3, 64, 64))
    assert layout_of(source).colours == 0
    restore_zarr(source, tmp_path / "out.zarr", "blur", weights=tiny_weights, block=64)
    lazy = restore_lazily(
        np.moveaxis(finest, 0, -1), "blur", weights=tiny_weights, rgb=True, block=64
    )
    same(zarr.open(str(tmp_path / "out.zarr/0")), np.moveaxis(np.asarray(lazy.image), -1, 0))


@pytest.mark.parametrize(
    ("shape", "options", "chunks"),
    [
        ((100, 130), {"chunks": (50, 70)}, (64, 64)),
        ((2, 100, 130), {"chunks": (2, 64, 64)}, (1, 64, 64)),
        ((128, 128), {"chunks": (16, 16), "shards": (48, 48)}, (64, 64)),
        ((128, 128), {"chunks": (16, 16), "shards": (32, 32)}, (16, 16)),
    ],
)
def test_no_two_blocks_share_a_file(tiny_weights, tmp_path, shape, options, chunks):
    array = grey(*shape)
    source = write(tmp_path / "in.zarr", array, **options)
    restore_zarr(source, tmp_path / "out.zarr", "rain", weights=tiny_weights, block=64)
    out = zarr.open(str(tmp_path / "out.zarr"))
    assert out.chunks == chunks
    same(out, np.asarray(restore_lazily(array, "rain", weights=tiny_weights, block=64).image))


def test_a_clean_picture_is_copied(tiny_weights, tmp_path):
    from skimage.data import camera

    source = write(tmp_path / "in.zarr", camera(), chunks=(128, 128))
    done = restore_zarr(source, tmp_path / "out.zarr", weights=tiny_weights)
    assert not done.changed
    out = zarr.open(str(tmp_path / "out.zarr"))
    same(out, camera())
    assert out.attrs["dfpir"][0]["steps"] == []


class Interruption:
    """Takes steps until `fraction` of the work is done, then interrupts."""

    def __init__(self, fraction):
        self.fraction, self.seen = fraction, []

    def __call__(self, step):
        self.seen.append(step.fraction)
        if step.fraction > self.fraction:
            raise KeyboardInterrupt


def names(folder):
    return sorted(path.name for path in folder.iterdir() if "zarr" in path.name)


def interrupt(source, output, kind, fraction=0.5, **options):
    """Restore until a part is done; return the error that ended it."""
    with pytest.raises(KeyboardInterrupt) as caught:
        restore_zarr(source, output, kind, **options, on_step=Interruption(fraction))
    return caught.value


def test_an_interrupted_run_leaves_the_old_output_and_is_continued(
    tiny_weights, tmp_path, monkeypatch
):
    picture = grey(200, 200)
    source = write(tmp_path / "in.zarr", picture, chunks=(64, 64))
    output = write(tmp_path / "out.zarr", grey(8, 8), chunks=(8, 8))
    options = {"weights": tiny_weights, "block": 64}
    error = interrupt(source, output, "rain", overwrite=True, **options)
    assert error.__notes__ == ["What is finished is kept; the same command goes on with it."]
    same(zarr.open(str(output)), grey(8, 8))
    [draft, *others] = names(tmp_path)
    assert others == ["in.zarr", "out.zarr"] and draft.startswith(".out.zarr.")
    assert draft.endswith(".part")
    # What a kill in the midst of writing leaves.
    with (tmp_path / draft / "finished.txt").open("a") as file:
        file.write("0 8")
    (tmp_path / draft / "content" / "c.partial").touch()

    done = []
    put = zarr_files.put
    monkeypatch.setattr(zarr_files, "put", lambda *args: (done.append(args[2]), put(*args)))
    steps = Interruption(1)
    restore_zarr(source, output, "rain", **options, overwrite=True, on_step=steps)
    assert steps.seen == sorted(steps.seen)
    # Of 9 blocks five were noted; one more may have been written.
    assert len(done) == 4
    same(zarr.open(str(output)), np.asarray(restore_lazily(picture, "rain", **options).image))
    assert names(tmp_path) == ["in.zarr", "out.zarr"]
    assert not list(output.rglob("*.partial"))


@pytest.mark.parametrize("change", ["settings", "input"])
def test_a_draft_of_something_else_is_not_used(tiny_weights, tmp_path, change):
    source = write(tmp_path / "in.zarr", grey(200, 200), chunks=(64, 64))
    output = tmp_path / "out.zarr"
    options = {"weights": tiny_weights, "block": 64}
    interrupt(source, output, "rain", **options)
    kind = "blur" if change == "settings" else "rain"
    if change == "input":
        zarr.open(str(source), mode="r+")[:64, :64] = 3
    picture = zarr.open(str(source))[:]
    restore_zarr(source, output, kind, **options)
    same(zarr.open(str(output)), np.asarray(restore_lazily(picture, kind, **options).image))
    assert names(tmp_path) == ["in.zarr", "out.zarr"]


def test_cancelling_before_the_first_block_leaves_nothing(tiny_weights, tmp_path):
    source = write(tmp_path / "in.zarr", grey(200, 200), chunks=(64, 64))
    error = interrupt(source, tmp_path / "out.zarr", "rain", fraction=0, weights=tiny_weights)
    assert not hasattr(error, "__notes__")
    assert names(tmp_path) == ["in.zarr"]


def test_a_source_that_changes_meanwhile_is_noticed(tiny_weights, tmp_path):
    source = write(tmp_path / "in.zarr", grey(200, 200), chunks=(64, 64))

    def change(step):
        if step.fraction > 0.5:
            zarr.open(str(source), mode="r+")[:64, :64] = 3

    options = {"weights": tiny_weights, "block": 64}
    with pytest.raises(ValueError, match=r"in\.zarr has changed while it was restored"):
        restore_zarr(source, tmp_path / "out.zarr", "rain", **options, on_step=change)
    assert not (tmp_path / "out.zarr").exists()


def test_an_output_that_is_done_is_left_alone_by_resume(tiny_weights, tmp_path):
    source = write(tmp_path / "in.zarr", grey(64, 64), chunks=(64, 64))
    output = tmp_path / "out.zarr"
    options = {"weights": tiny_weights, "resume": True}
    first = restore_zarr(source, output, "rain", **options)
    (output / "mine.txt").touch()
    for overwrite in (False, True):
        again = restore_zarr(source, output, "rain", **options, overwrite=overwrite)
        assert (output / "mine.txt").exists()
        assert again.summary == first.summary
        same(again.image, first.image[:])
    with pytest.raises(ValueError, match=r"out.zarr exists and was made from another input or"):
        restore_zarr(source, output, "blur", **options)
    # Another picture of the same shape is another input.
    write(tmp_path / "other.zarr", grey(64, 64, seed=1), chunks=(64, 64))
    with pytest.raises(ValueError, match=r"out.zarr exists and was made from another input or"):
        restore_zarr(tmp_path / "other.zarr", output, "rain", **options)


def test_consolidated_metadata_has_the_record(tiny_weights, tmp_path):
    for version, zarr_format in (("0.4", 2), ("0.5", 3)):
        source = write_ome(tmp_path / f"{version}.zarr", [grey(64, 64)], "yx", version)
        zarr.consolidate_metadata(str(source), zarr_format=zarr_format)
        output = tmp_path / f"{version}-out.zarr"
        restore_zarr(source, output, "rain", weights=tiny_weights)
        opened = zarr.open(str(output), mode="r")
        assert opened.metadata.consolidated_metadata is not None
        assert opened.attrs["dfpir"][0]["steps"] == ["rain"]
        assert opened["0"].shape == (64, 64)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_kill_at_any_moment_then_the_same_again(tiny_weights, tmp_path, thorough):
    """SIGKILL leaves no half output, and what follows equals an undisturbed run."""
    finest = grey(512, 512)
    levels = [finest, halved(finest), halved(halved(finest))]
    source = write_ome(tmp_path / "in.zarr", levels, "yx", chunks=(64, 64))
    output = tmp_path / "out.zarr"
    options = {"weights": tiny_weights, "block": 64, "device": "cpu"}
    expected = np.asarray(restore_lazily(finest, "rain", **options).image)
    code = (
        "import sys; from dfpir.zarr_files import restore_zarr; "
        "restore_zarr(*sys.argv[1:4], weights=sys.argv[4], block=64, device='cpu', resume=True, "
        "on_step=lambda step: print(step.doing, flush=True))"
    )
    command = [sys.executable, "-c", code, *map(str, (source, output, "rain", tiny_weights))]
    moments = random.Random(0)
    for _ in range(20 if thorough else 2):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        # After it has begun, within the first blocks or among the coarser levels.
        for _ in range(moments.choice([1, 5, 20, 40, 70, 80, 200])):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if output.exists():
            same(zarr.open(str(output))["0"], expected)
            same(zarr.open(str(output))["2"], halved(halved(expected)))
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    opened = zarr.open(str(output))
    half = halved(expected)
    for name, level in {"0": expected, "1": half, "2": halved(half)}.items():
        same(opened[name], level)
    assert names(tmp_path) == ["in.zarr", "out.zarr"]


def test_what_cannot_be_restored_is_refused_in_one_line(tiny_weights, tmp_path):
    source = write(tmp_path / "in.zarr", grey(64, 64), chunks=(64, 64))
    other = write(tmp_path / "other.zarr", grey(8, 8), chunks=(8, 8))
    with pytest.raises(ValueError, match=r"other.zarr exists; .* overwrite"):
        restore_zarr(source, other, "rain", weights=tiny_weights)
    with pytest.raises(ValueError, match="is the input"):
        restore_zarr(source, source, "rain", weights=tiny_weights, overwrite=True)
    for inside in (source / "out.zarr", tmp_path):
        with pytest.raises(ValueError, match="one within the other"):
            restore_zarr(source, inside, "rain", weights=tiny_weights, overwrite=True)
    (tmp_path / "results").mkdir()
    with pytest.raises(ValueError, match="results exists and is no zarr folder"):
        restore_zarr(source, tmp_path / "results", "rain", weights=tiny_weights, overwrite=True)
    odd = write_ome(tmp_path / "odd.zarr", [grey(96, 96), grey(64, 64)], "yx")
    with pytest.raises(ValueError, match=r"level of \(64, 64\) lies below one of \(96, 96\)"):
        restore_zarr(odd, tmp_path / "out.zarr", "rain", weights=tiny_weights)
    zarr.create_array(str(tmp_path / "complex.zarr"), shape=(8, 8), dtype="complex64")
    with pytest.raises(ValueError, match="values of type complex64; expected integers or floats"):
        restore_zarr(tmp_path / "complex.zarr", tmp_path / "out.zarr")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(ValueError, match="not a zarr array"):
        restore_zarr(tmp_path / "empty.zarr", tmp_path / "out.zarr")
    zarr.open_group(str(tmp_path / "group.zarr"), mode="w")
    with pytest.raises(ValueError, match=r"not of an OME-Zarr picture .* Copy the array"):
        restore_zarr(tmp_path / "group.zarr", tmp_path / "out.zarr")
    damaged = json.loads((source / "zarr.json").read_text())
    damaged["shape"] = "many"
    (source / "zarr.json").write_text(json.dumps(damaged))
    with pytest.raises(ValueError, match="not a zarr array"):
        restore_zarr(source, tmp_path / "out.zarr")
    assert not (tmp_path / "out.zarr").exists()


def test_the_command_line_restores_one_zarr(tiny_weights, tmp_path, capsys):
    source = write(tmp_path / "in.zarr", grey(64, 64), chunks=(64, 64))
    told = ["--degradation", "rain", "--weights", str(tiny_weights)]
    line = ["restore", str(source), "-o", str(tmp_path / "out.zarr"), *told]
    assert cli.main(line) == 0
    assert capsys.readouterr().out.startswith(f"{source} -> {tmp_path / 'out.zarr'}: ")
    assert cli.main(line) == 1
    assert "exists" in capsys.readouterr().err
    assert cli.main([*line, "--overwrite"]) == 0
    assert cli.main([*line, "--resume"]) == 0
    assert cli.main([*line, "--block", "40", "--overwrite"]) == 1
    assert "expected a multiple of 16" in capsys.readouterr().err
    assert cli.main([*line, "--compare"]) == 2
    assert "--compare is for pictures" in capsys.readouterr().err
    assert cli.main(["restore", "a.png", "b.zarr", "-o", "out"]) == 2
    assert cli.main(["restore", "a.png", "-o", "b.png", "--scheduler", "tcp://127.0.0.1:1"]) == 2


def test_the_command_line_restores_one_level_alone(tiny_weights, tmp_path, capsys):
    picture = write_ome(tmp_path / "in.zarr", [grey(64, 64), grey(32, 32)], "yx", chunks=(32, 32))
    told = ["--degradation", "rain", "--weights", str(tiny_weights)]
    assert cli.main(["restore", str(picture / "1"), "-o", str(tmp_path / "o.zarr"), *told]) == 0
    assert str(picture / "1") in capsys.readouterr().out
    assert zarr.open(str(tmp_path / "o.zarr"), mode="r").shape == (32, 32)


def test_the_record_of_a_first_restoration_is_kept_by_the_second(tiny_weights, tmp_path):
    write(tmp_path / "0.zarr", grey(64, 64), chunks=(64, 64))
    for number, kind in enumerate(("rain", "haze")):
        places = tmp_path / f"{number}.zarr", tmp_path / f"{number + 1}.zarr"
        restore_zarr(*places, kind, weights=tiny_weights)
    records = zarr.open(str(tmp_path / "2.zarr"), mode="r").attrs["dfpir"]
    assert [each["steps"] for each in records] == [["rain"], ["haze"]]


def test_the_command_line_says_that_an_interrupted_run_can_be_continued(
    tiny_weights, tmp_path, capsys, monkeypatch
):
    source = write(tmp_path / "in.zarr", grey(200, 200), chunks=(200, 200))
    line = ["restore", str(source), "-o", str(tmp_path / "out.zarr"), "--weights"]
    line += [str(tiny_weights), "--degradation", "rain"]
    finish = zarr_files.Draft.finish

    def stop(draft, name):
        finish(draft, name)
        raise KeyboardInterrupt

    monkeypatch.setattr(zarr_files.Draft, "finish", stop)
    assert cli.main(line) == 130
    assert "the same command goes on with it" in capsys.readouterr().err
    monkeypatch.setattr(zarr_files.Draft, "finish", finish)
    assert cli.main(line) == 0
    assert cli.main([*line, "--resume"]) == 0
    assert "was done before" in capsys.readouterr().out


def test_a_worker_that_does_not_see_the_folders_says_so(tmp_path):
    with pytest.raises(OSError, match=r"in\.zarr is not seen on worker"):
        zarr_files.must_see([tmp_path / "in.zarr"])


def test_relative_names_mean_the_same_everywhere(tiny_weights, tmp_path, monkeypatch):
    """Workers that were started in another folder would see nothing, and write elsewhere."""
    distributed = pytest.importorskip("distributed")
    write(tmp_path / "in.zarr", grey(96, 96), chunks=(96, 96))
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, dashboard_address=None
    ) as cluster:
        monkeypatch.chdir(tmp_path)
        restore_zarr(
            "in.zarr",
            "out.zarr",
            "rain",
            weights=tiny_weights.relative_to(tmp_path),
            scheduler=cluster.scheduler_address,
        )
    expected = restore_lazily(grey(96, 96), "rain", weights=tiny_weights).image
    found = zarr.open(str(tmp_path / "out.zarr"))[:]
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 1


def test_a_scheduler_that_does_not_answer_is_named(tiny_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(zarr_files, "ANSWER_SECONDS", 1)
    source = write(tmp_path / "in.zarr", grey(64, 64), chunks=(64, 64))
    with pytest.raises(OSError, match=r"127.0.0.1:1"):
        restore_zarr(
            source,
            tmp_path / "out.zarr",
            "rain",
            weights=tiny_weights,
            scheduler="tcp://127.0.0.1:1",
        )
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_worker_killed_halfway_changes_nothing(tiny_weights, tmp_path):
    distributed = pytest.importorskip("distributed")
    source = write(tmp_path / "in.zarr", grey(640, 640), chunks=(128, 128))
    expected = np.asarray(
        restore_lazily(grey(640, 640), "haze", weights=tiny_weights, block=128).image
    )
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None
    ) as cluster:
        first = next(iter(cluster.workers.values()))
        killed = []

        def kill(step):
            if step.fraction > 0.3 and not killed:
                killed.append(first.process.pid)
                os.kill(first.process.pid, signal.SIGKILL)

        restore_zarr(
            source,
            tmp_path / "out.zarr",
            "haze",
            weights=tiny_weights,
            block=128,
            scheduler=cluster.scheduler_address,
            on_step=kill,
        )
    assert killed
    found = zarr.open(str(tmp_path / "out.zarr"))[:]
    # Sums come out a little different with other numbers of threads.
    assert np.abs(found.astype(int) - expected).max() <= 1
