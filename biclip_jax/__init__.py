"""BiCLIP in pure JAX: medical image segmentation with the help of a sentence.

predictor = biclip_jax.load("runs/demo")
mask, probability, uncertainty = predictor.predict("xray.png", "... lower left lung.")

model, variables, processor = biclip_jax.load_model("runs/demo")
logits, aux = model.apply(variables, image, text_ids, text_mask)
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load", "load_model"]


def __getattr__(name: str) -> Any:
    # Lazy: `import biclip_jax` must stay light and must not start jax.
    if name in ("load", "load_model"):
        from biclip_jax import inference

        return getattr(inference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
