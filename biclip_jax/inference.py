"""Loads trained models: variables for research, a `Segmenter` for masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from biclip_jax.core.errors import UserError
from biclip_jax.data import image_io, tokenizers
from biclip_jax.data import text as text_lib
from biclip_jax.encoders import clip_pair
from biclip_jax.encoders import image as image_encoders
from biclip_jax.encoders import text as text_encoders
from biclip_jax.evaluation.robustness import tta
from biclip_jax.evaluation.steps import predict_step, sample_step
from biclip_jax.models import bert, biclip, clip, medclipseg
from biclip_jax.models.ensemble import Ensemble
from biclip_jax.models.text import PooledTextEncoder
from biclip_jax.weights import architectures, model_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Processor:
    """Converts images and prompts to the input of a model.

    Attributes:
      tokenizer: Tokenizer of the model folder.
      image_size: S, in pixels; 0 for a text encoder.
      max_length: L, in tokens.
      threshold: Pixels with at least this probability are foreground.
      resize_method: One of `image_io.RESIZE_METHODS`, as in training (`data.resize`).
    """

    tokenizer: Tokenizer
    image_size: int
    max_length: int
    threshold: float = 0.5
    resize_method: str = "antialiased"

    def __call__(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> dict[str, Any]:
        """Converts images and prompts to the fields of a `Batch`.

        Args:
          images: uint8 arrays (H, W, 1 or 3) of any size.
          texts: One prompt per image.

        Returns:
          image (B, S, S, 3) uint8, text_ids (B, L) int32, text_mask (B, L) bool, has_text (B,)
          bool.

        Raises:
          ValueError: The model is a text encoder and has no image input.
        """
        return {"image": self.resize(images), **self.encode(texts)}

    def resize(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Resizes images to (B, S, S, 3) uint8; raises like `__call__`."""
        if not self.image_size:
            raise ValueError("a text encoder has no image input; use processor.encode for prompts")
        size, method = self.image_size, self.resize_method
        resized = [image_io.resize_image(image, size, method) for image in images]
        shape = (self.image_size, self.image_size, 3)
        return np.stack([np.broadcast_to(image, shape) for image in resized])

    def encode(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Encodes prompts: text_ids (B, L) int32, text_mask (B, L) bool, has_text (B,) bool."""
        text_lib.warn_truncated(self.tokenizer, texts, self.max_length)
        return text_lib.encode_fields(self.tokenizer, texts, self.max_length)


class Prediction(NamedTuple):
    """Prediction for one image, at the size of the image (H, W).

    Attributes:
      mask: bool.
      probability: float32 in [0, 1]; of an ensemble, the mean over its members.
      uncertainty: float32 entropy -p ln p - (1-p) ln(1-p) of the probability, in nats, 0 to 0.693.
        It shows where the model is uncertain, not where it is confident and wrong.
    """

    mask: np.ndarray
    probability: np.ndarray
    uncertainty: np.ndarray


class SampledPrediction(NamedTuple):
    """`Prediction` whose probability is the mean over MedCLIPSeg's samples or over views.

    Attributes:
      epistemic: (H, W) float32, the part of `uncertainty` on which samples or views disagree
        (mutual information). The rest is aleatoric: the mean entropy of the single samples.
    """

    mask: np.ndarray
    probability: np.ndarray
    uncertainty: np.ndarray
    epistemic: np.ndarray


class Segmenter:
    """A loaded model that segments images given a text prompt."""

    def __init__(self, model: nn.Module, variables: Mapping[str, Any], processor: Processor):
        self.processor = processor
        self._encode = text_encoders.make_encode(model, variables, processor)
        self._variables = jax.device_put(text_encoders.without_text_encoder(model, variables))
        self.samples = isinstance(model, medclipseg.MedCLIPSeg)
        step = sample_step if self.samples else predict_step
        self._step = jax.jit(partial(step, model=model))

    def predict(self, image: np.ndarray | str | Path, prompt: str = "") -> Prediction:
        """Segments one image.

        Args:
          image: uint8 array (H, W) or (H, W, 1 or 3), or the path of an image file.
          prompt: Text prompt; "" for none.

        Raises:
          BadImageError: The file is not a readable image.
          ValueError: An array of another shape or dtype, or a prompt that is not a str.
        """
        if self.samples:
            return Prediction(*self.predict_samples(image, prompt)[:3])
        (probs,) = self._maps(image, prompt)
        uncertainty = tta.entropy(probs).astype(np.float32)
        return Prediction(probs >= self.processor.threshold, probs, uncertainty)

    def predict_samples(
        self, image: np.ndarray | str | Path, prompt: str = ""
    ) -> SampledPrediction:
        """Segments one image and returns the epistemic uncertainty too.

        Args, Raises: See `predict`; also ValueError for a model that does not sample (`samples`).
        """
        if not self.samples:
            raise ValueError("this model does not sample; use predict")
        return self._with_uncertainty(self._maps(image, prompt))

    def predict_views(self, image: np.ndarray | str | Path, prompt: str = "") -> SampledPrediction:
        """Segments one image with test-time augmentation: flip, rotations and contrast.

        Takes six forward passes. The flipped image gets the left-right swapped prompt. For a model
        that samples, each view is the mean over the samples. See `evaluation.robustness.tta`.
        """
        _check_prompt(prompt)
        swapped = self._encode([text_lib.swap_sides(prompt)])
        swapped_fields = {f"{tta.SWAPPED}{name}": values for name, values in swapped.items()}

        def predict_views(batch):
            views = list(tta.VIEWS.values())
            return tta.predict_views(lambda view: self._predict(view)[..., :1], batch, views)

        return self._with_uncertainty(self._maps(image, prompt, predict_views, **swapped_fields))

    def _with_uncertainty(self, maps: Sequence[np.ndarray]) -> SampledPrediction:
        probs, total, epistemic = maps
        return SampledPrediction(probs >= self.processor.threshold, probs, total, epistemic)

    def _predict(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.asarray(self._step(self._variables, batch))

    def _maps(self, image, prompt, predict_maps=None, **fields) -> list[np.ndarray]:
        pixels = (
            image_io.read_image(image) if isinstance(image, str | Path) else _check_image(image)
        )
        _check_prompt(prompt)
        batch = {"image": self.processor.resize([pixels]), **self._encode([prompt]), **fields}
        maps = np.moveaxis((predict_maps or self._predict)(batch)[0], -1, 0)
        size = pixels.shape[:2]
        return [image_io.resize_probability(m, size[0], size[1]) for m in maps]


def load_model(path: str | Path) -> tuple[nn.Module, dict[str, Any], Processor]:
    """Loads the best model of a work directory, a model folder, or a converted encoder.

    Returns:
      The model (`BiCLIP`, an `Ensemble` of it, `MedCLIPSeg`, `CLIP` or `Bert`), its variables
      (NumPy arrays) for `model.apply`, and the processor.

    Raises:
      UserError: Not a model folder, a damaged file, or parameters of another model.
    """
    path = model_path(path)
    config, variables = model_folder.read(path)
    tokenizer = tokenizers.load_tokenizer(path / "tokenizer")
    loaders = {
        "bert": _open_bert,
        "clip": _open_clip,
        "biclip": _open_biclip,
        "medclipseg": _open_medclipseg,
    }
    with model_folder.config_errors(path):
        return loaders[config["kind"]](path, config, variables, tokenizer)


def _open_bert(path, config, variables, tokenizer):
    model = bert.build(config["model"])
    text_encoders.check_vocabulary(path / "tokenizer", tokenizer, config["model"]["vocab_size"])
    ids = jnp.zeros((1, 1), jnp.int32)
    model_folder.check_shapes(path, variables, architectures.shapes_of(model, ids, ids > 0))
    return model, variables, Processor(tokenizer, 0, config["model"]["max_length"])


def _open_clip(path, config, variables, tokenizer):
    image, text = config["model"]["image"], config["model"]["text"]
    model, size = clip.build(config["model"]), image["image_size"]
    text_encoders.check_vocabulary(path / "tokenizer", tokenizer, text["vocab_size"])
    ids = jnp.zeros((1, text["max_length"]), jnp.int32)
    expected = architectures.shapes_of(model, jnp.zeros((1, size, size, 3)), ids)
    model_folder.check_shapes(path, variables, expected)
    return model, variables, Processor(tokenizer, size, text["max_length"])


def _open_biclip(path, config, variables, tokenizer):
    if tokenizer.get_vocab_size() != config["vocab_size"]:
        raise UserError(
            f"{path / 'tokenizer'}: found {tokenizer.get_vocab_size()} words; expected "
            f"{config['vocab_size']}, as in config.json; restore the tokenizer of this model"
        )
    text, encoder = config["model"]["text"], None
    if text["encoder"] != "scratch":
        encoder = text_encoders.open_text_encoder(
            path / text_encoders.TEXT_ENCODER, text["encoder"], config["model"]["dtype"]
        )
        text_encoders.check_text_encoder(encoder, text)
        if encoder.identity != config["text_encoder_sha256"]:
            raise UserError(
                f"{path / text_encoders.TEXT_ENCODER}: not the text encoder that this model was "
                "trained with; copy the folder again"
            )
    build = partial(_build_biclip, config)
    image = jnp.zeros((1, config["model"]["image_size"], config["model"]["image_size"], 3))
    ids = jnp.zeros((1, text["max_length"]), jnp.int32)
    text_inputs: dict[str, Any] = {"text_ids": ids, "text_mask": ids > 0}
    frozen = encoder if encoder and not text["trainable"] else None
    if frozen:
        num_features = PooledTextEncoder(frozen.module, text["pooling"]).num_features
        text_inputs = {"text_features": jnp.zeros((1, num_features))}
    expected = architectures.shapes_of(build(None if frozen else encoder), image, **text_inputs)
    model_folder.check_shapes(path, variables, expected)
    if frozen:
        variables["params"]["text_encoder"] = {"pretrained": frozen.params}
    size, resize_method = config["model"]["image_size"], config.get("resize", "antialiased")
    processor = Processor(tokenizer, size, text["max_length"], resize_method=resize_method)
    return build(encoder), variables, processor


def _open_medclipseg(path, config, variables, tokenizer):
    fields = config["model"]
    text_encoders.check_vocabulary(path / "tokenizer", tokenizer, fields["text"]["vocab_size"])
    if config["encoders_sha256"]:
        variables["params"] |= clip_pair.load_linked(path, config["encoders_sha256"])
    model, size = medclipseg.build(fields), fields["image_size"]
    ids = jnp.zeros((1, fields["max_length"]), jnp.int32)
    expected = architectures.shapes_of(model, jnp.zeros((1, size, size, 3)), ids)
    model_folder.check_shapes(path, variables, expected)
    processor = Processor(tokenizer, size, fields["max_length"], resize_method=fields["resize"])
    return model, variables, processor


def _build_biclip(
    config: Mapping[str, Any], encoder: text_encoders.PretrainedTextEncoder | None
) -> nn.Module:
    fields, image_fields = config["model"], config.get("image_encoder")
    num_members = config.get("ensemble", 1)
    model = biclip.build(
        fields,
        vocab_size=config["vocab_size"],
        pretrained_text_encoder=encoder.module if encoder and num_members == 1 else None,
        pretrained_image_encoder=image_encoders.build(image_fields, fields["dtype"])
        if image_fields
        else None,
    )
    if num_members == 1:
        return model
    shared = PooledTextEncoder(encoder.module, fields["text"]["pooling"]) if encoder else None
    return Ensemble(model, num_members, shared)


def load(path: str | Path) -> Segmenter:
    """Loads a `Segmenter` from a work directory or a model folder.

    Raises:
      UserError: See `load_segmentation_model`.
    """
    return Segmenter(*load_segmentation_model(path))


def load_segmentation_model(path: str | Path) -> tuple[nn.Module, dict[str, Any], Processor]:
    """Loads a model that segments images, see `load_model`.

    Raises:
      UserError: See `load_model`; also for a converted encoder, which does not segment.
    """
    model, variables, processor = load_model(path)
    if not isinstance(model, biclip.BiCLIP | Ensemble | medclipseg.MedCLIPSeg):
        raise UserError(
            f"{path}: found {type(model).__name__}, which does not segment images; give the "
            "work directory of a run, or load it with biclip_jax.load_model"
        )
    return model, variables, processor


def model_path(path: str | Path) -> Path:
    """Returns the model folder of a work directory, or the path itself."""
    inside = Path(path) / "model"
    return inside if inside.is_dir() else Path(path)


def _check_image(image: np.ndarray) -> np.ndarray:
    shapes = "(H, W), (H, W, 1) or (H, W, 3)"
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"image: found {type(image).__name__}; expected a uint8 array {shapes} or a path"
        )
    is_valid = image.ndim in (2, 3) and image.shape[2:] in ((), (1,), (3,))
    if image.dtype != np.uint8 or not is_valid:
        raise ValueError(
            f"image: found {image.dtype} {image.shape}; expected uint8 {shapes}; scale the "
            "intensities to 0..255 and put the channels last"
        )
    return image if image.ndim == 3 else image[..., None]


def _check_prompt(prompt: str) -> None:
    if not isinstance(prompt, str):
        raise ValueError(f'prompt: found {prompt!r}; expected a str, "" for none')
