"""Helpers of the tests of weight files."""

import pytest

from biclip_jax.core.errors import UserError
from biclip_jax.weights.readers import open_checkpoint


def rejection(path):
    """Asserts that opening a file fails; returns the message, which begins with its name."""
    with pytest.raises(UserError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    return message


def write(path, data):
    """Writes a file and returns its path."""
    path.write_bytes(data)
    return path


def assert_same(tensors, expected):
    """Asserts that tensors have the names, shapes, dtypes and bits of the expected arrays."""
    assert sorted(tensors) == sorted(expected)
    for name, array in expected.items():
        actual = tensors[name].read()
        assert tensors[name].shape == actual.shape == array.shape, name
        assert tensors[name].dtype == actual.dtype == array.dtype, name
        assert actual.tobytes() == array.tobytes(), name
