"""The U-Net of the published network: blocks of two convolutions, skips, any number of levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from biclip_jax.models.layers import BatchNorm, UpConv2x2, conv3x3, full_precision, max_pool_2x2


class DoubleConv(nn.Module):
    """(3x3 convolution without bias, BatchNorm, ReLU) twice."""

    features: int
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w d"]:
        for i in range(2):
            x = conv3x3(self.features, self.dtype, use_bias=False, name=f"conv_{i}")(x)
            norm = BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name=f"norm_{i}")
            x = nn.relu(norm(x, train))
        return x


class UNet(nn.Module):
    """Encoder, bottleneck and decoder with `len(widths) - 1` poolings.

    Attributes:
      widths: channels of the levels, from full size to the bottleneck; each
        twice the one before, since an up-convolution halves the channels.
      axis_name: device axis over which BatchNorm takes its statistics.
      dtype: of the computation; parameters are float32.
    """

    widths: Sequence[int] = (64, 128, 256, 512, 1024)
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool
    ) -> tuple[Float[Array, "b h w 1"], Float[Array, "b h w d"]]:
        """Maps a picture to logits and to the decoder's last features (d = widths[0]).

        H and W must be divisible by 2 ** (len(widths) - 1).
        """
        block = {"axis_name": self.axis_name, "dtype": self.dtype}
        skips = []
        for level, width in enumerate(self.widths):
            x = max_pool_2x2(x) if level else x
            x = DoubleConv(width, **block, name=f"encoder_{level}")(x, train)
            skips.append(x)
        skips.pop()
        for level, width in reversed(list(enumerate(self.widths[:-1]))):
            x = UpConv2x2(width, dtype=self.dtype, name=f"up_{level}")(x)
            x = jnp.concatenate([skips[level], x], axis=-1)
            x = DoubleConv(width, **block, name=f"decoder_{level}")(x, train)
        logits = nn.Conv(1, (1, 1), dtype=full_precision(x).dtype, name="head")(x)
        return logits, x
