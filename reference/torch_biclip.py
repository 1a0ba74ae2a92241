"""The published BiCLIP network in PyTorch, the reference for the Flax model.

With `level_hidden` image and text are also fused at every level, as in `full`. Parameter names are
those of the published checkpoints without the prefix `model.`; those of the levels are specific to
this implementation. The frozen text encoder is not included: its pooled output is the input
`text_features`. Images are (B, 3, S, S) in [0, 1], masks (B, 1, S, S) in {0, 1}. Only `segment`
applies the ImageNet statistics.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PSEUDO_MEAN, PSEUDO_STD = 0.5, 0.25
GENERATOR_CHANNELS = (64, 32, 16, 8)
LOSS_WEIGHTS = {"seg": 1.0, "gen": 0.1, "iac": 0.05, "cycle": 0.07}
EPS = 1e-5


def _norm(kind: str, num: int) -> nn.Module:
    return nn.BatchNorm2d(num) if kind == "batch" else nn.GroupNorm(math.gcd(8, num), num)


class DoubleConv(nn.Module):
    """(3x3 convolution without bias, norm, ReLU) twice."""

    def __init__(self, num_in: int, num_out: int, norm: str):
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(num_in, num_out, 3, padding=1, bias=False),
            _norm(norm, num_out),
            nn.ReLU(),
            nn.Conv2d(num_out, num_out, 3, padding=1, bias=False),
            _norm(norm, num_out),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Down(nn.Module):
    """Max-pooling by 2, then a `DoubleConv`."""

    def __init__(self, num_in: int, num_out: int, norm: str):
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(num_in, num_out, norm))

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool_conv(x)


class Up(nn.Module):
    """Transposed convolution that halves the channels, concat [skip, up], a `DoubleConv`."""

    def __init__(self, num_in: int, num_out: int, norm: str):
        super().__init__()
        self.up = nn.ConvTranspose2d(num_in, num_out, kernel_size=2, stride=2)
        self.conv = DoubleConv(2 * num_out, num_out, norm)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv(torch.cat([skip, self.up(x)], dim=1))


class OutConv(nn.Module):
    """1x1 convolution to one logit per pixel."""

    def __init__(self, num_in: int):
        super().__init__()
        self.conv = nn.Conv2d(num_in, 1, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def _conv_pair(num_in: int, widths: Sequence[int]) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(num_in, widths[0], 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(widths[0], widths[1], 3, padding=1),
        nn.ReLU(),
    )


def _mlp(num_in: int, num_out: int, hidden: int | None = None) -> nn.Sequential:
    hidden = hidden or num_out
    return nn.Sequential(
        nn.Linear(num_in, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, num_out)
    )


class ImageEncoder(nn.Module):
    """Maps images (B, 3, S, S) in [0, 1] to (B, widths[1])."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.conv = _conv_pair(3, widths)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image).mean(dim=(2, 3))


class TextProjection(nn.Module):
    """Maps pooled features (B, text_feature_dim) to t (B, text_dim)."""

    def __init__(self, text_feature_dim: int, text_dim: int):
        super().__init__()
        self.project_head = _mlp(text_feature_dim, text_dim)

    def forward(self, text_features: Tensor) -> Tensor:
        return self.project_head(text_features)


class TextRefiner(nn.Module):
    """BMF, vision to text: t' = t + g([t; i])."""

    def __init__(self, text_dim: int, image_dim: int, hidden: int | None = None):
        super().__init__()
        self.mlp = _mlp(text_dim + image_dim, text_dim, hidden)

    def forward(self, text: Tensor, image_vector: Tensor) -> Tensor:
        return text + self.mlp(torch.cat([text, image_vector], dim=1))


class LevelFusion(nn.Module):
    """BMF at a level: t' = t + g([t; mean F]), then F' = F (1 + gamma(t')) + beta(t')."""

    def __init__(self, text_dim: int, width: int, hidden: int):
        super().__init__()
        self.refiner = TextRefiner(text_dim, width, hidden)
        self.modulation = nn.Linear(text_dim, 2 * width)

    def forward(self, features: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        text = self.refiner(text, features.mean(dim=(2, 3)))
        gamma, beta = self.modulation(text)[..., None, None].chunk(2, dim=1)
        return features * (1 + gamma) + beta, text


class CycleHead(nn.Module):
    """Maps pseudo-images (B, 3, S, S) to t^ (B, text_dim)."""

    def __init__(self, widths: Sequence[int], text_dim: int):
        super().__init__()
        self.encoder = _conv_pair(3, widths)
        self.fc = nn.Linear(widths[1], text_dim)

    def forward(self, pseudo_image: Tensor) -> Tensor:
        return self.fc(self.encoder(pseudo_image).mean(dim=(2, 3)))


def _generator(num_doublings: int) -> nn.Sequential:
    hidden = GENERATOR_CHANNELS[len(GENERATOR_CHANNELS) - (num_doublings - 1) :]
    channels = (1, *hidden, 3)
    layers: list[nn.Module] = []
    for num_in, num_out in itertools.pairwise(channels):
        layers += [nn.ConvTranspose2d(num_in, num_out, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers[:-1], nn.Sigmoid())


def _num_doublings(image_size: int, text_side: int, num_poolings: int) -> int:
    num_doublings = round(math.log2(image_size / text_side))
    exact = text_side * 2**num_doublings == image_size
    if not (exact and 1 <= num_doublings <= 5 and image_size % 2**num_poolings == 0):
        raise ValueError(
            f"image_size {image_size}: expected {text_side} * 2^k, k in 1..5, "
            f"divisible by {2**num_poolings}"
        )
    return num_doublings


class TorchBiCLIP(nn.Module):
    """The published BiCLIP, from pooled text features to logits.

    Args:
      widths: Channels of the U-Net's levels; there is one pooling fewer than levels.
      encoder_widths: Channels of the two convolutions of the image encoder.
      cycle_widths: Channels of the two convolutions of the cycle head.
      text_dim: Length of t, a square number; t' is reshaped in row-major order.
      image_size: Side S of the square images, sqrt(text_dim) * 2^k.
      text_feature_dim: Length of the text encoder's pooled features.
      norm: "batch" or "group".
      level_hidden: Hidden features of the refiners at the levels; 0: no fusion at the levels.
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 256, 512, 1024),
        encoder_widths: Sequence[int] = (64, 256),
        cycle_widths: Sequence[int] = (32, 64),
        text_dim: int = 784,
        image_size: int = 224,
        text_feature_dim: int = 768,
        norm: str = "batch",
        level_hidden: int = 0,
    ):
        super().__init__()
        self.text_side = math.isqrt(text_dim)
        if self.text_side**2 != text_dim:
            raise ValueError(f"text_dim {text_dim}: expected a square number")
        self.num_poolings = len(widths) - 1
        self.image_feature_extractor = ImageEncoder(encoder_widths)
        self.image_to_text = CycleHead(cycle_widths, text_dim)
        self.text_encoder = TextProjection(text_feature_dim, text_dim)
        self.text_refiner = TextRefiner(text_dim, encoder_widths[1])
        self.generator = _generator(_num_doublings(image_size, self.text_side, self.num_poolings))
        self.IAC_proj = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[0], 256), nn.LayerNorm(256)
        )
        self.inc = DoubleConv(6, widths[0], norm)
        for level in range(1, len(widths)):
            setattr(self, f"down{level}", Down(widths[level - 1], widths[level], norm))
            setattr(self, f"up{level}", Up(widths[-level], widths[-level - 1], norm))
        self.outc = OutConv(widths[0])
        self.fusions = nn.ModuleDict()
        if level_hidden:
            blocks = [("encoder", level) for level in range(len(widths))]
            blocks += [("decoder", level) for level in range(len(widths) - 1)]
            for kind, level in blocks:
                fusion = LevelFusion(text_dim, widths[level], level_hidden)
                self.fusions[f"{kind}_{level}"] = fusion
        mean_std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]).reshape(2, 1, 3, 1, 1)
        self.register_buffer("imagenet", mean_std, persistent=False)

    def fuse(self, image: Tensor, text_features: Tensor) -> dict[str, Tensor]:
        """Fuses text and image.

        Args:
          image: (B, 3, S, S) in [0, 1], not normalised.
          text_features: (B, text_feature_dim).

        Returns:
          text t and refined_text t' (B, text_dim), pseudo_image x^ (B, 3, S, S) in [0, 1],
          cycle_text t^ (B, text_dim).
        """
        text = self.text_encoder(text_features)
        refined = self.text_refiner(text, self.image_feature_extractor(image))
        pseudo = self.generator(refined.reshape(-1, 1, self.text_side, self.text_side))
        return {
            "text": text,
            "refined_text": refined,
            "pseudo_image": pseudo,
            "cycle_text": self.image_to_text(pseudo),
        }

    def segment(
        self, image: Tensor, pseudo_image: Tensor, text: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Runs the U-Net on [x ; x^], both (B, 3, S, S) in [0, 1]; normalises them.

        `text` (B, text_dim) is required if the levels have a fusion.

        Returns:
          Logits (B, 1, S, S) and the last decoder features (B, widths[0], S, S).
        """
        image = (image - self.imagenet[0]) / self.imagenet[1]
        pseudo_image = (pseudo_image - PSEUDO_MEAN) / PSEUDO_STD
        x, skips = torch.cat([image, pseudo_image], dim=1), []
        for level in range(self.num_poolings + 1):
            x = getattr(self, f"down{level}")(x) if level else self.inc(x)
            x, text = self._fuse_at(f"encoder_{level}", x, text)
            skips.append(x)
        skips.pop()
        for level in range(1, self.num_poolings + 1):
            x = getattr(self, f"up{level}")(x, skips.pop())
            x, text = self._fuse_at(f"decoder_{self.num_poolings - level}", x, text)
        return self.outc(x), x

    def _fuse_at(self, name: str, x: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.fusions[name](x, text) if name in self.fusions else (x, text)

    def iac(self, features: Tensor) -> Tensor:
        """Maps decoder features (B, widths[0], S, S) to p (B, 256)."""
        return self.IAC_proj(features)

    def forward(self, image: Tensor, text_features: Tensor) -> Tensor:
        """Computes logits (B, 1, S, S) of unaugmented images."""
        fused = self.fuse(image, text_features)
        return self.segment(image, fused["pseudo_image"], fused["refined_text"])[0]


def segmentation_loss(logits: Tensor, mask: Tensor, double_sigmoid: bool = False) -> Tensor:
    """Computes soft Dice per image plus binary cross-entropy, weights 1:1; a scalar.

    With `double_sigmoid` the cross-entropy treats the probabilities as logits, as the published
    wrapper does. An empty mask gives a Dice term of 1 - 1e-5 / (sum(probs) + 1e-5).
    """
    probs = torch.sigmoid(logits)
    intersection = (probs * mask).sum(dim=(1, 2, 3))
    total = probs.sum(dim=(1, 2, 3)) + mask.sum(dim=(1, 2, 3))
    dice = 1 - (2 * intersection + EPS) / (total + EPS)
    bce = F.binary_cross_entropy_with_logits(probs if double_sigmoid else logits, mask)
    return dice.mean() + bce


View = Tensor | Callable[[Tensor], Tensor]


def published_loss(
    model: TorchBiCLIP,
    image: Tensor,
    text_features: Tensor,
    mask: Tensor,
    weak: tuple[Tensor, View, Tensor],
    strong: tuple[Tensor, View],
    double_sigmoid: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes L = L_seg + 0.1 L_gen + 0.05 L_IAC + 0.07 L_cycle of one batch.

    Args:
      model: Its BatchNorm sees the weak view before the strong one.
      image: (B, 3, S, S) in [0, 1], unaugmented.
      text_features: (B, text_feature_dim).
      mask: (B, 1, S, S) float in {0, 1}, unaugmented.
      weak: Image, pseudo-image and mask of the weak view.
      strong: Image and pseudo-image of the strong view. The pseudo-image of a view is either a
        constant tensor or a function of the generated pseudo-image, through which the segmentation
        loss then reaches the generator.
      double_sigmoid: See `segmentation_loss`.

    Returns:
      The loss and its unweighted parts seg, gen, iac, cycle, all scalars.
    """
    fused = model.fuse(image, text_features)
    pseudo_w, pseudo_s = (
        view[1](fused["pseudo_image"]) if callable(view[1]) else view[1] for view in (weak, strong)
    )
    logits_w, features_w = model.segment(weak[0], pseudo_w)
    _, features_s = model.segment(strong[0], pseudo_s)
    cosine = F.cosine_similarity(model.iac(features_w), model.iac(features_s).detach(), dim=1)
    parts = {
        "seg": segmentation_loss(logits_w, weak[2], double_sigmoid),
        "gen": (fused["pseudo_image"] - image * mask).abs().mean(),
        "iac": (1 - cosine).mean(),
        "cycle": (fused["cycle_text"] - fused["text"].detach()).abs().mean(),
    }
    return sum(LOSS_WEIGHTS[name] * part for name, part in parts.items()), parts


def full_loss(
    model: TorchBiCLIP,
    image: Tensor,
    text_features: Tensor,
    mask: Tensor,
    box: Tensor,
    change: Callable[[Tensor], Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the loss of `full`: masks for both views, the weak embedding as teacher.

    Args:
      model: Only the weak view updates the running statistics of its BatchNorm.
      image, text_features, mask: The weak view, as for `published_loss`.
      box: (B, 1, S, S) bool, the same for rows 2j and 2j + 1: the strong view has the pixels of
        its partner there.
      change: Photometric change of the strong image, applied after the boxes.

    Returns:
      As `published_loss`.
    """
    area = box.to(image.dtype).mean(dim=(1, 2, 3))[:, None]

    def cut(x: Tensor) -> Tensor:
        return torch.where(box, _partners(x), x)

    def mix(x: Tensor) -> Tensor:
        return (1 - area) * x + area * _partners(x)

    fused = model.fuse(image, text_features)
    pseudo, text = fused["pseudo_image"], fused["refined_text"]
    logits_w, features_w = model.segment(image, pseudo, text)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 0.0
    logits_s, features_s = model.segment(change(cut(image)), cut(pseudo), mix(text))
    for norm in norms:
        norm.momentum = 0.1
    target = mix(model.iac(features_w)).detach()
    cosine = F.cosine_similarity(target, model.iac(features_s), dim=1)
    parts = {
        "seg": (segmentation_loss(logits_w, mask) + segmentation_loss(logits_s, cut(mask))) / 2,
        "gen": (pseudo - image * mask).abs().mean(),
        "iac": (1 - cosine).mean(),
        "cycle": (fused["cycle_text"] - fused["text"].detach()).square().mean(),
    }
    return sum(LOSS_WEIGHTS[name] * part for name, part in parts.items()), parts


def _partners(x: Tensor) -> Tensor:
    order = [row ^ 1 for row in range(len(x))]
    return x[order]


@torch.no_grad()
def randomize_(model: nn.Module, seed: int) -> nn.Module:
    """Fills every parameter and running statistic from `seed`, in place.

    Kernels preserve the scale of their input, so that activations and logits stay near 1 at any
    depth. Scales of norms are near 1, running variances in [0.5, 1.5], everything else within a
    few tenths of 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal_(tensor: Tensor, mean: float, std: float) -> None:
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            normal_(module.weight, 0.0, _kernel_std(module))
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d | nn.GroupNorm):
            normal_(module.weight, 1.0, 0.1)
        if isinstance(module, nn.BatchNorm2d):
            normal_(module.running_mean, 0.0, 0.1)
            variance = 0.5 + torch.rand(module.running_var.shape, generator=generator)
            module.running_var.copy_(variance)
        if getattr(module, "bias", None) is not None:
            normal_(module.bias, 0.0, 0.1)
    return model


def _kernel_std(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d) -> float:
    if isinstance(layer, nn.ConvTranspose2d):
        # (in, out, kh, kw); with stride s each pixel receives 1 / s^2 of the taps.
        taps = layer.in_channels * math.prod(layer.kernel_size) / math.prod(layer.stride)
        return math.sqrt(1 / taps)
    # Only the 3x3 convolutions are followed by a ReLU, which halves the second moment.
    gain = 2 if getattr(layer, "kernel_size", None) == (3, 3) else 1
    return math.sqrt(gain / math.prod(layer.weight.shape[1:]))
