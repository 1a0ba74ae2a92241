"""Batches: epochs, order by seed, resuming, process shards, padding."""

from functools import partial

import numpy as np
import pytest
from PIL import Image

from biclip_jax.core.errors import UserError
from biclip_jax.data import label_subset, pipeline, text

NUM = 10


@pytest.fixture(scope="module")
def split():
    records = [
        {
            "id": str(i),
            "image": np.full((2, 2, 1), i, np.uint8),
            "mask": np.full((2, 2, 1), i % 2, np.uint8),
            "text": f"lesion {i} left",
        }
        for i in range(NUM)
    ]
    prompts = [record["text"] for record in records]
    tokenizer = text.build_tokenizer(prompts)
    return records, pipeline.text_fields(
        partial(text.encode_fields, tokenizer, max_length=6), prompts
    )


def splits_of(config):
    data = config.data.to_dict()
    return pipeline.open_splits(pipeline.prepare(data, 56), data)


def test_config_fields_resize_and_percent_reach_the_builder(smoke_config, monkeypatch):
    calls = []
    monkeypatch.setattr(
        pipeline.preparation, "prepare", lambda name, **kwargs: calls.append(kwargs)
    )
    monkeypatch.setattr(pipeline, "open_split", lambda prepared, split: [])
    smoke_config.data.resize, smoke_config.data.percent = "opencv", 25
    smoke_config.data.unlabelled = "elsewhere"
    data = smoke_config.data.to_dict()
    pipeline.open_unlabelled(pipeline.prepare(data, 56), data, 56)
    # The folder of unlabelled images has no published subset.
    assert [call["resize"] for call in calls] == ["opencv", "opencv"]
    assert [call["percent"] for call in calls] == [25, 100]


def batches(records, texts, start=0, **options):
    rows = pipeline.training_order(len(records), **options)
    return pipeline.train_batches(records, texts, rows, start)


def indices(iterator, count):
    return [next(iterator)["index"].tolist() for _ in range(count)]


def test_each_epoch_has_every_record_once_in_another_order(split):
    stream = np.concatenate(indices(batches(*split, batch_size=4, seed=1), 5))
    first, second = stream[:NUM].tolist(), stream[NUM:].tolist()
    assert sorted(first) == sorted(second) == list(range(NUM))
    assert first != second


def test_order_depends_on_the_seed(split):
    runs = [indices(batches(*split, batch_size=4, seed=s), 5) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("stop", [1, 2, 3, 7])
def test_resumes_with_the_same_batches(split, stop):
    full = indices(batches(*split, batch_size=4, seed=1), stop + 4)
    resumed = batches(*split, stop, batch_size=4, seed=1)
    assert indices(resumed, 4) == full[stop:]


def test_batches_without_grain_are_the_same(split, monkeypatch):
    prefetched = batches(*split, 2, batch_size=4, seed=1)
    monkeypatch.setattr(pipeline.importlib.util, "find_spec", lambda name: None)
    plain = batches(*split, 2, batch_size=4, seed=1)
    assert isinstance(plain, map)
    for _ in range(4):
        first, second = next(prefetched), next(plain)
        assert first.keys() == second.keys()
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])


def test_fields_of_a_row_belong_to_the_same_record(split):
    records, texts = split
    batch = next(batches(records, texts, batch_size=4, seed=1))
    for row, index in enumerate(batch["index"]):
        assert (batch["image"][row] == index).all()
        assert (batch["mask"][row] == index % 2).all()
        np.testing.assert_array_equal(batch["text_ids"][row], texts["text_ids"][index])
    assert batch["row"].tolist() == [0, 1, 2, 3]


def test_batches_contain_the_swapped_prompt(split):
    _, texts = split
    assert texts["swapped_text_ids"].shape == texts["text_ids"].shape
    # "right" occurs in no caption, so the swapped side is not in the vocabulary.
    assert (texts["swapped_text_ids"] == 1).any()


def test_processes_split_every_global_batch(split):
    full = batches(*split, batch_size=4, seed=1)
    shards = [
        batches(*split, batch_size=4, seed=1, process_index=p, process_count=2) for p in (0, 1)
    ]
    for _ in range(4):
        batch, parts = next(full), [next(shard) for shard in shards]
        for name in ("index", "row", "image"):
            np.testing.assert_array_equal(batch[name], np.concatenate([p[name] for p in parts]))


@pytest.mark.parametrize(("batch_size", "count"), [(4, 1), (4, 2), (16, 2), (5, 1)])
def test_evaluation_counts_every_record_once(split, batch_size, count):
    per_process = [
        list(
            pipeline.eval_batches(
                *split, batch_size=batch_size, process_index=p, process_count=count
            )
        )
        for p in range(count)
    ]
    assert len({len(batches) for batches in per_process}) == 1
    batches = [batch for batches in per_process for batch in batches]
    assert {batch["image"].shape[0] for batch in batches} == {batch_size // count}
    observed = np.concatenate([batch["index"][batch["valid"]] for batch in batches])
    assert sorted(observed.tolist()) == list(range(NUM))


def test_text_condition_empty_gives_empty_prompts(smoke_config):
    with smoke_config.unlocked():
        smoke_config.data.text_condition = "empty"
    splits = splits_of(smoke_config)
    assert {len(records) for records in splits.values()} == {32, 8}
    assert {record["text"] for records in splits.values() for record in records} == {""}


def test_label_fraction_reduces_only_the_training_split(smoke_config):
    full = splits_of(smoke_config)
    smoke_config.data.label_fraction = 0.25
    subset = splits_of(smoke_config)
    assert [len(subset[split]) for split in ("train", "val", "test")] == [8, 8, 8]
    ids = [record["id"] for record in full["train"]]
    expected = [ids[row] for row in label_subset.select_rows(ids, 0.25)]
    assert [record["id"] for record in subset["train"]] == expected


def test_reading_from_disk_gives_the_same_records_as_memory(smoke_config):
    in_memory = splits_of(smoke_config)["val"]
    smoke_config.data.in_memory = False
    on_disk = splits_of(smoke_config)["val"]
    for a, b in zip(in_memory, on_disk, strict=True):
        assert a["text"] == b["text"]
        np.testing.assert_array_equal(a["image"], b["image"])


HALF_LABELLED = {"batch_size": 4, "seed": 1, "num_labelled": 6, "labelled_rows": 2}


def test_labelled_records_come_first(split):
    records, texts = split
    iterator = batches(records, texts, **HALF_LABELLED)
    for batch in (next(iterator) for _ in range(8)):
        assert batch["labelled"].tolist() == [True, True, False, False]
        assert (batch["index"][:2] < 6).all()
        assert (batch["index"][2:] >= 6).all()
        for row, index in enumerate(batch["index"]):
            np.testing.assert_array_equal(batch["mask"][row], records[index]["mask"])
            assert (batch["image"][row] == index).all()
            np.testing.assert_array_equal(batch["text_ids"][row], texts["text_ids"][index])


def test_all_rows_are_labelled_by_default(split):
    batch = next(batches(*split, batch_size=4, seed=1))
    assert batch["labelled"].tolist() == [True] * 4
    assert batch["labelled"].dtype == bool


def test_labelled_and_unlabelled_records_have_separate_epochs(split):
    stream = np.array(indices(batches(*split, **HALF_LABELLED), 12))
    labelled, unlabelled = stream[:, :2].ravel(), stream[:, 2:].ravel()
    for epoch in labelled.reshape(-1, 6):
        assert sorted(epoch) == list(range(6))
    for epoch in unlabelled.reshape(-1, 4):
        assert sorted(epoch) == [6, 7, 8, 9]
    assert len({tuple(epoch) for epoch in unlabelled.reshape(-1, 4)}) > 1
    assert len({tuple(epoch) for epoch in labelled.reshape(-1, 6)}) > 1


def test_order_of_labelled_records_does_not_depend_on_the_others(split):
    with_unlabelled = np.array(indices(batches(*split, **HALF_LABELLED), 5))[:, :2]
    records, texts = split
    labelled_only = records[:6], {name: values[:6] for name, values in texts.items()}
    expected = np.array(indices(batches(*labelled_only, batch_size=2, seed=1), 5))
    np.testing.assert_array_equal(with_unlabelled, expected)


@pytest.mark.parametrize("stop", [1, 3, 7])
def test_resumes_with_labelled_and_unlabelled_records(split, stop):
    full = indices(batches(*split, **HALF_LABELLED), stop + 4)
    assert indices(batches(*split, stop, **HALF_LABELLED), 4) == full[stop:]


def test_ensemble_members_have_the_orders_of_their_seeds(split):
    stacked = next(batches(*split, batch_size=4, seed=1, num_members=3))
    for k in range(3):
        single = next(batches(*split, batch_size=4, seed=1 + k))
        assert stacked.keys() == single.keys()
        for name, values in single.items():
            np.testing.assert_array_equal(stacked[name][k], values)


def test_stack_split_is_indexed_by_record(split):
    records, texts = split
    data = pipeline.stack_split(records, texts)
    assert data["image"].shape[0] == data["mask"].shape[0] == len(records)
    np.testing.assert_array_equal(data["image"][3], records[3]["image"])
    assert data.keys() == {"image", "mask", *texts}


def test_processes_split_the_labelled_rows_by_position(split):
    full = next(batches(*split, **HALF_LABELLED))
    parts = [
        next(batches(*split, **HALF_LABELLED, process_index=p, process_count=2)) for p in (0, 1)
    ]
    for name in ("index", "labelled", "mask"):
        np.testing.assert_array_equal(full[name], np.concatenate([p[name] for p in parts]))
    assert parts[0]["labelled"].all()
    assert not parts[1]["labelled"].any()


def unlabelled_of(config):
    data = config.data.to_dict()
    return pipeline.open_unlabelled(pipeline.prepare(data, 56), data, 56)


def test_unlabelled_rest_is_the_complement_of_the_label_subset(smoke_config):
    all_ids = [record["id"] for record in splits_of(smoke_config)["train"]]
    assert unlabelled_of(smoke_config) == []
    smoke_config.data.label_fraction, smoke_config.data.unlabelled = 0.25, "rest"
    labelled = [record["id"] for record in splits_of(smoke_config)["train"]]
    rest = [record["id"] for record in unlabelled_of(smoke_config)]
    assert len(labelled) == 8
    assert sorted(labelled + rest) == sorted(all_ids)
    for record in unlabelled_of(smoke_config):
        assert record["mask"].shape == (56, 56, 1) and not record["mask"].any()
        assert not record["full_mask"].any()
    smoke_config.data.text_condition = "empty"
    assert {record["text"] for record in unlabelled_of(smoke_config)} == {""}


def test_rejects_an_empty_rest_naming_the_field(smoke_config):
    smoke_config.data.unlabelled = "rest"
    with pytest.raises(UserError, match=r"unlabelled: 'rest', .* 1\.0 leaves no"):
        unlabelled_of(smoke_config)


def test_unlabelled_images_may_be_in_another_folder(smoke_config, tmp_path):
    """They need no masks, regardless of the dataset's name, layout and prompt."""
    for i in range(4):
        pixels = np.full((20, 30), 40 * i, np.uint8)
        pixels[5:9, 5:9] = 255 - 40 * i
        Image.fromarray(pixels).save(tmp_path / f"image_{i}.png")
    lines = ["image,text", *(f"image_{i}.png,left lung {i}" for i in range(4))]
    (tmp_path / "annotations.csv").write_text("\n".join(lines) + "\n")
    with smoke_config.unlocked():
        smoke_config.data.unlabelled = str(tmp_path)
    records = unlabelled_of(smoke_config)
    assert [record["id"] for record in records] == [f"image_{i}" for i in range(4)]
    assert records[0]["image"].shape == (56, 56, 1)
    assert [record["text"] for record in records] == [f"left lung {i}" for i in range(4)]
    assert not any(record["mask"].any() or record["full_mask"].any() for record in records)
    assert records[0]["full_mask"].shape == (20, 30, 1)


@pytest.mark.parametrize(("labelled", "unlabelled"), [(1, 3), (3, 1), (1, 1)])
def test_grey_and_colour_images_can_be_in_one_batch(smoke_config, labelled, unlabelled):
    record = splits_of(smoke_config)["train"][0]
    grey = record["image"][..., :1]
    kinds = [{**record, "image": np.repeat(grey, c, -1)} for c in (labelled, unlabelled)]
    images = [r["image"] for r in pipeline.join_records(kinds[:1], kinds[1:])]
    channels = max(labelled, unlabelled)
    assert [image.shape for image in images] == [(56, 56, channels)] * 2
    assert all((image == grey).all() for image in images)
    assert pipeline.join_records(kinds, []) is kinds
