"""MedCLIPSeg (arXiv 2602.20423): two CLIP towers that exchange what they see, by adapters.

The towers keep their own weights. Before most of their blocks an adapter lets picture and
sentence look at each other by attention whose keys and values have a variance; that of the
values is sampled. A head compares every place of the picture with the sentence.
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

# Names in the parameter tree. Random parameters depend on them, so they stay: a seed gives the
# published figures.
IMAGE_PARAMS, TEXT_PARAMS = "image_tower", "text_tower"
FROZEN = (IMAGE_PARAMS, TEXT_PARAMS, "logit_scale")

# The towers of the published variants; `model` of a configuration adds the rest.
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
# The reference reads pictures as BGR and never turns them.
INPUTS = ("clip", "imagenet_bgr")

VALUE_ONLY = ("clip", "pubmedclip")

# The 2 arrays of each adapter's noise, or one key an example, or None for no noise.
Noise = Sequence[Array] | Key[Array, " b"] | None


class Upscaler(nn.Module):
    """Doubles a map: transposed convolution, GELU, depthwise 3x3 convolution, LayerNorm."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
        # The bound of the published framework, which counts the outputs of a transposed kernel.
        bias_init = bounded_uniform(4 * self.features)
        x = gelu(UpConv2x2(self.features, bias_init, dtype=self.dtype, name="up")(x))
        kernel = self.param("depthwise", bounded_uniform(9), (3, 3, self.features))
        x = depthwise_conv3x3(x, kernel.astype(x.dtype))
        return LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)


class Head(nn.Module):
    """Every place of the enlarged picture against the sentence.

    Attributes:
      num_upscales: doublings of the map.
      dtype: of the computation.
    """

    num_upscales: int = 2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, "b n e"], text: Float[Array, "b e"]
    ) -> Float[Array, "b h w"]:
        """Features of the patches, in rows of a square, and of the sentence, to a map of logits."""
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
    """A pass up to its first noise.

    Attributes:
      image, text: (B, N, D), (B, L, E) the streams before the first adapter's answer.
      mask: of the sentence's attention.
      row: (B,) the token that stands for the sentence.
      prepared: the first adapter.
    """

    image: Float[Array, "b n d"]
    text: Float[Array, "b l e"]
    mask: Bool[Array, "#b 1 #l l"]
    row: Int[Array, " b"]
    prepared: Prepared


class MedCLIPSeg(nn.Module):
    """The network of this paper.

    Pictures are float32 in [0, 1], RGB, (B, H, W, 3), H = W = image_tower.image_size; every
    normalisation after that happens here. Sentences are ids padded to one length, since the
    adapters see the padding, too: stored features of sentences would not do.

    Attributes:
      image_tower: a `clip.VisionTransformer`.
      text_tower: a `clip.TextTransformer` or a `bert.Bert`, as deep.
      adapter_width, beta, gate_init: of the adapters.
      layers: blocks that have an adapter before them, in order.
      num_upscales: of the head.
      value_only: whether the image tower's last block gives every patch's own value, as in the
        variants `VALUE_ONLY`, or its full answer.
      input: normalisation of the pictures: "clip", or "imagenet_bgr" as the reference did.
      num_samples: passes whose mean a prediction is.
      dtype: of the computation; parameters, scores, logits are float32.
    """

    # The names that `build` gives the encoders are those of their parameters.
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
        """Side of the pictures, in pixels."""
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
        # CLIP's temperature belongs to the weights; the mask does not depend on it.
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
        """One pass.

        Args:
          image: RGB in [0, 1].
          text_ids: padded with 0.
          text_mask: true at tokens; None: where ids are not 0. For BERT towers alone.
          has_text: taken and not needed: an empty sentence is one like others.
          noise: standard normal, see `Noise`; its arrays in the order of `noise_shapes`.
          dropout_keys: one an example, of a BERT tower's dropout; None: without it.

        Returns:
          Logits, and features (B, patches, E) of the picture, text (B, E) of the sentence,
          low_logits (B, h, w) before the resize.

        Raises:
          ValueError: pictures of another size than the image tower's, or noise of other shapes.
        """
        return self.of_normalised(
            self.normalise(image), text_ids, text_mask, noise=noise, dropout_keys=dropout_keys
        )

    def normalise(self, image: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
        """Pictures in [0, 1] to what the image tower takes."""
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
        """`__call__` for pictures that are normalised already."""
        begun = self.begin(image, text_ids, text_mask, dropout_keys)
        return self.finish(begun, noise, dropout_keys)

    def begin(
        self,
        image: Float[Array, "b h w 3"],
        text_ids: Int[Array, "b l"],
        text_mask: Bool[Array, "b l"] | None = None,
        dropout_keys: Key[Array, " b"] | None = None,
    ) -> PassState:
        """What is the same for every noise: normalised pictures up to the first adapter."""
        if image.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(
                f"pictures of {image.shape[1]} x {image.shape[2]}; expected {self.image_size} x "
                f"{self.image_size}, the image tower's own size"
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
            u = self.text_encoder.blocks[i](u, mask, keys=_of_layer(dropout_keys, i))
        row = self.text_encoder.summary_row(text_ids)
        return PassState(x, u, mask, row, self.adapters[0].prepare(x, u))

    def finish(
        self, begun: PassState, noise: Noise = None, dropout_keys: Key[Array, " b"] | None = None
    ) -> tuple[Float[Array, "b h w 1"], dict[str, Array]]:
        """The rest of the pass; returns as `__call__`."""
        x, u = begun.image, begun.text
        last = len(self.image_encoder.blocks) - 1
        for i in range(self.layers[0], last + 1):
            if i in self.layers:
                number = self.layers.index(i)
                adapter = self.adapters[number]
                prepared = adapter.prepare(x, u) if number else begun.prepared
                dx, du = adapter.finish(prepared, self._noise(noise, number, x, u))
                x, u = x + dx, u + du
            row = begun.row if i == last else None
            keys = _of_layer(dropout_keys, i)
            x = self._image_block(i, x)
            u = self.text_encoder.blocks[i](u, begun.mask, row=row, keys=keys)
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
            block(x)  # the weights of a tower are whole, used or not
        return block(x, values_only=True)

    def _noise(self, noise, number, x, u):
        if noise is None:
            return None
        if not _are_keys(noise):
            if len(noise) != 2 * len(self.layers):
                raise ValueError(
                    f"noise has {len(noise)} arrays; expected {2 * len(self.layers)} (see "
                    "noise_shapes), or keys of jax.random.key, one an example"
                )
            pair = noise[2 * number : 2 * number + 2]
            expected = [(*s.shape[:2], self.adapter_width) for s in (u, x)]
            if [part.shape for part in pair] != expected:
                raise ValueError(
                    f"noise of adapter {number} has the shapes {[part.shape for part in pair]}; "
                    f"expected {expected} (see noise_shapes)"
                )
            return pair
        if noise.shape != (len(x),):
            raise ValueError(f"noise is keys {noise.shape}; expected one an example, ({len(x)},)")
        pairs = enumerate((u, x), 2 * number)
        return [_normal(fold_keys(noise, i), (s.shape[1], self.adapter_width)) for i, s in pairs]


def noise_shapes(model: MedCLIPSeg, batch_size: int, length: int) -> list[tuple[int, int, int]]:
    """Shapes of a pass's noise: for each adapter (B, L, C) of the sentence's values, then
    (B, 1 + patches, C) of the picture's."""
    num_tokens = (model.image_size // model.image_encoder.patch_size) ** 2 + 1
    pair = [(batch_size, n, model.adapter_width) for n in (length, num_tokens)]
    return pair * len(model.layers)


class Samples(NamedTuple):
    """What S passes with different noise say of every pixel, (B, H, W, 1) each.

    Attributes:
      mean: of the probabilities.
      total: entropy of the mean, in nats, 0 to 0.693; the published uncertainty.
      aleatoric: mean of the passes' entropies, what each pass alone is unsure of.
      epistemic: total - aleatoric, the mutual information: what the passes disagree about.
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
) -> Samples:
    """Monte-Carlo inference: `num_samples` passes, what does not depend on the noise once.

    Args:
      model, variables: as for `apply`.
      image: RGB in [0, 1].
      text_ids, text_mask: as for `MedCLIPSeg`.
      keys: one an example; the noise of pass s is drawn from the key and s alone.
      num_samples: S.
      chunk: passes that run as one batch, at most; it changes the memory, not the numbers.
    """
    normalised = model.normalise(image)
    begun = model.apply(variables, normalised, text_ids, text_mask, method=model.begin)
    num_at_once = max(n for n in range(1, min(chunk, num_samples) + 1) if num_samples % n == 0)
    fold_each = jax.vmap(jax.random.fold_in, (0, None))

    def passes(sums, numbers):
        repeated = jax.tree.map(lambda part: _repeat(part, len(image), num_at_once), begun)
        noise = jax.vmap(fold_each, (None, 0))(keys, numbers).reshape(-1)
        logits, _ = model.apply(variables, repeated, noise, method=model.finish)
        probs = jax.nn.sigmoid(logits).reshape(num_at_once, *image.shape[:3], 1)
        return (sums[0] + probs.sum(0), sums[1] + _entropy(probs).sum(0)), None

    numbers = jnp.arange(num_samples).reshape(-1, num_at_once)
    zeros = jnp.zeros((*image.shape[:3], 1))
    (probs, entropies), _ = jax.lax.scan(passes, (zeros, zeros), numbers)
    mean, aleatoric = probs / num_samples, entropies / num_samples
    total = _entropy(mean)
    return Samples(mean, total, aleatoric, jnp.maximum(total - aleatoric, 0.0))


def init(
    model: MedCLIPSeg, key: Key[Array, ""], max_length: int, without: Sequence[str] = ()
) -> dict[str, Any]:
    """Fresh variables (params, and empty batch_stats), float32.

    Args:
      model: whose.
      key: of all of them.
      max_length: tokens of a sentence.
      without: names at the top of the parameters' tree that are not wanted, and not drawn.
    """
    size = model.image_size
    image, ids = jnp.zeros((1, size, size, 3)), jnp.zeros((1, max_length), jnp.int32)

    @jax.jit
    def wanted(key):
        params = model.init(key, image, ids)["params"]
        return {name: part for name, part in params.items() if name not in without}

    return {"batch_stats": {}, "params": wanted(key)}


def build(config: Mapping[str, Any]) -> MedCLIPSeg:
    """The model that a resolved `model` configuration describes.

    Args:
      config: image and text, the towers' own fields; and adapter_width, beta, gate_init,
        num_layers (adapters before the blocks 1 to num_layers), num_upscales, value_only,
        input, num_samples, dtype.

    Raises:
      ValueError: towers of different depth, more adapters than blocks, or a ResNet.
    """
    image, text, dtype = config["image"], config["text"], config["dtype"]
    if image.get("kind", "vit") != "vit":
        raise ValueError(f"the image tower is a {image['kind']}; MedCLIPSeg needs a ViT")
    image_encoder = clip.build_image_encoder(image, dtype, IMAGE_PARAMS)
    text_encoder = clip.build_text_encoder(text, dtype, TEXT_PARAMS)
    for name, encoder in (("image", image_encoder), ("text", text_encoder)):
        if encoder.width % encoder.num_heads:
            raise ValueError(
                f"the {name} tower's width is {encoder.width}, its heads {encoder.num_heads}; "
                "expected heads that divide the width"
            )
    depths = image_encoder.num_layers, text_encoder.num_layers
    if depths[0] != depths[1] or not 1 <= config["num_layers"] < depths[0]:
        raise ValueError(
            f"the towers have {depths[0]} and {depths[1]} blocks, and there are "
            f"{config['num_layers']} adapters; expected towers of one depth, and fewer adapters"
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


def _of_layer(keys, i):
    return None if keys is None else fold_keys(keys, i)


def _are_keys(noise):
    return hasattr(noise, "dtype") and jnp.issubdtype(noise.dtype, jax.dtypes.prng_key)


def _normal(keys, shape):
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def _repeat(part, batch_size, times):
    """Copies of a batch one after the other; what is one for all examples stays so."""
    if len(part) != batch_size:
        return part
    return jnp.broadcast_to(part, (times, *part.shape)).reshape(-1, *part.shape[1:])


def _entropy(probs):
    """-p ln p - (1 - p) ln(1 - p), with the published 1e-8 under the logarithms."""
    return -(probs * jnp.log(probs + 1e-8) + (1 - probs) * jnp.log(1 - probs + 1e-8))
