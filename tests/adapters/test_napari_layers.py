"""Between layers and stacks: places, masks, undo. Needs napari's layers, but no Qt."""

import gc
import itertools
import weakref

import numpy as np
import pytest

pytest.importorskip("napari", reason="napari is not installed")

from napari.layers import Image, Labels, Shapes

from dfpir_napari import _layers
from dfpir_napari._history import History

MUCH = 10**12


def array(shape, dtype, seed=0):
    values = np.random.default_rng(seed).uniform(0, 1, shape)
    return (values * (1 if np.dtype(dtype).kind == "f" else 250)).astype(dtype)


def facts_of(layer):
    found = dict(layer.as_layer_data_tuple()[1])
    found["metadata"] = dict(found["metadata"])
    found["contrast_limits_range"] = tuple(layer.contrast_limits_range)
    found["unique_id"] = layer.unique_id
    for key in ("affine", "rotate", "colormap", "cache"):
        found[key] = str(found.get(key))
    return {
        key: value.tolist() if isinstance(value, np.ndarray) else str(value)
        for key, value in found.items()
    }


@pytest.mark.parametrize(
    ("dtype", "shape", "scale", "limits"),
    [
        (dtype, shape, scale, limits)
        for dtype, shape, scale, limits in itertools.product(
            [np.uint8, np.uint16, np.float32],
            [(20, 24), (3, 20, 24), (2, 3, 20, 24), (40, 48, 3), (2, 40, 48, 4)],
            [None, 0.5],
            [None, (0.1, 0.7)],
        )
    ],
)
def test_undo_leaves_no_trace(dtype, shape, scale, limits):
    rgb = shape[-1] in (3, 4)
    count = len(shape) - rgb
    options = {"metadata": {"mine": 1}, "name": "it"}
    if scale:
        options["scale"] = [scale * (axis + 1) for axis in range(count)]
        options["units"] = "um"
    layer = Image(array(shape, dtype), rgb=rgb, **options)
    if limits and not rgb:
        layer.contrast_limits = limits
    before, facts = layer.data, facts_of(layer)
    history = History()
    for seed in (1, 2):
        history.replace(layer, array(shape, dtype, seed), [{"seed": seed}], MUCH)
        during = facts_of(layer)
        assert layer.metadata["dfpir"][-1] == {"seed": seed}
        assert {key for key in facts if facts[key] != during[key]} == {"metadata"}
    assert history.undo(layer) and layer.metadata["dfpir"] == [{"seed": 1}]
    assert history.undo(layer) and layer.data is before
    assert facts_of(layer) == facts
    assert not history.undo(layer)


def test_undo_of_levels():
    levels = [array((64, 64), np.uint16), array((32, 32), np.uint16)]
    layer = Image(levels, multiscale=True)
    history = History()
    history.replace(layer, [each + 1 for each in levels], [{}], MUCH)
    assert layer.multiscale and layer.data[1][0, 0] == levels[1][0, 0] + 1
    assert history.undo(layer)
    assert [a is b for a, b in zip(layer.data, levels, strict=True)] == [True, True]


def test_undo_of_lazy_layers():
    dask = pytest.importorskip("dask.array")
    data = dask.from_array(array((3, 20, 24), np.uint16), chunks=(1, 20, 24))
    layer = Image(data)
    history = History()
    history.replace(layer, data + np.uint16(1), [{}], 0)
    assert history.bytes_held() == 0
    assert history.undo(layer) and layer.data is data


def test_what_others_changed_since_is_left_to_them():
    layer = Image(array((20, 24), np.uint8))
    history = History()
    history.replace(layer, array((20, 24), np.uint8, 1), [{}], MUCH)
    others = layer.data = array((20, 24), np.uint8, 2)
    assert not history.undo(layer) and layer.data is others
    assert history.latest(layer) is None


def test_ten_restorations_do_not_pile_up():
    layer = Image(array((64, 64), np.uint16))
    history, alive = History(), []
    for seed in range(10):
        alive.append(weakref.ref(layer.data))
        history.replace(layer, array((64, 64), np.uint16, seed), [{}], 3 * 64 * 64 * 2)
    gc.collect()
    assert sum(each() is not None for each in alive) == 3 == len(history.entries)
    assert history.undo(layer) and history.undo(layer) and history.undo(layer)
    assert not history.undo(layer)


def test_the_latest_original_is_kept_however_large():
    layer = Image(array((64, 64), np.uint16))
    before, history = layer.data, History()
    history.replace(layer, array((64, 64), np.uint16, 1), [{}], 0)
    assert history.undo(layer) and layer.data is before


def test_histories_of_layers_are_apart():
    one, other = Image(array((20, 24), np.uint8)), Image(array((20, 24), np.uint8))
    first = one.data
    history = History()
    history.replace(one, array((20, 24), np.uint8, 1), [{}], MUCH)
    history.replace(other, array((20, 24), np.uint8, 2), [{}], MUCH)
    assert history.undo(one) and one.data is first
    del other
    gc.collect()
    history.trim(MUCH)
    assert not history.entries


# Places


def test_the_plane_in_view():
    layer = Image(np.zeros((4, 5, 20, 24)), scale=(2, 0.5, 1, 1), translate=(10, 0, 0, 0))
    assert _layers.current_plane(layer, (14.2, 1.1, 3, 3)) == (2, 2)
    assert _layers.current_plane(layer, (99, 14.2, 1.1, 3, 3)) == (2, 2)
    assert _layers.current_plane(layer, (-50, 900, 0, 0)) == (0, 4)
    assert _layers.current_plane(layer, None) == (0, 0)
    assert _layers.current_plane(Image(np.zeros((20, 24))), (3, 3)) == ()


def test_what_is_in_view_is_bounded():
    layer = Image(np.zeros((600, 800), np.uint8))
    assert _layers.visible_box(layer, 100) == (slice(250, 350), slice(350, 450))
    assert _layers.visible_box(layer, 5000) == (slice(0, 600), slice(0, 800))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": (3, 0.5, 0.25), "translate": (1, 2, 3)},
        {"scale": (3, 0.5, 0.25), "rotate": 30},
        {"affine": np.diag([2.0, 3.0, 4.0, 1.0]), "scale": (1, 2, 2), "rotate": 30},
    ],
)
def test_a_part_lies_where_it_was_cut(options):
    layer = Image(np.zeros((4, 30, 40), np.uint8), **options)
    facts = _layers.placed(_layers.attributes(layer), layer, (2, 5, 7))
    part = Image(
        np.zeros((1, 10, 10), np.uint8),
        **{key: facts[key] for key in ("scale", "translate", "rotate", "shear", "affine")},
    )
    for place in [(0, 0, 0), (0, 3, 4)]:
        there = np.add(place, (2, 5, 7))
        np.testing.assert_allclose(part.data_to_world(place), layer.data_to_world(there), atol=1e-9)


def test_shapes_mark_pixels_wherever_their_own_layer_lies():
    layer = Image(np.zeros((40, 50)), scale=(0.5, 0.5), translate=(10, 0))
    box = np.array([[10.0, 5.0], [10.0, 10.0], [15.0, 10.0], [15.0, 5.0]])
    mask = _layers.mask_from_shapes(layer, Shapes([box], shape_type="rectangle"))
    rows, columns = np.nonzero(mask)
    assert (rows.min(), rows.max()) == (0, 10) and (columns.min(), columns.max()) == (10, 20)
    shapes = Shapes([box * 2], shape_type="rectangle", scale=(0.5, 0.5))
    np.testing.assert_array_equal(_layers.mask_from_shapes(layer, shapes), mask)


def test_an_ellipse_is_round():
    box = np.array([[0.0, 0.0], [0.0, 40.0], [40.0, 40.0], [40.0, 0.0]])
    shapes = Shapes([box], shape_type="ellipse")
    mask = _layers.mask_from_shapes(Image(np.zeros((41, 41))), shapes)
    assert mask[20, 20] and not mask[2, 2]
    assert mask.sum() == pytest.approx(np.pi * 20**2, rel=0.05)


def test_labels_mark_planes_or_all():
    layer = Image(np.zeros((3, 20, 24)))
    marks = np.zeros((3, 20, 24), np.int32)
    marks[1, 2:4] = 7
    found = _layers.request(layer, _layers.REGION_OF_STACK, (1,), marks=Labels(marks))
    assert found["mask"].sum() == 48 and "planes" not in found
    found = _layers.request(layer, _layers.REGION, (1,), marks=Labels(marks[1]))
    assert found["planes"] == [(1,)] and found["mask"].shape == (20, 24)
    with pytest.raises(ValueError, match="expected"):
        _layers.mask_from(layer, Labels(marks[:2]))
    with pytest.raises(ValueError, match="no region"):
        _layers.mask_from(layer, None)
    with pytest.raises(ValueError, match="enclose no pixel"):
        _layers.mask_from(layer, Shapes())


def test_shapes_of_another_plane_mark_nothing_here():
    layer = Image(np.zeros((7, 20, 24)))
    box = np.array([[5, 2, 2], [5, 2, 9], [5, 9, 9], [5, 9, 2]], float)
    shapes = Shapes([box, box + np.array([1, 4, 4])], shape_type="rectangle")
    found = _layers.request(layer, _layers.REGION, (5,), marks=shapes)
    assert found["mask"][3, 3] and not found["mask"][12, 12]
    with pytest.raises(ValueError, match="enclose no pixel"):
        _layers.request(layer, _layers.REGION, (2,), marks=shapes)
    everywhere = _layers.request(layer, _layers.REGION_OF_STACK, (2,), marks=shapes)
    assert everywhere["mask"][3, 3] and everywhere["mask"][12, 12]
    any_channel = _layers.request(layer, _layers.REGION, (2,), marks=shapes, channels=0)
    assert any_channel["mask"].sum() == everywhere["mask"].sum()


def test_labels_of_several_levels_are_those_of_the_finest():
    marks = np.zeros((32, 40), np.int32)
    marks[3:7, 5:9] = 1
    labels = Labels([marks, marks[::2, ::2]], multiscale=True)
    np.testing.assert_array_equal(_layers.mask_from(Image(np.zeros((32, 40))), labels), marks > 0)


def test_axes_that_are_named():
    layer = Image(
        np.zeros((2, 3, 4, 20, 24)), axis_labels=("t", "c", "z", "y", "x"), scale=(5, 1, 3, 2, 1)
    )
    assert _layers.channel_axis(layer) == 1
    assert _layers.tiff_axes(layer) == "TCZ"
    sizes = {letter: size for letter, (size, _) in _layers.pixel_size(layer).items()}
    assert sizes == {"T": 5, "Z": 3, "Y": 2, "X": 1}
    plain = Image(np.zeros((4, 20, 24)))
    assert _layers.channel_axis(plain) is None and _layers.tiff_axes(plain) is None
