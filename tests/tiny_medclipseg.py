"""A tiny MedCLIPSeg and its batch: encoders of three blocks, 24 and 16 wide, at 32 px."""

import jax
import jax.numpy as jnp
import numpy as np

from biclip_jax.models import medclipseg
from tests.models.numpy_reference import noise

IMAGE_SIZE, PATCH_SIZE, NUM_BLOCKS, EMBEDDING = 32, 8, 3, 12
MAX_LENGTH, VOCAB_SIZE, ADAPTER_WIDTH = 6, 16, 8
IMAGE_WIDTH, TEXT_WIDTH, NUM_HEADS = 16, 24, 2
# Fields of a checkpoint's config.json that cannot be derived from its arrays.
HEADS = {f"{part}_config": {"num_attention_heads": NUM_HEADS} for part in ("vision", "text")}
NUM_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2 + 1


def encoders(variant, num_blocks=NUM_BLOCKS):
    """Returns the fields of a variant's encoders, at tiny size."""
    image, text = (dict(medclipseg.ENCODERS[variant][part]) for part in ("image", "text"))
    common = {"num_layers": num_blocks, "num_heads": NUM_HEADS}
    image |= common | {"width": IMAGE_WIDTH, "mlp_width": 4 * IMAGE_WIDTH}
    image |= {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "embedding_size": EMBEDDING}
    text |= common | {"width": TEXT_WIDTH, "mlp_width": 4 * TEXT_WIDTH}
    text |= {"vocab_size": VOCAB_SIZE, "max_length": MAX_LENGTH}
    size = "projection_size" if text.get("kind") == "bert" else "embedding_size"
    return {"image": image, "text": text | {size: EMBEDDING}}


def fields(variant="unimedclip", **changes):
    """Returns the config of `medclipseg.build`: two adapters, before the blocks 1 and 2."""
    return {
        **encoders(variant),
        "image_size": IMAGE_SIZE,
        "max_length": MAX_LENGTH,
        "resize": "antialiased",
        "input": "clip",
        "value_only": variant in medclipseg.VALUE_ONLY,
        "dtype": "float32",
        "adapter_width": ADAPTER_WIDTH,
        "num_layers": 2,
        "num_upscales": 1,
        "beta": medclipseg.BETA,
        "gate_init": 0.0,
        "num_samples": 4,
        **changes,
    }


def variables(model, seed=0):
    """Returns random parameters without zeros and ones, without compiling `init`."""
    ids = jnp.zeros((1, MAX_LENGTH), jnp.int32)
    image = jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3))
    return {"batch_stats": {}, **noise(model, image, ids, seed=seed, amount=0.2)}


def batch(size=4, seed=0):
    """Returns a random `Batch`; every prompt has padding, and one has only its end tokens."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (size, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.uint8)
    ids = rng.integers(5, VOCAB_SIZE, (size, MAX_LENGTH))
    ids[:, 0] = 2
    for i in range(size):
        ids[i, 1 + i % 3] = VOCAB_SIZE - 1  # the end token, the largest id
        ids[i, 2 + i % 3 :] = 0
    fields = {"image": image, "mask": (image[..., :1] > 127).astype(np.uint8)}
    for prefix in ("", "swapped_"):
        encoded_text = {"text_ids": ids.astype(np.int32), "text_mask": ids > 0}
        encoded_text |= {"has_text": np.ones(size, bool)}
        fields |= {f"{prefix}{name}": value for name, value in encoded_text.items()}
    fields |= {"row": np.arange(size, dtype=np.int32), "index": np.arange(size, dtype=np.int32)}
    return {name: jnp.asarray(value) for name, value in fields.items()}


def keys(size=4, seed=5):
    """Returns one key per example."""
    return jax.random.split(jax.random.key(seed), size)
