"""Tiles cover the image once and see what they need."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfpir.tiling import Tiling, plan, windows


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    size=st.integers(16, 128),
    overlap=st.integers(0, 40),
    multiple=st.sampled_from([8, 16]),
)
@settings(deadline=None)
def test_tiles_put_an_image_together(height, width, size, overlap, multiple):
    image = np.arange(height * width).reshape(height, width)
    result, written = np.full_like(image, -1), np.zeros_like(image)
    for tile in plan(height, width, Tiling(size, overlap), multiple):
        read = image[tile.read_rows, tile.read_columns]
        result[tile.rows, tile.columns] = read[tile.inner]
        written[tile.rows, tile.columns] += 1
        assert tile.read_rows.start % multiple == tile.read_columns.start % multiple == 0
        assert tile.read_rows.start <= max(tile.rows.start - overlap, 0)
        assert tile.read_rows.stop == min(tile.rows.stop + overlap, height)
    assert np.array_equal(result, image)
    assert (written == 1).all()


@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    side=st.integers(1, 200),
    most=st.integers(1, 20),
)
@settings(deadline=None)
def test_windows_lie_inside_and_reach_both_ends(height, width, side, most):
    found = windows(height, width, side, most)
    assert 1 <= len(found) <= most
    for rows, columns in found:
        assert 0 <= rows.start < rows.stop <= height
        assert rows.stop - rows.start == min(side, height)
        assert 0 <= columns.start < columns.stop <= width
        assert columns.stop - columns.start == min(side, width)
    starts = {rows.start for rows, _ in found}
    if len(starts) > 1:
        assert min(starts) == 0 and max(starts) == height - min(side, height)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"size": 8}, "size is 8"), ({"overlap": -1}, "overlap is -1"), ({"statistics": "x"}, "'x'")],
)
def test_settings_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        Tiling(**arguments)
