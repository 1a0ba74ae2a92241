"""All layouts give the same examples, and errors name every problem."""

import json
import os
import shutil

import pytest

from biclip_jax.core.errors import DataError
from biclip_jax.data.layouts import (
    LAYOUTS,
    find_layout,
    read_layout,
    read_unlabelled,
    read_variants,
)

from . import fixtures

WRITERS = {
    "lvit": fixtures.lvit,
    "languide": fixtures.languide,
    "medclipseg": fixtures.medclipseg,
    "medvlsm": fixtures.medvlsm,
    "csv": fixtures.plain_csv,
}


def error_message(root, *args):
    with pytest.raises(DataError) as caught:
        read_layout(root, *args)
    return str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_detected_and_read_in_order(tmp_path, layout):
    samples = fixtures.samples()
    WRITERS[layout](tmp_path, samples)
    assert find_layout(tmp_path) == layout
    examples = read_layout(tmp_path)
    assert [(e.split, e.id, e.text) for e in examples] == [
        (s.split, s.name, s.text) for s in samples
    ]
    for example in examples:
        assert os.path.isfile(example.image_path) and os.path.isfile(example.mask_path)
        assert os.path.basename(example.image_path) == f"{example.id}.png"


@pytest.mark.parametrize("books", ["inside", "root", "joint"])
@pytest.mark.parametrize("prefix", ["mask_", ""])
def test_lvit_workbook_locations_and_mask_names(tmp_path, books, prefix):
    samples = fixtures.samples()
    examples = read_layout(fixtures.lvit(tmp_path, samples, books, prefix))
    assert [(e.split, e.id, e.text) for e in examples] == [
        (s.split, s.name, s.text) for s in samples
    ]
    assert os.path.basename(examples[0].mask_path) == f"{prefix}case_0.png"


def test_medclipseg_without_ground_truth_and_with_the_plain_test_book(tmp_path):
    root = fixtures.medclipseg(tmp_path, fixtures.samples(), with_ground_truth=False)
    book = root / "Prompts_Folder/Test_text_original.xlsx"
    book.rename(book.with_name("Test_text.xlsx"))
    examples = read_layout(root)
    assert len(examples) == 7
    assert all(os.path.basename(e.mask_path) == f"{e.id}.png" for e in examples)


def test_medvlsm_prompts(tmp_path):
    root = fixtures.medvlsm(tmp_path, fixtures.samples())
    assert {e.text for e in read_layout(root, prompt="p1")} == {"polyp"}
    assert {e.text for e in read_layout(root, prompt="p0")} == {""}
    assert "train.json entry 0" in error_message(root, None, "p7")
    (root / "anns/val.json").write_text("{")
    assert "val.json" in error_message(root)
    (root / "anns/val.json").write_text(json.dumps({"a": 1}))
    assert "val.json: found a dict" in error_message(root)


def test_csv_with_another_name_and_paths_relative_to_the_root(tmp_path):
    samples = fixtures.samples()
    root = fixtures.plain_csv(tmp_path, samples, "my.csv")
    rows = [(s.split, f"images/{s.name}.png", f"masks/mask_{s.name}.png", None) for s in samples]
    fixtures.table(root / "my.csv", (" Split", "IMAGE ", "Mask", "text"), rows)
    examples = read_layout(root)
    assert [e.id for e in examples] == [s.name for s in samples]
    assert {e.text for e in examples} == {""}


def test_names_match_without_or_with_another_suffix(tmp_path):
    samples = fixtures.samples()
    root = fixtures.lvit(tmp_path, samples)
    suffixes = ["", ".jpg", "", ".tif"]
    rows = [(f"mask_{s.name}{x}", s.text) for s, x in zip(samples[:4], suffixes, strict=True)]
    fixtures.workbook(root / "Train_Folder/Train_text.xlsx", ("Image", "Description"), rows)
    assert [e.id for e in read_layout(root)] == [s.name for s in samples]


def test_rejects_no_layout_several_layouts_unknown_layout_no_folder(tmp_path):
    with pytest.raises(DataError, match=r"no known layout.*labelcol.*GTs.*anns"):
        find_layout(tmp_path)
    fixtures.lvit(tmp_path, fixtures.samples())
    fixtures.plain_csv(tmp_path, fixtures.samples())
    with pytest.raises(DataError, match=r"several layouts \(lvit, csv\)"):
        find_layout(tmp_path)
    assert len(read_layout(tmp_path, "lvit")) == 7
    assert "expected one of lvit" in error_message(tmp_path, "dicom")
    assert "prompt: found 'p1'" in error_message(tmp_path, "lvit", "p1")
    assert "no such folder" in error_message(tmp_path / "none")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_mask_and_missing_image_are_reported(tmp_path, layout):
    root = WRITERS[layout](tmp_path, fixtures.samples())
    examples = read_layout(root)
    os.remove(examples[1].mask_path)
    os.remove(examples[5].image_path)
    text = error_message(root)
    assert f"{examples[1].mask_path.rsplit('/', 1)[1]}: mask not found" in text
    assert "case_5.png: image not found" in text
    assert "2 problem(s)" in text


@pytest.mark.parametrize("layout", ["lvit", "languide", "medclipseg"])
def test_image_without_a_prompt_is_reported(tmp_path, layout):
    samples = fixtures.samples()
    root = WRITERS[layout](tmp_path, samples)
    folder = os.path.dirname(read_layout(root)[0].image_path)
    fixtures.save(root / folder / "stray.png", samples[0].image)
    (root / folder / "Thumbs.db").write_bytes(b"")
    text = error_message(root)
    assert "stray.png: image without a text prompt" in text and "1 problem(s)" in text


def test_duplicate_ids_within_and_across_splits_are_reported(tmp_path):
    samples = fixtures.samples()
    repeats = [samples[0], samples[1]._replace(split="test")]
    text = error_message(fixtures.plain_csv(tmp_path, samples + repeats))
    assert "case_0.png: found id 'case_0' a second time in annotations.csv row 9 (train)" in text
    assert "case_1.png: found id 'case_1' a second time" in text
    assert "(test), first in annotations.csv row 3 (train)" in text


def test_rejects_several_tables_and_a_file_instead_of_a_folder(tmp_path):
    for name in ("b.csv", "c.csv"):
        (tmp_path / name).write_text("split,image,mask,text\n")
    assert "found 2 CSV files (b.csv, c.csv), none of them annotations.csv" in error_message(
        tmp_path
    )
    assert "found a file; expected the folder" in error_message(tmp_path / "b.csv")


def test_rejects_columns_separated_by_semicolons(tmp_path):
    (tmp_path / "annotations.csv").write_text("split;image;mask;text\ntrain;a.png;b.png;c\n")
    assert "expected a column 'split'; separate columns by commas" in error_message(tmp_path)


def test_missing_file_is_reported_with_the_path_from_the_table(tmp_path):
    row = ("train", "images/p.png", "masks/p.png", "a")
    fixtures.table(tmp_path / "annotations.csv", ("split", "image", "mask", "text"), [row])
    text = error_message(tmp_path)
    for name in row[1:3]:
        assert f"{tmp_path / name}: " in text and f"{name.split('/')[0]}/{name}" not in text


def test_missing_column_suggests_the_nearest(tmp_path):
    root = fixtures.lvit(tmp_path, fixtures.samples())
    book = root / "Val_Folder/Val_text.xlsx"
    fixtures.workbook(book, ("Images", "Description"), [("mask_case_4.png", "a")])
    text = error_message(root)
    assert "Val_text.xlsx: found columns Images, Description; expected a column 'Image'" in text
    assert "rename 'Images'" in text and "1 problem(s)" in text


def test_rejects_missing_empty_and_damaged_tables(tmp_path):
    root = fixtures.lvit(tmp_path, fixtures.samples())
    (root / "Train_Folder/Train_text.xlsx").write_bytes(b"not a workbook")
    (root / "Test_Folder/Test_text.xlsx").unlink()
    text = error_message(root)
    assert "Train_text.xlsx: found a file that cannot be read" in text
    assert "Test_text.xlsx: found no such file" in text
    assert "2 problem(s)" in text
    empty = tmp_path / "empty"
    fixtures.table(empty / "annotations.csv", ("split", "image", "mask", "text"), [])
    assert "found no annotated image" in error_message(empty)
    (empty / "annotations.csv").write_bytes(b"")
    assert "annotations.csv: found no columns" in error_message(empty)
    (empty / "annotations.csv").write_bytes(b"\xff\xfe\x00")
    assert "annotations.csv: found a file that cannot be read" in error_message(empty)


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "C:\\a.png", "b\\..\\a.png", ""])
def test_rejects_unsafe_and_empty_names(tmp_path, name):
    samples = fixtures.samples()
    root = fixtures.plain_csv(tmp_path, samples)
    rows = [("train", name, "mask_case_0.png", "a"), ("nowhere", "case_1.png", "m.png", "b")]
    fixtures.table(root / "annotations.csv", ("split", "image", "mask", "text"), rows)
    text = error_message(root)
    assert "annotations.csv row 2: found " + ("unsafe image" if name else "no image") in text
    assert "annotations.csv row 3: found split 'nowhere'" in text


def test_error_lists_twenty_problems_and_their_number(tmp_path):
    rows = [("train", f"{i}.png", f"{i}.png", "") for i in range(15)]
    fixtures.table(tmp_path / "annotations.csv", ("split", "image", "mask", "text"), rows)
    text = error_message(tmp_path)
    assert "30 problem(s)" in text and text.count("not found") == 20
    assert text.endswith("... and 10 more")


def test_variants_of_medclipseg_are_grouped_by_image(tmp_path):
    samples = fixtures.samples()
    root = fixtures.medclipseg(tmp_path, samples)
    assert read_variants(root, read_layout(root)) == {}
    fixtures.medclipseg_variants(root, samples, ("contradictory", "underdescriptive"))
    examples = read_layout(root)
    assert [e.text for e in examples] == [s.text for s in samples]
    assert read_variants(root, examples) == {
        s.name: {n: f"{n}: {s.text}" for n in ("contradictory", "underdescriptive")}
        for s in samples[-2:]
    }


def test_published_subset_reduces_train_and_val(tmp_path):
    samples = fixtures.samples()
    root = fixtures.medclipseg(tmp_path, samples)
    fixtures.medclipseg_subset(root, [samples[2], samples[4]], 25)
    fixtures.medclipseg_variants(root, samples, ("contradictory",))
    rows = [(f"{s.name}.png", "no lesion.") for s in samples[:4]]
    book = root / "Prompts_Folder/Train_text_contradictory.xlsx"
    fixtures.workbook(book, ("Image", "Description"), rows)
    examples = read_layout(root, percent=25)
    expected = [samples[2], *samples[4:]]
    assert [(e.split, e.id, e.text) for e in examples] == [
        (s.split, s.name, s.text) for s in expected
    ]
    assert set(read_variants(root, examples, percent=25)) == {"case_2", "case_5", "case_6"}
    assert len(read_layout(root, percent=100)) == len(samples)


def test_rejects_missing_subsets(tmp_path):
    samples = fixtures.samples()
    root = fixtures.medclipseg(tmp_path / "a", samples)
    text = error_message(root, None, None, 10)
    assert "Train_text_10.xlsx: found no such file" in text
    assert "Val_text_10.xlsx: found no such file" in text and "2 problem(s)" in text
    assert "percent: found 30; expected one of 10, 25, 50, 100" in error_message(
        root, None, None, 30
    )
    other = fixtures.lvit(tmp_path / "b", samples)
    assert "percent: found 10; expected 100, as the lvit layout" in error_message(
        other, None, None, 10
    )


def test_test_split_of_a_subset_is_complete_and_its_images_need_prompts(tmp_path):
    samples = fixtures.samples()
    root = fixtures.medclipseg(tmp_path, samples)
    fixtures.medclipseg_subset(root, [samples[2], samples[4]], 50)
    fixtures.save(root / "Test_Folder/img/stray.png", samples[0].image)
    text = error_message(root, None, None, 50)
    assert "stray.png: image without a text prompt" in text and "1 problem(s)" in text


def test_variants_of_csv_are_columns_and_empty_cells_are_skipped(tmp_path):
    samples = fixtures.samples()
    root = fixtures.plain_csv(tmp_path, samples)
    header = ("split", "image", "mask", "text", "Contradictory")
    rows = [(s.split, f"{s.name}.png", f"mask_{s.name}.png", s.text, "") for s in samples]
    rows[-1] = (*rows[-1][:4], "no lesion.")
    fixtures.table(root / "annotations.csv", header, rows)
    variants = read_variants(root, read_layout(root))
    assert variants == {"case_6": {"contradictory": "no lesion."}}
    other = fixtures.lvit(tmp_path / "lvit", samples)
    assert read_variants(other, read_layout(other)) == {}


def test_variants_of_unknown_or_repeated_images_are_reported(tmp_path):
    samples = fixtures.samples()
    root = fixtures.medclipseg(tmp_path, samples)
    rows = [("case_5.png", "a"), ("case_5.png", "b"), ("nobody.png", "c")]
    book = root / "Prompts_Folder/Test_text_missing_location.xlsx"
    fixtures.workbook(book, ("Image", "Description"), rows)
    with pytest.raises(DataError) as caught:
        read_variants(root, read_layout(root))
    text = str(caught.value)
    assert "Test_text_missing_location.xlsx row 3: found 'case_5' a second time" in text
    assert "row 4: found 'nobody'" in text and "2 problem(s)" in text


def test_published_datasets_may_repeat_an_image_within_and_across_splits(tmp_path):
    samples = fixtures.samples()
    root = fixtures.medclipseg(tmp_path, samples)
    train = [s for s in samples if s.split == "train"]
    shared = next(s for s in samples if s.split == "test")
    folder = root / "Train_Folder"
    fixtures.save(folder / f"img/{shared.name}.png", shared.image)
    fixtures.save(folder / f"label/{shared.name}_gt.png", shared.mask)
    rows = [(f"{s.name}.png", s.text, f"{s.name}_gt.png") for s in [*train, shared, train[0]]]
    book = root / "Prompts_Folder/Train_text.xlsx"
    fixtures.workbook(book, ("Image", "Description", "Ground Truth"), rows)
    with pytest.warns(UserWarning) as warned:
        examples = read_layout(root)
    messages = [str(record.message) for record in warned]
    assert f"1 image(s) with several rows; the first is used: {train[0].name}" in messages[0]
    assert "1 image(s) in several splits; if the images are the same, scores" in messages[1]
    assert messages[1].endswith(shared.name)
    ids = [(e.split, e.id) for e in examples]
    assert len(ids) == len(set(ids)) == len(samples) + 1
    assert {("train", shared.name), ("test", shared.name)} <= set(ids)


def test_published_targets_without_validation_images_are_read(tmp_path):
    samples = [s for s in fixtures.samples() if s.split != "val"]
    root = fixtures.medclipseg(tmp_path, samples)
    header = ("Image", "Description", "Mask")
    fixtures.workbook(root / "Prompts_Folder/Val_text.xlsx", header, [])
    assert {e.split for e in read_layout(root)} == {"train", "test"}


def test_a_table_without_a_mask_column_gives_unlabelled_images(tmp_path):
    samples = fixtures.samples()
    root = fixtures.plain_csv(tmp_path, samples)
    rows = [(f"{s.name}.png", s.text) for s in samples]
    fixtures.table(root / "annotations.csv", ("IMAGE", "text"), rows)
    examples = read_unlabelled(root)
    assert [e.id for e in examples] == [s.name for s in samples]
    assert [e.text for e in examples] == [s.text for s in samples]
    assert {(e.split, e.mask_path) for e in examples} == {("train", "")}
    with pytest.raises(DataError, match="mask"):  # not as labelled data
        read_layout(root)
    fixtures.table(
        root / "annotations.csv", ("image", "text"), [*rows, ("gone.png", ""), ("", "a")]
    )
    with pytest.raises(DataError, match=r"(?s)found no image.*gone.png: image not found"):
        read_unlabelled(root)
    fixtures.table(root / "annotations.csv", ("image", "text"), [])
    with pytest.raises(DataError, match="found no image to train on"):
        read_unlabelled(root)


@pytest.mark.parametrize("layout", [fixtures.plain_csv, fixtures.lvit])
def test_unlabelled_images_of_a_dataset_are_its_training_split(tmp_path, layout):
    samples = fixtures.samples()
    examples = read_unlabelled(layout(tmp_path, samples))
    assert [e.id for e in examples] == [s.name for s in samples if s.split == "train"]
    assert {e.mask_path for e in examples} == {""}


def test_unlabelled_images_of_a_table_with_splits_are_its_training_split(tmp_path):
    samples = fixtures.samples()
    root = fixtures.plain_csv(tmp_path, samples)
    rows = [(s.split, f"{s.name}.png", s.text) for s in samples]
    fixtures.table(root / "annotations.csv", ("split", "image", "text"), rows)
    assert [e.id for e in read_unlabelled(root)] == [s.name for s in samples if s.split == "train"]


def test_published_target_may_have_only_a_test_split(tmp_path):
    root = fixtures.medclipseg(tmp_path, fixtures.samples())
    for split in ("Train", "Val"):
        shutil.rmtree(root / f"{split}_Folder")
        (root / f"Prompts_Folder/{split}_text.xlsx").unlink()
    assert {e.split for e in read_layout(root)} == {"test"}
    shutil.rmtree(root / "Test_Folder")
    assert "image not found" in error_message(root)
    (root / "Prompts_Folder/Test_text_original.xlsx").unlink(missing_ok=True)
    (root / "Prompts_Folder/Test_text.xlsx").unlink(missing_ok=True)
    assert "found no annotated image" in error_message(root)
