"""The variants of configs/variants.py: each builds and traces, alone and composed."""

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


@pytest.mark.parametrize("page", sorted({*config_lib.config_names()} - {"medclipseg"}))
def test_every_page_takes_every_method(page):
    base = config_lib.load_config(page, [])
    assert config_lib.load_config(f"{page}:published", []).to_dict() | {"name": ""} == (
        base.to_dict() | {"name": ""}
    )
    for method in variants.METHODS:
        config = config_lib.load_config(f"{page}:{method}", [])
        assert config.name == f"{base.name}_{method}"
        # Without masks as many again.
        assert config.batch_size == base.batch_size * (2 if method == "semi" else 1)
        for name in ("data.name", "optim.learning_rate", "model.width"):
            assert dict(config_lib.flatten(config))[name] == dict(config_lib.flatten(base))[name]


def test_full_is_the_column_of_the_method_s_description():
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


# What a method says of the views, whatever the page.
OF_METHODS = ("geometry_first", "strong", "strong_statistics")


def test_a_method_comes_before_the_variants_of_its_page():
    small = config_lib.load_config("qata:small,full", [])
    assert (small.name, small.views.affine, small.model.width) == ("qata_small_full", 1.0, 16)
    turned = config_lib.load_config("qata:full,small", [])
    assert (turned.name, turned.views) == ("qata_full_small", small.views)
    whole = config_lib.load_config("qata:full", [])
    assert (small.views.translation, whole.views.translation) == (0.1, 0)
    assert (whole.optim.warmup_steps, whole.num_epochs) == (1000, 200)
    assert (small.optim.warmup_steps, small.num_epochs) == (100, 200)


@pytest.mark.parametrize("page", ["folder", "kvasir", "qata"])
def test_every_page_has_a_size_for_a_cpu_with_one_geometry_for_all_methods(page):
    small = config_lib.load_config(f"{page}:small", [])
    assert (small.model.image_size, small.model.width, small.num_steps) == (112, 16, 2500)
    kept = {name: value for name, value in small.views.items() if name not in OF_METHODS}
    for method in ("full", "ef_unet"):
        views = config_lib.load_config(f"{page}:small,{method}", []).views
        assert {name: views[name] for name in kept} == kept


def test_two_methods_at_once_are_refused():
    with pytest.raises(UserError, match="ef_unet, full are whole methods; name one"):
        config_lib.load_config("default:ef_unet,smoke,full", [])


@pytest.mark.parametrize("variant", ["smoke,ful", "full,", "full smoke", "full,,smoke"])
def test_an_unknown_variant_is_named_with_the_known_ones(variant):
    with pytest.raises(UserError, match=r"no variant .*smoke.*published.*full.*no_generator"):
        config_lib.load_config(f"default:{variant}", [])


def test_the_light_of_a_page_reaches_the_objective():
    small = config_lib.load_config("qata:small,full", []).to_dict()
    assert objective.make_recipe(small).photometric == views.Photometric(
        brightness=0.2, contrast=0.3
    )
    assert (
        objective.make_recipe(config_lib.load_config("qata", []).to_dict()).photometric
        == views.Photometric()
    )
