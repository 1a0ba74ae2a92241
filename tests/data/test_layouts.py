"""Every layout reads as the same examples, and every flaw is named."""

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


def message(root, *args):
    with pytest.raises(DataError) as caught:
        read_layout(root, *args)
    return str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_found_and_read_in_order(tmp_path, layout):
    made = fixtures.samples()
    WRITERS[layout](tmp_path, made)
    assert find_layout(tmp_path) == layout
    examples = read_layout(tmp_path)
    assert [(e.split, e.id, e.text) for e in examples] == [(s.split, s.name, s.text) for s in made]
    for example in examples:
        assert os.path.isfile(example.image_path) and os.path.isfile(example.mask_path)
        assert os.path.basename(example.image_path) == f"{example.id}.png"


@pytest.mark.parametrize("books", ["inside", "root", "ensemble_with"])
@pytest.mark.parametrize("prefix", ["mask_", ""])
def test_lvit_workbook_places_and_mask_names(tmp_path, books, prefix):
    made = fixtures.samples()
    examples = read_layout(fixtures.lvit(tmp_path, made, books, prefix))
    assert [(e.split, e.id, e.text) for e in examples] == [(s.split, s.name, s.text) for s in made]
    assert os.path.basename(examples[0].mask_path) == f"{prefix}case_0.png"


def test_medclipseg_without_ground_truth_and_with_the_plain_test_book(tmp_path):
    root = fixtures.medclipseg(tmp_path, fixtures.samples(), with_truth=False)
    book = root / "Prompts_Folder/Test_text_original.xlsx"
    book.rename(book.with_name("Test_text.xlsx"))
    examples = read_layout(root)
    assert len(examples) == 7
    assert all(os.path.basename(e.mask_path) == f"{e.id}.png" for e in examples)


def test_medvlsm_prompts(tmp_path):
    root = fixtures.medvlsm(tmp_path, fixtures.samples())
    assert {e.text for e in read_layout(root, prompt="p1")} == {"polyp"}
    assert {e.text for e in read_layout(root, prompt="p0")} == {""}
    assert "train.json entry 0" in message(root, None, "p7")
    (root / "anns/val.json").write_text("{")
    assert "val.json" in message(root)
    (root / "anns/val.json").write_text(json.dumps({"a": 1}))
    assert "val.json: found a dict" in message(root)


def test_csv_under_another_name_with_paths_from_the_root(tmp_path):
    made = fixtures.samples()
    root = fixtures.plain_csv(tmp_path, made, "my.csv")
    rows = [(s.split, f"images/{s.name}.png", f"masks/mask_{s.name}.png", None) for s in made]
    fixtures.table(root / "my.csv", (" Split", "IMAGE ", "Mask", "text"), rows)
    examples = read_layout(root)
    assert [e.id for e in examples] == [s.name for s in made]
    assert {e.text for e in examples} == {""}


def test_names_match_without_suffix_or_with_another(tmp_path):
    made = fixtures.samples()
    root = fixtures.lvit(tmp_path, made)
    suffixes = ["", ".jpg", "", ".tif"]
    rows = [(f"mask_{s.name}{x}", s.text) for s, x in zip(made[:4], suffixes, strict=True)]
    fixtures.workbook(root / "Train_Folder/Train_text.xlsx", ("Image", "Description"), rows)
    assert [e.id for e in read_layout(root)] == [s.name for s in made]


def test_no_layout_several_layouts_unknown_layout_no_folder(tmp_path):
    with pytest.raises(DataError, match=r"no known layout.*labelcol.*GTs.*anns"):
        find_layout(tmp_path)
    fixtures.lvit(tmp_path, fixtures.samples())
    fixtures.plain_csv(tmp_path, fixtures.samples())
    with pytest.raises(DataError, match=r"several layouts \(lvit, csv\)"):
        find_layout(tmp_path)
    assert len(read_layout(tmp_path, "lvit")) == 7
    assert "expected one of lvit" in message(tmp_path, "dicom")
    assert "prompt: found 'p1'" in message(tmp_path, "lvit", "p1")
    assert "no such folder" in message(tmp_path / "none")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_mask_and_missing_picture(tmp_path, layout):
    root = WRITERS[layout](tmp_path, fixtures.samples())
    examples = read_layout(root)
    os.remove(examples[1].mask_path)
    os.remove(examples[5].image_path)
    text = message(root)
    assert f"{examples[1].mask_path.rsplit('/', 1)[1]}: mask not found" in text
    assert "case_5.png: image not found" in text
    assert "2 problem(s)" in text


@pytest.mark.parametrize("layout", ["lvit", "languide", "medclipseg"])
def test_picture_without_a_sentence(tmp_path, layout):
    made = fixtures.samples()
    root = WRITERS[layout](tmp_path, made)
    folder = os.path.dirname(read_layout(root)[0].image_path)
    fixtures.save(root / folder / "stray.png", made[0].image)
    (root / folder / "Thumbs.db").write_bytes(b"")
    text = message(root)
    assert "stray.png: picture without a sentence" in text and "1 problem(s)" in text


def test_duplicate_ids_inside_a_split_and_over_two(tmp_path):
    made = fixtures.samples()
    again = [made[0], made[1]._replace(split="test")]
    text = message(fixtures.plain_csv(tmp_path, made + again))
    assert "case_0.png: found id 'case_0' a second time in annotations.csv row 9 (train)" in text
    assert "case_1.png: found id 'case_1' a second time" in text
    assert "(test), first in annotations.csv row 3 (train)" in text


def test_several_tables_and_a_file_in_the_place_of_a_folder(tmp_path):
    for name in ("b.csv", "c.csv"):
        (tmp_path / name).write_text("split,image,mask,text\n")
    assert "found 2 CSV files (b.csv, c.csv), none of them annotations.csv" in message(tmp_path)
    assert "found a file; expected the folder" in message(tmp_path / "b.csv")


def test_columns_apart_by_semicolons(tmp_path):
    (tmp_path / "annotations.csv").write_text("split;image;mask;text\ntrain;a.png;b.png;c\n")
    assert "expected a column 'split'; separate columns by commas" in message(tmp_path)


def test_a_missing_file_is_named_where_the_table_has_it(tmp_path):
    row = ("train", "images/p.png", "masks/p.png", "a")
    fixtures.table(tmp_path / "annotations.csv", ("split", "image", "mask", "text"), [row])
    text = message(tmp_path)
    for name in row[1:3]:
        assert f"{tmp_path / name}: " in text and f"{name.split('/')[0]}/{name}" not in text


def test_missing_column_names_the_nearest(tmp_path):
    root = fixtures.lvit(tmp_path, fixtures.samples())
    book = root / "Val_Folder/Val_text.xlsx"
    fixtures.workbook(book, ("Images", "Description"), [("mask_case_4.png", "a")])
    text = message(root)
    assert "Val_text.xlsx: found columns Images, Description; expected a column 'Image'" in text
    assert "rename 'Images'" in text and "1 problem(s)" in text


def test_missing_empty_and_damaged_tables(tmp_path):
    root = fixtures.lvit(tmp_path, fixtures.samples())
    (root / "Train_Folder/Train_text.xlsx").write_bytes(b"not a workbook")
    (root / "Test_Folder/Test_text.xlsx").unlink()
    text = message(root)
    assert "Train_text.xlsx: found a file that cannot be read" in text
    assert "Test_text.xlsx: found no such file" in text
    assert "2 problem(s)" in text
    bare = tmp_path / "bare"
    fixtures.table(bare / "annotations.csv", ("split", "image", "mask", "text"), [])
    assert "found no annotated picture" in message(bare)
    (bare / "annotations.csv").write_bytes(b"")
    assert "annotations.csv: found no columns" in message(bare)
    (bare / "annotations.csv").write_bytes(b"\xff\xfe\x00")
    assert "annotations.csv: found a file that cannot be read" in message(bare)


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "C:\\a.png", "b\\..\\a.png", ""])
def test_unsafe_and_empty_names(tmp_path, name):
    made = fixtures.samples()
    root = fixtures.plain_csv(tmp_path, made)
    rows = [("train", name, "mask_case_0.png", "a"), ("nowhere", "case_1.png", "m.png", "b")]
    fixtures.table(root / "annotations.csv", ("split", "image", "mask", "text"), rows)
    text = message(root)
    assert "annotations.csv row 2: found " + ("unsafe image" if name else "no image") in text
    assert "annotations.csv row 3: found split 'nowhere'" in text


def test_first_twenty_problems_and_the_count(tmp_path):
    rows = [("train", f"{i}.png", f"{i}.png", "") for i in range(15)]
    fixtures.table(tmp_path / "annotations.csv", ("split", "image", "mask", "text"), rows)
    text = message(tmp_path)
    assert "30 problem(s)" in text and text.count("not found") == 20
    assert text.endswith("... and 10 more")


def test_variants_of_medclipseg_are_sorted_by_picture(tmp_path):
    made = fixtures.samples()
    root = fixtures.medclipseg(tmp_path, made)
    assert read_variants(root, read_layout(root)) == {}
    fixtures.medclipseg_variants(root, made, ("contradictory", "underdescriptive"))
    examples = read_layout(root)
    assert [e.text for e in examples] == [s.text for s in made]
    assert read_variants(root, examples) == {
        s.name: {n: f"{n}: {s.text}" for n in ("contradictory", "underdescriptive")}
        for s in made[-2:]
    }


def test_a_published_subset_reduces_train_and_val_together(tmp_path):
    made = fixtures.samples()
    root = fixtures.medclipseg(tmp_path, made)
    fixtures.medclipseg_subset(root, [made[2], made[4]], 25)
    fixtures.medclipseg_variants(root, made, ("contradictory",))
    rows = [(f"{s.name}.png", "no lesion.") for s in made[:4]]
    book = root / "Prompts_Folder/Train_text_contradictory.xlsx"
    fixtures.workbook(book, ("Image", "Description"), rows)
    examples = read_layout(root, percent=25)
    chosen = [made[2], *made[4:]]
    assert [(e.split, e.id, e.text) for e in examples] == [
        (s.split, s.name, s.text) for s in chosen
    ]
    assert set(read_variants(root, examples, percent=25)) == {"case_2", "case_5", "case_6"}
    assert len(read_layout(root, percent=100)) == len(made)


def test_subsets_that_are_not_there(tmp_path):
    made = fixtures.samples()
    root = fixtures.medclipseg(tmp_path / "a", made)
    text = message(root, None, None, 10)
    assert "Train_text_10.xlsx: found no such file" in text
    assert "Val_text_10.xlsx: found no such file" in text and "2 problem(s)" in text
    assert "percent: found 30; expected one of 10, 25, 50, 100" in message(root, None, None, 30)
    other = fixtures.lvit(tmp_path / "b", made)
    assert "percent: found 10; expected 100, as the lvit layout" in message(other, None, None, 10)


def test_the_test_split_of_a_subset_is_whole_and_its_pictures_need_sentences(tmp_path):
    made = fixtures.samples()
    root = fixtures.medclipseg(tmp_path, made)
    fixtures.medclipseg_subset(root, [made[2], made[4]], 50)
    fixtures.save(root / "Test_Folder/img/stray.png", made[0].image)
    text = message(root, None, None, 50)
    assert "stray.png: picture without a sentence" in text and "1 problem(s)" in text


def test_variants_of_csv_are_columns_and_empty_ones_are_none(tmp_path):
    made = fixtures.samples()
    root = fixtures.plain_csv(tmp_path, made)
    header = ("split", "image", "mask", "text", "Contradictory")
    rows = [(s.split, f"{s.name}.png", f"mask_{s.name}.png", s.text, "") for s in made]
    rows[-1] = (*rows[-1][:4], "no lesion.")
    fixtures.table(root / "annotations.csv", header, rows)
    found = read_variants(root, read_layout(root))
    assert found == {"case_6": {"contradictory": "no lesion."}}
    other = fixtures.lvit(tmp_path / "lvit", made)
    assert read_variants(other, read_layout(other)) == {}


def test_variants_of_no_picture_or_twice_are_problems(tmp_path):
    made = fixtures.samples()
    root = fixtures.medclipseg(tmp_path, made)
    rows = [("case_5.png", "a"), ("case_5.png", "b"), ("nobody.png", "c")]
    book = root / "Prompts_Folder/Test_text_missing_location.xlsx"
    fixtures.workbook(book, ("Image", "Description"), rows)
    with pytest.raises(DataError) as caught:
        read_variants(root, read_layout(root))
    text = str(caught.value)
    assert "Test_text_missing_location.xlsx row 3: found 'case_5' a second time" in text
    assert "row 4: found 'nobody'" in text and "2 problem(s)" in text


def test_published_sets_may_name_a_picture_twice_and_in_two_splits(tmp_path):
    made = fixtures.samples()
    root = fixtures.medclipseg(tmp_path, made)
    train = [s for s in made if s.split == "train"]
    tested = next(s for s in made if s.split == "test")
    folder = root / "Train_Folder"
    fixtures.save(folder / f"img/{tested.name}.png", tested.image)
    fixtures.save(folder / f"label/{tested.name}_gt.png", tested.mask)
    rows = [(f"{s.name}.png", s.text, f"{s.name}_gt.png") for s in [*train, tested, train[0]]]
    book = root / "Prompts_Folder/Train_text.xlsx"
    fixtures.workbook(book, ("Image", "Description", "Ground Truth"), rows)
    with pytest.warns(UserWarning) as warned:
        found = read_layout(root)
    said = [str(one.message) for one in warned]
    assert f"1 picture(s) with several rows; the first is taken: {train[0].name}" in said[0]
    assert "1 picture(s) named in several splits; where they are the same, a score" in said[1]
    assert said[1].endswith(tested.name)
    ids = [(e.split, e.id) for e in found]
    assert len(ids) == len(set(ids)) == len(made) + 1
    assert {("train", tested.name), ("test", tested.name)} <= set(ids)


def test_published_targets_without_validation_pictures_are_read(tmp_path):
    made = [s for s in fixtures.samples() if s.split != "val"]
    root = fixtures.medclipseg(tmp_path, made)
    header = ("Image", "Description", "Mask")
    fixtures.workbook(root / "Prompts_Folder/Val_text.xlsx", header, [])
    assert {e.split for e in read_layout(root)} == {"train", "test"}


def test_pictures_without_masks_are_all_of_a_table_that_has_no_such_column(tmp_path):
    made = fixtures.samples()
    root = fixtures.plain_csv(tmp_path, made)
    rows = [(f"{s.name}.png", s.text) for s in made]
    fixtures.table(root / "annotations.csv", ("IMAGE", "text"), rows)
    examples = read_unlabelled(root)
    assert [e.id for e in examples] == [s.name for s in made]
    assert [e.text for e in examples] == [s.text for s in made]
    assert {(e.split, e.mask_path) for e in examples} == {("train", "")}
    with pytest.raises(DataError, match="mask"):  # not to be had as labelled data
        read_layout(root)
    fixtures.table(
        root / "annotations.csv", ("image", "text"), [*rows, ("gone.png", ""), ("", "a")]
    )
    with pytest.raises(DataError, match=r"(?s)found no image.*gone.png: image not found"):
        read_unlabelled(root)
    fixtures.table(root / "annotations.csv", ("image", "text"), [])
    with pytest.raises(DataError, match="found no picture to train on"):
        read_unlabelled(root)


@pytest.mark.parametrize("layout", [fixtures.plain_csv, fixtures.lvit])
def test_of_a_whole_data_set_the_training_split_is_taken(tmp_path, layout):
    made = fixtures.samples()
    examples = read_unlabelled(layout(tmp_path, made))
    assert [e.id for e in examples] == [s.name for s in made if s.split == "train"]
    assert {e.mask_path for e in examples} == {""}


def test_of_a_table_with_splits_and_without_masks_the_training_split_is_taken(tmp_path):
    made = fixtures.samples()
    root = fixtures.plain_csv(tmp_path, made)
    rows = [(s.split, f"{s.name}.png", s.text) for s in made]
    fixtures.table(root / "annotations.csv", ("split", "image", "text"), rows)
    assert [e.id for e in read_unlabelled(root)] == [s.name for s in made if s.split == "train"]


def test_a_published_target_may_have_a_test_split_alone(tmp_path):
    root = fixtures.medclipseg(tmp_path, fixtures.samples())
    for split in ("Train", "Val"):
        shutil.rmtree(root / f"{split}_Folder")
        (root / f"Prompts_Folder/{split}_text.xlsx").unlink()
    assert {e.split for e in read_layout(root)} == {"test"}
    shutil.rmtree(root / "Test_Folder")
    assert "image not found" in message(root)
    (root / "Prompts_Folder/Test_text_original.xlsx").unlink(missing_ok=True)
    (root / "Prompts_Folder/Test_text.xlsx").unlink(missing_ok=True)
    assert "found no annotated picture" in message(root)
