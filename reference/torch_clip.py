"""CLIP in PyTorch with OpenAI's parameter names, from the formulas of arXiv 2103.00020.

Both image encoders and the text encoder; every forward pass returns the states of all layers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    """x + attention(ln_1 x), then x + mlp(ln_2 x)."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width),
                gelu=QuickGELU(),
                c_proj=nn.Linear(4 * width, width),
            )
        )
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, num_layers: int, num_heads: int):
        super().__init__()
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, num_heads) for _ in range(num_layers)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        states = [x]
        for block in self.resblocks:
            states.append(block(states[-1], mask))
        return states


class VisionTransformer(nn.Module):
    def __init__(self, size: int, patch: int, width: int, num_layers: int, heads: int, out: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((size // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, num_layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, out))

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.conv1(image).flatten(2).transpose(1, 2)
        class_token = self.class_embedding.expand(len(x), 1, -1)
        x = self.ln_pre(torch.cat([class_token, x], dim=1) + self.positional_embedding)
        states = self.transformer(x)
        return self.ln_post(states[-1][:, 0]) @ self.proj, states


class Bottleneck(nn.Module):
    def __init__(self, num_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.pool = nn.AvgPool2d(stride)
        self.downsample = None
        if stride > 1 or num_in != 4 * width:
            self.downsample = nn.Sequential(
                OrderedDict(
                    [
                        ("-1", nn.AvgPool2d(stride)),
                        ("0", nn.Conv2d(num_in, 4 * width, 1, bias=False)),
                        ("1", nn.BatchNorm2d(4 * width)),
                    ]
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.pool(F.relu(self.bn2(self.conv2(y))))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class AttentionPool(nn.Module):
    """softmax(q(mean) k(x) / sqrt(d)) v(x) over the mean and all positions, head by head."""

    def __init__(self, side: int, width: int, num_heads: int, out: int):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.zeros(side**2 + 1, width))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, out)
        self.num_heads = num_heads

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding
        outputs = []
        size = x.shape[-1] // self.num_heads
        q, k, v = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)
        for head in range(self.num_heads):
            part = slice(head * size, (head + 1) * size)
            weights = torch.softmax(q[..., part] @ k[..., part].mT / size**0.5, dim=-1)
            outputs.append(weights @ v[..., part])
        return self.c_proj(torch.cat(outputs, dim=-1))[:, 0]


class ModifiedResNet(nn.Module):
    def __init__(self, size: int, width: int, stages: Sequence[int], num_heads: int, out: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        num_in = width
        for i, num_blocks in enumerate(stages):
            blocks = []
            for j in range(num_blocks):
                blocks.append(Bottleneck(num_in, width * 2**i, 2 if i and not j else 1))
                num_in = 4 * width * 2**i
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool(size // 32, num_in, num_heads, out)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = F.relu(self.bn1(self.conv1(image)))
        x = F.relu(self.bn2(self.conv2(x)))
        states = [F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)]
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            states.append(layer(states[-1]))
        return self.attnpool(states[-1]), states


class OpenAIClip(nn.Module):
    """CLIP with the released parameter names: visual.*, transformer.*, token_embedding, ..."""

    def __init__(
        self, visual: nn.Module, vocab: int, length: int, width: int, layers: int, out: int
    ):
        super().__init__()
        self.visual = visual
        self.transformer = Transformer(width, layers, max(width // 64, 1))
        self.token_embedding = nn.Embedding(vocab, width)
        self.positional_embedding = nn.Parameter(torch.zeros(length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, out))
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def encode_text(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        length = ids.shape[1]
        x = self.token_embedding(ids) + self.positional_embedding[:length]
        mask = torch.full((length, length), float("-inf")).triu(1)
        states = self.transformer(x, mask)
        x = self.ln_final(states[-1])
        return x[torch.arange(len(x)), ids.argmax(dim=-1)] @ self.text_projection, states

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        unit = [F.normalize(x[0], dim=-1) for x in (self.visual(image), self.encode_text(ids))]
        return self.logit_scale.exp() * unit[0] @ unit[1].T


@torch.no_grad()
def randomize_(model: nn.Module, seed: int) -> nn.Module:
    """Fills all parameters and buffers from `seed`, in place; states stay near 1 at any depth."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        noise = torch.randn(value.shape, generator=generator)
        if not value.is_floating_point():
            continue
        if name.endswith("running_var"):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        elif value.ndim >= 2:
            fan_in = value[0].numel() if value.ndim == 4 else value.shape[-1]
            value.copy_(noise * (1.4 if value.ndim == 4 else 0.7) / fan_in**0.5)
        elif name.endswith("weight"):
            # Otherwise the residual branches and their sums would grow with depth.
            is_branch_end = name.endswith(("bn3.weight", "downsample.1.weight"))
            value.copy_((0.5 if is_branch_end else 1.0) + 0.1 * noise)
        else:
            value.copy_(0.1 * noise)
    return model.eval()
