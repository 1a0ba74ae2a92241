"""The frozen encoders of MedCLIPSeg in PyTorch; blocks run one at a time, between the adapters.

Parameters have the names of the published checkpoints. Images are (B, 3, H, W), already
normalised; ids (B, L) are padded with 0. Dropout is not implemented.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference import torch_clip


class ClipImageEncoder(torch_clip.VisionTransformer):
    """OpenAI's ViT, block by block."""

    def embed(self, image: Tensor) -> Tensor:
        x = self.conv1(image).flatten(2).transpose(1, 2)
        class_token = self.class_embedding.expand(len(x), 1, -1)
        return self.ln_pre(torch.cat([class_token, x], dim=1) + self.positional_embedding)

    def block(self, index: int, x: Tensor) -> Tensor:
        return self.transformer.resblocks[index](x, None)

    def values(self, index: int, x: Tensor) -> Tensor:
        """Computes the block's attention output as if every token attended only to itself."""
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


class TrunkImageEncoder(nn.Module):
    """BiomedCLIP's ViT, block by block."""

    def __init__(self, size: int, patch: int, width: int, num_layers: int, heads: int, out: int):
        super().__init__()
        self.trunk = Trunk(size, patch, width, num_layers, heads)
        self.head = nn.ModuleDict({"proj": nn.Linear(width, out, bias=False)})

    def embed(self, image: Tensor) -> Tensor:
        x = self.trunk.patch_embed["proj"](image).flatten(2).transpose(1, 2)
        class_token = self.trunk.cls_token.expand(len(x), -1, -1)
        return torch.cat([class_token, x], dim=1) + self.trunk.pos_embed

    def block(self, index: int, x: Tensor) -> Tensor:
        return self.trunk.blocks[index](x)

    def project(self, x: Tensor) -> Tensor:
        return self.head["proj"](self.trunk.norm(x[:, 1:]))


class ClipTextEncoder(nn.Module):
    """OpenAI's causal transformer, block by block, without its embedding table."""

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
        """Projects the state of the end token, which has the largest id."""
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
        output = self.attention["output"]
        x = output["LayerNorm"](x + output["dense"](_attend(q, k, v, self.num_heads, mask)))
        hidden = F.gelu(self.intermediate["dense"](x))
        return self.output["LayerNorm"](x + self.output["dense"](hidden))


def _dense_and_norm(num_in: int, num_out: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {"dense": nn.Linear(num_in, num_out), "LayerNorm": nn.LayerNorm(num_out, eps=1e-12)}
    )


class BertTextEncoder(nn.Module):
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
        """Returns 0 at tokens and the smallest number at padding, (B, 1, 1, L)."""
        dtype = self.proj[0].weight.dtype
        return (ids == 0)[:, None, None].to(dtype) * torch.finfo(dtype).min

    def block(self, index: int, x: Tensor, mask: Tensor) -> Tensor:
        return self.transformer["encoder"]["layer"][index](x, mask)

    def pool(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.proj(x[:, 0])
