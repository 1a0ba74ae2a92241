"""Trained models for use: variables for researchers, masks for everybody."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from biclip_jax.data import image_io
from biclip_jax.data import text as text_lib
from biclip_jax.errors import UserError
from biclip_jax.evaluation.steps import predict_step
from biclip_jax.models import biclip
from biclip_jax.weights import folder as model_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Processor:
    """Pictures and sentences to the model's input.

    Attributes:
      tokenizer: of the model folder.
      image_size: S, in pixels.
      max_length: L, in tokens.
      threshold: probability from which a pixel is foreground.
    """

    tokenizer: Tokenizer
    image_size: int
    max_length: int
    threshold: float = 0.5

    def __call__(self, images: Sequence[np.ndarray], sentences: Sequence[str]) -> dict[str, Any]:
        """uint8 pictures (H, W, 1 or 3) of any size, one sentence each, to a `Batch`'s fields.

        Returns:
          image (B, S, S, 3) uint8, text_ids (B, L) int32, text_mask (B, L) bool.
        """
        resized = [image_io.resize_image(image, self.image_size) for image in images]
        shape = (self.image_size, self.image_size, 3)
        image = np.stack([np.broadcast_to(image, shape) for image in resized])
        return {"image": image, **self.encode(sentences)}

    def encode(self, sentences: Sequence[str]) -> dict[str, np.ndarray]:
        """Sentences alone: text_ids (B, L) int32, text_mask (B, L) bool."""
        ids, mask = text_lib.encode(self.tokenizer, sentences, self.max_length)
        return {"text_ids": ids, "text_mask": mask}


class Prediction(NamedTuple):
    """One picture's answer, at the picture's own size (H, W).

    Attributes:
      mask: bool.
      probability: float32 in [0, 1].
      uncertainty: float32, the entropy -p ln p - (1-p) ln(1-p) of the
        probability, in nats, 0 to 0.693. Of one pass of one model: it tells
        where the model hesitates, not where it is wrong with confidence.
    """

    mask: np.ndarray
    probability: np.ndarray
    uncertainty: np.ndarray


class Predictor:
    """A loaded model as a function of a picture and a sentence."""

    def __init__(self, model: biclip.BiCLIP, variables: Mapping[str, Any], processor: Processor):
        self.processor = processor
        self._variables = jax.device_put(variables)
        self._predict = jax.jit(partial(predict_step, model=model))

    def predict(self, image: np.ndarray | str | Path, sentence: str = "") -> Prediction:
        """Segments one picture: a uint8 array (H, W), (H, W, 1 or 3), or a file.

        Raises:
          BadImageError: the file is not a picture that can be read.
          ValueError: an array of another shape or dtype.
        """
        pixels = image_io.read_image(image) if isinstance(image, str | Path) else _checked(image)
        batch = self.processor([pixels], [sentence])
        probs = np.asarray(self._predict(self._variables, batch))[0, ..., 0]
        probs = image_io.resize_probability(probs, pixels.shape[0], pixels.shape[1])
        inside = np.clip(probs, 1e-7, 1 - 1e-7)
        entropy = -inside * np.log(inside) - (1 - inside) * np.log1p(-inside)
        return Prediction(probs >= self.processor.threshold, probs, entropy.astype(np.float32))


def load_model(path: str | Path) -> tuple[biclip.BiCLIP, dict[str, Any], Processor]:
    """Opens a run's work directory (its best model) or a model folder.

    Returns:
      The model, its variables (numpy) for `model.apply`, and the processor.

    Raises:
      UserError: nothing to open, a damaged file, or parameters that are not the model's.
    """
    path = model_path(path)
    config, variables = model_folder.read(path)
    tokenizer = text_lib.load_tokenizer(path / "tokenizer")
    if tokenizer.get_vocab_size() != config["vocab_size"]:
        raise UserError(
            f"{path / 'tokenizer'}: {tokenizer.get_vocab_size()} words, the model of config.json "
            f"has {config['vocab_size']}; put the tokenizer of this model there"
        )
    model = biclip.build(config["model"], vocab_size=config["vocab_size"])
    processor = Processor(
        tokenizer, config["model"]["image_size"], config["model"]["text"]["max_length"]
    )
    _check_variables(path, model, variables, processor)
    return model, variables, processor


def load(path: str | Path) -> Predictor:
    """A `Predictor` from a run's work directory or a model folder; errors as `load_model`."""
    return Predictor(*load_model(path))


def model_path(path: str | Path) -> Path:
    """The model folder of a work directory, or the path itself."""
    inside = Path(path) / "model"
    return inside if inside.is_dir() else Path(path)


def _check_variables(path, model, variables, processor) -> None:
    init = partial(biclip.init, model, max_length=processor.max_length)
    expected = jax.eval_shape(init, jax.random.key(0))
    want = {k: v.shape for k, v in flatten_dict(expected, sep="/").items()}
    have = {k: v.shape for k, v in flatten_dict(variables, sep="/").items()}
    for name in sorted(want.keys() | have.keys()):
        if want.get(name) != have.get(name):
            raise UserError(
                f"{path / model_folder.WEIGHTS}: {name} has shape {have.get(name, 'none')}, the "
                f"model of config.json expects {want.get(name, 'none')}; write the folder anew"
            )


def _checked(image: np.ndarray) -> np.ndarray:
    legal = image.ndim in (2, 3) and image.shape[2:] in ((), (1,), (3,))
    if image.dtype != np.uint8 or not legal:
        raise ValueError(
            f"the picture is {image.dtype} {image.shape}; "
            "expected uint8 (H, W), (H, W, 1) or (H, W, 3)"
        )
    return image if image.ndim == 3 else image[..., None]
