"""MedCLIPSeg in PyTorch, from the formulas of arXiv 2602.20423: names and numbers.

Parameters carry the names of the published checkpoints. Images are (B, 3, H, W),
already normalised; ids (B, L) are padded with 0; masks (B, H, W) are floats in
{0, 1}. Dropout of the frozen text tower is left out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import torch_clip

BETA = 2.35
MIN_VARIANCE = 1e-6
TRAINABLE = ("pvl_adapters.", "mask_head.", "upscale.")
LOSS_WEIGHTS = {"dice": 0.5, "bce": 0.5, "contrastive": 0.1}
CLIP_TEXT = {"text_width": 512, "text_heads": 8, "text_positions": 77, "vocab": 49408}
BERT_TEXT = {"text_width": 768, "text_heads": 12, "text_positions": 512, "vocab": 30522}
TEXT_SIZES = {"clip": CLIP_TEXT, "unimedclip": BERT_TEXT, "biomedclip": BERT_TEXT}
TEXT_LENGTHS = {"clip": 77, "unimedclip": 256, "biomedclip": 256}


class ProbabilisticAttention(nn.Module):
    """One head over keys and values with means and variances, mixed with its query by a gate.

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
    """What the image's tokens and the text's add to each other, (B, N, .) and (B, L, .)."""

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
    """Transposed convolution to twice the side, GELU, 3x3 convolution a channel, norm."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = ChannelNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv2(F.gelu(self.conv1(x))))


def make_upscale(width: int) -> nn.Sequential:
    """(B, width, h, w) -> (B, width, 4 h, 4 w)."""
    return nn.Sequential(ScaleBlock(width), ScaleBlock(width))


def make_mask_head(width: int) -> nn.Sequential:
    """(B, width) -> (B, width)."""
    return nn.Sequential(
        nn.Linear(width, width),
        nn.GELU(),
        nn.Linear(width, width),
        nn.GELU(),
        nn.Linear(width, width),
    )


def low_logits(upscale: nn.Module, mask_head: nn.Module, features: Tensor, text: Tensor) -> Tensor:
    """Patches of a square picture (B, P, E) and its sentence (B, E) -> (B, h, w)."""
    batch, num_patches, width = features.shape
    side = round(num_patches**0.5)
    x = _unit(features).reshape(batch, side, side, width).permute(0, 3, 1, 2)
    return torch.einsum("bc,bchw->bhw", mask_head(_unit(text)), upscale(x))


def _unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


class ClipImageTower(torch_clip.VisionTransformer):
    """OpenAI's ViT, block by block."""

    def embed(self, image: Tensor) -> Tensor:
        x = self.conv1(image).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(x), 1, -1)
        return self.ln_pre(torch.cat([first, x], dim=1) + self.positional_embedding)

    def block(self, index: int, x: Tensor) -> Tensor:
        return self.transformer.resblocks[index](x, None)

    def values(self, index: int, x: Tensor) -> Tensor:
        """What the block's attention would give if every token saw itself alone."""
        block = self.transformer.resblocks[index]
        attention, start = block.attn, 2 * x.shape[-1]
        weight, bias = attention.in_proj_weight[start:], attention.in_proj_bias[start:]
        return attention.out_proj(F.linear(block.ln_1(x), weight, bias))

    def project(self, x: Tensor) -> Tensor:
        return self.ln_post(x[:, 1:]) @ self.proj


class TrunkBlock(nn.Module):
    """x + attention(norm1 x), then x + mlp(norm2 x), with the exact GELU."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(width, 4 * width), gelu=nn.GELU(), fc2=nn.Linear(4 * width, width)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.attn["qkv"](self.norm1(x)).chunk(3, dim=-1)
        x = x + self.attn["proj"](_attend(*qkv, self.num_heads))
        return x + self.mlp(self.norm2(x))


def _attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


class Trunk(nn.Module):
    """A ViT without a norm before its blocks."""

    def __init__(self, size: int, patch: int, width: int, num_layers: int, num_heads: int):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
        self.blocks = nn.ModuleList(TrunkBlock(width, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)


class TrunkImageTower(nn.Module):
    """BiomedCLIP's ViT, block by block."""

    def __init__(self, size: int, patch: int, width: int, num_layers: int, heads: int, out: int):
        super().__init__()
        self.trunk = Trunk(size, patch, width, num_layers, heads)
        self.head = nn.ModuleDict({"proj": nn.Linear(width, out, bias=False)})

    def embed(self, image: Tensor) -> Tensor:
        x = self.trunk.patch_embed["proj"](image).flatten(2).transpose(1, 2)
        first = self.trunk.cls_token.expand(len(x), -1, -1)
        return torch.cat([first, x], dim=1) + self.trunk.pos_embed

    def block(self, index: int, x: Tensor) -> Tensor:
        return self.trunk.blocks[index](x)

    def project(self, x: Tensor) -> Tensor:
        return self.head["proj"](self.trunk.norm(x[:, 1:]))


class ClipTextTower(nn.Module):
    """OpenAI's causal transformer, block by block; its embedding table lives outside."""

    def __init__(self, positions: int, width: int, num_layers: int, num_heads: int, out: int):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.zeros(positions, width))
        self.text_projection = nn.Parameter(torch.zeros(width, out))
        self.ln_final = nn.LayerNorm(width)
        self.transformer = torch_clip.Transformer(width, num_layers, num_heads)

    def embed(self, words: Tensor) -> Tensor:
        return words + self.positional_embedding[: words.shape[1]]

    def mask(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        return torch.full((length, length), float("-inf"), device=ids.device).triu(1)

    def block(self, index: int, x: Tensor, mask: Tensor) -> Tensor:
        return self.transformer.resblocks[index](x, mask)

    def pool(self, x: Tensor, ids: Tensor) -> Tensor:
        """The state at the largest id, which ends the sentence, projected."""
        last = x[torch.arange(len(x), device=x.device), ids.argmax(dim=-1)]
        return self.ln_final(last) @ self.text_projection


class BertLayer(nn.Module):
    """x = norm(x + attention(x)), then x = norm(x + mlp(x))."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        linears = {name: nn.Linear(width, width) for name in ("query", "key", "value")}
        self.attention = nn.ModuleDict(
            {"self": nn.ModuleDict(linears), "output": _dense_and_norm(width, width)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 4 * width)})
        self.output = _dense_and_norm(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (linear(x) for linear in self.attention["self"].values())
        after = self.attention["output"]
        x = after["LayerNorm"](x + after["dense"](_attend(q, k, v, self.num_heads, mask)))
        hidden = F.gelu(self.intermediate["dense"](x))
        return self.output["LayerNorm"](x + self.output["dense"](hidden))


def _dense_and_norm(num_in: int, num_out: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {"dense": nn.Linear(num_in, num_out), "LayerNorm": nn.LayerNorm(num_out, eps=1e-12)}
    )


class BertTextTower(nn.Module):
    """BERT layer by layer, then two linear layers on the state of its first token."""

    def __init__(
        self, vocab: int, positions: int, width: int, num_layers: int, num_heads: int, out: int
    ):
        super().__init__()
        embeddings = {
            "word_embeddings": nn.Embedding(vocab, width),
            "position_embeddings": nn.Embedding(positions, width),
            "token_type_embeddings": nn.Embedding(2, width),
            "LayerNorm": nn.LayerNorm(width, eps=1e-12),
        }
        layers = nn.ModuleList(BertLayer(width, num_heads) for _ in range(num_layers))
        self.transformer = nn.ModuleDict(
            {
                "embeddings": nn.ModuleDict(embeddings),
                "encoder": nn.ModuleDict({"layer": layers}),
            }
        )
        hidden = (width + out) // 2
        self.proj = nn.Sequential(
            nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, out, bias=False)
        )

    def embed(self, ids: Tensor) -> Tensor:
        tables = self.transformer["embeddings"]
        positions = tables["position_embeddings"].weight[: ids.shape[1]]
        segment = tables["token_type_embeddings"].weight[0]
        return tables["LayerNorm"](tables["word_embeddings"](ids) + positions + segment)

    def mask(self, ids: Tensor) -> Tensor:
        """0 at tokens, the smallest number at padding, (B, 1, 1, L)."""
        dtype = self.proj[0].weight.dtype
        return (ids == 0)[:, None, None].to(dtype) * torch.finfo(dtype).min

    def block(self, index: int, x: Tensor, mask: Tensor) -> Tensor:
        return self.transformer["encoder"]["layer"][index](x, mask)

    def pool(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.proj(x[:, 0])


class MedCLIPSeg(nn.Module):
    """Both towers of a CLIP in step, an adapter between them before blocks 1 to L - 2.

    The towers are frozen; adapters and head are not.

    Args:
      variant: "clip", "unimedclip" or "biomedclip".
      image_size, patch: side of the pictures and of their patches.
      width, heads: of the image tower.
      layers: of either tower, L.
      embed: length of the features both towers end in.
      adapter_dim, beta, gate_init: of the adapters.
      text_width, text_heads, text_positions, vocab: of the text tower, by default
        those of the published variant; text_positions are rows of a table.
      as_published: does the work of the published program whose outcome is not
        used: in the variant "clip" the values alone of every image block and all
        of the last image block, in `monte_carlo` one more pass.
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
        tower = TrunkImageTower if variant == "biomedclip" else ClipImageTower
        self.vision_model = tower(image_size, patch, width, layers, heads, embed)
        text = (text_positions, text_width, layers, text_heads, embed)
        if variant == "clip":
            self.clip_model = nn.ModuleDict({"token_embedding": nn.Embedding(vocab, text_width)})
            self.text_model = ClipTextTower(*text)
        else:
            self.text_model = BertTextTower(vocab, *text)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.pvl_adapters = nn.ModuleList(
            Adapter(width, text_width, adapter_dim, beta, gate_init) for _ in range(layers - 2)
        )
        self.mask_head = make_mask_head(embed)
        self.upscale = make_upscale(embed)
        for name, value in self.named_parameters():
            value.requires_grad_(name.startswith(TRAINABLE))

    def draw_noise(self, ids: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        """Standard normal noise of one pass: for every adapter the text's, then the image's."""
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
        """One pass.

        Args:
          image: (B, 3, S, S), normalised.
          ids: (B, L), 0 at padding.
          noise: as from `draw_noise`; None: zeros.
          return_features: gives out what `contrastive_loss` takes, too.

        Returns:
          logits (B, S, S), or with the features: logits, patch features
          (B, P, embed) and text features (B, embed), neither of unit length.
        """
        features, text = self.encode(image, ids, noise)
        low = low_logits(self.upscale, self.mask_head, features, text)
        size = (self.image_size, self.image_size)
        logits = F.interpolate(low[:, None], size, mode="bilinear", align_corners=False)[:, 0]
        return (logits, features, text) if return_features else logits

    def encode(
        self, image: Tensor, ids: Tensor, noise: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Patch features (B, P, embed) and text features (B, embed) of one pass."""
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
    """The state dict of a published checkpoint: "clip" has its towers under a second name, too."""
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
    """Mean probability and its entropy in nats, both (B, S, S), one pass after another."""
    if model.as_published:
        model(image, ids, model.draw_noise(ids, generator))
    mean = torch.zeros(())
    for _ in range(num_samples):
        logits = model(image, ids, model.draw_noise(ids, generator))
        mean = mean + logits.sigmoid() / num_samples
    entropy = -(mean * (mean + 1e-8).log() + (1 - mean) * (1 - mean + 1e-8).log())
    return mean, entropy


def row_dice_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Soft Dice of every row of every picture but the first row, averaged."""
    probs, mask = logits.sigmoid()[:, 1:], mask[:, 1:]
    both = (probs * mask).sum(dim=-1)
    area = probs.sum(dim=-1) + mask.sum(dim=-1)
    return (1 - (2 * both + 1e-5) / (area + 1e-5)).mean()


def bce(logits: Tensor, mask: Tensor) -> Tensor:
    """Binary cross-entropy, the mean over all pixels."""
    return F.binary_cross_entropy_with_logits(logits, mask)


def soft_targets(text: Tensor, temperature: float = 0.2) -> Tensor:
    """softmax of the rows of T T' / temperature, each of unit length, (B, B)."""
    return _unit(text @ text.T / temperature).softmax(dim=-1)


def contrastive_loss(features: Tensor, text: Tensor, temperature: float = 0.2) -> Tensor:
    """Cross-entropy of means of unit patches to sentences, both ways, targets from sentences.

    Args:
      features: (B, P, E).
      text: (B, E), not of unit length; the targets pass no gradient on.
      temperature: of the similarities.
    """
    scores = _unit(features).mean(dim=1) @ text.T / temperature
    targets = soft_targets(text, temperature).detach()
    return (F.cross_entropy(scores, targets) + F.cross_entropy(scores.T, targets.T)) / 2


def total(logits: Tensor, mask: Tensor, features: Tensor, text: Tensor) -> Tensor:
    """0.5 Dice of rows + 0.5 binary cross-entropy + 0.1 contrastive loss."""
    parts = {
        "dice": row_dice_loss(logits, mask),
        "bce": bce(logits, mask),
        "contrastive": contrastive_loss(features, text),
    }
    return sum(LOSS_WEIGHTS[name] * part for name, part in parts.items())
