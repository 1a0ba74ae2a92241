"""Configurations by name, overrides with the nearest name, errors as one sentence."""

import json
import platform
import subprocess
import sys

import pytest

from biclip_jax import cli, places
from biclip_jax.errors import UserError


def test_every_configuration_and_its_smoke_variant_resolve():
    names = cli.config_names()
    assert {"default", "qata"} <= set(names)
    for name in names:
        config = cli.load_config(f"{name}:smoke", [])
        assert config.is_locked
        assert config.data.name == "synthetic"
        assert config.num_steps <= 10


def test_found_by_name_by_path_in_the_package_and_by_path_on_disk(tmp_path):
    by_name = cli.load_config("qata:small", [])
    assert by_name == cli.load_config("configs/qata.py:small", [])
    own = tmp_path / "mine.py"
    own.write_text(
        "from biclip_jax.configs import qata\n"
        "def get_config(variant=None):\n    config = qata.get_config(variant)\n"
        "    config.seed = 7\n    return config\n"
    )
    assert cli.load_config(f"{own}:small", []).seed == 7


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("--config.batch_size=8", "batch_size", 8),
        ("--config.optim.learning_rate=1", "optim.learning_rate", 1.0),
        ("--config.optim.learning_rate=3e-4", "optim.learning_rate", 3e-4),
        ("--config.data.in_memory=false", "data.in_memory", False),
        ("--config.data.source=/a=b", "data.source", "/a=b"),
        ("--config.data.num_examples.train=5", "data.num_examples.train", 5),
    ],
)
def test_overrides_take_the_field_s_type(override, path, value):
    fields = dict(cli.leaves(cli.load_config("qata", [override])))
    assert fields[path] == value
    assert type(fields[path]) is type(value)


@pytest.mark.parametrize(
    ("name", "override", "said"),
    [
        ("qata", "--config.batchsize=8", "did you mean batch_size"),
        ("qata", "--config.optim.lr=1", "no such field"),
        ("qata", "--config.batch_size=many", "is no int"),
        ("qata", "--config.batch_size=1.5", "is no int"),
        ("qata", "--batch_size=8", "--config.FIELD=VALUE"),
        ("qata", "--config.optim.name=adam", "did you mean adamw"),
        ("qata", "--config.model.dtype=float16", "bfloat16"),
        ("qata", "--config.data.sentences=mising", "did you mean missing"),
        ("qata", "--config.data.resize=opencv2", "did you mean opencv"),
        ("qata", "--config.data.percent=20", "expected one of 10, 25, 50, 100"),
        ("qata", "--config.model.norm=layer", "expected one of batch, group"),
        ("qata", "--config.model.image.encoder=clip_vit", "did you mean clip_vit_b16"),
        ("qata", "--config.loss.views=strong", "expected one of weak, both"),
        ("qata", "--config.loss.iac_learner=none", "expected one of weak, strong, both"),
        ("qata", "--config.loss.cycle_distance=l3", "expected one of l1, l2"),
        ("qata", "--config.log_every=0", "at least 1"),
        ("qata", "--config.loss.iac=-1.0", "at least 0"),
        ("qata", "--config.loss.confidence=1.5", "0.5 <= value < 1"),
        ("qata", "--config.optim.ema_decay=1.5", "0 <= value < 1"),
        ("qata", "--config.model.text.dropout=1.0", "0 <= value < 1"),
        ("qata", "--config.model.bmf.dropout=1.0", "0 <= value < 1"),
        ("qata", "--config.data.unlabelled_ratio=-1.0", "at least 0"),
        ("qata", "--config.views.strong.cutmix=2.0", "a probability"),
        ("qata", "--config.views.strong.noise=-0.1", "at least 0"),
        ("qata", "--config.parallel.mode=mash", "did you mean mesh"),
        ("qata", "--config.parallel.shard=params", "expected one of '', optimizer, all"),
        ("qata", "--config.parallel.shard=all", "set parallel.mode=mesh, or leave it out"),
        ("quata", "", "did you mean qata"),
        ("elsewhere/qata.py", "", "no such file"),
        ("common", "", "no such file"),
        ("qata:tiny", "", "small"),
    ],
)
def test_mistakes_are_named_with_the_mend(name, override, said):
    with pytest.raises(UserError, match=said):
        cli.load_config(name, [override] if override else [])


def test_a_run_may_be_older_than_the_mode_of_its_devices_and_go_on_under_another(tmp_path):
    path, mesh = tmp_path / "config.json", "--config.parallel.mode=mesh"
    config = cli.load_config("qata", [mesh, "--config.parallel.shard=all"]).to_dict()
    for before in ({}, {"parallel": {"mode": "pmap", "shard": ""}}):
        there = {name: part for name, part in config.items() if name != "parallel"}
        path.write_text(json.dumps({**there, **before}))
        assert cli.changed_fields(path, config) == {}


def test_a_user_s_error_is_one_line_and_status_2(capsys):
    def main(argv):
        raise UserError("here.png: found this; expected that; do so")

    with pytest.raises(SystemExit) as stopped:
        cli.run(main, [])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: here.png: found this; expected that; do so\n"


def test_ctrl_c_is_one_line_and_status_130(capsys):
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        cli.run(main, [])
    assert stopped.value.code == 130
    said = capsys.readouterr().err
    assert said.startswith("interrupted;") and said.count("\n") == 1


def test_a_file_that_cannot_be_used_is_one_line_too(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda _: (tmp_path / "gone").read_text() and None, [])
    assert stopped.value.code == 2
    assert str(tmp_path / "gone") in capsys.readouterr().err


def test_the_convolution_flag_is_set_once_and_only_where_it_is_known(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    monkeypatch.setattr(cli.metadata, "version", lambda _: "0.10.2")
    for _ in range(2):
        cli.set_xla_flags()
        assert cli.os.environ["XLA_FLAGS"] == f"--xla_a=1 {cli.CPU_CONVOLUTION_FLAG}"
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(cli.metadata, "version", lambda _: "0.12.0")
    cli.set_xla_flags()
    assert cli.os.environ["XLA_FLAGS"] == ""


@pytest.mark.parametrize("given", [True, False])
def test_compiled_programs_are_kept_unless_a_folder_is_named(monkeypatch, tmp_path, given):
    import jax

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = {
        name: getattr(jax.config, name)
        for name in ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    }
    if given:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    else:
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    try:
        cli.keep_compiled_programs()
        expected = before["jax_compilation_cache_dir"] if given else str(places.programs_dir())
        assert jax.config.jax_compilation_cache_dir == expected
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_memory_is_kept_on_hosts_without_an_accelerator_alone(monkeypatch):
    asked = []

    class Library:
        mallopt = staticmethod(lambda option, value: asked.append((option, value)))
        malloc_trim = staticmethod(lambda pad: asked.append(("trim", pad)))

    monkeypatch.setattr(cli.ctypes, "CDLL", lambda name: Library)
    found = [True]
    monkeypatch.setattr(cli.Path, "glob", lambda *_: found)
    cli.keep_memory()
    cli.give_back_memory()
    assert asked == []
    monkeypatch.setattr(cli.Path, "glob", lambda *_: [])
    cli.keep_memory()
    assert dict(asked) == cli.MALLOC_OPTIONS
    cli.give_back_memory()
    assert asked[-1] == ("trim", 0)


KEEPS = """
import ctypes, resource
from biclip_jax import cli
cli.ACCELERATORS = ()
cli.keep_memory()
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
size = 5 * 2**29  # above 2 GiB
def touch():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    libc.memset(block, 1, size // 16)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, second = touch(), touch()
cli.give_back_memory()
print(first, second, touch())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone")
def test_memory_of_more_than_two_gibibytes_is_kept_too():
    said = subprocess.run([sys.executable, "-c", KEEPS], capture_output=True, text=True, check=True)
    first, kept, given_back = map(int, said.stdout.split())
    assert kept < first / 100
    assert given_back > first / 2


def test_another_c_library_is_left_alone(monkeypatch):
    asked = []

    def missing(name):
        asked.append(name)
        raise OSError(name)

    monkeypatch.setattr(cli.ctypes, "CDLL", missing)
    monkeypatch.setattr(cli.Path, "glob", lambda *_: [])
    cli.keep_memory()
    assert asked == ["libc.so.6"]
