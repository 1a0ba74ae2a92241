"""A prepared dataset as a single file: same records, NumPy only, errors for other files."""

import subprocess
import sys

import numpy as np
import pytest

from biclip_jax.core import config as config_lib
from biclip_jax.core.errors import DataError
from biclip_jax.data import pipeline
from biclip_jax.data.builders import single_file
from biclip_jax.data.builders.prepared import open_split
from biclip_jax.data.schema import SPLITS

from . import fixtures


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Returns (data config, file)."""
    base = tmp_path_factory.mktemp("single_file")
    fixtures.plain_csv(base / "source", fixtures.samples())
    overrides = [f"--config.data.source={base / 'source'}", f"--config.data.cache_dir={base}"]
    data = config_lib.load_config("folder", overrides).data.to_dict()
    counts = pipeline.write_file(data, 24, base / "set.npz")
    assert counts == {split: len(open_split(base / "set.npz", split)) for split in SPLITS}
    return data, base / "set.npz"


def config_of_file(data, path):
    return {**data, "source": str(path)}


def test_records_are_those_of_the_folder(written):
    data, path = written
    prepared = pipeline.prepare(data, 24)
    assert pipeline.prepare(config_of_file(data, path), 24) == path
    for split in SPLITS:
        for record, expected in zip(
            open_split(path, split), open_split(prepared, split), strict=True
        ):
            assert record.keys() == expected.keys()
            for name, value in expected.items():
                np.testing.assert_array_equal(record[name], value)


def test_neither_tfds_nor_grain_is_imported(written):
    data, path = written
    code = f"""
import sys
from biclip_jax.data import pipeline
data = {config_of_file(data, path)!r}
splits = pipeline.open_splits(pipeline.prepare(data, 24), data)
assert len(pipeline.stack_split(splits["train"], {{}})["image"]) == len(splits["train"]) > 0
assert not {{"tensorflow_datasets", "grain"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("change", "size", "message"),
    [({}, 32, "image_size 24; expected 32"), ({"resize": "opencv"}, 24, "'antialiased'; expected")],
)
def test_rejects_another_dataset_than_configured(written, change, size, message):
    data, path = written
    with pytest.raises(DataError, match=f"set.npz: found .*{message}"):
        pipeline.prepare({**config_of_file(data, path), **change}, size)


def test_error_names_damaged_missing_and_foreign_files(written, tmp_path):
    data, path = written
    corrupted, foreign = tmp_path / "damaged.npz", tmp_path / "foreign.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    corrupted.write_bytes(bytes(content))
    np.savez(foreign, x=np.zeros(3))
    with pytest.raises(DataError, match=r"absent\.npz: cannot be read"):
        pipeline.prepare(config_of_file(data, tmp_path / "absent.npz"), 24)
    np.savez(tmp_path / "odd.npz", facts=np.full(3, 200, np.uint8))
    with pytest.raises(DataError, match=r"odd\.npz: its facts are not JSON .*; write it again"):
        pipeline.prepare(config_of_file(data, tmp_path / "odd.npz"), 24)
    with pytest.raises(DataError, match=r"foreign\.npz: found no facts"):
        pipeline.prepare(config_of_file(data, foreign), 24)
    with pytest.raises(DataError, match=r"damaged\.npz: cannot be read .*; write it again"):
        for split in SPLITS:
            single_file.examples(corrupted, split)
    (tmp_path / "short.npz").write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match=r"short\.npz: cannot be read"):
        pipeline.prepare(config_of_file(data, tmp_path / "short.npz"), 24)
