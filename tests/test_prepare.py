"""The door that writes a data set as one file."""

import pytest

from biclip_jax import prepare
from biclip_jax.data.builders.prepared import open_split


def test_the_file_is_written_and_described(smoke_config, tmp_path, capsys):
    cache = f"--config.data.cache_dir={smoke_config.data.cache_dir}"
    output = tmp_path / "smoke.npz"
    with pytest.raises(SystemExit) as done:
        prepare.main(["--config", "default:smoke", cache, "--output", str(output)])
    assert not done.value.code
    assert f"{output}  32 train, 8 val, 8 test" in capsys.readouterr().out
    assert len(open_split(output, "train")) == 32


def test_another_suffix_is_refused(capsys):
    with pytest.raises(SystemExit) as done:
        prepare.main(["--config", "default:smoke", "--output", "set.zip"])
    assert done.value.code == 2
    assert "set.zip; expected a name that ends in .npz" in capsys.readouterr().err
