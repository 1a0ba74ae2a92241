"""Models that were trained apart as one, with predictors whose answers are known."""

import numpy as np
import pytest

from biclip_jax.data import pipeline
from biclip_jax.evaluation import ensemble
from biclip_jax.evaluation.robustness import tta
from tests.evaluation import test_runner as known


def encode_otherwise(prompts):
    """Another vocabulary: right is 1, left is 2."""
    fields = known.encode(prompts)
    swapped = np.array([0, 2, 1], np.int32)[fields["text_ids"]]
    return {**fields, "text_ids": swapped}


def predict_otherwise(batch):
    """What `known.predict` says, half as sure, out of the other vocabulary."""
    swapped = np.array([0, 2, 1], np.int32)[batch["text_ids"]]
    return known.predict({**batch, "text_ids": swapped}) / 2


def predicts():
    return ensemble.member_predicts([known.predict, predict_otherwise])


@pytest.fixture
def encode():
    return ensemble.joint_encode([known.encode, encode_otherwise])


def test_each_model_reads_its_own_words_and_the_mean_answers(encode):
    (batch,) = pipeline.eval_batches(known.RECORDS, encode(known.TEXTS), batch_size=11)
    expected = known.predict({**batch, **known.encode(known.TEXTS)})
    assert expected.any()
    own = [predict(batch) for predict in predicts()]
    np.testing.assert_array_equal(own[0], expected)
    np.testing.assert_array_equal(own[1], expected / 2)
    found = ensemble.mean_predict(predicts())(batch)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, 0.75 * expected, rtol=1e-6)


def test_damage_reaches_every_model(encode):
    def make(corruption=None):
        return lambda batch: np.full((len(batch["image"]), 2, 2, 1), corruption or 0.0, np.float32)

    (batch,) = pipeline.eval_batches(known.RECORDS, encode(known.TEXTS), batch_size=11)
    make_both = ensemble.mean_predict_maker([make, lambda corruption=None: make(0.5)])
    assert (make_both()(batch) == 0.25).all()
    assert (make_both(1.0)(batch) == 0.75).all()


def test_a_mirrored_view_gives_every_model_its_mirrored_sentence(encode):
    texts = pipeline.text_fields(encode, known.TEXTS)
    (batch,) = pipeline.eval_batches(known.RECORDS, texts, batch_size=11)
    views = [tta.VIEWS[name] for name in ("identity", "horizontal_flip")]
    own = pipeline.text_fields(known.encode, known.TEXTS)
    (plain,) = pipeline.eval_batches(known.RECORDS, own, batch_size=11)
    expected = tta.predict_views(known.predict, plain, views=views)[..., 0]
    found = tta.predict_views(ensemble.mean_predict(predicts()), batch, views=views)[..., 0]
    np.testing.assert_allclose(found, 0.75 * expected, rtol=1e-6)
