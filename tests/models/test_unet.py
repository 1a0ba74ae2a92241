"""The U-Net by itself: its blocks, and recomputation that changes memory alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import flops
from biclip_jax.models.unet import UNet, block_names

WIDTHS = (4, 8, 16)
IMAGE = jnp.asarray(np.random.default_rng(0).random((2, 16, 16, 3)), jnp.float32)


def test_blocks_are_named_in_the_order_of_the_data():
    assert block_names(3) == ("encoder_0", "encoder_1", "encoder_2", "decoder_1", "decoder_0")


@pytest.fixture(scope="module")
def steps():
    """{remat: (FLOPs of the gradient, its value, new statistics)} with the same parameters."""
    found = {}
    variables = UNet(WIDTHS).init(jax.random.key(0), IMAGE, True)
    for remat in (False, True):
        module = UNet(WIDTHS, remat=remat)

        def loss(params, module=module):
            state = {**variables, "params": params}
            (logits, _), updated = module.apply(state, IMAGE, True, mutable=["batch_stats"])
            return jnp.square(logits).sum(), updated

        gradient = jax.value_and_grad(loss, has_aux=True)
        fresh = jax.eval_shape(lambda module=module: module.init(jax.random.key(0), IMAGE, True))
        assert jax.tree.structure(variables) == jax.tree.structure(fresh)
        work = flops.count(gradient, variables["params"])
        found[remat] = work, jax.jit(gradient)(variables["params"])
    return found


def test_recomputation_changes_no_number(steps):
    (_, plain), (_, again) = steps[False], steps[True]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), plain, again)


def test_every_block_is_computed_again_in_the_backward_pass(steps):
    """What is added is the work of their two convolutions, products with padding left out."""
    channels = zip((3, 4, 8, 16, 8), (4, 8, 16, 8, 4), (16, 8, 4, 8, 16), strict=True)
    blocks = sum(
        2 * 2 * (3 * side - 2) ** 2 * width * (inputs + width) for inputs, width, side in channels
    )
    assert steps[True][0] - steps[False][0] == blocks
