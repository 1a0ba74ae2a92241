"""CLIP (Radford et al., arXiv 2103.00020): ViT image encoder, text encoder, and the full model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from biclip_jax.models import bert
from biclip_jax.models.layers import Dense, LayerNorm, full_precision
from biclip_jax.models.resnet import ModifiedResNet
from biclip_jax.models.transformer import Block, interpolate_positions

# Statistics of CLIP's training images; RGB in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

VIT_B16 = {
    "kind": "vit",
    "image_size": 224,
    "patch_size": 16,
    "width": 768,
    "num_layers": 12,
    "num_heads": 12,
    "mlp_width": 3072,
    "embedding_size": 512,
}
VIT_B32 = VIT_B16 | {"patch_size": 32}
RN50 = {
    "kind": "resnet",
    "image_size": 224,
    "width": 64,
    "stages": (3, 4, 6, 3),
    "num_heads": 32,
    "embedding_size": 1024,
}
TEXT = {
    "vocab_size": 49408,
    "max_length": 77,
    "width": 512,
    "num_layers": 12,
    "num_heads": 8,
    "mlp_width": 2048,
    "embedding_size": 512,
}


class VisionTransformer(nn.Module):
    """CLIP's ViT: patches and a class token, pre-norm blocks, a projection.

    Attributes:
      image_size: Image side that the position table is for; the table is interpolated to other
        sizes.
      patch_size: Patch side in pixels; divides the image sides.
      width, num_layers, num_heads, mlp_width: Sizes of the transformer.
      embedding_size: E, size of the joint embedding space.
      activation, epsilon: Fields of the blocks.
      patch_bias, stem_norm: Whether the stem has a bias and a LayerNorm; timm's ViT of BiomedCLIP
        has a bias and no LayerNorm.
      dtype: Dtype of the computation.
    """

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    embedding_size: int = 512
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    patch_bias: bool = False
    stem_norm: bool = True
    dtype: Any = jnp.float32

    def setup(self):
        table = nn.initializers.normal(self.width**-0.5)
        num_positions = (self.image_size // self.patch_size) ** 2 + 1
        self.patches = Dense(self.width, use_bias=self.patch_bias, dtype=self.dtype)
        self.class_token = self.param("class_token", table, (self.width,))
        self.positions = self.param("positions", table, (num_positions, self.width))
        if self.stem_norm:
            self.norm_pre = LayerNorm(epsilon=self.epsilon, dtype=self.dtype)
        self.blocks = _blocks(self)
        self.norm_post = LayerNorm(epsilon=self.epsilon, dtype=self.dtype)
        self.projection = Dense(self.embedding_size, use_bias=False, dtype=self.dtype)

    def __call__(
        self, image: Float[Array, "b h w 3"]
    ) -> tuple[Float[Array, "b e"], dict[str, Any]]:
        """Computes embeddings of normalised images (see `MEAN`, `STD`).

        Returns:
          The projected class token (B, E); and hidden_states, num_layers + 1 arrays of (B, 1 +
          patches, width), the stem's first; pooled (B, width), the class token before the
          projection; tokens (B, 1 + patches, E), all tokens projected.
        """
        x = self.embed(image)
        hidden_states = [x]
        for block in self.blocks:
            x = block(x)
            hidden_states.append(x)
        pooled = self.norm_post(x[:, 0])
        return self.projection(pooled), {
            "hidden_states": tuple(hidden_states),
            "pooled": pooled,
            "tokens": self.project(x),
        }

    def embed(self, image: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
        """Applies the stem: class token and patches in row-major order, positions, LayerNorm."""
        b, height, width, channels = image.shape
        size = self.patch_size
        if height % size or width % size:
            raise ValueError(f"the image is {height} x {width}; the patches are {size} x {size}")
        grid = (height // size, width // size)
        # A convolution with non-overlapping windows is one matrix product.
        x = image.reshape(b, grid[0], size, grid[1], size, channels).transpose(0, 1, 3, 2, 4, 5)
        x = self.patches(x.reshape(b, grid[0] * grid[1], size * size * channels))
        token = jnp.broadcast_to(self.class_token.astype(x.dtype), (b, 1, self.width))
        x = jnp.concatenate([token, x], axis=1) + interpolate_positions(self.positions, grid)
        return self.norm_pre(x) if self.stem_norm else x.astype(self.dtype)

    def project(self, x: Float[Array, "b n d"]) -> Float[Array, "b n e"]:
        """Projects the states of the last block to the joint space, token by token."""
        return self.projection(self.norm_post(x))


class TextTransformer(nn.Module):
    """CLIP's text encoder: causal, pre-norm, pooled at the end token.

    Attributes:
      vocab_size, max_length: Rows of the embedding tables.
      width, num_layers, num_heads, mlp_width, embedding_size, activation, epsilon, dtype: See
        `VisionTransformer`.
    """

    vocab_size: int = 49408
    max_length: int = 77
    width: int = 512
    num_layers: int = 12
    num_heads: int = 8
    mlp_width: int = 2048
    embedding_size: int = 512
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    def setup(self):
        words, positions = nn.initializers.normal(0.02), nn.initializers.normal(0.01)
        self.words = nn.Embed(self.vocab_size, self.width, embedding_init=words)
        self.positions = self.param("positions", positions, (self.max_length, self.width))
        self.blocks = _blocks(self)
        self.norm_post = LayerNorm(epsilon=self.epsilon, dtype=self.dtype)
        self.projection = Dense(self.embedding_size, use_bias=False, dtype=self.dtype)

    def __call__(
        self, text_ids: Int[Array, "b l"], text_mask: Bool[Array, "b l"] | None = None
    ) -> tuple[Float[Array, "b e"], dict[str, Any]]:
        """Computes text embeddings.

        Args:
          text_ids: Token ids, at most `max_length` per example; the end token has the largest id.
          text_mask: False at padding. It changes only the states of the padding, because the
            attention is causal; with None, padding attends to all earlier positions.

        Returns:
          The projected state of the end token (B, E); and hidden_states, num_layers + 1 arrays of
          (B, L, width), the embeddings first; pooled (B, width); tokens (B, L, E), all tokens
          projected.
        """
        x = self.embed(text_ids)
        mask = self.attention_mask(text_ids)
        if text_mask is not None:
            mask = mask & text_mask[:, None, None, :]
        hidden_states = [x]
        for block in self.blocks:
            x = block(x, mask)
            hidden_states.append(x)
        pooled = self.norm_post(x[jnp.arange(len(x)), self.summary_row(text_ids)])
        return self.projection(pooled), {
            "hidden_states": tuple(hidden_states),
            "pooled": pooled,
            "tokens": self.projection(self.norm_post(x)),
        }

    def embed(self, text_ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """Computes the sum of word and position embeddings."""
        length = text_ids.shape[1]
        if length > self.max_length:
            raise ValueError(f"{length} tokens; the text encoder has {self.max_length} positions")
        return (self.words(text_ids) + self.positions[:length]).astype(self.dtype)

    def pool(self, state: Float[Array, "b d"]) -> Float[Array, "b e"]:
        """Maps the last state of the end token to the text embedding."""
        return self.projection(self.norm_post(state))

    def summary_row(self, text_ids: Int[Array, "b l"]) -> Int[Array, " b"]:
        """Returns the index of the token that represents the text: the end token (largest id)."""
        return text_ids.argmax(axis=-1)

    def attention_mask(self, text_ids: Int[Array, "b l"]) -> Bool[Array, "1 1 l l"]:
        """Returns the causal mask: true at keys not later than the query, padding included."""
        return jnp.tril(jnp.ones((1, 1, *2 * text_ids.shape[1:]), bool))


def _blocks(encoder: VisionTransformer | TextTransformer) -> list[Block]:
    return [
        Block(
            encoder.num_heads,
            encoder.mlp_width,
            encoder.activation,
            encoder.epsilon,
            dtype=encoder.dtype,
        )
        for _ in range(encoder.num_layers)
    ]


class CLIP(nn.Module):
    """Both encoders and the temperature.

    Attributes:
      image_encoder: A `VisionTransformer` or `ModifiedResNet`.
      text_encoder: A `TextTransformer` or `Bert`.
    """

    image_encoder: nn.Module
    text_encoder: nn.Module

    def setup(self):
        initial = nn.initializers.constant(np.log(1 / 0.07))
        self.logit_scale = self.param("logit_scale", initial, ())

    def __call__(
        self, image: Float[Array, "i h w 3"], text_ids: Int[Array, "t l"]
    ) -> tuple[Float[Array, "i t"], dict[str, Any]]:
        """Computes the similarity logits of every image with every text.

        Args:
          image: Normalised images, see `MEAN` and `STD`.
          text_ids: See `TextTransformer`.

        Returns:
          exp(logit_scale) times the cosine similarities (I, T); and image_embedding (I, E),
          text_embedding (T, E), both with unit norm, and image and text, the intermediates of the
          encoders.
        """
        image_embedding, image_aux = self.encode_image(image)
        text_embedding, text_aux = self.encode_text(text_ids)
        logits = jnp.exp(self.logit_scale) * image_embedding @ text_embedding.T
        return logits, {
            "image_embedding": image_embedding,
            "text_embedding": text_embedding,
            "image": image_aux,
            "text": text_aux,
        }

    def encode_image(self, image: Float[Array, "i h w 3"]):
        """Returns unit-norm embeddings (I, E) and the intermediates of the image encoder."""
        embedding, aux = self.image_encoder(image)
        return _unit(embedding), aux

    def encode_text(self, text_ids: Int[Array, "t l"], text_mask=None):
        """Returns unit-norm embeddings (T, E) and the intermediates of the text encoder."""
        embedding, aux = self.text_encoder(text_ids, text_mask)
        return _unit(embedding), aux


def _unit(x: Float[Array, "b e"]) -> Float[Array, "b e"]:
    x = full_precision(x)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class ResizedImageEncoder(nn.Module):
    """Pretrained image encoder for images that were not preprocessed for it.

    Attributes:
      pretrained: A `VisionTransformer` or `ModifiedResNet`, used in inference mode.
    """

    pretrained: nn.Module

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"]) -> Float[Array, "b e"]:
        """Resizes images in [0, 1] bilinearly to the encoder's size and computes embeddings."""
        size = self.pretrained.image_size
        image = jax.image.resize(image, (len(image), size, size, 3), "bilinear")
        embedding, _ = self.pretrained((image - jnp.asarray(MEAN)) / jnp.asarray(STD))
        return full_precision(embedding)


def build_image_encoder(
    config: Mapping[str, Any], dtype: str = "float32", name: str | None = None
) -> VisionTransformer | ModifiedResNet:
    """Builds the image encoder from the `image` part of a converted folder's `config.json`."""
    fields = {name: value for name, value in config.items() if name != "kind"}
    if config["kind"] == "resnet":
        return ModifiedResNet(**fields, dtype=jnp.dtype(dtype), name=name)
    return VisionTransformer(**fields, dtype=jnp.dtype(dtype), name=name)


def build_text_encoder(
    config: Mapping[str, Any], dtype: str = "float32", name: str | None = None
) -> TextTransformer | bert.Bert:
    """Builds the text encoder from the `text` part of a converted folder's `config.json`."""
    fields = {name: value for name, value in config.items() if name != "kind"}
    if config.get("kind") == "bert":
        return bert.build(fields, dtype, name)
    return TextTransformer(**fields, dtype=jnp.dtype(dtype), name=name)


def build(config: Mapping[str, Any], dtype: str = "float32") -> CLIP:
    """Builds CLIP from the fields image and text; see `VIT_B16`, `VIT_B32`, `RN50`, `TEXT`."""
    return CLIP(
        build_image_encoder(config["image"], dtype), build_text_encoder(config["text"], dtype)
    )
