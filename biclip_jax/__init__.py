"""Text-prompted medical image segmentation in pure JAX: BiCLIP and MedCLIPSeg.

segmenter = biclip_jax.load("runs/demo")
mask, probability, uncertainty = segmenter.predict("xray.png", "... lower left lung.")

model, variables, processor = biclip_jax.load_model("runs/demo")
logits, aux = model.apply(variables, image, text_ids, text_mask)
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load", "load_model"]


def __getattr__(name: str) -> Any:
    # Lazy: `import biclip_jax` stays light and does not start jax.
    if name in ("load", "load_model"):
        from biclip_jax import inference

        return getattr(inference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
