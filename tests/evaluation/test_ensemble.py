"""Ensembles of independently trained models, with stub predictors."""

import numpy as np
import pytest

from biclip_jax.data import pipeline
from biclip_jax.evaluation import ensemble
from biclip_jax.evaluation.robustness import tta
from tests.evaluation import test_runner as stub


def encode_other_vocabulary(prompts):
    """Uses another vocabulary: right is 1, left is 2."""
    fields = stub.encode(prompts)
    swapped = np.array([0, 2, 1], np.int32)[fields["text_ids"]]
    return {**fields, "text_ids": swapped}


def predict_other_vocabulary(batch):
    """Returns half the probability of `stub.predict`, from the other vocabulary."""
    swapped = np.array([0, 2, 1], np.int32)[batch["text_ids"]]
    return stub.predict({**batch, "text_ids": swapped}) / 2


def predicts():
    return ensemble.member_predicts([stub.predict, predict_other_vocabulary])


@pytest.fixture
def encode():
    return ensemble.joint_encode([stub.encode, encode_other_vocabulary])


def test_each_model_gets_its_own_ids_and_probabilities_are_averaged(encode):
    (batch,) = pipeline.eval_batches(stub.RECORDS, encode(stub.TEXTS), batch_size=11)
    expected = stub.predict({**batch, **stub.encode(stub.TEXTS)})
    assert expected.any()
    members = [predict(batch) for predict in predicts()]
    np.testing.assert_array_equal(members[0], expected)
    np.testing.assert_array_equal(members[1], expected / 2)
    mean = ensemble.mean_predict(predicts())(batch)
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, 0.75 * expected, rtol=1e-6)


def test_corruptions_reach_every_model(encode):
    def make(corruption=None):
        return lambda batch: np.full((len(batch["image"]), 2, 2, 1), corruption or 0.0, np.float32)

    (batch,) = pipeline.eval_batches(stub.RECORDS, encode(stub.TEXTS), batch_size=11)
    make_mean = ensemble.mean_predict_maker([make, lambda corruption=None: make(0.5)])
    assert (make_mean()(batch) == 0.25).all()
    assert (make_mean(1.0)(batch) == 0.75).all()


def test_a_flipped_view_gives_every_model_its_swapped_prompt(encode):
    texts = pipeline.text_fields(encode, stub.TEXTS)
    (batch,) = pipeline.eval_batches(stub.RECORDS, texts, batch_size=11)
    views = [tta.VIEWS[name] for name in ("identity", "horizontal_flip")]
    single_texts = pipeline.text_fields(stub.encode, stub.TEXTS)
    (single_batch,) = pipeline.eval_batches(stub.RECORDS, single_texts, batch_size=11)
    expected = tta.predict_views(stub.predict, single_batch, views=views)[..., 0]
    mean = tta.predict_views(ensemble.mean_predict(predicts()), batch, views=views)[..., 0]
    np.testing.assert_allclose(mean, 0.75 * expected, rtol=1e-6)
