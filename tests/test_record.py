"""Hashes tell arrays apart."""

import numpy as np

from dfpir.record import array_hash


def test_hash_depends_on_values_shape_and_dtype_only():
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert array_hash(array) == array_hash(np.asfortranarray(array))
    different = [array + 1, array.reshape(4, 3), array.astype(np.uint16)]
    assert len({array_hash(each) for each in [array, *different]}) == 4
