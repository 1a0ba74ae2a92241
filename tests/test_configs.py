"""Variants of configs/variants.py: each builds and traces, singly and combined."""

import jax
import jax.numpy as jnp
import pytest

from biclip_jax.configs import variants
from biclip_jax.core import config as config_lib
from biclip_jax.core import distributed, rng
from biclip_jax.core.errors import UserError
from biclip_jax.encoders import text as text_encoders
from biclip_jax.experiment import program
from biclip_jax.models import biclip
from biclip_jax.training import views
from biclip_jax.training.objectives import biclip as objective
from tests import tiny

PARTS = {"seg", "gen", "iac", "cycle"}
# method -> parts of the loss
LOSSES = {
    "published": PARTS,
    "full": PARTS,
    "semi": PARTS | {"pseudo_labels"},
    "unet": {"seg"},
    "ef_unet": {"seg"},
    "one_way": {"seg"},
    "no_bmf": PARTS,
    "no_iac": PARTS - {"iac"},
    "no_cycle": PARTS - {"cycle"},
    "no_generator": {"seg", "iac"},
}


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=() if name in ("published", "semi") else pytest.mark.slow)
        for name in variants.METHODS
    ],
)
def test_every_method_builds_and_traces(method, monkeypatch):
    monkeypatch.setattr(biclip, "init", tiny.abstract_init)
    config = config_lib.load_config(f"default:smoke,{method}", [])
    assert config.name == f"demo_smoke_{method}"
    size, rows = config.model.image_size, config.batch_size
    texts = {"train": ["lower left lung"] * rows}
    encoded_text = text_encoders.encode_splits(config.model.text.to_dict(), texts, None)
    built = program.build(config, 32, encoded_text)
    batch = {
        "image": jnp.zeros((rows, size, size, 1), jnp.uint8),
        "mask": jnp.zeros((rows, size, size, 1), jnp.uint8),
        "row": jnp.arange(rows, dtype=jnp.int32),
        "labelled": jnp.arange(rows) < built.num_labelled_rows,
        **encoded_text.fields["train"],
    }
    key = rng.stream(config, "augment")
    state, metrics = jax.eval_shape(
        built.train_step, built.initial, distributed.shard_batch(batch), key
    )
    assert set(metrics) == {
        "loss",
        "grad_norm",
        "skipped",
        *(f"loss_{part}" for part in LOSSES[method]),
    }
    assert jax.tree.structure(state) == jax.tree.structure(built.initial)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, built.initial)
    assert (built.initial.ema is not None) == (method == "semi")
    assert built.num_labelled_rows == (rows // 2 if method == "semi" else rows)


@pytest.mark.parametrize("name", sorted({*config_lib.config_names()} - {"medclipseg"}))
def test_every_config_has_every_method(name):
    base = config_lib.load_config(name, [])
    assert config_lib.load_config(f"{name}:published", []).to_dict() | {"name": ""} == (
        base.to_dict() | {"name": ""}
    )
    for method in variants.METHODS:
        config = config_lib.load_config(f"{name}:{method}", [])
        assert config.name == f"{base.name}_{method}"
        # Semi-supervised batches have as many unlabelled rows.
        assert config.batch_size == base.batch_size * (2 if method == "semi" else 1)
        fields, base_fields = (dict(config_lib.flatten(c)) for c in (config, base))
        for field in ("data.name", "optim.learning_rate", "model.width"):
            assert fields[field] == base_fields[field]


def test_full_has_the_settings_of_the_method_description():
    fields = dict(config_lib.flatten(config_lib.load_config("qata:full", [])))
    expected = {
        "model.bmf.levels": "all",
        "model.text.pooling": "masked",
        "loss.views": "both",
        "loss.iac_learner": "strong",
        "loss.cycle_distance": "l2",
        "loss.gen": 0.1,
        "loss.iac": 0.05,
        "loss.cycle": 0.07,
        "views.geometry_first": True,
        "views.strong_statistics": False,
        "views.horizontal_flip": 0.5,
        "views.vertical_flip": 0.0,
        "views.rotation": 10.0,
        "views.strong.photometric": False,
    }
    assert {name: fields[name] for name in expected} == expected
    assert all(fields[f"views.strong.{name}"] > 0 for name in ("noise", "contrast", "elastic"))
    assert fields["views.strong.cutmix"] > 0
    assert fields["model.text.dropout"] > 0


# Fields of `views` that a method sets, in every config.
METHOD_FIELDS = ("geometry_first", "strong", "strong_statistics")


def test_methods_are_applied_before_other_variants():
    small = config_lib.load_config("qata:small,full", [])
    assert (small.name, small.views.affine, small.model.width) == ("qata_small_full", 1.0, 16)
    reversed_order = config_lib.load_config("qata:full,small", [])
    assert (reversed_order.name, reversed_order.views) == ("qata_full_small", small.views)
    full = config_lib.load_config("qata:full", [])
    assert (small.views.translation, full.views.translation) == (0.1, 0)
    assert (full.optim.warmup_steps, full.num_epochs) == (1000, 200)
    assert (small.optim.warmup_steps, small.num_epochs) == (100, 200)


@pytest.mark.parametrize("name", ["folder", "kvasir", "qata"])
def test_small_variants_have_the_same_geometry_for_all_methods(name):
    small = config_lib.load_config(f"{name}:small", [])
    assert (small.model.image_size, small.model.width, small.num_steps) == (112, 16, 2500)
    geometry = {k: value for k, value in small.views.items() if k not in METHOD_FIELDS}
    for method in ("full", "ef_unet"):
        views = config_lib.load_config(f"{name}:small,{method}", []).views
        assert {field: views[field] for field in geometry} == geometry


def test_rejects_two_methods():
    with pytest.raises(UserError, match="ef_unet, full: expected at most one method"):
        config_lib.load_config("default:ef_unet,smoke,full", [])


@pytest.mark.parametrize("variant", ["smoke,ful", "full,", "full smoke", "full,,smoke"])
def test_rejects_an_unknown_variant(variant):
    with pytest.raises(
        UserError,
        match=r"variant .*unknown; expected one of .*smoke.*published.*full.*no_generator",
    ):
        config_lib.load_config(f"default:{variant}", [])


def test_photometric_fields_reach_the_objective():
    small = config_lib.load_config("qata:small,full", []).to_dict()
    assert objective.make_recipe(small).photometric == views.Photometric(
        brightness=0.2, contrast=0.3
    )
    assert (
        objective.make_recipe(config_lib.load_config("qata", []).to_dict()).photometric
        == views.Photometric()
    )
