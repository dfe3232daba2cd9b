"""Zarr folders: the same layout restored, whole or not at all, here and on a cluster."""

import json
import os
import signal

import numpy as np
import pytest

from dfpir import checkpoint, cli, zarr_files
from dfpir.slides import restore_lazily
from dfpir.zarr_files import layout_of, restore_zarr

zarr = pytest.importorskip("zarr")


@pytest.fixture
def tiny(tiny_model, tmp_path):
    """A file of tiny weights."""
    path = tmp_path / "tiny.safetensors"
    checkpoint.save(tiny_model, path)
    return path


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
def test_a_plain_array_keeps_all_but_its_values(tiny, tmp_path, zarr_format):
    array = grey(150, 200, dtype=np.uint16)
    source = write(
        tmp_path / "in.zarr",
        array,
        chunks=(64, 64),
        attributes={"stain": "DAPI"},
        zarr_format=zarr_format,
        fill_value=3,
    )
    done = restore_zarr(source, tmp_path / "out.zarr", "rain", weights=tiny, block=64)
    out = zarr.open(str(tmp_path / "out.zarr"), mode="r")
    assert (out.shape, out.dtype, out.chunks, out.fill_value) == ((150, 200), "uint16", (64, 64), 3)
    assert out.metadata.zarr_format == zarr_format and out.attrs["stain"] == "DAPI"
    assert out.compressors == zarr.open(str(source), mode="r").compressors
    assert out.attrs["dfpir"][0]["steps"] == ["rain"]
    same(out, np.asarray(restore_lazily(array, "rain", weights=tiny, block=64).image))
    same(done.image, out[:])
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_an_ome_zarr_keeps_its_channels_labels_and_levels(tiny, tmp_path, version):
    finest = grey(2, 3, 130, 161, dtype=np.uint16)
    levels = [finest, halved(np.pad(finest, ((0, 0),) * 3 + ((0, 1),), mode="edge"))]
    source = write_ome(tmp_path / "in.zarr", levels, "tcyx", version, chunks=(1, 1, 64, 64))
    done = restore_zarr(source, tmp_path / "out.zarr", "noise-25", weights=tiny, block=64)
    before, after = (
        zarr.open(str(source), mode="r"),
        zarr.open(str(tmp_path / "out.zarr"), mode="r"),
    )
    assert len(done.records) == 3 and len(after.attrs["dfpir"]) == 3
    attributes = dict(after.attrs)
    del attributes["dfpir"]
    assert attributes == dict(before.attrs)
    same(after["labels/cells"], np.full((4, 4), 7))
    restored = restore_lazily(finest, "noise-25", weights=tiny, channel_axis=1, block=64).image
    same(after["0"], np.asarray(restored))
    padded = np.pad(after["0"][:], ((0, 0),) * 3 + ((0, 1),), mode="edge")
    same(after["1"], halved(padded))
    assert (after["1"].shape, after["1"].chunks) == (levels[1].shape, (1, 1, 64, 64))


def test_colours_of_a_stained_slide_stay_first(tiny, tmp_path):
    finest = grey(3, 96, 128)
    source = write_ome(tmp_path / "in.zarr", [finest], "cyx", chunks=(3, 64, 64))
    assert layout_of(source).colours == 0
    restore_zarr(source, tmp_path / "out.zarr", "blur", weights=tiny, block=64)
    lazy = restore_lazily(np.moveaxis(finest, 0, -1), "blur", weights=tiny, rgb=True, block=64)
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
def test_no_two_blocks_share_a_file(tiny, tmp_path, shape, options, chunks):
    array = grey(*shape)
    source = write(tmp_path / "in.zarr", array, **options)
    restore_zarr(source, tmp_path / "out.zarr", "rain", weights=tiny, block=64)
    out = zarr.open(str(tmp_path / "out.zarr"))
    assert out.chunks == chunks
    same(out, np.asarray(restore_lazily(array, "rain", weights=tiny, block=64).image))


def test_a_clean_picture_is_copied(tiny, tmp_path):
    from skimage.data import camera

    source = write(tmp_path / "in.zarr", camera(), chunks=(128, 128))
    done = restore_zarr(source, tmp_path / "out.zarr", weights=tiny)
    assert not done.changed
    out = zarr.open(str(tmp_path / "out.zarr"))
    same(out, camera())
    assert out.attrs["dfpir"][0]["steps"] == []


def test_cancelling_leaves_nothing_and_the_old_output(tiny, tmp_path):
    source = write(tmp_path / "in.zarr", grey(200, 200), chunks=(64, 64))
    output = write(tmp_path / "out.zarr", grey(8, 8), chunks=(8, 8))

    def stop(step):
        seen.append(step.fraction)
        if step.fraction > 0.5:
            raise KeyboardInterrupt

    seen = []
    with pytest.raises(KeyboardInterrupt):
        restore_zarr(source, output, "rain", weights=tiny, block=64, overwrite=True, on_step=stop)
    assert seen == sorted(seen)
    same(zarr.open(str(output)), grey(8, 8))
    assert sorted(path.name for path in tmp_path.glob("*.zarr*")) == ["in.zarr", "out.zarr"]
    assert not list(tmp_path.glob(".*"))
    restore_zarr(source, output, "rain", weights=tiny, block=64, overwrite=True)
    assert zarr.open(str(output)).shape == (200, 200)
    assert not list(tmp_path.glob(".*"))


def test_what_cannot_be_restored_is_refused_in_one_line(tiny, tmp_path):
    source = write(tmp_path / "in.zarr", grey(64, 64), chunks=(64, 64))
    other = write(tmp_path / "other.zarr", grey(8, 8), chunks=(8, 8))
    with pytest.raises(ValueError, match=r"other.zarr exists; .* overwrite"):
        restore_zarr(source, other, "rain", weights=tiny)
    with pytest.raises(ValueError, match="is the input"):
        restore_zarr(source, source, "rain", weights=tiny, overwrite=True)
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(ValueError, match="not a zarr array"):
        restore_zarr(tmp_path / "empty.zarr", tmp_path / "out.zarr")
    zarr.open_group(str(tmp_path / "group.zarr"), mode="w")
    with pytest.raises(ValueError, match=r"not of an OME-Zarr picture .* Name the array"):
        restore_zarr(tmp_path / "group.zarr", tmp_path / "out.zarr")
    damaged = json.loads((source / "zarr.json").read_text())
    damaged["shape"] = "many"
    (source / "zarr.json").write_text(json.dumps(damaged))
    with pytest.raises(ValueError, match="not a zarr array"):
        restore_zarr(source, tmp_path / "out.zarr")
    assert not (tmp_path / "out.zarr").exists()


def test_the_command_line_restores_one_zarr(tiny, tmp_path, capsys):
    source = write(tmp_path / "in.zarr", grey(64, 64), chunks=(64, 64))
    told = ["--degradation", "rain", "--weights", str(tiny)]
    line = ["restore", str(source), "-o", str(tmp_path / "out.zarr"), *told]
    assert cli.main(line) == 0
    assert capsys.readouterr().out.startswith(f"{source} -> {tmp_path / 'out.zarr'}: ")
    assert cli.main(line) == 1
    assert "exists" in capsys.readouterr().err
    assert cli.main([*line, "--overwrite"]) == 0
    assert cli.main([*line, "--resume"]) == 2
    assert "--resume is for pictures" in capsys.readouterr().err
    assert cli.main(["restore", "a.png", "b.zarr", "-o", "out"]) == 2
    assert cli.main(["restore", "a.png", "-o", "b.png", "--scheduler", "tcp://127.0.0.1:1"]) == 2


def test_a_scheduler_that_does_not_answer_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(zarr_files, "ANSWER_SECONDS", 1)
    source = write(tmp_path / "in.zarr", grey(64, 64), chunks=(64, 64))
    with pytest.raises(OSError, match=r"127.0.0.1:1"):
        restore_zarr(
            source, tmp_path / "out.zarr", "rain", weights=tiny, scheduler="tcp://127.0.0.1:1"
        )
    assert not list(tmp_path.glob(".*"))


def test_a_worker_killed_halfway_changes_nothing(tiny, tmp_path):
    distributed = pytest.importorskip("distributed")
    source = write(tmp_path / "in.zarr", grey(640, 640), chunks=(128, 128))
    expected = np.asarray(restore_lazily(grey(640, 640), "haze", weights=tiny, block=128).image)
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
            weights=tiny,
            block=128,
            scheduler=cluster.scheduler_address,
            on_step=kill,
        )
    assert killed
    found = zarr.open(str(tmp_path / "out.zarr"))[:]
    # Sums come out a little different with other numbers of threads.
    assert np.abs(found.astype(int) - expected).max() <= 1
