"""What the tests of weight files share: written, refused, read back."""

import pytest

from biclip_jax.core.errors import UserError
from biclip_jax.weights.readers import open_checkpoint


def refused(path):
    """The message, which begins with the file's name."""
    with pytest.raises(UserError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    return message


def write(path, data):
    """The path, with `data` in it."""
    path.write_bytes(data)
    return path


def assert_same(tensors, expected):
    """Names, shapes, dtypes and bits of what a file holds are the expected arrays'."""
    assert sorted(tensors) == sorted(expected)
    for name, array in expected.items():
        read = tensors[name].read()
        assert tensors[name].shape == read.shape == array.shape, name
        assert tensors[name].dtype == read.dtype == array.dtype, name
        assert read.tobytes() == array.tobytes(), name
