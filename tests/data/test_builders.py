"""Prepared datasets: round trips, caching, checksums, and no import of TensorFlow."""

import hashlib
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest

from biclip_jax.core.errors import DataError
from biclip_jax.data import opencv_resize
from biclip_jax.data.builders import preparation, single_file
from biclip_jax.data.builders.drawing import describe, draw_example, draw_lesions
from biclip_jax.data.builders.preparation import prepare
from biclip_jax.data.builders.prepared import open_split, verify
from biclip_jax.data.image_io import read_image, resize_image, resize_mask, write_png
from biclip_jax.data.schema import SPLITS

from . import fixtures

SMALL = {"train": 3, "val": 1, "test": 2}


def fingerprint(path):
    digest = hashlib.sha256()
    for split in SPLITS:
        for record in open_split(path, split):
            digest.update(f"{split}|{record['id']}|{record['text']}".encode())
            for name in ("image", "mask", "full_mask"):
                digest.update(str(record[name].shape).encode() + record[name].tobytes())
    return digest.hexdigest()


def test_synthetic_round_trip_and_idempotence(tmp_path):
    args = {"data_dir": tmp_path, "image_size": 32, "num_examples": SMALL}
    path = prepare("synthetic", **args)
    written = path.stat().st_mtime_ns
    assert prepare("synthetic", **args) == path
    assert path.stat().st_mtime_ns == written
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert [len(open_split(path, split)) for split in SPLITS] == [3, 1, 2]
    image, mask, text = draw_example(2, 1, 32)
    record = open_split(path, "test")[1]
    np.testing.assert_array_equal(record["image"], image)
    np.testing.assert_array_equal(record["mask"], mask)
    assert record["text"] == text and record["id"] == "test_00001"


def test_each_size_and_source_has_its_own_folder(tmp_path):
    samples = fixtures.samples()
    fixtures.plain_csv(tmp_path / "a", samples)
    fixtures.plain_csv(tmp_path / "b", [samples[0]._replace(text="other words."), *samples[1:]])
    folders = {
        prepare("folder", data_dir=tmp_path / "out", image_size=size, source_dir=tmp_path / source)
        for source, size in (("a", 16), ("a", 24), ("b", 16))
    }
    assert len(folders) == 3 and all(path.name.startswith("folder-") for path in folders)


def test_records_contain_the_variants_which_change_the_folder(tmp_path):
    samples = fixtures.samples()
    source = fixtures.medclipseg(tmp_path / "a", samples)
    args = {"data_dir": tmp_path / "out", "image_size": 16, "source_dir": source}
    default_path = prepare("folder", **args)
    assert [r["variants"] for r in open_split(default_path, "test")] == [{}, {}]
    fixtures.medclipseg_variants(source, samples, ("contradictory",))
    path = prepare("folder", **args)
    assert path != default_path
    variants = [r["variants"] for r in open_split(path, "test")]
    assert variants == [{"contradictory": f"contradictory: {s.text}"} for s in samples[-2:]]
    assert [r["variants"] for r in open_split(path, "train")] == [{}] * 4


def test_records_are_the_resized_files(tmp_path):
    samples = fixtures.samples()
    source = fixtures.medvlsm(tmp_path / "source", samples)
    path = prepare("kvasir_seg", data_dir=tmp_path, image_size=16, source_dir=source)
    records = [record for split in SPLITS for record in open_split(path, split)]
    for record, sample in zip(records, samples, strict=True):
        mask = (sample.mask > 127).astype(np.uint8)[..., None]
        assert (record["id"], record["text"]) == (sample.name, sample.text)
        np.testing.assert_array_equal(record["image"], resize_image(sample.image, 16))
        np.testing.assert_array_equal(record["mask"], resize_mask(mask, 16))
        np.testing.assert_array_equal(record["full_mask"], mask)


def test_a_resize_method_other_than_the_default_changes_the_folder(tmp_path):
    samples = fixtures.samples(channels=3)
    source = fixtures.plain_csv(tmp_path / "source", samples)
    args = {"data_dir": tmp_path / "out", "image_size": 16, "source_dir": source}
    default_path, path = prepare("folder", **args), prepare("folder", **args, resize="opencv")
    assert prepare("folder", **args, resize="antialiased") == default_path != path
    for record, sample in zip(open_split(path, "train"), samples, strict=False):
        mask = (sample.mask > 127).astype(np.uint8)[..., None]
        np.testing.assert_array_equal(record["image"], opencv_resize.bilinear(sample.image, 16, 16))
        np.testing.assert_array_equal(record["mask"], opencv_resize.nearest(mask, 16, 16))
        np.testing.assert_array_equal(record["full_mask"], mask)
    with pytest.raises(DataError, match="resize: found 'cubic'"):
        prepare("folder", **args, resize="cubic")


def test_a_published_subset_has_its_own_folder(tmp_path):
    samples = fixtures.samples()
    source = fixtures.medclipseg(tmp_path / "source", samples)
    fixtures.medclipseg_subset(source, [samples[1], samples[4]], 10)
    args = {"data_dir": tmp_path / "out", "image_size": 16, "source_dir": source}
    path = prepare("folder", **args, percent=10)
    assert path != prepare("folder", **args)
    assert [[r["id"] for r in open_split(path, split)] for split in SPLITS] == [
        ["case_1"],
        ["case_4"],
        ["case_5", "case_6"],
    ]


def test_lvit_languide_and_csv_give_the_same_examples(tmp_path):
    samples = fixtures.samples()
    fingerprints = set()
    for write in (fixtures.lvit, fixtures.languide, fixtures.plain_csv):
        source = write(tmp_path / write.__name__, samples)
        path = prepare("qata_cov19", data_dir=tmp_path / "out", image_size=16, source_dir=source)
        fingerprints.add(fingerprint(path))
    assert len(fingerprints) == 1


@pytest.mark.parametrize(("colour_at", "channels"), [(None, 1), (6, 3)])
def test_images_have_one_channel_only_if_all_are_grey(tmp_path, colour_at, channels):
    samples = [s._replace(image=np.repeat(s.image, 3, 2)) for s in fixtures.samples()]
    samples[0] = samples[0]._replace(image=samples[0].image[..., :1])
    if colour_at is not None:
        samples[colour_at] = fixtures.samples(channels=3)[colour_at]
    source = fixtures.plain_csv(tmp_path / "source", samples)
    path = prepare("folder", data_dir=tmp_path, image_size=16, source_dir=source)
    for split in SPLITS:
        assert all(
            record["image"].shape == (16, 16, channels) for record in open_split(path, split)
        )
    first = open_split(path, "train")[0]["image"]
    np.testing.assert_array_equal(first[..., -1:], resize_image(samples[0].image, 16))


def test_dicom_images_are_identified_by_their_full_names(tmp_path):
    samples = fixtures.samples()
    source = fixtures.plain_csv(tmp_path / "source", samples)
    rows = []
    for number, sample in enumerate(samples):
        name = f"1.2.840.{number}"
        fixtures.dicom_file(source / "images" / name, sample.image[..., 0])
        rows.append((sample.split, name, f"mask_{sample.name}.png", sample.text))
    fixtures.table(source / "annotations.csv", ("split", "image", "mask", "text"), rows)
    path = prepare("folder", data_dir=tmp_path, image_size=16, source_dir=source)
    records = [record for split in SPLITS for record in open_split(path, split)]
    assert sorted(r["id"] for r in records) == [f"1.2.840.{i}" for i in range(len(samples))]
    for record in records:
        sample = samples[int(record["id"].split(".")[-1])]
        np.testing.assert_array_equal(record["image"], resize_image(sample.image, 16))
        assert record["text"] == sample.text


def test_error_names_all_bad_images_and_nothing_is_written(tmp_path):
    source = fixtures.plain_csv(tmp_path / "source", fixtures.samples())
    (source / "images/case_1.png").write_bytes(b"\x89PNG")
    write_png(source / "masks/mask_case_6.png", np.zeros((24, 21), np.uint8))
    with pytest.raises(DataError) as caught:
        prepare("folder", data_dir=tmp_path / "out", image_size=16, source_dir=source)
    assert "case_1.png: found a file that cannot be decoded" in str(caught.value)
    assert "case_6.png: found 20 x 24 pixels; expected 21 x 24" in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_interrupted_preparation_leaves_no_folder(tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    source = fixtures.plain_csv(tmp_path / "source", fixtures.samples())
    args = {"data_dir": tmp_path / "out", "image_size": 16}
    for owner, function, name, extra in (
        (preparation, "write_checksums", "folder", {"source_dir": source}),
        (single_file.np, "savez", "synthetic", {"num_examples": SMALL}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, function, stop)
            with pytest.raises(KeyboardInterrupt):
                prepare(name, **args, **extra)
        assert list((tmp_path / "out").iterdir()) == []
    assert len(open_split(prepare("folder", **args, source_dir=source), "train")) == 4
    assert len(open_split(prepare("synthetic", **args, num_examples=SMALL), "train")) == 3


def test_a_damaged_synthetic_file_is_detected_on_reuse(tmp_path):
    args = {"data_dir": tmp_path, "image_size": 16, "num_examples": SMALL}
    path = prepare("synthetic", **args)
    content = path.read_bytes()
    middle = content.index(b"train/image.npy") + 300
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(DataError, match=r"wrong checksum of train/image.npy; delete the file"):
        prepare("synthetic", **args)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"cannot be read.*delete the file"):
        prepare("synthetic", **args)
    path.unlink()
    assert prepare("synthetic", **args).read_bytes() == content


def test_damaged_files_are_detected_on_reuse(tmp_path):
    source = fixtures.plain_csv(tmp_path / "source", fixtures.samples())
    args = {"data_dir": tmp_path / "out", "image_size": 16, "source_dir": source}
    path = prepare("folder", **args)
    file = next(path.glob("*train*"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=rf"{re.escape(file.name)}.*delete the folder"):
        prepare("folder", **args)
    file.unlink()
    with pytest.raises(DataError, match="found no file"):
        verify(path)
    (path / "checksums.json").unlink()
    with pytest.raises(DataError, match=r"checksums\.json: cannot be read"):
        prepare("folder", **args)


@pytest.mark.parametrize(
    ("name", "changed", "field"),
    [
        ("nothing", {}, "name: found 'nothing'"),
        ("folder", {}, "data.source: not set"),
        ("folder", {"num_examples": SMALL}, "num_examples"),
        ("synthetic", {"source_dir": "x"}, "source: found 'x'"),
        ("synthetic", {"percent": 10}, "percent: found 10"),
        ("synthetic", {"image_size": 0}, "image_size: found 0"),
        ("synthetic", {"num_examples": {"dev": 3}}, "num_examples: found 'dev'"),
        ("synthetic", {"num_examples": {"val": 0}}, "num_examples: found 'val': 0"),
    ],
)
def test_rejects_invalid_arguments(tmp_path, name, changed, field):
    with pytest.raises(DataError, match=field):
        prepare(name, **({"data_dir": tmp_path, "image_size": 16} | changed))


def test_split_is_a_sequence_that_can_be_pickled(tmp_path):
    path = prepare("synthetic", data_dir=tmp_path, image_size=16, num_examples=SMALL)
    split = pickle.loads(pickle.dumps(open_split(path, "train")))
    assert [r["id"] for r in split] == ["train_00000", "train_00001", "train_00002"]
    assert split[np.int64(-1)]["id"] == "train_00002"
    with pytest.raises(IndexError):
        split[3]
    with pytest.raises(DataError, match=r"found the split 'dev'; expected one of"):
        open_split(path, "dev")
    with pytest.raises(DataError, match=r"checksums\.json"):
        open_split(tmp_path, "train")


def test_split_without_examples_is_left_out(tmp_path):
    samples = [s for s in fixtures.samples() if s.split == "test"]
    source = fixtures.plain_csv(tmp_path / "source", samples)
    path = prepare("folder", data_dir=tmp_path, image_size=16, source_dir=source)
    assert len(open_split(path, "test")) == 2
    with pytest.raises(DataError, match="found the splits test"):
        open_split(path, "train")


def test_imports_no_tensorflow_and_tfds_only_when_needed(tmp_path):
    source = fixtures.plain_csv(tmp_path / "source", fixtures.samples())
    path = prepare("folder", data_dir=tmp_path, image_size=16, source_dir=source)
    code = f"""
import sys
from biclip_jax.data.builders.preparation import prepare
from biclip_jax.data.builders.prepared import open_split
synthetic = prepare("synthetic", data_dir={str(tmp_path)!r}, image_size=24, num_examples={SMALL})
print(open_split(synthetic, "val")[0]["text"])
assert "tensorflow_datasets" not in sys.modules
prepare("folder", data_dir={str(tmp_path)!r}, image_size=24, source_dir={str(source)!r})
print(open_split({str(path)!r}, "val")[0]["id"])
assert "tensorflow_datasets" in sys.modules and "tensorflow" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    validation_id = open_split(path, "val")[0]["id"]
    assert result.stdout == f"{draw_example(1, 0, 24)[2]}\n{validation_id}\n"


def test_drawing_is_deterministic_and_differs_by_seed_and_index():
    first, second = draw_example(3, 4, 56), draw_example(3, 4, 56)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    assert first[2] == second[2] == draw_example(3, 4, 112)[2]
    assert first[0].shape == first[1].shape == (56, 56, 1)
    assert first[0].dtype == first[1].dtype == np.uint8
    assert not np.array_equal(first[0], draw_example(3, 5, 56)[0])
    assert not np.array_equal(first[0], draw_example(4, 4, 56)[0])


def test_prompts_have_the_wording_of_qata():
    left, right = 0, 3
    assert describe(np.array([left + 2])) == (
        "unilateral pulmonary infection, one infected area, lower left lung."
    )
    assert describe(np.array([right + 2, left + 0])) == (
        "bilateral pulmonary infection, two infected areas, upper left lung and lower right lung."
    )
    assert describe(np.array([left + 2, left + 0])) == (
        "unilateral pulmonary infection, two infected areas, upper lower left lung."
    )


def test_lesions_are_in_their_zones_and_visible():
    for index in range(60):
        image, lesions, zones, is_target = draw_lesions(0, index, 56)
        assert len(set(zones)) == len(zones) in (3, 4) and is_target.sum() in (1, 2)
        assert lesions.sum(0).max() == 1
        for lesion, zone in zip(lesions, zones, strict=True):
            rows, columns = np.nonzero(lesion)
            assert (columns < 28).all() if zone < 3 else (columns >= 28).all()
            assert zone % 3 == np.digitize(rows.mean() / 56, [0.39, 0.61])
            ring = np.hypot(*(np.indices((56, 56)).T - [rows.mean(), columns.mean()]).T) < 9
            background = ring & ~lesions.any(0)
            assert image[..., 0][lesion].mean() > image[..., 0][background].mean() + 15


def test_targets_look_like_other_lesions_and_segmenting_all_scores_below_60_dice():
    target_area, other_area = [], []
    for index in range(500):
        _, lesions, _, is_target = draw_lesions(0, index, 56)
        area = lesions.sum((1, 2))
        target_area += area[is_target].tolist()
        other_area += area[~is_target].tolist()
    dice = 2 * sum(target_area) / (2 * sum(target_area) + sum(other_area))
    assert 0.5 < dice < 0.6
    assert abs(np.mean(target_area) - np.mean(other_area)) < 0.05 * np.mean(other_area)


def test_read_image_gives_the_image_of_the_builder(tmp_path):
    samples = fixtures.samples(channels=3)
    source = fixtures.plain_csv(tmp_path / "source", samples)
    path = prepare("folder", data_dir=tmp_path, image_size=24, source_dir=source)
    image = read_image(source / "images/case_5.png")
    np.testing.assert_array_equal(open_split(path, "test")[0]["image"], resize_image(image, 24))
