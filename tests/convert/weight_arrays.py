"""Arrays of a model by path, drawn at random and compared, for the converters' tests."""

import numpy as np


def random_arrays(shapes):
    rng = np.random.default_rng(0)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert found[key].flags.c_contiguous and found[key].dtype == array.dtype
        np.testing.assert_array_equal(found[key], array)
