"""Loading configs by name, overrides, and one-line errors that suggest the nearest name."""

import json

import pytest

from biclip_jax.core import config as config_lib
from biclip_jax.core.errors import UserError


def test_every_config_and_its_smoke_variant_load():
    names = config_lib.config_names()
    assert {"default", "qata"} <= set(names)
    for name in names:
        config = config_lib.load_config(f"{name}:smoke", [])
        assert config.is_locked
        assert config.data.name == "synthetic"
        assert config.num_steps <= 10


def test_loads_by_name_by_path_in_the_package_and_by_path_on_disk(tmp_path):
    by_name = config_lib.load_config("qata:small", [])
    assert by_name == config_lib.load_config("configs/qata.py:small", [])
    custom = tmp_path / "mine.py"
    custom.write_text(
        "from biclip_jax.configs import qata\n"
        "def get_config(variant=None):\n    config = qata.get_config(variant)\n"
        "    config.seed = 7\n    return config\n"
    )
    assert config_lib.load_config(f"{custom}:small", []).seed == 7


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
def test_overrides_are_converted_to_the_type_of_the_field(override, path, value):
    fields = dict(config_lib.flatten(config_lib.load_config("qata", [override])))
    assert fields[path] == value
    assert type(fields[path]) is type(value)


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("qata", "--config.batchsize=8", "did you mean batch_size"),
        ("qata", "--config.optim.lr=1", "unknown field"),
        ("qata", "--config.batch_size=many", "expected a value of type int"),
        ("qata", "--config.batch_size=1.5", "expected a value of type int"),
        ("qata", "--batch_size=8", "--config.FIELD=VALUE"),
        ("qata", "--config.optim.name=adam", "did you mean adamw"),
        ("qata", "--config.model.dtype=float16", "bfloat16"),
        ("qata", "--config.data.text_condition=emtpy", "did you mean empty"),
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
        ("qata", "--config.model.bmf.level_text_dropout=1.0", "0 <= value < 1"),
        ("qata", "--config.data.unlabelled_ratio=-1.0", "at least 0"),
        ("qata", "--config.views.strong.cutmix=2.0", "a probability"),
        ("qata", "--config.views.strong.noise=-0.1", "at least 0"),
        ("qata", "--config.parallel.mode=mash", "did you mean mesh"),
        ("qata", "--config.parallel.shard=params", "expected one of '', optimizer, all"),
        ("qata", "--config.parallel.shard=all", "set parallel.mode=mesh, or remove it"),
        ("quata", "", "did you mean qata"),
        ("elsewhere/qata.py", "", "no such file"),
        ("common", "", "no such file"),
        ("qata:tiny", "", "small"),
    ],
)
def test_invalid_configs_raise_errors_with_a_fix(name, override, message):
    with pytest.raises(UserError, match=message):
        config_lib.load_config(name, [override] if override else [])


def test_parallel_fields_may_change_or_be_missing_when_a_run_resumes(tmp_path):
    path, mesh = tmp_path / "config.json", "--config.parallel.mode=mesh"
    config = config_lib.load_config("qata", [mesh, "--config.parallel.shard=all"]).to_dict()
    for before in ({}, {"parallel": {"mode": "pmap", "shard": ""}}):
        without_parallel = {name: part for name, part in config.items() if name != "parallel"}
        path.write_text(json.dumps({**without_parallel, **before}))
        assert config_lib.changed_fields(path, config) == {}
