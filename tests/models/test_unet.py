"""U-Net: block names, and rematerialisation, which changes only memory and time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biclip_jax.core import config as config_lib
from biclip_jax.models import biclip
from biclip_jax.models.unet import UNet, block_names
from reference import flops

WIDTHS = (4, 8, 16)
IMAGE = jnp.asarray(np.random.default_rng(0).random((2, 16, 16, 3)), jnp.float32)


def test_block_names_are_in_data_flow_order():
    assert block_names(3) == ("encoder_0", "encoder_1", "encoder_2", "decoder_1", "decoder_0")


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: UNet(WIDTHS).init(jax.random.key(0), IMAGE, True))()["params"]


def gradient(remat):
    """Returns params -> ((loss, new statistics), gradient)."""
    module = UNet(WIDTHS, remat=remat)
    statistics = jax.eval_shape(lambda: module.init(jax.random.key(0), IMAGE, True))["batch_stats"]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), statistics)

    def loss(params):
        state = {"params": params, "batch_stats": zeros}
        (logits, _), updated = module.apply(state, IMAGE, True, mutable=["batch_stats"])
        return jnp.square(logits).sum(), updated

    return jax.value_and_grad(loss, has_aux=True)


@pytest.mark.slow
def test_remat_gives_the_same_gradient(params):
    plain, remat = (jax.jit(gradient(remat))(params) for remat in (False, True))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), plain, remat)


def test_remat_recomputes_every_block_in_the_backward_pass(params):
    """The additional operations are the two convolutions of each block, without padding."""
    channels = zip((3, 4, 8, 16, 8), (4, 8, 16, 8, 4), (16, 8, 4, 8, 16), strict=True)
    blocks = sum(
        2 * 2 * (3 * side - 2) ** 2 * width * (inputs + width) for inputs, width, side in channels
    )
    work = {remat: flops.count(gradient(remat), params) for remat in (False, True)}
    assert work[True] - work[False] == blocks


def test_config_sets_remat():
    for remat in (False, True):
        config = config_lib.load_config("default:smoke", [f"--config.model.remat={remat}"])
        model = biclip.build(config.model.to_dict(), vocab_size=9)
        assert model.bind({}).unet.remat == remat
