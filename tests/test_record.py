"""Hashes tell arrays apart; records say how intensities fared and travel with the picture."""

import json

import numpy as np
import pytest

from dfpir.record import LinearitySums, array_hash, save_with_record


def test_hash_depends_on_values_shape_and_dtype_only():
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert array_hash(array) == array_hash(np.asfortranarray(array))
    different = [array + 1, array.reshape(4, 3), array.astype(np.uint16)]
    assert len({array_hash(each) for each in [array, *different]}) == 4


def line_through(raw, restored, parts=1):
    sums = LinearitySums()
    for some in zip(np.array_split(raw, parts), np.array_split(restored, parts), strict=True):
        sums.add(*some)
    return sums.report()


@pytest.mark.parametrize(("slope", "offset"), [(1.0, 0.0), (0.5, 200.0), (2.0, -3000.0)])
def test_the_line_from_restored_to_raw_is_found(slope, offset):
    generator = np.random.default_rng(0)
    restored = generator.uniform(5000, 9000, (200, 300))
    raw = slope * restored + offset + generator.normal(0, 100, restored.shape)
    found = line_through(raw.astype(np.float32), restored.astype(np.float32), parts=7)
    assert found.slope == pytest.approx(slope, abs=0.01)
    assert found.offset == pytest.approx(offset, abs=30)
    assert found.mean_drift == pytest.approx(float(restored.mean() - raw.mean()), abs=0.1)
    assert found.span == pytest.approx(np.subtract(*np.percentile(raw, [99, 1])), rel=0.01)


def test_clipped_values_are_those_that_reached_an_end():
    raw = np.array([0, 10, 250, 255], np.uint8)
    found = line_through(raw, np.array([0, 0, 255, 255], np.uint8))
    assert found.clipped_fraction == 0.5
    assert line_through(raw.astype(float), raw * 2.0).clipped_fraction == 0


def test_no_line_through_a_point():
    flat = np.full((4, 4), 7, np.uint16)
    found = line_through(flat, flat)
    assert found.slope is None and found.mean_drift == 0 and "no line" in found.summary
    assert LinearitySums().report() is None


def write(path, array, **options):
    return save_with_record(
        path,
        list(array),
        shape=array.shape,
        dtype=array.dtype,
        axes="ZYX",
        records=[{"weights": "w"}],
        **options,
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_picture_and_record_are_written_together(tmp_path, dtype):
    tifffile = pytest.importorskip("tifffile")
    array = np.arange(2 * 16 * 16, dtype=dtype).reshape(2, 16, 16)
    picture, record = write(tmp_path / "a.ome.tif", array)
    np.testing.assert_array_equal(tifffile.imread(picture), array)
    assert json.loads(record.read_text())["dfpir"] == [{"weights": "w"}]


def test_nothing_is_overwritten_or_left_half(tmp_path):
    pytest.importorskip("tifffile")
    array = np.zeros((2, 16, 16), np.uint16)
    path, _ = write(tmp_path / "a.tif", array)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="exists"):
        write(path, array)

    def fail():
        yield array[0]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        save_with_record(
            path,
            fail(),
            shape=array.shape,
            dtype=array.dtype,
            axes="ZYX",
            records=[],
            overwrite=True,
        )
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("name", "dtype"), [("a.png", np.uint8), ("a.tif", np.float16)])
def test_what_a_tiff_cannot_be_is_refused(tmp_path, name, dtype):
    pytest.importorskip("tifffile")
    with pytest.raises(ValueError, match=r"choose such a name|convert"):
        write(tmp_path / name, np.zeros((1, 4, 4), dtype))
