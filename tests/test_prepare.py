"""`prepare`: writes a dataset as a single file."""

import pytest

from biclip_jax import prepare
from biclip_jax.data.builders.prepared import open_split


def test_writes_the_file_and_prints_the_split_sizes(smoke_config, tmp_path, capsys):
    cache = f"--config.data.cache_dir={smoke_config.data.cache_dir}"
    output = tmp_path / "smoke.npz"
    with pytest.raises(SystemExit) as exit_info:
        prepare.main(["--config", "default:smoke", cache, "--output", str(output)])
    assert not exit_info.value.code
    assert f"{output}  32 train, 8 val, 8 test" in capsys.readouterr().out
    assert len(open_split(output, "train")) == 32


def test_rejects_another_suffix(capsys):
    with pytest.raises(SystemExit) as exit_info:
        prepare.main(["--config", "default:smoke", "--output", "set.zip"])
    assert exit_info.value.code == 2
    assert "set.zip; expected a file name that ends in .npz" in capsys.readouterr().err
