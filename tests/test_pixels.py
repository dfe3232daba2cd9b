"""Arrays to pixels and back: exact for every dtype and layout."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfpir.pixels import PixelError, natural_range, to_array, to_pixels

DTYPES = [np.uint8, np.uint16, np.int16, np.uint32, np.float32, np.float64, np.float16]
LAYOUTS = [
    ((9, 7), None),
    ((9, 7, 1), None),
    ((9, 7, 3), None),
    ((9, 7, 4), None),
    ((3, 9, 7), 0),
    ((1, 9, 7), 0),
    ((4, 9, 7), -3),
    ((2, 9, 7, 3), None),
    ((2, 3, 9, 7), 1),
    ((2, 9, 7, 4), -1),
]


def drawn(dtype, shape, seed=0):
    generator = np.random.default_rng(seed)
    if np.issubdtype(dtype, np.integer):
        top = min(np.iinfo(dtype).max, 2**20)
        return generator.integers(0, top, shape, endpoint=True).astype(dtype)
    return generator.random(shape).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_round_trip(dtype, shape, axis):
    array = drawn(dtype, shape)
    pixels, form = to_pixels(array, channel_axis=axis)
    assert pixels.dtype == torch.float32 and pixels.shape[1] == 3
    back = to_array(pixels, form)
    assert back.dtype == array.dtype and back.shape == array.shape
    # Single precision resolves 2^-24 of the range.
    step = (form.value_range[1] - form.value_range[0]) * 2.0**-23
    if np.issubdtype(dtype, np.integer):
        assert np.abs(back.astype(float) - array).max() <= np.ceil(step) * (step > 0.5)
    else:
        assert np.abs(back.astype(float) - array).max() <= max(step, 2e-3 * (dtype == np.float16))


@given(
    a=st.sampled_from([1, 2, 16, 257]),
    b=st.integers(0, 1000),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_grey_pixels_do_not_see_gain_or_offset(a, b, seed):
    array = drawn(np.uint16, (12, 11), seed) // 300
    array[0, :2] = 0, 200
    plain, _ = to_pixels(array)
    changed, form = to_pixels((array.astype(np.int64) * a + b).astype(np.uint16))
    assert torch.allclose(plain, changed, atol=1e-6)
    assert form.value_range[0] == array.min() * a + b


def test_values_above_the_percentile_pass_unclipped():
    array = np.zeros((200, 200), np.uint16)
    array[:, ::2] = 1000
    array[0, 0] = 60000
    pixels, form = to_pixels(array)
    assert form.value_range == (0.0, 1000.0)
    assert float(pixels.max()) == 60.0
    assert np.array_equal(to_array(pixels, form), array)


def test_a_stack_has_one_range():
    stack = np.stack([drawn(np.uint8, (8, 8, 3)), drawn(np.uint8, (8, 8, 3)) // 4])
    pixels, form = to_pixels(stack)
    assert form.value_range == (0.0, 255.0)
    assert float(pixels[1].max()) < 0.26


def test_alpha_is_carried():
    array = drawn(np.uint8, (6, 5, 4))
    pixels, form = to_pixels(array)
    changed = to_array(1 - pixels, form)
    assert np.array_equal(changed[..., 3], array[..., 3])
    assert np.array_equal(changed[..., :3], 255 - array[..., :3])


def test_integers_are_rounded_and_clipped():
    _, form = to_pixels(np.zeros((1, 2), np.uint8))
    assert to_array(torch.tensor([[[[-1.0, 2.0]]]]).expand(1, 3, 1, 2), form).tolist() == [[0, 255]]
    half = torch.full((1, 3, 1, 2), 10.6 / 255)
    assert to_array(half, form).tolist() == [[11, 11]]


def test_grey_is_the_mean_of_the_channels():
    _, form = to_pixels(np.zeros((1, 1), np.float32), value_range=(0, 1))
    pixels = torch.tensor([0.1, 0.2, 0.6]).reshape(1, 3, 1, 1)
    assert to_array(pixels, form)[0, 0] == pytest.approx(0.3)


def test_constant_images_have_a_range():
    assert natural_range(np.full((4, 4), 7, np.uint16), grey=True) == (7.0, 8.0)


@pytest.mark.parametrize(
    ("array", "axis", "message"),
    [
        (np.zeros((0, 4), np.uint8), None, "no pixels"),
        (np.zeros((4, 4, 2), np.uint8), None, "2 channels on axis -1"),
        (np.zeros((4, 4, 5), np.uint8), None, "5 channels on axis -1"),
        (np.zeros((4, 4), bool), None, "boolean"),
        (np.zeros((4, 4), complex), None, "complex128"),
        (np.zeros((4, 4), np.int64), None, "at most 32 bits"),
        (np.full((4, 4), np.nan), None, "16 values that are NaN or infinite"),
        (np.array([[1.0, np.inf]]), None, "1 values"),
        (np.zeros((2, 3, 4, 5, 3), np.uint8), None, "Cannot tell the channels"),
        (np.zeros((9, 9, 9), np.uint8), None, "Cannot tell the channels"),
        (np.zeros((9, 9, 3), np.uint8), 0, "9 channels on axis 0"),
        (np.zeros((9, 9, 3), np.uint8), 5, "channel_axis=5 does not fit"),
        (np.array(["a"]), None, "dtype"),
        (np.zeros(5), None, "Cannot tell"),
    ],
)
def test_what_is_not_an_image_is_refused(array, axis, message):
    with pytest.raises(PixelError, match=message):
        to_pixels(array, channel_axis=axis)


@pytest.mark.parametrize("value_range", [(1, 1), (2, 1), (0, np.inf), (np.nan, 1)])
def test_ranges_go_upwards(value_range):
    with pytest.raises(PixelError, match="the larger last"):
        to_pixels(np.zeros((2, 2)), value_range=value_range)
