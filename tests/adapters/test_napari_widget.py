"""The widget, with plain layers and, further down, in a real viewer. Needs a display."""

import os
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("napari", reason="napari is not installed")
pytest.importorskip("pytestqt", reason="pytest-qt is not installed")
if sys.platform == "linux" and not os.environ.get("DISPLAY"):
    pytest.skip("no display: run under xvfb-run -a", allow_module_level=True)

from napari.layers import Image, Labels

import dfpir
from dfpir.degradation import Degradation, Diagnosis
from dfpir.stacks import restore_stack
from dfpir_napari import _widget
from dfpir_napari._settings import Settings
from dfpir_napari._widget import RestorationWidget

pytest_plugins = ["napari_fixtures"]

PATIENCE = 120_000
"""Milliseconds; nothing waits that long on a machine that is not overloaded."""


@pytest.fixture
def opened(qtbot, said):
    def open_with(layer, **values):
        widget = RestorationWidget()
        qtbot.addWidget(widget.native)
        widget.layer.choices = [layer]
        for name, value in values.items():
            getattr(widget, name).value = value
        return widget

    return open_with


def press(qtbot, widget, name):
    getattr(widget, name).native.click()
    qtbot.waitUntil(lambda: not widget.running, timeout=PATIENCE)


def counts(*shape, seed=0):
    generator = np.random.default_rng(seed)
    scene = 100 + 60 * np.sin(np.arange(shape[-1]) / 5)
    return (scene + generator.normal(0, 12, shape)).astype(np.uint16)


def test_restore_is_what_the_core_gives_and_undo_brings_the_original_back(
    qtbot, small, opened, said
):
    data = counts(40, 48) * 16
    layer = Image(data, scale=(0.1, 0.1), contrast_limits=(1000, 3000), metadata={"mine": 1})
    widget = opened(layer, degradation="noise-25", strength=0.5)
    press(qtbot, widget, "restore")
    np.testing.assert_array_equal(layer.data, small.restore(data, "noise-25", strength=0.5).image)
    assert layer.data.dtype == np.uint16 and layer.contrast_limits == [1000, 3000]
    (record,) = layer.metadata["dfpir"]
    assert record["steps"] == ["noise-25"] and record["strength"] == 0.5
    assert "raw = " in widget._report.text()
    assert widget.undo.enabled and not said
    press(qtbot, widget, "undo")
    assert layer.data is data and layer.metadata == {"mine": 1} and not widget.undo.enabled


def test_widget_function_and_command_line_agree_exactly(qtbot, opened, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    from dfpir.cli import main

    data = counts(48, 56) * 16
    layer = Image(data.copy())
    widget = opened(layer, degradation="noise-25")
    press(qtbot, widget, "restore")
    np.testing.assert_array_equal(layer.data, dfpir.restore(data, "noise-25"))
    tifffile.imwrite(tmp_path / "in.tif", data)
    source, target = str(tmp_path / "in.tif"), str(tmp_path / "out.tif")
    assert main(["restore", source, "-o", target, "--degradation", "noise-25"]) == 0
    np.testing.assert_array_equal(layer.data, tifffile.imread(target))


@pytest.mark.parametrize("gain", [1, 16, 257])
@pytest.mark.parametrize("offset", [0, 100])
def test_gain_and_offset_do_not_matter(qtbot, small, opened, gain, offset):
    data = counts(40, 48)
    once = small.restore(data, "noise-25")
    layer = Image(data * gain + offset)
    widget = opened(layer)
    press(qtbot, widget, "diagnose")
    expected = dfpir.classify(data).probabilities
    assert widget.bars.values == pytest.approx(expected, abs=1e-3)
    widget.degradation.value = "noise-25"
    press(qtbot, widget, "restore")
    assert np.abs(layer.data - (once.image.astype(float) * gain + offset)).max() <= 0.5 * gain + 1


def test_colours_keep_their_kind(qtbot, small, opened, photograph):
    data = np.dstack([photograph[:48, :64], np.full((48, 64), 9, np.uint8)])
    layer = Image(data, rgb=True)
    press(qtbot, opened(layer, degradation="rain"), "restore")
    assert layer.rgb and (layer.data[..., 3] == 9).all()
    np.testing.assert_array_equal(layer.data, small.restore(data, "rain").image)


@pytest.mark.parametrize("scope", ["plane", "stack"])
def test_scopes_of_a_stack(qtbot, small, opened, scope):
    data = counts(2, 3, 32, 40)
    layer = Image(data)
    press(qtbot, opened(layer, degradation="noise-25", scope=scope), "restore")
    planes = [(0, 0)] if scope == "plane" else None
    expected = restore_stack(data, "noise-25", restorer=small, planes=planes)
    np.testing.assert_array_equal(layer.data, expected.image)


def test_levels_stay_levels(qtbot, small, opened):
    levels = [counts(64, 64), counts(64, 64)[::2, ::2]]
    layer = Image(levels, multiscale=True)
    widget = opened(layer, degradation="noise-25")
    press(qtbot, widget, "restore")
    assert layer.multiscale and [each.shape for each in layer.data] == [(64, 64), (32, 32)]
    np.testing.assert_array_equal(layer.data[0], small.restore(levels[0], "noise-25").image)
    press(qtbot, widget, "undo")
    assert layer.data[0] is levels[0] and layer.data[1] is levels[1]


@pytest.mark.parametrize("kind", ["dask", "zarr", "xarray"])
def test_lazy_layers_are_neither_loaded_nor_written(qtbot, small, opened, tmp_path, kind):
    dask = pytest.importorskip("dask.array")
    zarr = pytest.importorskip("zarr")
    array = counts(3, 32, 40)
    if kind == "dask":
        data = dask.from_array(array, chunks=(1, 32, 40))
    elif kind == "xarray":
        data = pytest.importorskip("xarray").DataArray(array, dims=("z", "y", "x"))
    else:
        data = zarr.open_array(
            str(tmp_path / "in.zarr"), mode="w", shape=array.shape, dtype=array.dtype
        )
        data[...] = array
    layer = Image(data)
    widget = opened(layer, degradation="noise-25", scope="stack")
    press(qtbot, widget, "restore")
    assert type(layer.data) is type(data)
    expected = restore_stack(array, "noise-25", restorer=small).image
    np.testing.assert_array_equal(np.asarray(layer.data), expected)
    np.testing.assert_array_equal(np.asarray(data), array)
    press(qtbot, widget, "undo")
    assert layer.data is data


@pytest.mark.parametrize(
    ("verdict", "degradation", "words"),
    [("clean", None, "Clean"), ("unsure", Degradation.HAZE, "Unsure, perhaps haze")],
)
def test_automatic_leaves_alone_and_says_why(
    qtbot, small, opened, monkeypatch, verdict, degradation, words
):
    found = Diagnosis(verdict, degradation, {"haze": 0.45, "clean": 0.55})
    monkeypatch.setattr(small, "classify_pixels", lambda pixels: [found])
    layer = Image(counts(32, 40))
    before = layer.data
    widget = opened(layer)
    press(qtbot, widget, "diagnose")
    assert words in widget._found.text() and "leaves it alone" in widget._status.text()
    assert widget.bars.values["clean"] == 0.55
    press(qtbot, widget, "restore")
    assert layer.data is before and "dfpir" not in layer.metadata and not widget.undo.enabled


def test_caution_comes_before_and_stays_in_the_record(qtbot, small, opened, said):
    layer = Image(counts(32, 40))
    widget = opened(layer, degradation="haze")
    assert "no physical meaning" in widget._status.text()
    press(qtbot, widget, "restore")
    assert "no physical meaning" in layer.metadata["dfpir"][0]["notes"][0]
    assert any("no physical meaning" in line for line in said)


def test_errors_are_told(qtbot, small, opened, said):
    layer = Image(np.full((32, 40), np.nan, np.float32), contrast_limits=(0, 1))
    widget = opened(layer, degradation="noise-25")
    press(qtbot, widget, "restore")
    assert "NaN" in said[0] and "Not done" in widget._status.text() and widget.restore.enabled
    widget.scope.value = "region"
    press(qtbot, widget, "restore")
    assert "no region" in said[1]


def test_an_error_of_torch_is_told_and_undo_still_works(qtbot, small, opened, monkeypatch):
    """superqt drops a RuntimeError of a worker, and the widget would wait for ever."""
    layer = Image(counts(32, 40))
    before = layer.data
    widget = opened(layer, degradation="noise-25")
    press(qtbot, widget, "restore")

    def exhausted(*_, **__):
        message = "DefaultCPUAllocator: can't allocate memory"
        raise RuntimeError(message)

    monkeypatch.setattr(small, "restore", exhausted)
    press(qtbot, widget, "restore")
    assert "Not done. DefaultCPUAllocator" in widget._status.text() and widget.restore.enabled
    press(qtbot, widget, "undo")
    assert layer.data is before


def test_what_exists_is_not_replaced_unasked(qtbot, small, opened, tmp_path, monkeypatch):
    """A dialog asks about the name that was typed, not about what is made of it."""
    pytest.importorskip("tifffile")
    kept = tmp_path / "cells.ome.tif"
    kept.write_bytes(b"somebody's")
    widget = opened(Image(counts(32, 40)))
    typed = str(tmp_path / "cells")
    monkeypatch.setattr(_widget.QFileDialog, "getSaveFileName", lambda *_: (typed, ""))
    widget.ask_where_to_save()
    qtbot.waitUntil(lambda: not widget.running, timeout=PATIENCE)
    assert kept.read_bytes() == b"somebody's" and "Not done" in widget._status.text()
    typed = str(kept)
    widget.ask_where_to_save()
    qtbot.waitUntil(lambda: not widget.running, timeout=PATIENCE)
    assert kept.read_bytes() != b"somebody's"


def test_cancel_changes_nothing(qtbot, small, opened):
    layer = Image(counts(400, 32, 40))
    before = layer.data
    widget = opened(layer, degradation="noise-25", scope="stack")
    widget.restore.native.click()
    qtbot.waitUntil(lambda: "restoring" in widget._status.text(), timeout=PATIENCE)
    assert not widget.restore.enabled and widget.cancel.enabled
    press(qtbot, widget, "cancel")
    assert layer.data is before and "Cancelled" in widget._status.text()
    assert widget.restore.enabled
    assert not [each for each in threading.enumerate() if each.name == "dfpir"]


def test_the_python_line_does_the_same(qtbot, small, opened, monkeypatch):
    monkeypatch.setattr("dfpir.stacks.shared_restorer", lambda *_: small)
    data = counts(2, 32, 40)
    layer = Image(data, name="it's")
    widget = opened(layer, degradation="noise-25", strength=0.7)
    widget.more.value = True
    line = widget.python.value
    viewer = SimpleNamespace(layers={"it's": Image(data)})
    scope = {"viewer": viewer}
    exec(line, scope)
    press(qtbot, widget, "restore")
    np.testing.assert_array_equal(layer.data, scope["done"].image)


@pytest.mark.parametrize("scope", ["region", "region of stack"])
def test_the_python_line_knows_the_region(qtbot, small, opened, monkeypatch, scope):
    monkeypatch.setattr("dfpir.stacks.shared_restorer", lambda *_: small)
    data = counts(2, 32, 40)
    labels = Labels(np.zeros(data.shape, np.int32), name="marks")
    labels.data[:, 4:20, 4:30] = 1
    layer = Image(data, name="cells")
    widget = opened(layer, degradation="noise-25", scope=scope)
    widget.region.choices = [labels]
    widget.region.value = labels
    widget.more.value = True
    scope = {"viewer": SimpleNamespace(layers={"cells": Image(data), "marks": labels})}
    exec(widget.python.value, scope)
    press(qtbot, widget, "restore")
    np.testing.assert_array_equal(layer.data, scope["done"].image)


def test_the_python_line_knows_the_device(qtbot, small, opened, monkeypatch):
    monkeypatch.setattr(_widget, "read_settings", lambda: Settings(device="cpu"))
    monkeypatch.setattr(dfpir, "Restorer", lambda *, device: {"cpu": small}[device])
    data = counts(2, 32, 40)
    widget = opened(Image(data, name="cells"), degradation="noise-25", scope="stack")
    widget.more.value = True
    scope = {"viewer": SimpleNamespace(layers={"cells": Image(data)})}
    exec(widget.python.value, scope)
    expected = restore_stack(data, "noise-25", restorer=small)
    np.testing.assert_array_equal(scope["done"].image, expected.image)


def test_what_is_saved(qtbot, small, opened, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    layer = Image(counts(3, 32, 40), scale=(0.5, 0.1, 0.1), units="um")
    widget = opened(layer, degradation="noise-25")
    press(qtbot, widget, "restore")
    widget.save_to(str(tmp_path / "out"))
    qtbot.waitUntil(lambda: not widget.running, timeout=PATIENCE)
    with tifffile.TiffFile(tmp_path / "out.ome.tif") as file:
        np.testing.assert_array_equal(file.asarray(), layer.data)
        assert 'PhysicalSizeX="0.1"' in file.ome_metadata
    assert (tmp_path / "out.ome.tif.json").exists()


def test_settings_bound_the_memory_of_undo(qtbot, small, opened, monkeypatch):
    monkeypatch.setattr(_widget, "read_settings", lambda: Settings(undo_megabytes=0))
    layer = Image(counts(32, 40))
    widget = opened(layer, degradation="noise-25")
    for _ in range(3):
        press(qtbot, widget, "restore")
    assert len(widget._history.entries) == 1 and len(layer.metadata["dfpir"]) == 3


# In a viewer


@pytest.fixture
def docked(make_napari_viewer_proxy, said):
    viewer = make_napari_viewer_proxy()

    def dock(layer, **values):
        viewer.add_layer(layer)
        widget = RestorationWidget(viewer)
        viewer.window.add_dock_widget(widget, name="dfpir")
        widget.reset_choices()
        for name, value in values.items():
            getattr(widget, name).value = value
        return viewer, widget

    return dock


def test_preview_lies_on_its_layer_and_goes_with_restore(qtbot, small, docked):
    layer = Image(counts(3, 64, 80), scale=(2, 0.5, 0.5), name="cells")
    viewer, widget = docked(layer, degradation="noise-25")
    viewer.dims.set_current_step(0, 1)
    press(qtbot, widget, "preview")
    shown = viewer.layers["cells preview"]
    rows, columns = np.asarray(shown.data).shape[-2:]
    np.testing.assert_allclose(shown.extent.world[0][0], 2)
    assert (np.asarray(shown.data) != layer.data[1, :rows, :columns]).any()
    assert viewer.layers.selection.active == layer
    press(qtbot, widget, "restore")
    assert [each.name for each in viewer.layers] == ["cells"]
    changed = (layer.data != counts(3, 64, 80)).any(axis=(1, 2))
    assert changed.tolist() == [False, True, False]


def test_layers_that_went_are_passed_over(qtbot, small, docked):
    layers = [Image(counts(64, 64), name=name) for name in "abc"]
    before = [layer.data for layer in layers]
    viewer, widget = docked(layers[0], degradation="noise-25")
    for layer in layers[1:]:
        viewer.add_layer(layer)
    widget.restore_layers(layers)
    viewer.layers.remove(layers[1])
    qtbot.waitUntil(lambda: not widget.running, timeout=PATIENCE)
    changed = [layer.data is not data for layer, data in zip(layers, before, strict=True)]
    assert changed == [True, False, True]


def test_a_layer_removed_meanwhile_gets_a_new_one(qtbot, small, docked, said):
    layer = Image(counts(20, 32, 40), name="cells", scale=(1, 0.5, 0.5))
    viewer, widget = docked(layer, degradation="noise-25", scope="stack")
    widget.restore.native.click()
    qtbot.waitUntil(lambda: "restoring" in widget._status.text(), timeout=PATIENCE)
    viewer.layers.remove("cells")
    qtbot.waitUntil(lambda: not widget.running, timeout=PATIENCE)
    result = viewer.layers["cells restored"]
    assert tuple(result.scale) == (1, 0.5, 0.5) and len(result.metadata["dfpir"]) == 1
    assert any("was removed" in line for line in said)


def test_a_layer_changed_meanwhile_is_left_alone(qtbot, small, docked, said):
    layer = Image(counts(20, 32, 40), name="cells")
    viewer, widget = docked(layer, degradation="noise-25", scope="stack")
    widget.restore.native.click()
    qtbot.waitUntil(lambda: "restoring" in widget._status.text(), timeout=PATIENCE)
    others = counts(20, 32, 40, seed=5)
    layer.data = others
    qtbot.waitUntil(lambda: not widget.running, timeout=PATIENCE)
    assert layer.data is others and "cells restored" in viewer.layers
    assert any("was changed" in line for line in said)


def test_a_region_drawn_in_the_viewer(qtbot, small, docked):
    layer = Image(counts(64, 80), name="cells")
    viewer, widget = docked(layer, degradation="noise-25", scope="region")
    box = [[10, 20], [10, 40], [30, 40], [30, 20]]
    viewer.add_shapes([np.array(box, float)], shape_type="rectangle", name="box")
    widget.reset_choices()
    widget.region.value = next(each for each in viewer.layers if each.name == "box")
    press(qtbot, widget, "restore")
    changed = layer.data != counts(64, 80)
    rows, columns = np.nonzero(changed)
    assert rows.min() >= 10 and rows.max() <= 30 and columns.min() >= 20 and columns.max() <= 40


def test_residual_is_what_was_taken_away(qtbot, small, docked):
    layer = Image(counts(64, 80), name="cells", scale=(0.5, 0.5))
    viewer, widget = docked(layer, degradation="noise-25")
    press(qtbot, widget, "restore")
    widget.residual.native.click()
    shown = viewer.layers["cells residual"]
    np.testing.assert_allclose(np.asarray(shown.data) + layer.data, counts(64, 80), atol=1e-3)
    low, high = shown.contrast_limits
    assert low == -high and tuple(shown.scale) == (0.5, 0.5)


def test_the_widget_follows_the_active_layer(small, docked):
    first, second = Image(counts(32, 40), name="a"), Image(counts(32, 40), name="b")
    viewer, widget = docked(first)
    viewer.add_layer(second)
    assert widget.layer.value.name == "b"
    viewer.layers.selection.active = viewer.layers["a"]
    assert widget.layer.value.name == "a"


def test_several_layers_are_restored_one_after_the_other(qtbot, small, docked):
    first, second = Image(counts(32, 40), name="a"), Image(counts(32, 40), name="b")
    viewer, widget = docked(first, degradation="noise-25")
    viewer.add_layer(second)
    widget.restore_layers(list(viewer.layers))
    qtbot.waitUntil(lambda: not widget.running and not widget._queue, timeout=PATIENCE)
    assert all(len(each.metadata["dfpir"]) == 1 for each in (first, second))


def test_closing_the_dock_ends_the_work(qtbot, small, docked):
    layer = Image(counts(400, 32, 40), name="cells")
    viewer, widget = docked(layer, degradation="noise-25", scope="stack")
    before = layer.data
    widget.restore.native.click()
    qtbot.waitUntil(lambda: "restoring" in widget._status.text(), timeout=PATIENCE)
    worker = widget._worker
    viewer.window.remove_dock_widget("all")
    widget._close()
    qtbot.waitUntil(lambda: not worker.is_running, timeout=PATIENCE)
    assert layer.data is before


@pytest.mark.parametrize(
    "name", ["noisy_micrograph", "noisy_stack", "rainy_photograph", "clean_photograph"]
)
def test_samples_become_layers(make_napari_viewer_proxy, name):
    pytest.importorskip("skimage")
    from dfpir_napari import _sample_data

    viewer = make_napari_viewer_proxy()
    for data, facts, kind in getattr(_sample_data, name)():
        layer = getattr(viewer, f"add_{kind}")(data, **facts)
        assert layer.name == name.replace("_", " ")
