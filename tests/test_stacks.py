"""Stacks: one range, one verdict, plane by plane, in memory and out of it."""

import gc
import itertools
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from conftest import SMALL_COMPACT, random_model
from dfpir import stacks, targets
from dfpir.degradation import Degradation, Diagnosis, caution
from dfpir.pixels import PixelError, natural_range
from dfpir.record import array_hash, describe
from dfpir.restorer import Restorer
from dfpir.stacks import (
    Reporter,
    Selection,
    classify_stack,
    measure_range,
    preview,
    residual,
    restore_stack,
    restore_steps,
    save_stack,
    steps_of,
)


@pytest.fixture
def restorer(tiny_model):
    return Restorer(model=tiny_model)


def counts(*shape, dtype=np.uint16, seed=0):
    """Grey levels of a camera: an offset, a scene, noise."""
    generator = np.random.default_rng(seed)
    scene = 300 + 200 * np.sin(np.arange(shape[-1]) / 5)
    return (scene + generator.normal(0, 30, shape)).astype(dtype)


def same(found, expected):
    found = np.asarray(found)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    np.testing.assert_array_equal(found, expected)


# One plane, one range, one verdict


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_one_plane_is_what_the_restorer_makes_of_it(restorer, dtype):
    plane = counts(40, 48, dtype=dtype)
    done = restore_stack(plane, "noise-25", restorer=restorer)
    expected = restorer.restore(plane, "noise-25")
    same(done.image, expected.image)
    record = done.records[0]
    assert record.input_sha256 == array_hash(plane) == expected.record.input_sha256
    assert record.value_range == expected.record.value_range


def test_a_stack_is_what_the_restorer_makes_of_a_stack_of_grey_images(restorer):
    stack = counts(3, 32, 40)
    done = restore_stack(stack, "noise-25", restorer=restorer)
    same(done.image, restorer.restore(stack[..., None], "noise-25").image[..., 0])
    assert done.records[0].input_sha256 == array_hash(stack)


def test_colours_and_alpha(restorer, photograph):
    alpha = np.arange(128 * 160, dtype=np.uint8).reshape(128, 160, 1)
    stack = np.stack([np.concatenate([photograph, alpha], axis=-1)] * 2)[:, :48, :64]
    done = restore_stack(stack, "rain", restorer=restorer, rgb=True)
    same(done.image, restorer.restore(stack, "rain").image)
    same(done.image[..., 3], stack[..., 3])


@given(
    arrays(
        st.sampled_from([np.uint16, np.int16, np.float32]),
        st.tuples(st.integers(1, 4), st.integers(1, 60), st.integers(1, 60)),
        elements=st.integers(0, 1000),
    )
)
@settings(max_examples=60, deadline=None)
def test_the_range_of_a_stack_is_that_of_all_its_pixels(stack):
    selection = Selection.of(stack)
    found = measure_range(stack, selection, selection.planes, Reporter(None))
    assert found == natural_range(stack, grey=True)


def test_the_range_keeps_the_largest_values_of_many_planes():
    stack = np.random.default_rng(1).normal(size=(7, 100, 150)).astype(np.float32)
    selection = Selection.of(stack)
    found = measure_range(stack, selection, selection.planes, Reporter(None))
    assert found == natural_range(stack, grey=True)


def test_the_verdict_is_one_and_by_vote(restorer, monkeypatch):
    noisy = Diagnosis("degraded", Degradation.NOISE_50, {"noise-50": 0.9, "clean": 0.1}, 50.0)
    clean = Diagnosis("clean", None, {"noise-50": 0.1, "clean": 0.9})
    votes = iter([noisy, clean, noisy])
    monkeypatch.setattr(restorer, "classify_pixels", lambda pixels: [next(votes)])
    stack = counts(3, 32, 32)
    done = restore_stack(stack, restorer=restorer)
    assert done.diagnoses[0].degradation is Degradation.NOISE_50
    same(done.image, restore_stack(stack, "noise-50", restorer=restorer).image)
    assert done.records[0].diagnosis["told"] is False


def test_what_the_weights_do_not_know_is_left_with_a_remark(monkeypatch):
    few = replace(SMALL_COMPACT, degradations=tuple(Degradation)[:5])
    restorer = Restorer(model=random_model(few))
    found = Diagnosis("degraded", Degradation.BLUR, {"blur": 0.9, "clean": 0.1})
    monkeypatch.setattr(restorer, "classify_pixels", lambda pixels: [found])
    stack = counts(2, 32, 32)
    done = restore_stack(stack, restorer=restorer)
    assert done.image is stack and done.diagnoses == (found,)
    assert "not trained for 'blur'" in done.records[0].notes[0]
    sample = preview(stack, (0,), (slice(0, 16), slice(0, 16)), restorer=restorer)
    same(sample.image, stack[0, :16, :16])
    assert sample.records[0].notes == done.records[0].notes


@pytest.mark.parametrize("verdict", ["clean", "unsure"])
def test_auto_leaves_what_it_is_not_sure_of(restorer, monkeypatch, verdict):
    found = Diagnosis(verdict, Degradation.HAZE, {"haze": 0.4, "clean": 0.6})
    monkeypatch.setattr(restorer, "classify_pixels", lambda pixels: [found])
    stack = counts(2, 32, 32)
    done = restore_stack(stack, restorer=restorer)
    assert done.image is stack and not done.changed and done.records[0].steps == ()


def test_at_most_sixteen_planes_vote(restorer, monkeypatch):
    seen = []
    found = Diagnosis("clean", None, {"clean": 1.0})
    monkeypatch.setattr(restorer, "classify_pixels", lambda pixels: seen.append(1) or [found])
    classify_stack(np.zeros((40, 8, 8), np.uint8), restorer=restorer)
    assert len(seen) == stacks.VOTERS


@pytest.mark.parametrize(("gain", "offset"), itertools.product([1, 16, 257], [0, 100]))
def test_gain_and_offset_of_a_camera_do_not_matter(restorer, gain, offset):
    stack = counts(2, 32, 32) // 4
    once = restore_stack(stack, "noise-25", restorer=restorer).image
    scaled = stack * gain + offset
    twice = restore_stack(scaled, "noise-25", restorer=restorer)
    assert twice.image.dtype == np.uint16
    error = twice.image.astype(float) - (once.astype(float) * gain + offset)
    assert np.abs(error).max() <= 0.5 * gain + 1


# Which part of a stack


def test_other_planes_stay(restorer):
    stack = counts(2, 3, 32, 32)
    done = restore_stack(stack, "noise-25", restorer=restorer, planes=[(1, 2)])
    changed = (done.image != stack).any(axis=(2, 3))
    assert changed.tolist() == [[False, False, False], [False, False, True]]
    same(done.image[1, 2], restorer.restore(stack[1, 2], "noise-25").image)
    assert done.records[0].scope == {"shape": [2, 3, 32, 32], "planes": [[1, 2]]}
    assert done.records[0].input_sha256 == array_hash(stack[1, 2])


def test_channels_are_treated_on_their_own(restorer):
    stack = np.stack([counts(2, 32, 32), counts(2, 32, 32, seed=1) * 7])
    done = restore_stack(stack, "noise-25", restorer=restorer, channel_axis=0)
    for channel in range(2):
        alone = restore_stack(stack[channel], "noise-25", restorer=restorer)
        same(done.image[channel], alone.image)
        assert done.records[channel].value_range == alone.records[0].value_range
        assert done.records[channel].scope["channel"] == channel


def test_a_mask_bounds_what_changes_and_what_is_read(restorer):
    plane = counts(200, 240)
    mask = np.zeros((200, 240), bool)
    mask[90:120, 100:130] = True
    done = restore_stack(plane, "noise-25", restorer=restorer, mask=mask)
    same(done.image[~mask], plane[~mask])
    assert (done.image[mask] != plane[mask]).mean() > 0.5
    assert done.records[0].masked and done.records[0].linearity.values == mask.sum()
    elsewhere = plane.copy()
    elsewhere[:20, :20] = elsewhere[20:40, 20:40]
    again = restore_stack(
        elsewhere,
        "noise-25",
        restorer=restorer,
        mask=mask,
        value_range=done.records[0].value_range,
    )
    same(again.image[mask], done.image[mask])


def test_no_plane_is_no_choice(restorer):
    with pytest.raises(PixelError, match="No plane is chosen"):
        restore_stack(counts(3, 32, 40), "noise-25", restorer=restorer, planes=[])


def test_records_tell_what_was_remarked(restorer, monkeypatch):
    """What is remarked on each plane stands in the stack's record once."""
    whole = restorer.restore

    def remarking(*arguments, **options):
        done = whole(*arguments, **options)
        record = replace(done.record, notes=("Memory was short.",), statistics="sampled")
        return replace(done, record=record)

    monkeypatch.setattr(restorer, "restore", remarking)
    [record] = restore_stack(counts(3, 32, 40), "noise-25", restorer=restorer).records
    assert record.notes == ("Memory was short.",) and record.statistics == "sampled"


def test_alpha_is_no_measurement(restorer):
    generator = np.random.default_rng(0)
    opaque = generator.integers(0, 200, (32, 40, 4), dtype=np.uint8)
    opaque[..., 3] = 255
    with_alpha, without = (
        restore_stack(each, "rain", restorer=restorer, rgb=True).records[0].linearity
        for each in (opaque, opaque[..., :3])
    )
    assert with_alpha == without and with_alpha.values == 3 * 32 * 40


def test_a_mask_for_each_plane(restorer):
    stack = counts(3, 48, 48)
    labels = np.zeros(stack.shape, np.int32)
    labels[1, 10:30, 10:30] = 1
    done = restore_stack(stack, "noise-25", restorer=restorer, mask=labels > 0)
    same(done.image[[0, 2]], stack[[0, 2]])
    assert done.records[0].scope["planes"] == [[1]]


def test_preview_is_a_part_of_the_plane(restorer):
    stack = counts(3, 96, 96)
    done = preview(
        stack, (1,), (slice(10, 50), slice(20, 80)), "noise-25", restorer=restorer, planes=[(1,)]
    )
    assert done.image.shape == (40, 60) and done.image.dtype == stack.dtype
    assert (done.image != stack[1, 10:50, 20:80]).any()
    whole = preview(stack, (1,), (slice(0, 96), slice(0, 96)), "noise-25", restorer=restorer)
    same(whole.image, restore_stack(stack, "noise-25", restorer=restorer).image[1])


@pytest.mark.parametrize("name", ["clean", "noise"])
def test_a_preview_is_recorded_as_it_was_judged(restorer, monkeypatch, name):
    kinds = {"clean": 0.0, "noise-25": 0.0} | {name if name == "clean" else "noise-25": 1.0}
    noisy = name == "noise"
    found = Diagnosis(
        "degraded" if noisy else "clean", Degradation.NOISE_25 if noisy else None, kinds
    )
    monkeypatch.setattr(restorer, "classify_pixels", lambda pixels: [found])
    stack = counts(2, 48, 48)
    box = (slice(0, 32), slice(0, 32))
    done = preview(stack, (1,), box, restorer=restorer, strength=0.5)
    assert done.diagnoses == (found,) and (done.image != stack[1, :32, :32]).any() == noisy
    [record] = done.records
    assert record.diagnosis == describe(found) and record.strength == 0.5
    assert record.steps == (("noise-25",) if noisy else ())


# Out of memory


class Spy:
    """An array that notes what is read from it and refuses to be written to."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.ndim = array, array.shape, array.dtype, array.ndim
        self.largest = 0

    def __getitem__(self, key):
        part = self.array[key]
        self.largest = max(self.largest, part.size)
        return part


def as_kind(kind, array, folder):
    if kind == "dask":
        return pytest.importorskip("dask.array").from_array(array, chunks=(1, 1, 16, 16))
    if kind == "zarr":
        zarr = pytest.importorskip("zarr")
        source = zarr.open_array(
            str(folder / "in.zarr"), mode="w", shape=array.shape, dtype=array.dtype
        )
        source[...] = array
        return source
    if kind == "xarray":
        xarray = pytest.importorskip("xarray")
        return xarray.DataArray(
            array, dims=("t", "z", "y", "x"), coords={"z": [0.0, 0.5]}, attrs={"unit": "counts"}
        )
    path = folder / "in.npy"
    np.save(path, array)
    return np.load(path, mmap_mode="r")


@pytest.mark.parametrize("kind", ["dask", "zarr", "xarray", "memmap"])
@pytest.mark.parametrize("planes", [None, [(0, 1)]])
def test_lazy_stacks_give_lazy_results(restorer, tmp_path, kind, planes):
    pytest.importorskip("dask.array")
    pytest.importorskip("zarr")
    array = counts(2, 2, 32, 40)
    source = as_kind(kind, array, tmp_path)
    options = {"restorer": restorer, "planes": planes}
    expected = restore_stack(array, "noise-25", **options)
    done = restore_stack(source, "noise-25", **options)
    same(done.image, expected.image)
    same(source, array)
    assert done.records[0].input_sha256 == expected.records[0].input_sha256
    if kind in ("dask", "xarray") or (kind == "zarr" and planes is None):
        assert type(done.image) is type(source)
    if kind == "xarray":
        assert done.image.dims == source.dims and done.image.attrs == source.attrs


def test_lazy_stacks_are_read_by_planes(restorer):
    pytest.importorskip("dask.array")
    pytest.importorskip("zarr")
    array = counts(4, 32, 40)
    spy = Spy(array)
    done = restore_stack(spy, "noise-25", restorer=restorer)
    assert spy.largest == 32 * 40
    same(done.image, restore_stack(array, "noise-25", restorer=restorer).image)
    partly = restore_stack(Spy(array), "noise-25", restorer=restorer, planes=[(2,)]).image
    for key in [(2,), (slice(1, 4), 3), (Ellipsis, slice(3, 9)), (slice(None, None, 2),)]:
        same(partly[key], np.asarray(partly)[key])


def test_a_temporary_result_lives_as_long_as_it_is_used(restorer, tmp_path, monkeypatch):
    pytest.importorskip("dask.array")
    pytest.importorskip("zarr")
    monkeypatch.setattr(targets.tempfile, "tempdir", str(tmp_path))
    part = restore_stack(Spy(counts(2, 32, 32)), "noise-25", restorer=restorer, planes=[(0,)]).image
    part = part[0] + 1
    gc.collect()
    assert list(tmp_path.iterdir()) and part.sum().compute() > 0
    del part
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_output_is_written_where_it_is_wanted_or_not_at_all(restorer, tmp_path):
    zarr = pytest.importorskip("zarr")
    stack, output = counts(2, 32, 32), tmp_path / "out.zarr"

    def interrupt(step):
        if step.fraction > 0.7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restore_stack(stack, "noise-25", restorer=restorer, output=output, on_step=interrupt)
    assert not list(tmp_path.iterdir())
    done = restore_stack(stack, "noise-25", restorer=restorer, output=output)
    same(zarr.open_array(str(output), mode="r")[...], np.asarray(done.image))
    assert [path.name for path in tmp_path.iterdir()] == ["out.zarr"]
    with pytest.raises(ValueError, match="exists and was left"):
        restore_stack(stack, "noise-25", restorer=restorer, output=output)


@pytest.mark.parametrize("lazy", [False, True])
def test_an_output_has_the_planes_that_were_not_asked_for_too(restorer, tmp_path, lazy):
    zarr = pytest.importorskip("zarr")
    stack, output = counts(3, 32, 32), tmp_path / "out.zarr"
    given = Spy(stack) if lazy else stack
    done = restore_stack(given, "noise-25", restorer=restorer, planes=[(1,)], output=output)
    written = zarr.open_array(str(output), mode="r")[...]
    same(written[[0, 2]], stack[[0, 2]])
    assert (written[1] != stack[1]).any()
    same(written, np.asarray(done.image))


def test_without_zarr_the_message_says_what_to_do(restorer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zarr", None)
    with pytest.raises(ImportError, match=r"dfpir\[stacks\]"):
        restore_stack(Spy(counts(2, 32, 32)), "noise-25", restorer=restorer)


# Levels of resolution


def test_levels_are_rebuilt_from_the_finest(restorer):
    finest = counts(64, 80)
    levels = [finest, finest[::2, ::2], finest[::4, ::4]]
    done = restore_stack(levels, "noise-25", restorer=restorer)
    same(done.image[0], restorer.restore(finest, "noise-25").image)
    blocks = done.image[0].reshape(32, 2, 40, 2).astype(float).mean(axis=(1, 3))
    same(done.image[1], np.rint(blocks).astype(np.uint16))
    assert [level.shape for level in done.image] == [level.shape for level in levels]


def test_levels_keep_what_is_not_restored(restorer):
    finest = counts(4, 64, 64)
    levels = [finest, finest[::2, ::2, ::2]]
    mask = np.zeros((64, 64), bool)
    mask[:16, :16] = True
    done = restore_stack(levels, "noise-25", restorer=restorer, planes=[(2,)], mask=mask)
    changed = done.image[1] != levels[1]
    assert changed[1, :8, :8].any()
    changed[1, :8, :8] = False
    assert not changed.any()


# Steps


def drain(steps):
    seen = []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as stop:
            return seen, stop.value


def test_steps_rise_to_the_end(restorer, monkeypatch):
    monkeypatch.setattr(stacks, "STEP_SECONDS", 0)
    stack = counts(3, 32, 32)
    seen, done = drain(restore_steps(stack, "noise-25", restorer=restorer, threads=1))
    fractions = [step.fraction for step in seen]
    assert fractions == sorted(fractions) and fractions[0] == 0 and fractions[-1] == 1
    assert any("plane 2 of 3" in step.doing for step in seen)
    same(done.image, restore_stack(stack, "noise-25", restorer=restorer).image)


def test_closing_the_steps_ends_the_work(restorer, monkeypatch):
    monkeypatch.setattr(stacks, "STEP_SECONDS", 0)
    steps = restore_steps(counts(50, 64, 64), "noise-25", restorer=restorer)
    assert any(step.doing.startswith("restoring") for step in itertools.islice(steps, 200))
    steps.close()
    assert not [each for each in threading.enumerate() if each.name == "dfpir"]


def test_steps_hand_errors_over_and_leave_the_threads_of_torch_alone():
    before = torch.get_num_threads()

    def fail(on_step):
        on_step(stacks.Step(0.0, "trying"))
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        drain(steps_of(fail, threads=1))
    assert torch.get_num_threads() == before


# What is refused and what is said


@pytest.mark.parametrize(
    ("stack", "options", "message"),
    [
        (np.zeros(5, np.uint8), {}, "expected"),
        (np.zeros((4, 4, 5), np.uint8), {"rgb": True}, "H, W, 3 or 4"),
        (np.zeros((0, 4, 4), np.uint8), {}, "no empty axis"),
        (np.zeros((2, 4, 4), np.uint8), {"planes": [(2,)]}, "no plane"),
        (np.zeros((2, 4, 4), np.uint8), {"channel_axis": 1}, "channel_axis=1"),
        (np.zeros((2, 4, 4), np.uint8), {"strength": 2}, "strength is 2"),
        (np.zeros((2, 4, 4), np.uint8), {"mask": np.ones((3, 4))}, "Mask has shape"),
        (np.zeros((2, 4, 4), np.uint8), {"mask": np.zeros((4, 4))}, "mask is empty"),
        (np.full((2, 4, 4), np.nan, np.float32), {}, r"Plane \(0,\): .*NaN"),
        (np.zeros((2, 4, 4), bool), {}, "boolean"),
        ([], {}, "empty list"),
    ],
)
def test_what_does_not_fit_is_refused(restorer, stack, options, message):
    with pytest.raises(ValueError, match=message):
        restore_stack(stack, "noise-25", restorer=restorer, **options)


def test_caution_where_the_restoration_has_no_meaning(restorer):
    assert caution(Degradation.HAZE, rgb=True) is None
    assert caution(Degradation.NOISE_15, rgb=False) is None
    record = restore_stack(counts(32, 32), "low-light", restorer=restorer).records[0]
    assert record.notes == (caution(Degradation.LOW_LIGHT, rgb=False),)


def test_residual_adds_up():
    before, after = counts(2, 16, 16), counts(2, 16, 16, seed=1)
    found = residual(before, after)
    assert found.dtype == np.float32
    np.testing.assert_allclose(after + found, before)
    dask = pytest.importorskip("dask.array")
    lazy = residual(dask.from_array(before), after)
    np.testing.assert_array_equal(lazy.compute(), found)
    assert lazy.dtype == np.float32


@pytest.mark.parametrize(("unit", "found"), [("second", "s"), ("minute", "min"), ("pixel", None)])
def test_time_has_units_that_ome_knows(tmp_path, unit, found):
    tifffile = pytest.importorskip("tifffile")
    path, _ = save_stack(
        tmp_path / "a.tif", counts(2, 3, 32, 40), [], axes="TZ", pixel_size={"T": (2.0, unit)}
    )
    with tifffile.TiffFile(path) as file:
        text = file.ome_metadata
    assert ("TimeIncrement" in text) == (found is not None)
    assert found is None or f'TimeIncrementUnit="{found}"' in text


def test_a_saved_stack_keeps_pixels_and_their_size(restorer, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    stack = counts(2, 3, 32, 40)
    done = restore_stack(stack, "noise-25", restorer=restorer)
    size = {"X": (0.1, "micrometer"), "Y": (0.1, "micrometer"), "Z": (0.5, "micrometer")}
    path, _ = save_stack(
        tmp_path / "a.tif", done.image, [done.records[0].as_dict()], pixel_size=size
    )
    with tifffile.TiffFile(path) as file:
        assert file.series[0].axes == "TZYX"
        same(file.asarray(), done.image)
        assert 'PhysicalSizeX="0.1"' in file.ome_metadata
        assert 'PhysicalSizeZ="0.5"' in file.ome_metadata
    assert sorted(each.name for each in Path(tmp_path).iterdir()) == ["a.tif", "a.tif.json"]
    with pytest.raises(ValueError, match="letters of TZC"):
        save_stack(tmp_path / "b.tif", stack, [], axes="ZZ")
