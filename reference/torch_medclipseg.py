"""MedCLIPSeg in PyTorch with the published parameter names, from the formulas of arXiv 2602.20423.

Images are (B, 3, H, W), already normalised; ids (B, L) are padded with 0; masks (B, H, W) are
floats in {0, 1}. Dropout of the frozen text encoder is not implemented.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference.torch_medclipseg_encoders import (
    BertTextEncoder,
    ClipImageEncoder,
    ClipTextEncoder,
    TrunkImageEncoder,
)

BETA = 2.35
MIN_VARIANCE = 1e-6
TRAINABLE = ("pvl_adapters.", "mask_head.", "upscale.")
CLIP_TEXT = {"text_width": 512, "text_heads": 8, "text_positions": 77, "vocab": 49408}
BERT_TEXT = {"text_width": 768, "text_heads": 12, "text_positions": 512, "vocab": 30522}
TEXT_SIZES = {"clip": CLIP_TEXT, "unimedclip": BERT_TEXT, "biomedclip": BERT_TEXT}
TEXT_LENGTHS = {"clip": 77, "unimedclip": 256, "biomedclip": 256}


class ProbabilisticAttention(nn.Module):
    """Single-head attention with Gaussian keys and values, and a gate between query and output.

    A = softmax((Q K' - beta sqrt(Q^2 Var_K')) / sqrt(dim)), V = mean_V + sqrt(Var_V) eps.
    """

    def __init__(self, dim: int, beta: float = BETA, gate_init: float = 0.0):
        super().__init__()
        self.beta = beta
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, 2 * dim)
        self.v_proj = nn.Linear(dim, 2 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.norm_k = nn.LayerNorm(dim)
        self.norm_v = nn.LayerNorm(dim)
        self.gate = nn.Parameter(torch.tensor(gate_init))

    def forward(self, x: Tensor, context: Tensor, noise: Tensor | None) -> Tensor:
        q = self.q_proj(x)
        k, k_raw = self.k_proj(context).chunk(2, dim=-1)
        v, v_raw = self.v_proj(context).chunk(2, dim=-1)
        k, v = self.norm_k(k), self.norm_v(v)
        if noise is not None:
            v = v + (F.softplus(v_raw) + MIN_VARIANCE).sqrt() * noise
        deviation = (q.square() @ (F.softplus(k_raw) + MIN_VARIANCE).mT).sqrt()
        scale = q.shape[-1] ** -0.5
        scores = torch.baddbmm(deviation, q, k.mT, beta=-self.beta * scale, alpha=scale)
        out = self.out_proj(scores.softmax(dim=-1) @ v)
        return torch.lerp(x, out, self.gate.sigmoid())


class Adapter(nn.Module):
    """Computes the updates that image and text exchange, (B, N, .) and (B, L, .)."""

    def __init__(
        self,
        width: int,
        text_width: int,
        dim: int,
        beta: float = BETA,
        gate_init: float = 0.0,
    ):
        super().__init__()
        self.proj_vis_down = nn.Sequential(nn.Linear(width, dim, bias=False))
        self.proj_txt_down = nn.Linear(text_width, dim, bias=False)
        self.two_way = nn.ModuleDict(
            {
                "cross_attn_img_to_txt": ProbabilisticAttention(dim, beta, gate_init),
                "cross_attn_txt_to_img": ProbabilisticAttention(dim, beta, gate_init),
            }
        )
        self.proj_vis_up = nn.Linear(dim, width, bias=False)
        self.proj_txt_up = nn.Linear(dim, text_width, bias=False)

    def forward(
        self, image: Tensor, text: Tensor, noise: Sequence[Tensor | None] = (None, None)
    ) -> tuple[Tensor, Tensor]:
        v, t = self.proj_vis_down(image), self.proj_txt_down(text)
        v = self.two_way["cross_attn_img_to_txt"](v, t, noise[0])
        t = self.two_way["cross_attn_txt_to_img"](t, v, noise[1])
        return self.proj_vis_up(v), self.proj_txt_up(t)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ScaleBlock(nn.Module):
    """Transposed convolution to twice the side, GELU, depthwise 3x3 convolution, norm."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = ChannelNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv2(F.gelu(self.conv1(x))))


def make_upscale(width: int) -> nn.Sequential:
    """Maps (B, width, h, w) to (B, width, 4 h, 4 w)."""
    return nn.Sequential(ScaleBlock(width), ScaleBlock(width))


def make_mask_head(width: int) -> nn.Sequential:
    """Maps (B, width) to (B, width)."""
    return nn.Sequential(
        nn.Linear(width, width),
        nn.GELU(),
        nn.Linear(width, width),
        nn.GELU(),
        nn.Linear(width, width),
    )


def low_logits(upscale: nn.Module, mask_head: nn.Module, features: Tensor, text: Tensor) -> Tensor:
    """Maps patches (B, P, E) of a square image and its text (B, E) to logits (B, h, w)."""
    batch, num_patches, width = features.shape
    side = round(num_patches**0.5)
    x = unit(features).reshape(batch, side, side, width).permute(0, 3, 1, 2)
    return torch.einsum("bc,bchw->bhw", mask_head(unit(text)), upscale(x))


def unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


class MedCLIPSeg(nn.Module):
    """Both CLIP encoders in lockstep, with adapters between them before the blocks 1 to L - 2.

    The encoders are frozen; adapters and head are trainable.

    Args:
      variant: "clip", "unimedclip" or "biomedclip".
      image_size, patch: Side of the images and of their patches.
      width, heads: Sizes of the image encoder.
      layers: L, number of blocks in each encoder.
      embed: Size of the output features of both encoders.
      adapter_dim, beta, gate_init: Fields of the adapters.
      text_width, text_heads, text_positions, vocab: Sizes of the text encoder; default to those of
        the published variant. text_positions is the number of rows of the position table.
      as_published: Also does the unused work of the published code: with "clip", the values of
        every image block and the full last image block; in `monte_carlo`, one extra pass.
    """

    def __init__(
        self,
        variant: str,
        image_size: int = 224,
        patch: int = 16,
        width: int = 768,
        heads: int = 12,
        layers: int = 12,
        embed: int = 512,
        adapter_dim: int = 256,
        beta: float = BETA,
        gate_init: float = 0.0,
        text_width: int | None = None,
        text_heads: int | None = None,
        text_positions: int | None = None,
        vocab: int | None = None,
        as_published: bool = False,
    ):
        super().__init__()
        sizes = TEXT_SIZES[variant]
        text_width = text_width or sizes["text_width"]
        text_heads = text_heads or sizes["text_heads"]
        text_positions = text_positions or sizes["text_positions"]
        vocab = vocab or sizes["vocab"]
        self.variant, self.as_published = variant, as_published
        self.image_size, self.num_layers, self.adapter_dim = image_size, layers, adapter_dim
        self.num_image_tokens = (image_size // patch) ** 2 + 1
        encoder = TrunkImageEncoder if variant == "biomedclip" else ClipImageEncoder
        self.vision_model = encoder(image_size, patch, width, layers, heads, embed)
        text = (text_positions, text_width, layers, text_heads, embed)
        if variant == "clip":
            self.clip_model = nn.ModuleDict({"token_embedding": nn.Embedding(vocab, text_width)})
            self.text_model = ClipTextEncoder(*text)
        else:
            self.text_model = BertTextEncoder(vocab, *text)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.pvl_adapters = nn.ModuleList(
            Adapter(width, text_width, adapter_dim, beta, gate_init) for _ in range(layers - 2)
        )
        self.mask_head = make_mask_head(embed)
        self.upscale = make_upscale(embed)
        for name, value in self.named_parameters():
            value.requires_grad_(name.startswith(TRAINABLE))

    def draw_noise(self, ids: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        """Draws the standard normal noise of one pass: for each adapter, text then image."""
        batch, length = ids.shape
        return [
            torch.randn(batch, tokens, self.adapter_dim, generator=generator, device=ids.device)
            for _ in self.pvl_adapters
            for tokens in (length, self.num_image_tokens)
        ]

    def forward(
        self,
        image: Tensor,
        ids: Tensor,
        noise: Sequence[Tensor] | None = None,
        return_features: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Runs one pass.

        Args:
          image: (B, 3, S, S), normalised.
          ids: (B, L), 0 at padding.
          noise: As from `draw_noise`; None: zeros.
          return_features: Whether to return also the inputs of `contrastive_loss`.

        Returns:
          Logits (B, S, S), or with the features: logits, patch features (B, P, embed) and text
          features (B, embed), neither of unit norm.
        """
        features, text = self.encode(image, ids, noise)
        low = low_logits(self.upscale, self.mask_head, features, text)
        size = (self.image_size, self.image_size)
        logits = F.interpolate(low[:, None], size, mode="bilinear", align_corners=False)[:, 0]
        return (logits, features, text) if return_features else logits

    def encode(
        self, image: Tensor, ids: Tensor, noise: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Computes patch features (B, P, embed) and text features (B, embed) of one pass."""
        vision, text, last = self.vision_model, self.text_model, self.num_layers - 1
        is_clip = self.variant == "clip"
        x = vision.embed(image)
        u = text.embed(self.clip_model["token_embedding"](ids) if is_clip else ids)
        mask = text.mask(ids)
        for i in range(self.num_layers):
            if 0 < i < last:
                pair = (None, None) if noise is None else noise[2 * i - 2 : 2 * i]
                dx, du = self.pvl_adapters[i - 1](x, u, pair)
                x, u = x + dx, u + du
            if is_clip and (self.as_published or i == last):
                values = vision.values(i, x)
            if not is_clip or self.as_published or i < last:
                x = vision.block(i, x)
            u = text.block(i, u, mask)
        return vision.project(values if is_clip else x), text.pool(u, ids)


def state_dict_with_aliases(model: MedCLIPSeg) -> dict[str, Tensor]:
    """Returns the state dict of a published checkpoint; "clip" repeats its encoders as aliases."""
    state = dict(model.state_dict())
    if model.variant == "clip":
        aliases = {"vision_model.": "clip_model.visual.", "text_model.": "clip_model."}
        for name in list(state):
            for prefix, alias in aliases.items():
                if name.startswith(prefix):
                    state[alias + name.removeprefix(prefix)] = state[name]
        state["clip_model.logit_scale"] = state["logit_scale"]
    return state


@torch.no_grad()
def monte_carlo(
    model: MedCLIPSeg,
    image: Tensor,
    ids: Tensor,
    num_samples: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the mean probability and its entropy in nats, (B, S, S), pass by pass."""
    if model.as_published:
        model(image, ids, model.draw_noise(ids, generator))
    mean = torch.zeros(())
    for _ in range(num_samples):
        logits = model(image, ids, model.draw_noise(ids, generator))
        mean = mean + logits.sigmoid() / num_samples
    entropy = -(mean * (mean + 1e-8).log() + (1 - mean) * (1 - mean + 1e-8).log())
    return mean, entropy
