"""Prepared sets: what is written comes back, once, undamaged, and without TensorFlow."""

import hashlib
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest

from biclip_jax.core.errors import DataError
from biclip_jax.data import opencv_resize
from biclip_jax.data.builders import preparation
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
    written = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    assert prepare("synthetic", **args) == path
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == written
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert [len(open_split(path, split)) for split in SPLITS] == [3, 1, 2]
    image, mask, text = draw_example(2, 1, 32)
    record = open_split(path, "test")[1]
    np.testing.assert_array_equal(record["image"], image)
    np.testing.assert_array_equal(record["mask"], mask)
    assert record["text"] == text and record["id"] == "test_00001"


def test_another_size_or_source_is_another_folder(tmp_path):
    made = fixtures.samples()
    fixtures.plain_csv(tmp_path / "a", made)
    fixtures.plain_csv(tmp_path / "b", [made[0]._replace(text="other words."), *made[1:]])
    sets = {
        prepare("folder", data_dir=tmp_path / "out", image_size=size, source_dir=tmp_path / source)
        for source, size in (("a", 16), ("a", 24), ("b", 16))
    }
    assert len(sets) == 3 and all(path.name.startswith("folder-") for path in sets)


def test_records_carry_the_variants_and_these_make_another_folder(tmp_path):
    made = fixtures.samples()
    source = fixtures.medclipseg(tmp_path / "a", made)
    args = {"data_dir": tmp_path / "out", "image_size": 16, "source_dir": source}
    plain = prepare("folder", **args)
    assert [r["variants"] for r in open_split(plain, "test")] == [{}, {}]
    fixtures.medclipseg_variants(source, made, ("contradictory",))
    path = prepare("folder", **args)
    assert path != plain
    variants = [r["variants"] for r in open_split(path, "test")]
    assert variants == [{"contradictory": f"contradictory: {s.text}"} for s in made[-2:]]
    assert [r["variants"] for r in open_split(path, "train")] == [{}] * 4


def test_records_are_the_resized_files(tmp_path):
    made = fixtures.samples()
    source = fixtures.medvlsm(tmp_path / "source", made)
    path = prepare("kvasir_seg", data_dir=tmp_path, image_size=16, source_dir=source)
    records = [record for split in SPLITS for record in open_split(path, split)]
    for record, sample in zip(records, made, strict=True):
        mask = (sample.mask > 127).astype(np.uint8)[..., None]
        assert (record["id"], record["text"]) == (sample.name, sample.text)
        np.testing.assert_array_equal(record["image"], resize_image(sample.image, 16))
        np.testing.assert_array_equal(record["mask"], resize_mask(mask, 16))
        np.testing.assert_array_equal(record["full_mask"], mask)


def test_the_method_of_resizing_is_part_of_the_folder_s_name_where_it_is_chosen(tmp_path):
    made = fixtures.samples(channels=3)
    source = fixtures.plain_csv(tmp_path / "source", made)
    args = {"data_dir": tmp_path / "out", "image_size": 16, "source_dir": source}
    plain, path = prepare("folder", **args), prepare("folder", **args, resize="opencv")
    assert prepare("folder", **args, resize="antialiased") == plain != path
    for record, sample in zip(open_split(path, "train"), made, strict=False):
        mask = (sample.mask > 127).astype(np.uint8)[..., None]
        np.testing.assert_array_equal(record["image"], opencv_resize.bilinear(sample.image, 16, 16))
        np.testing.assert_array_equal(record["mask"], opencv_resize.nearest(mask, 16, 16))
        np.testing.assert_array_equal(record["full_mask"], mask)
    with pytest.raises(DataError, match="resize: found 'cubic'"):
        prepare("folder", **args, resize="cubic")


def test_a_published_subset_is_a_set_of_its_own(tmp_path):
    made = fixtures.samples()
    source = fixtures.medclipseg(tmp_path / "source", made)
    fixtures.medclipseg_subset(source, [made[1], made[4]], 10)
    args = {"data_dir": tmp_path / "out", "image_size": 16, "source_dir": source}
    path = prepare("folder", **args, percent=10)
    assert path != prepare("folder", **args)
    assert [[r["id"] for r in open_split(path, split)] for split in SPLITS] == [
        ["case_1"],
        ["case_4"],
        ["case_5", "case_6"],
    ]


def test_lvit_languide_and_csv_give_the_same_examples(tmp_path):
    made = fixtures.samples()
    prints = set()
    for write in (fixtures.lvit, fixtures.languide, fixtures.plain_csv):
        source = write(tmp_path / write.__name__, made)
        path = prepare("qata_cov19", data_dir=tmp_path / "out", image_size=16, source_dir=source)
        prints.add(fingerprint(path))
    assert len(prints) == 1


@pytest.mark.parametrize(("colour_at", "channels"), [(None, 1), (6, 3)])
def test_one_channel_only_where_every_picture_is_grey(tmp_path, colour_at, channels):
    made = [s._replace(image=np.repeat(s.image, 3, 2)) for s in fixtures.samples()]
    made[0] = made[0]._replace(image=made[0].image[..., :1])
    if colour_at is not None:
        made[colour_at] = fixtures.samples(channels=3)[colour_at]
    source = fixtures.plain_csv(tmp_path / "source", made)
    path = prepare("folder", data_dir=tmp_path, image_size=16, source_dir=source)
    for split in SPLITS:
        assert all(
            record["image"].shape == (16, 16, channels) for record in open_split(path, split)
        )
    first = open_split(path, "train")[0]["image"]
    np.testing.assert_array_equal(first[..., -1:], resize_image(made[0].image, 16))


def test_dicom_pictures_are_read_and_known_by_their_whole_names(tmp_path):
    made = fixtures.samples()
    source = fixtures.plain_csv(tmp_path / "source", made)
    rows = []
    for number, sample in enumerate(made):
        name = f"1.2.840.{number}"
        fixtures.dicom_file(source / "images" / name, sample.image[..., 0])
        rows.append((sample.split, name, f"mask_{sample.name}.png", sample.text))
    fixtures.table(source / "annotations.csv", ("split", "image", "mask", "text"), rows)
    path = prepare("folder", data_dir=tmp_path, image_size=16, source_dir=source)
    records = [record for split in SPLITS for record in open_split(path, split)]
    assert sorted(r["id"] for r in records) == [f"1.2.840.{i}" for i in range(len(made))]
    for record in records:
        sample = made[int(record["id"].split(".")[-1])]
        np.testing.assert_array_equal(record["image"], resize_image(sample.image, 16))
        assert record["text"] == sample.text


def test_bad_pictures_are_all_named_and_nothing_is_written(tmp_path):
    source = fixtures.plain_csv(tmp_path / "source", fixtures.samples())
    (source / "images/case_1.png").write_bytes(b"\x89PNG")
    write_png(source / "masks/mask_case_6.png", np.zeros((24, 21), np.uint8))
    with pytest.raises(DataError) as caught:
        prepare("folder", data_dir=tmp_path / "out", image_size=16, source_dir=source)
    assert "case_1.png: found a file that cannot be decoded" in str(caught.value)
    assert "case_6.png: found 20 x 24 pixels; expected 21 x 24" in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_interrupted_preparation_does_not_count(tmp_path, monkeypatch):
    def stop(path):
        raise KeyboardInterrupt

    args = {"data_dir": tmp_path, "image_size": 16, "num_examples": SMALL}
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "write_checksums", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare("synthetic", **args)
    assert list(tmp_path.iterdir()) == []
    assert len(open_split(prepare("synthetic", **args), "train")) == 3


def test_damage_is_found_on_reuse(tmp_path):
    args = {"data_dir": tmp_path, "image_size": 16, "num_examples": SMALL}
    path = prepare("synthetic", **args)
    file = next(path.glob("*train*"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match=rf"{re.escape(file.name)}.*delete the folder"):
        prepare("synthetic", **args)
    file.unlink()
    with pytest.raises(DataError, match="found no file"):
        verify(path)
    (path / "checksums.json").unlink()
    with pytest.raises(DataError, match=r"checksums\.json: cannot be read"):
        prepare("synthetic", **args)


@pytest.mark.parametrize(
    ("name", "changed", "field"),
    [
        ("nothing", {}, "name: found 'nothing'"),
        ("folder", {}, "source: found none"),
        ("folder", {"num_examples": SMALL}, "num_examples"),
        ("synthetic", {"source_dir": "x"}, "source: found 'x'"),
        ("synthetic", {"percent": 10}, "percent: found 10"),
        ("synthetic", {"image_size": 0}, "image_size: found 0"),
        ("synthetic", {"num_examples": {"dev": 3}}, "num_examples: found 'dev'"),
        ("synthetic", {"num_examples": {"val": 0}}, "num_examples: found 'val': 0"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, name, changed, field):
    with pytest.raises(DataError, match=field):
        prepare(name, **({"data_dir": tmp_path, "image_size": 16} | changed))


def test_split_is_a_sequence_that_can_be_pickled(tmp_path):
    path = prepare("synthetic", data_dir=tmp_path, image_size=16, num_examples=SMALL)
    split = pickle.loads(pickle.dumps(open_split(path, "train")))
    assert [r["id"] for r in split] == ["train_00000", "train_00001", "train_00002"]
    assert split[np.int64(-1)]["id"] == "train_00002"
    with pytest.raises(IndexError):
        split[3]
    with pytest.raises(DataError, match=r"expected 'dev'"):
        open_split(path, "dev")
    with pytest.raises(DataError, match=r"checksums\.json"):
        open_split(tmp_path, "train")


def test_split_without_examples_is_left_out(tmp_path):
    made = [s for s in fixtures.samples() if s.split == "test"]
    source = fixtures.plain_csv(tmp_path / "source", made)
    path = prepare("folder", data_dir=tmp_path, image_size=16, source_dir=source)
    assert len(open_split(path, "test")) == 2
    with pytest.raises(DataError, match="found the splits test"):
        open_split(path, "train")


def test_neither_tensorflow_nor_an_early_tfds(tmp_path):
    path = prepare("synthetic", data_dir=tmp_path, image_size=16, num_examples=SMALL)
    code = f"""
import sys
from biclip_jax.data.builders.preparation import prepare
from biclip_jax.data.builders.prepared import open_split
assert "tensorflow_datasets" not in sys.modules
prepare("synthetic", data_dir={str(tmp_path)!r}, image_size=24, num_examples={SMALL})
print(open_split({str(path)!r}, "val")[0]["text"])
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == draw_example(1, 0, 16)[2] + "\n"


def test_drawing_is_deterministic_and_differs_by_seed_and_index():
    first, again = draw_example(3, 4, 56), draw_example(3, 4, 56)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert first[2] == again[2] == draw_example(3, 4, 112)[2]
    assert first[0].shape == first[1].shape == (56, 56, 1)
    assert first[0].dtype == first[1].dtype == np.uint8
    assert not np.array_equal(first[0], draw_example(3, 5, 56)[0])
    assert not np.array_equal(first[0], draw_example(4, 4, 56)[0])


def test_sentences_have_the_wording_of_the_field():
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


def test_lesions_lie_in_their_zones_and_can_be_seen():
    for index in range(60):
        image, lesions, zones, meant = draw_lesions(0, index, 56)
        assert len(set(zones)) == len(zones) in (3, 4) and meant.sum() in (1, 2)
        assert lesions.sum(0).max() == 1
        for lesion, zone in zip(lesions, zones, strict=True):
            rows, columns = np.nonzero(lesion)
            assert (columns < 28).all() if zone < 3 else (columns >= 28).all()
            assert zone % 3 == np.digitize(rows.mean() / 56, [0.39, 0.61])
            ring = np.hypot(*(np.indices((56, 56)).T - [rows.mean(), columns.mean()]).T) < 9
            around = ring & ~lesions.any(0)
            assert image[..., 0][lesion].mean() > image[..., 0][around].mean() + 15


def test_meant_lesions_are_drawn_like_the_others_and_all_of_them_score_below_60_dice():
    meant_area, other_area = [], []
    for index in range(500):
        _, lesions, _, meant = draw_lesions(0, index, 56)
        area = lesions.sum((1, 2))
        meant_area += area[meant].tolist()
        other_area += area[~meant].tolist()
    dice = 2 * sum(meant_area) / (2 * sum(meant_area) + sum(other_area))
    assert 0.5 < dice < 0.6
    assert abs(np.mean(meant_area) - np.mean(other_area)) < 0.05 * np.mean(other_area)


def test_a_read_picture_is_what_the_builder_saw(tmp_path):
    made = fixtures.samples(channels=3)
    source = fixtures.plain_csv(tmp_path / "source", made)
    path = prepare("folder", data_dir=tmp_path, image_size=24, source_dir=source)
    image = read_image(source / "images/case_5.png")
    np.testing.assert_array_equal(open_split(path, "test")[0]["image"], resize_image(image, 24))
