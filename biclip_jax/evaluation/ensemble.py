"""Ensembles of independently trained models, each with its own tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from biclip_jax.evaluation import runner

Make = Callable[..., runner.Predict]


def joint_encode(encoders: Sequence[runner.Encode]) -> runner.Encode:
    """Returns prompts -> text fields of all models; those of model k are named "k.text_ids" etc."""

    def encode(prompts: Sequence[str]) -> dict[str, np.ndarray]:
        return {
            f"{k}.{name}": values
            for k, encode_one in enumerate(encoders)
            for name, values in encode_one(prompts).items()
        }

    return encode


def mean_predict_maker(makes: Sequence[Make]) -> Make:
    """Returns corruption -> predict, which averages the probabilities of all models.

    Args:
      makes: corruption -> predict of each model, in the order of `joint_encode`.
    """
    return lambda corruption=None: mean_predict(
        member_predicts([make(corruption) for make in makes])
    )


def member_predicts(predicts: Sequence[runner.Predict]) -> list[runner.Predict]:
    """Returns the prediction function of each model, for a batch with the fields of all models."""
    return [partial(_predict, k, predict) for k, predict in enumerate(predicts)]


def mean_predict(member_predicts: Sequence[runner.Predict]) -> runner.Predict:
    """Returns batch -> mean probability (B, S, S, 1) float32."""

    def predict(batch: Any) -> np.ndarray:
        return np.stack([member(batch) for member in member_predicts]).mean(0)

    return predict


def _predict(k: int, predict: runner.Predict, batch: Any) -> np.ndarray:
    shared = {name: values for name, values in batch.items() if "." not in name}
    prefix = f"{k}."
    fields = {n.removeprefix(prefix): v for n, v in batch.items() if n.startswith(prefix)}
    return predict({**shared, **fields})
