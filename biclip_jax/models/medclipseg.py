"""MedCLIPSeg (arXiv 2602.20423): two CLIP encoders that exchange information through adapters.

The encoders are frozen. Before most of their blocks an adapter lets image and text attend to each
other; keys and values have a variance, and the values are sampled. The head takes the dot product
of the upsampled patch features with the text embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from biclip_jax.models import bert, clip
from biclip_jax.models.adapters import BETA, Adapter, Prepared, bounded_uniform, linear
from biclip_jax.models.biclip import IMAGENET_MEAN, IMAGENET_STD
from biclip_jax.models.layers import LayerNorm, UpConv2x2, depthwise_conv3x3, full_precision, gelu
from biclip_jax.models.transformer import fold_keys

# Names in the parameter tree. The random initialisation depends on them; renaming them would change
# the parameters of a seed and thereby the reported results.
IMAGE_PARAMS, TEXT_PARAMS = "image_tower", "text_tower"
FROZEN = (IMAGE_PARAMS, TEXT_PARAMS, "logit_scale")

# Encoders of the published variants; the `model` fields of a config supply the rest.
BERT_TEXT = {"kind": "bert", "projection_size": 512, "projection_kind": "mlp", "dropout": 0.1}
ENCODERS: dict[str, dict[str, Any]] = {
    "clip": {"image": clip.VIT_B16, "text": clip.TEXT},
    "pubmedclip": {"image": clip.VIT_B32, "text": clip.TEXT},
    "unimedclip": {"image": clip.VIT_B16, "text": BERT_TEXT},
    "biomedclip": {
        "image": clip.VIT_B16
        | {"activation": "gelu", "epsilon": 1e-6, "patch_bias": True, "stem_norm": False},
        "text": BERT_TEXT,
    },
}

VALUE_ONLY = ("clip", "pubmedclip")

# Two noise arrays per adapter, or one key per example, or None for no noise.
Noise = Sequence[Array] | Key[Array, " b"] | None


class Upscaler(nn.Module):
    """Doubles the map size: transposed convolution, GELU, depthwise 3x3 convolution, LayerNorm."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
        # The published framework computes the fan-in of a transposed kernel from its outputs.
        bias_init = bounded_uniform(4 * self.features)
        x = gelu(UpConv2x2(self.features, bias_init, dtype=self.dtype, name="up")(x))
        kernel = self.param("depthwise", bounded_uniform(9), (3, 3, self.features))
        x = depthwise_conv3x3(x, kernel.astype(x.dtype))
        return LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)


class Head(nn.Module):
    """Dot product of the upsampled patch features with the text embedding.

    Attributes:
      num_upscales: Number of times the map is doubled.
      dtype: Dtype of the computation.
    """

    num_upscales: int = 2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, "b n e"], text: Float[Array, "b e"]
    ) -> Float[Array, "b h w"]:
        """Computes a logit map from the text and square patch features in row-major order."""
        b, num_patches, size = features.shape
        side = round(num_patches**0.5)
        x = _unit(features).reshape(b, side, side, size)
        for i in range(self.num_upscales):
            x = Upscaler(size, self.dtype, name=f"up_{i}")(x)
        query = _unit(text)
        for i in range(3):
            query = gelu(query) if i else query
            query = linear(size, size, self.dtype, name=f"mlp_{i}")(query)
        return jnp.einsum("bhwc,bc->bhw", full_precision(x), full_precision(query))


class PassState(NamedTuple):
    """State of a forward pass before its first noise is drawn.

    Attributes:
      image, text: Streams before the first adapter's update, (B, N, D) and (B, L, E).
      mask: Attention mask of the text encoder.
      row: (B,) index of the token that represents the text.
      prepared: State of the first adapter.
    """

    image: Float[Array, "b n d"]
    text: Float[Array, "b l e"]
    mask: Bool[Array, "#b 1 #l l"]
    row: Int[Array, " b"]
    prepared: Prepared


class MedCLIPSeg(nn.Module):
    """The MedCLIPSeg network.

    Images are float32 in [0, 1], RGB, (B, H, W, 3), H = W = image_encoder.image_size; the model
    normalises them itself. The text input is ids padded to a fixed length. Precomputed text
    features cannot be used because the adapters also attend to the padding.

    Attributes:
      image_encoder: A `clip.VisionTransformer`.
      text_encoder: A `clip.TextTransformer` or `bert.Bert` of the same depth.
      adapter_width, beta, gate_init: Fields of the adapters.
      layers: Indices of the blocks that follow an adapter, in ascending order.
      num_upscales: Field of the head.
      value_only: Whether the last block of the image encoder returns the projected value of each
        patch, as in the variants `VALUE_ONLY`, instead of its full output.
      input: Normalisation of the images: "clip", or "imagenet_bgr" as in the reference.
      num_samples: Number of passes averaged for a prediction.
      dtype: Dtype of the computation; parameters, scores and logits are float32.
    """

    # The parameters keep the names that `build` gives to the encoders.
    preserve_adopted_names: ClassVar[bool] = True

    image_encoder: nn.Module
    text_encoder: nn.Module
    adapter_width: int = 256
    beta: float = BETA
    gate_init: float = 0.0
    layers: Sequence[int] = tuple(range(1, 11))
    num_upscales: int = 2
    value_only: bool = True
    input: str = "clip"
    num_samples: int = 30
    dtype: Any = jnp.float32

    @property
    def image_size(self) -> int:
        """Image side, in pixels."""
        return self.image_encoder.image_size

    def setup(self):
        self.adapters = [
            Adapter(
                self.image_encoder.width,
                self.text_encoder.width,
                self.adapter_width,
                self.beta,
                self.gate_init,
                self.dtype,
            )
            for _ in self.layers
        ]
        self.head = Head(self.num_upscales, self.dtype)
        # CLIP's temperature is part of the weights; the prediction does not depend on it.
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), ())

    def __call__(
        self,
        image: Float[Array, "b h w 3"],
        text_ids: Int[Array, "b l"],
        text_mask: Bool[Array, "b l"] | None = None,
        has_text: Bool[Array, " b"] | None = None,
        noise: Noise = None,
        dropout_keys: Key[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b h w 1"], dict[str, Array]]:
        """Runs one pass.

        Args:
          image: RGB in [0, 1].
          text_ids: Token ids, padded with 0.
          text_mask: True at tokens; None: where ids are not 0. Used only by a BERT text encoder.
          has_text: Ignored; an empty prompt is encoded like any other.
          noise: Standard normal noise, see `Noise`; arrays are in the order of `noise_shapes`.
          dropout_keys: Dropout keys of a BERT text encoder, one per example; None disables
            dropout.

        Returns:
          Logits, and features (B, patches, E) of the image, text (B, E), low_logits (B, h, w)
          before the resize.

        Raises:
          ValueError: The image size is not that of the image encoder, or the noise has other
            shapes.
        """
        return self.of_normalised(
            self.normalise(image), text_ids, text_mask, noise=noise, dropout_keys=dropout_keys
        )

    def normalise(self, image: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
        """Normalises images in [0, 1] for the image encoder."""
        if self.input == "imagenet_bgr":
            return (image[..., ::-1] - jnp.asarray(IMAGENET_MEAN)) / jnp.asarray(IMAGENET_STD)
        return (image - jnp.asarray(clip.MEAN)) / jnp.asarray(clip.STD)

    def of_normalised(
        self,
        image: Float[Array, "b h w 3"],
        text_ids: Int[Array, "b l"],
        text_mask: Bool[Array, "b l"] | None = None,
        noise: Noise = None,
        dropout_keys: Key[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b h w 1"], dict[str, Array]]:
        """Runs `__call__` on images that are already normalised."""
        state = self.begin(image, text_ids, text_mask, dropout_keys)
        return self.finish(state, noise, dropout_keys)

    def begin(
        self,
        image: Float[Array, "b h w 3"],
        text_ids: Int[Array, "b l"],
        text_mask: Bool[Array, "b l"] | None = None,
        dropout_keys: Key[Array, " b"] | None = None,
    ) -> PassState:
        """Computes the part that does not depend on the noise, up to the first adapter.

        Takes normalised images.
        """
        if image.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(
                f"the images are {image.shape[1]} x {image.shape[2]}; expected {self.image_size} x "
                f"{self.image_size}, the size of the image encoder"
            )
        if isinstance(self.text_encoder, bert.Bert):
            mask = self.text_encoder.attention_mask(text_ids, text_mask)
            u = self.text_encoder.embed(text_ids, dropout_keys)
        else:
            mask = self.text_encoder.attention_mask(text_ids)
            u = self.text_encoder.embed(text_ids)
        x = self.image_encoder.embed(image)
        for i in range(self.layers[0]):
            x = self.image_encoder.blocks[i](x)
            u = self.text_encoder.blocks[i](u, mask, keys=_layer_keys(dropout_keys, i))
        row = self.text_encoder.summary_row(text_ids)
        return PassState(x, u, mask, row, self.adapters[0].prepare(x, u))

    def finish(
        self, state: PassState, noise: Noise = None, dropout_keys: Key[Array, " b"] | None = None
    ) -> tuple[Float[Array, "b h w 1"], dict[str, Array]]:
        """Computes the rest of the pass; returns the same values as `__call__`."""
        x, u = state.image, state.text
        last = len(self.image_encoder.blocks) - 1
        for i in range(self.layers[0], last + 1):
            if i in self.layers:
                index = self.layers.index(i)
                adapter = self.adapters[index]
                prepared = adapter.prepare(x, u) if index else state.prepared
                dx, du = adapter.finish(prepared, self._noise(noise, index, x, u))
                x, u = x + dx, u + du
            row = state.row if i == last else None
            keys = _layer_keys(dropout_keys, i)
            x = self._image_block(i, x)
            u = self.text_encoder.blocks[i](u, state.mask, row=row, keys=keys)
        features = full_precision(self.image_encoder.project(x[:, 1:]))
        text = full_precision(self.text_encoder.pool(u[:, 0]))
        low_logits = self.head(features, text)
        size = (len(x), self.image_size, self.image_size)
        logits = jax.image.resize(low_logits, size, "bilinear", antialias=False)
        aux = {"features": features, "text": text, "low_logits": low_logits}
        return logits[..., None], aux

    def _image_block(self, i, x):
        block = self.image_encoder.blocks[i]
        if not self.value_only or i + 1 < len(self.image_encoder.blocks):
            return block(x)
        if self.is_initializing():
            block(x)  # creates all parameters of the pretrained encoder, also the unused ones
        return block(x, values_only=True)

    def _noise(self, noise, index, x, u):
        if noise is None:
            return None
        if not _are_keys(noise):
            if len(noise) != 2 * len(self.layers):
                raise ValueError(
                    f"noise has {len(noise)} arrays; expected {2 * len(self.layers)} (see "
                    "noise_shapes), or keys of jax.random.key, one per example"
                )
            pair = noise[2 * index : 2 * index + 2]
            expected = [(*s.shape[:2], self.adapter_width) for s in (u, x)]
            if [part.shape for part in pair] != expected:
                raise ValueError(
                    f"noise of adapter {index} has the shapes {[part.shape for part in pair]}; "
                    f"expected {expected} (see noise_shapes)"
                )
            return pair
        if noise.shape != (len(x),):
            raise ValueError(
                f"noise has keys of shape {noise.shape}; expected one per example, ({len(x)},)"
            )
        pairs = enumerate((u, x), 2 * index)
        return [_normal(fold_keys(noise, i), (s.shape[1], self.adapter_width)) for i, s in pairs]


def noise_shapes(model: MedCLIPSeg, batch_size: int, length: int) -> list[tuple[int, int, int]]:
    """Returns the shapes of the noise arrays of one pass.

    Args:
      model: The model.
      batch_size: B.
      length: L, number of tokens, padding included.

    Returns:
      For each adapter (B, L, C) for the text values, then (B, 1 + patches, C) for the image
      values.
    """
    num_tokens = (model.image_size // model.image_encoder.patch_size) ** 2 + 1
    pair = [(batch_size, n, model.adapter_width) for n in (length, num_tokens)]
    return pair * len(model.layers)


class SampleStatistics(NamedTuple):
    """Per-pixel statistics of S passes with different noise, (B, H, W, 1) each.

    Attributes:
      mean: Mean of the probabilities.
      total: Entropy of the mean, in nats, 0 to 0.693; the published uncertainty.
      aleatoric: Mean of the entropies of the passes.
      epistemic: total - aleatoric, the mutual information: the disagreement of the passes.
    """

    mean: Float[Array, "b h w 1"]
    total: Float[Array, "b h w 1"]
    aleatoric: Float[Array, "b h w 1"]
    epistemic: Float[Array, "b h w 1"]


def sample_statistics(
    model: MedCLIPSeg,
    variables: Mapping[str, Any],
    image: Float[Array, "b h w 3"],
    text_ids: Int[Array, "b l"],
    text_mask: Bool[Array, "b l"] | None,
    keys: Key[Array, " b"],
    num_samples: int = 30,
    chunk: int = 10,
) -> SampleStatistics:
    """Runs Monte-Carlo inference; computes the part that does not depend on the noise once.

    Args:
      model, variables: As for `apply`.
      image: RGB in [0, 1].
      text_ids, text_mask: As for `MedCLIPSeg`.
      keys: One per example; the noise of pass s depends only on the key and s.
      num_samples: S, number of passes.
      chunk: Largest number of passes per batch; affects the memory, not the result.

    Returns:
      The statistics over the passes.
    """
    normalised = model.normalise(image)
    state = model.apply(variables, normalised, text_ids, text_mask, method=model.begin)
    chunk_size = max(n for n in range(1, min(chunk, num_samples) + 1) if num_samples % n == 0)
    fold_each = jax.vmap(jax.random.fold_in, (0, None))

    def run_chunk(sums, indices):
        repeated = jax.tree.map(lambda part: _repeat(part, len(image), chunk_size), state)
        noise = jax.vmap(fold_each, (None, 0))(keys, indices).reshape(-1)
        logits, _ = model.apply(variables, repeated, noise, method=model.finish)
        probs = jax.nn.sigmoid(logits).reshape(chunk_size, *image.shape[:3], 1)
        return (sums[0] + probs.sum(0), sums[1] + _entropy(probs).sum(0)), None

    indices = jnp.arange(num_samples).reshape(-1, chunk_size)
    zeros = jnp.zeros((*image.shape[:3], 1))
    (probs, entropies), _ = jax.lax.scan(run_chunk, (zeros, zeros), indices)
    mean, aleatoric = probs / num_samples, entropies / num_samples
    total = _entropy(mean)
    return SampleStatistics(mean, total, aleatoric, jnp.maximum(total - aleatoric, 0.0))


def init(
    model: MedCLIPSeg, key: Key[Array, ""], max_length: int, exclude: Sequence[str] = ()
) -> dict[str, Any]:
    """Initialises the variables (params, and empty batch_stats); float32.

    Args:
      model: The model.
      key: Key of the parameters.
      max_length: Number of tokens of a text, padding included.
      exclude: Top-level names of the parameter tree to leave out; they are not initialised.
    """
    size = model.image_size
    image, ids = jnp.zeros((1, size, size, 3)), jnp.zeros((1, max_length), jnp.int32)

    @jax.jit
    def init_params(key):
        params = model.init(key, image, ids)["params"]
        return {name: part for name, part in params.items() if name not in exclude}

    return {"batch_stats": {}, "params": init_params(key)}


def build(config: Mapping[str, Any]) -> MedCLIPSeg:
    """Builds the model that a resolved `model` config describes.

    Args:
      config: image and text, the fields of the encoders; and adapter_width, beta, gate_init,
        num_layers (adapters, before the blocks 1 to num_layers), num_upscales, value_only, input,
        num_samples, dtype.

    Raises:
      ValueError: The image encoder is a ResNet, an encoder's heads do not divide its width, the
        encoders differ in depth, or there are too many adapters.
    """
    image, text, dtype = config["image"], config["text"], config["dtype"]
    if image.get("kind", "vit") != "vit":
        raise ValueError(f"the image encoder is a {image['kind']}; MedCLIPSeg needs a ViT")
    image_encoder = clip.build_image_encoder(image, dtype, IMAGE_PARAMS)
    text_encoder = clip.build_text_encoder(text, dtype, TEXT_PARAMS)
    for name, encoder in (("image", image_encoder), ("text", text_encoder)):
        if encoder.width % encoder.num_heads:
            raise ValueError(
                f"the {name} encoder has width {encoder.width} and {encoder.num_heads} heads; "
                "expected a number of heads that divides the width"
            )
    depths = image_encoder.num_layers, text_encoder.num_layers
    if depths[0] != depths[1] or not 1 <= config["num_layers"] < depths[0]:
        raise ValueError(
            f"the encoders have {depths[0]} and {depths[1]} blocks, and there are "
            f"{config['num_layers']} adapters; expected encoders of the same depth, and fewer "
            "adapters than blocks (at least 1)"
        )
    return MedCLIPSeg(
        image_encoder,
        text_encoder,
        adapter_width=config["adapter_width"],
        beta=config["beta"],
        gate_init=config["gate_init"],
        layers=tuple(range(1, config["num_layers"] + 1)),
        num_upscales=config["num_upscales"],
        value_only=config["value_only"],
        input=config["input"],
        num_samples=config["num_samples"],
        dtype=jnp.dtype(dtype),
    )


def _unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _layer_keys(keys, i):
    return None if keys is None else fold_keys(keys, i)


def _are_keys(noise):
    return hasattr(noise, "dtype") and jnp.issubdtype(noise.dtype, jax.dtypes.prng_key)


def _normal(keys, shape):
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def _repeat(part, batch_size, times):
    """Tiles a batch along its first axis; leaves without a batch axis are unchanged."""
    if len(part) != batch_size:
        return part
    return jnp.broadcast_to(part, (times, *part.shape)).reshape(-1, *part.shape[1:])


def _entropy(probs):
    """Computes -p ln p - (1 - p) ln(1 - p), with the published 1e-8 inside the logarithms."""
    return -(probs * jnp.log(probs + 1e-8) + (1 - probs) * jnp.log(1 - probs + 1e-8))
