"""Models that were trained apart as one: each reads its own words, the mean of them answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from biclip_jax.evaluation import runner

Make = Callable[..., runner.Predict]


def joint_encode(encoders: Sequence[runner.Encode]) -> runner.Encode:
    """Sentences as every model takes them: model k's fields are named "k.text_ids" and so on."""

    def encode(prompts: Sequence[str]) -> dict[str, np.ndarray]:
        return {
            f"{k}.{name}": values
            for k, own in enumerate(encoders)
            for name, values in own(prompts).items()
        }

    return encode


def mean_predict_maker(makes: Sequence[Make]) -> Make:
    """Damage -> the mean of all models' probabilities, as a function of a batch.

    Args:
      makes: of each model, in the order of `joint_encode`; see `runner.make_predict`.
    """
    return lambda corruption=None: mean_predict(
        member_predicts([make(corruption) for make in makes])
    )


def member_predicts(own: Sequence[runner.Predict]) -> list[runner.Predict]:
    """Each model by itself on a batch with the fields of all."""
    return [partial(_predict, k, predict) for k, predict in enumerate(own)]


def mean_predict(member_predicts: Sequence[runner.Predict]) -> runner.Predict:
    """Batch -> the mean probability (B, S, S, 1) float32."""

    def predict(batch: Any) -> np.ndarray:
        return np.stack([one(batch) for one in member_predicts]).mean(0)

    return predict


def _predict(k: int, predict: runner.Predict, batch: Any) -> np.ndarray:
    shared = {name: values for name, values in batch.items() if "." not in name}
    prefix = f"{k}."
    own = {n.removeprefix(prefix): v for n, v in batch.items() if n.startswith(prefix)}
    return predict({**shared, **own})
