"""Slides: blocks that agree with the whole, read and restored only where they are asked for."""

import threading
from dataclasses import replace

import dask
import dask.array as da
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage.data import camera

import dfpir
from conftest import SMALL_COMPACT, random_model
from dfpir import checkpoint, slides
from dfpir.degradation import Degradation, Diagnosis
from dfpir.restorer import Restorer
from dfpir.slides import OVERLAP, blocks, restore_lazily, side_of
from dfpir.stacks import restore_stack


@pytest.fixture(scope="module")
def noisy():
    """A grey photograph with noise, (200, 330) of uint8."""
    picture = camera()[100:300, 100:430].astype(float)
    return (
        (picture + np.random.default_rng(0).normal(0, 25, picture.shape)).clip(0, 255).astype("u1")
    )


class Watched:
    """An array that notes what is read of it."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.ndim = array, array.shape, array.dtype, array.ndim
        self.read = []

    def __getitem__(self, key):
        part = self.array[key]
        self.read.append(part.size)
        return part


@given(st.integers(1, 5000), st.integers(4, 64).map(lambda n: 16 * n))
def test_blocks_cover_a_side_and_begin_where_the_network_s_do(length, side):
    cut = blocks(length, side)
    assert sum(cut) == length
    assert all(part == side for part in cut[:-1])
    assert len(cut) == 1 or cut[-1] >= OVERLAP


@pytest.mark.parametrize(
    ("chunks", "side"),
    [
        ((256, 256), 1024),
        ((1024, 1024), 1024),
        ((384, 384), 768),
        ((2048, 2048), 2048),
        ((250, 250), 1024),
        ((256, 512), 1024),
        ((64, 64), 1024),
        ((40000, 40000), 1024),
    ],
)
def test_blocks_are_whole_chunks_where_these_allow(chunks, side):
    assert side_of(*chunks) == side


@pytest.mark.parametrize("kind", [Degradation.NOISE_25, Degradation.HAZE])
def test_blocks_are_the_whole_picture_s(noisy, kind):
    whole = dfpir.restore(noisy, kind, device="cpu").astype(int)
    done = restore_lazily(noisy, kind, device="cpu", block=64)
    assert done.records[0].statistics == "whole"
    assert done.image.dtype == noisy.dtype and done.image.shape == noisy.shape
    difference = np.abs(np.asarray(done.image).astype(int) - whole)
    assert np.quantile(difference, 0.99) <= 1 and difference.max() <= 5
    # No more on the seams than elsewhere.
    assert difference[:, 63::64].mean() <= difference.mean() + 0.1


def test_sampled_blocks_agree_with_their_neighbours(noisy, monkeypatch):
    monkeypatch.setattr(slides, "WINDOW", 48)
    fine = restore_lazily(noisy, "noise-25", device="cpu", block=64)
    coarse = restore_lazily(noisy, "noise-25", device="cpu", block=256)
    assert fine.records[0].statistics == "sampled"
    difference = np.asarray(fine.image).astype(int) - np.asarray(coarse.image)
    assert np.abs(difference).max() <= 2
    whole = dfpir.restore(noisy, "noise-25", device="cpu").astype(int)
    assert np.abs(np.asarray(fine.image) - whole).mean() < 1


@pytest.mark.parametrize("shape", [(9, 200), (200, 9), (9, 9)])
def test_a_plane_may_be_narrower_than_what_blocks_read(tiny_weights, shape):
    slide = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    lazy = restore_lazily(slide, "rain", weights=tiny_weights, value_range=(0, 255), block=64)
    whole = Restorer(tiny_weights).restore(slide, "rain", value_range=(0, 255)).image
    np.testing.assert_allclose(np.asarray(lazy.image).astype(int), whole, atol=1)


def test_one_block_is_the_picture_but_for_rounding(noisy):
    done = restore_lazily(noisy, "noise-25", device="cpu")
    expected = Restorer(device="cpu").restore(noisy, "noise-25", value_range=(0, 255))
    difference = np.asarray(done.image).astype(int) - expected.image
    assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 5e-3


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_planes_are_those_of_a_stack(tiny_weights, dtype):
    stack = np.random.default_rng(1).integers(10, 240, (2, 3, 48, 80)).astype(dtype)
    options = {"channel_axis": 1, "value_range": (0, 255)}
    lazy = restore_lazily(
        da.from_array(stack, chunks=(1, 2, 48, 40)), "rain", weights=tiny_weights, **options
    )
    whole = restore_stack(stack, "rain", restorer=Restorer(tiny_weights), **options)
    assert len(lazy.records) == len(whole.records) == 3
    np.testing.assert_allclose(
        np.asarray(lazy.image), whole.image, atol=1 if dtype != "float32" else 0.01
    )
    assert [record.scope["channel"] for record in lazy.records] == [0, 1, 2]
    assert lazy.records[0].scope["shape"] == [2, 3, 48, 80]


def test_colours_and_strength(tiny_weights):
    picture = np.random.default_rng(2).integers(0, 256, (64, 96, 4), dtype=np.uint8)
    done = restore_lazily(picture, "blur", weights=tiny_weights, rgb=True, strength=0.5)
    expected = Restorer(tiny_weights).restore(picture, "blur", strength=0.5).image.astype(int)
    found = np.asarray(done.image)
    np.testing.assert_array_equal(found[..., 3], picture[..., 3])
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("channels", [3, 4])
def test_a_grey_slide_in_three_channels_stays_grey(tiny_weights, channels):
    picture = np.random.default_rng(7).integers(0, 256, (96, 128, channels), dtype=np.uint8)
    picture[..., 1:3] = picture[..., :1]
    lazy = restore_lazily(picture, "rain", weights=tiny_weights, rgb=True, block=64).image
    found = np.asarray(lazy)
    assert (found[..., :3] == found[..., :1]).all() and (found[..., 0] != picture[..., 0]).any()


def test_a_grey_block_of_a_coloured_slide_is_treated_as_its_neighbours(tiny_weights):
    picture = np.random.default_rng(8).integers(0, 256, (160, 192, 3), dtype=np.uint8)
    picture[:128, :128] = picture[:128, :128, :1]
    lazy = restore_lazily(picture, "rain", weights=tiny_weights, rgb=True, block=64).image
    inner = np.asarray(lazy)[:64, :64]
    assert (inner != inner[..., :1]).any()


def test_the_axes_of_xarray_keep_their_names(tiny_weights):
    xarray = pytest.importorskip("xarray")
    array = np.random.default_rng(6).integers(0, 256, (64, 96), dtype=np.uint8)
    slide = xarray.DataArray(array, dims=("y", "x"), attrs={"stain": "DAPI"})
    done = restore_lazily(slide, "rain", weights=tiny_weights, block=64).image
    assert (done.dims, done.attrs) == (slide.dims, slide.attrs)
    assert isinstance(done.data, da.Array)
    expected = restore_lazily(array, "rain", weights=tiny_weights, block=64).image
    np.testing.assert_array_equal(done.values, np.asarray(expected))


def test_only_what_is_looked_at_is_read(tiny_weights, monkeypatch):
    monkeypatch.setattr(slides, "WINDOW", 32)
    source = Watched(np.random.default_rng(3).integers(0, 256, (640, 640), dtype=np.uint8))
    slide = da.from_array(source, chunks=64, meta=np.empty((0, 0), np.uint8))
    done = restore_lazily(slide, "noise-15", weights=tiny_weights, value_range=(0, 255), block=64)
    at_first = sum(source.read)
    assert at_first <= 16 * 4 * 64**2
    corner = np.asarray(done.image[:64, :64])
    assert corner.shape == (64, 64)
    # The windows of the attention once more, and the corner with its neighbours.
    assert sum(source.read) - at_first <= at_first + 4 * 64**2


def test_planes_left_alone_are_the_source_s(tiny_weights, monkeypatch):
    verdicts = iter(
        [Diagnosis("clean", None, {"clean": 1.0}), Diagnosis.from_user(Degradation.RAIN)]
    )
    monkeypatch.setattr(slides, "judge", lambda *_, **__: next(verdicts))
    stack = np.random.default_rng(4).integers(0, 200, (2, 48, 48), dtype=np.uint8)
    done = restore_lazily(stack, weights=tiny_weights, channel_axis=0)
    found = np.asarray(done.image)
    np.testing.assert_array_equal(found[0], stack[0])
    assert (found[1] != stack[1]).any()
    assert [record.steps for record in done.records] == [(), ("rain",)]


def test_what_the_weights_do_not_know_is_left_with_a_remark(tmp_path, monkeypatch):
    few = replace(SMALL_COMPACT, degradations=tuple(Degradation)[:5])
    checkpoint.save(random_model(few), tmp_path / "few.safetensors")
    found = Diagnosis("degraded", Degradation.BLUR, {"blur": 0.9, "clean": 0.1})
    monkeypatch.setattr(slides, "judge", lambda *_, **__: found)
    slide = np.zeros((48, 48), np.uint8)
    done = restore_lazily(slide, weights=tmp_path / "few.safetensors")
    assert done.image is slide and "not trained for 'blur'" in done.records[0].notes[0]


def test_a_clean_slide_is_given_back(tiny_weights):
    picture = camera()
    done = restore_lazily(picture, weights=tiny_weights)
    assert done.image is picture and not done.changed
    assert restore_lazily(picture, "rain", weights=tiny_weights, strength=0).image is picture


def test_empty_glass_has_no_vote(noisy):
    glass = np.full((512, 512), 240, np.uint8)
    diagnosis = slides.judge([glass] * 6 + [noisy] * 6, (0, 255), rgb=False)
    assert diagnosis.verdict == "degraded"


def test_blocks_of_one_process_take_turns(tiny_weights, monkeypatch):
    running, most = [], []
    run = Restorer.run

    def watched(self, *args, **options):
        running.append(threading.get_ident())
        most.append(len(running))
        result = run(self, *args, **options)
        running.pop()
        return result

    monkeypatch.setattr(Restorer, "run", watched)
    picture = np.random.default_rng(5).integers(0, 256, (256, 256), dtype=np.uint8)
    lazy = restore_lazily(picture, "noise-50", weights=tiny_weights, block=64).image
    lazy.compute(scheduler="threads", num_workers=4)
    assert len(most) == 16 and max(most) == 1


def test_other_weights_on_a_worker_are_refused(tiny_weights, tiny_model):
    lazy = restore_lazily(np.zeros((32, 32), np.uint8), "rain", weights=tiny_weights).image
    for value in tiny_model.parameters():
        value.add_(1)
    checkpoint.save(tiny_model, tiny_weights)
    slides.shared_restorer.cache_clear()
    with pytest.raises(ValueError, match=r"SHA-256 .* expected .* Install the same version"):
        lazy.compute(scheduler="synchronous")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strength": 2}, "strength is 2"),
        ({"block": 100}, "block is 100; expected a multiple of 16, at least 64"),
        ({"block": 48}, "block is 48"),
        ({"rgb": True}, r"expected \(..., H, W, 3 or 4\)"),
        ({"channel_axis": 0}, "channel_axis=0"),
        ({"degradation": "fog"}, "fog"),
    ],
)
def test_what_does_not_fit_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        restore_lazily(np.zeros((64, 64), np.uint8), **options)


def test_nan_is_refused_where_it_is(tiny_weights):
    picture = np.full((160, 160), 0.5, np.float32)
    slide = da.from_array(Watched(picture), chunks=64, meta=np.empty((0, 0), np.float32))
    lazy = restore_lazily(slide, "rain", weights=tiny_weights, value_range=(0, 1), block=64)
    picture[150, 150] = np.nan
    with pytest.raises(ValueError, match="NaN"), dask.config.set(scheduler="synchronous"):
        lazy.image.compute()
