"""Adapter, head and losses against the authors' numbers at toy size.

tests/fixtures/medclipseg_toy.npz: random weights under the released names, random inputs, and the
outputs of the authors' code (arXiv 2602.20423) in float32.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biclip_jax.models import adapters, medclipseg
from biclip_jax.training import losses
from biclip_jax.weights import convert, keys

TOY = np.load(Path(__file__).parent.parent / "fixtures/medclipseg_toy.npz")


@pytest.fixture(autouse=True)
def exact_matmul():
    with jax.default_matmul_precision("highest"):
        yield


def parameters(table, prefix, fixture_name):
    """Converts the parameters below `prefix` with the table for released checkpoints."""
    tree = {}
    for name, rule in table.items():
        if not name.startswith(f"params/{prefix}"):
            continue
        (source,) = rule.sources
        *path, leaf = name.removeprefix(f"params/{prefix}").split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = jnp.asarray(convert.LAYOUTS[rule.layout](TOY[fixture_name(source)]))
    return {"params": tree}


def test_adapter_matches_the_authors():
    table = keys.medclipseg(1, 0)
    variables = parameters(
        table, "adapters_0/", lambda name: name.replace("pvl_adapters.0.", "ad_w/")
    )
    module = adapters.Adapter(24, 20, 8)
    noise = [jnp.asarray(TOY["ad_eps_txt"]), jnp.asarray(TOY["ad_eps_img"])]
    inputs = jnp.asarray(TOY["ad_in_img"]), jnp.asarray(TOY["ad_in_txt"])
    image, text = module.apply(variables, *inputs, noise)
    np.testing.assert_allclose(image, TOY["ad_out_img"], atol=1e-6)
    np.testing.assert_allclose(text, TOY["ad_out_txt"], atol=1e-6)


def test_head_and_resized_logits_match_the_authors():
    def fixture_name(name):
        return name.replace("upscale.", "hd_up/").replace("mask_head.", "hd_mlp/")

    variables = parameters(keys.medclipseg(0, 2), "head/", fixture_name)
    features, text = jnp.asarray(TOY["hd_feats"]), jnp.asarray(TOY["hd_txt"])
    low = medclipseg.Head().apply(variables, features, text)
    np.testing.assert_allclose(low, TOY["hd_low"], atol=1e-5)
    logits = jax.image.resize(3 * low, TOY["hd_logits_times3"].shape, "bilinear", antialias=False)
    np.testing.assert_allclose(logits, TOY["hd_logits_times3"], atol=1e-5)


def test_losses_match_the_authors():
    logits = jnp.asarray(TOY["hd_logits_times3"])[..., None]
    mask = jnp.asarray(TOY["ls_mask"])[..., None]
    pooled = losses.pooled_patches(jnp.asarray(TOY["hd_feats"]))
    parts = {
        "dice": losses.row_dice_loss(logits, mask).mean(),
        "bce": losses.binary_cross_entropy(logits, mask).mean(),
        "contrastive": losses.contrastive_loss(
            pooled, jnp.asarray(TOY["hd_txt"]), kind="released"
        ).mean(),
    }
    for name, value in parts.items():
        np.testing.assert_allclose(value, TOY[f"ls_{name}"], atol=2e-6, err_msg=name)
    total = 0.5 * parts["dice"] + 0.5 * parts["bce"] + 0.1 * parts["contrastive"]
    np.testing.assert_allclose(total, TOY["ls_total"], atol=2e-6)
