"""The PyTorch MedCLIPSeg at the sizes of `tiny_medclipseg`."""

from reference import torch_clip
from reference.torch_medclipseg import MedCLIPSeg
from tests import tiny_medclipseg as tiny


def tiny_model(variant: str, num_layers: int = tiny.NUM_BLOCKS) -> MedCLIPSeg:
    """Returns the PyTorch network at the sizes of `tiny_medclipseg`, with random parameters."""
    model = MedCLIPSeg(
        variant,
        image_size=tiny.IMAGE_SIZE,
        patch=tiny.PATCH_SIZE,
        width=tiny.IMAGE_WIDTH,
        heads=tiny.NUM_HEADS,
        layers=num_layers,
        embed=tiny.EMBEDDING,
        adapter_dim=tiny.ADAPTER_WIDTH,
        text_width=tiny.TEXT_WIDTH,
        text_heads=tiny.NUM_HEADS,
        text_positions=tiny.MAX_LENGTH,
        vocab=tiny.VOCAB_SIZE,
    )
    return torch_clip.randomize_(model, 0)
