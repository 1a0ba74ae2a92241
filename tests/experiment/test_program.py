"""Programs built from configs: rows, heads, blocks and invalid configs."""

import jax
import numpy as np
import pytest

from biclip_jax.core import config as config_lib
from biclip_jax.core import rng
from biclip_jax.core.errors import UserError
from biclip_jax.encoders import text as text_encoders
from biclip_jax.experiment import biclip_spec, program
from biclip_jax.models import biclip
from biclip_jax.training import state as train_state
from tests import tiny


def configured(variant="smoke", *overrides):
    return config_lib.load_config(
        f"default:{variant}", [f"--config.{field}" for field in overrides]
    )


def build(config, num_labelled=32, num_val=0):
    texts = {"train": ["lower left lung"]}
    encoded_text = text_encoders.encode_splits(config.model.text.to_dict(), texts, None)
    return program.build(config, num_labelled, encoded_text, num_val=num_val)


@pytest.mark.parametrize(
    ("batch_size", "ratio", "rows"),
    [(16, 1.0, 8), (16, 3.0, 4), (16, 7.0, 2), (16, 0.3, 12), (4, 1.0, 2), (6, 1.0, 4)],
)
def test_labelled_rows_are_even_and_follow_the_ratio(batch_size, ratio, rows):
    """The last case: 6 rows at ratio 1 would give 3, which is odd; 2 * round(1.5) = 4."""
    config = configured("semi", f"batch_size={batch_size}", f"data.unlabelled_ratio={ratio}")
    assert program.num_labelled_rows(config) == rows
    assert program.num_labelled_rows(configured("full", f"batch_size={batch_size}")) == batch_size


@pytest.mark.parametrize(
    ("batch_size", "ratio"), [(16, 100.0), (16, 0.01), (2, 1.0)], ids=["none", "all", "small"]
)
def test_rejects_a_ratio_without_labelled_or_unlabelled_rows(batch_size, ratio):
    config = configured("semi", f"batch_size={batch_size}", f"data.unlabelled_ratio={ratio}")
    with pytest.raises(UserError, match=r"unlabelled_ratio: .*expected 2 to"):
        program.num_labelled_rows(config)


def test_rejects_batches_that_do_not_fit_devices_parts_or_pairs(monkeypatch):
    full = configured("smoke,full")
    program.check_batch(full, 8)
    with pytest.raises(ValueError, match=r"accumulate is 2; expected 1 with unlabelled images"):
        program.check_batch(configured("smoke,semi", "optim.accumulate=2"), 4)
    program.check_batch(configured("smoke,full", "optim.accumulate=4"), 8)
    message = r"cutmix pairs .*batch_size 8 gives 1 rows per device .*expected an even number"
    with pytest.raises(ValueError, match=message):
        program.check_batch(configured("smoke,full", "optim.accumulate=8"), 8)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    with pytest.raises(ValueError, match=message):
        program.check_batch(full, 8)
    program.check_batch(configured("smoke"), 8)
    program.check_batch(configured("smoke,full", "views.strong.cutmix=0.0"), 8)
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    with pytest.raises(ValueError, match="multiple of 3"):
        program.check_batch(full, 8)


@pytest.mark.parametrize(
    ("overrides", "heads"),
    [
        ((), ["cycle", "iac"]),
        (("loss.iac=0.0",), ["cycle"]),
        (("loss.cycle=0.0",), ["iac"]),
        (("loss.cycle=0.0", "loss.iac=0.0", "loss.gen=0.0"), []),
    ],
)
def test_the_losses_determine_the_heads(overrides, heads):
    fields = biclip_spec.model_fields(configured("smoke", *overrides))
    assert fields["heads"] == heads
    assert fields["iac_blocks"] == ["decoder_0"]
    assert fields["width"] == 4


def test_consistency_accepts_only_decoder_blocks():
    fields = biclip_spec.model_fields(configured("smoke", "loss.iac_blocks=decoder"))
    assert fields["iac_blocks"] == ["decoder_1", "decoder_0"]
    for blocks in ("encoder_0", "", "all", "bottleneck"):
        with pytest.raises(ValueError, match="expected decoder blocks"):
            biclip_spec.model_fields(configured("smoke", f"loss.iac_blocks={blocks}"))


@pytest.mark.parametrize(
    ("names", "blocks"),
    [
        ("", ()),
        ("all", ("encoder_0", "encoder_1", "encoder_2", "decoder_1", "decoder_0")),
        ("encoder", ("encoder_0", "encoder_1")),
        ("bottleneck", ("encoder_2",)),
        ("decoder", ("decoder_1", "decoder_0")),
        ("decoder_0, encoder_1", ("encoder_1", "decoder_0")),
        ("decoder,bottleneck,decoder_1", ("encoder_2", "decoder_1", "decoder_0")),
    ],
)
def test_blocks_are_named_singly_or_by_kind_and_returned_in_network_order(names, blocks):
    assert biclip.named_blocks(names, 3) == blocks


@pytest.mark.parametrize("name", ["encoder_3", "decoder_2", "middle", "All"])
def test_rejects_an_unknown_block(name):
    with pytest.raises(ValueError, match=rf"block '{name}'; .*all, encoder, .*decoder_0"):
        biclip.named_blocks(f"decoder_0,{name}", 3)


def test_num_steps_follows_from_the_labelled_images(monkeypatch):
    monkeypatch.setattr(biclip, "init", tiny.abstract_init)
    fields = ("num_steps=0", "num_epochs=3", "eval_every=0")
    # With few images, evaluation and saving still take place only every 50 steps.
    assert build(configured("smoke,semi", *fields), 3, num_val=160).eval_every == 50
    monkeypatch.setattr(program, "MIN_EVAL_EVERY", 1)
    full, semi = (build(configured(v, *fields), 33) for v in ("smoke,full", "smoke,semi"))
    assert (full.num_steps, full.eval_every, full.num_labelled_rows) == (15, 5, 8)
    assert (semi.num_steps, semi.eval_every, semi.num_labelled_rows) == (27, 9, 4)
    few = build(configured("smoke,semi", *fields), 3)
    assert (few.num_steps, few.eval_every) == (3, 1)
    # Validation must not take more batches than training takes steps.
    assert build(configured("smoke,semi", *fields), 3, num_val=160).eval_every == 20
    assert build(configured("smoke,full", *fields), 33, num_val=16).eval_every == 5


@pytest.mark.parametrize(
    ("variant", "override", "message"),
    [
        ("smoke,full", "loss.pseudo_labels=1.0", r"set data\.unlabelled, or both losses"),
        ("smoke,full", "model.bmf.levels=encoder_7", "unknown U-Net block"),
        ("smoke,full", "loss.iac_blocks=encoder_0", "expected decoder blocks"),
        ("smoke,unet", "model.pseudo_contrast=True", r"model\.pseudo_image is false; set"),
        ("smoke,full", "optim.accumulate=8", "expected an even number"),
        ("smoke,semi", "optim.accumulate=2", "expected 1 with unlabelled images"),
        ("smoke", "model.image_size=60", r"model\.image_size is 60; expected one of \[56, 112"),
        ("smoke,unet", "model.image_size=58", r"model\.image_size is 58; .* multiple of 4 with 3"),
    ],
)
def test_rejects_incompatible_fields(monkeypatch, variant, override, message):
    monkeypatch.setattr(biclip, "init", tiny.abstract_init)
    with pytest.raises(UserError, match=rf"^--config(: |\.).*{message}"):
        build(configured(variant, override))


def test_models_without_generator_accept_more_image_sizes(monkeypatch):
    monkeypatch.setattr(biclip, "init", tiny.abstract_init)
    for variant in ("smoke,unet", "smoke,no_generator"):
        assert build(configured(variant, "model.image_size=64")).initial.params


@pytest.mark.parametrize("shard", ["optimizer", "all"])
def test_a_mesh_train_step_keeps_the_sharding_of_the_state(monkeypatch, shard):
    monkeypatch.setattr(biclip, "init", tiny.abstract_init)
    config = configured("smoke", "parallel.mode=mesh", f"parallel.shard={shard}")
    built = build(config)
    layout = program.state_shardings(built.initial, shard)
    specs = {
        name: [sharding.spec for sharding in jax.tree.leaves(getattr(layout, name))]
        for name in ("params", "opt_state", "batch_stats")
    }
    assert any(specs["opt_state"]) and not any(specs["batch_stats"])
    assert any(specs["params"]) == (shard == "all")
    size, rows = config.model.image_size, config.batch_size
    ids = np.ones((rows, config.model.text.max_length), np.int32)
    batch = {"image": np.zeros((rows, size, size, 1), np.uint8), "text_ids": ids}
    batch |= {"mask": batch["image"], "text_mask": ids > 0, "has_text": np.ones(rows, bool)}
    batch |= {"row": np.arange(rows, dtype=np.int32), "valid": np.ones(rows, bool)}
    state, batch = built.place(built.initial), built.shard(batch)
    key = rng.stream(config, "augment")
    after, _ = jax.eval_shape(built.train_step, state, batch, key)
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)
    assert jax.tree.map(lambda x: x.sharding, state) == layout
    sums = jax.eval_shape(built.eval_step, train_state.inference_variables(state), batch)
    assert all(x.shape == () for x in sums.values())


def test_streams_differ_by_name_and_seed():
    keys = [
        jax.random.key_data(rng.stream(configured("smoke", f"seed={seed}"), name))
        for seed in (0, 1)
        for name in ("params", "augment")
    ]
    assert len(np.unique(keys, axis=0)) == 4


def test_the_model_config_contains_no_local_paths(monkeypatch):
    monkeypatch.setattr(biclip, "init", tiny.abstract_init)
    model_config = build(configured("smoke,full")).model_config
    assert model_config["kind"] == "biclip"
    assert model_config["image_encoder"] == {}
    assert model_config["model"]["heads"] == ["cycle", "iac"]
    assert model_config["model"]["bmf"]["levels"] == "all"
    model = biclip.build(model_config["model"], vocab_size=model_config["vocab_size"])
    assert len(model.levels) == 5
    assert model.no_text
