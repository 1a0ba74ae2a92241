"""Seven tiny examples, written in each supported layout."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import openpyxl
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RLELossless

from biclip_jax.data.image_io import write_png

FOLDERS = {"train": "Train", "val": "Val", "test": "Test"}


class Sample(NamedTuple):
    split: str
    name: str
    image: np.ndarray
    mask: np.ndarray
    text: str


def samples(channels: int = 1) -> list[Sample]:
    rng = np.random.default_rng(7)
    result = []
    for index, split in enumerate(["train"] * 4 + ["val"] + ["test"] * 2):
        image = rng.integers(0, 256, (24, 20, channels), dtype=np.uint8)
        mask = (rng.random((24, 20)) > 0.5).astype(np.uint8) * 255
        result.append(Sample(split, f"case_{index}", image, mask, f"caption {index}, left lung."))
    return result


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, array)


def workbook(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    book = openpyxl.Workbook()
    for line in [header, *rows]:
        book.active.append(line)
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(path)


def table(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([header, *rows])


def lvit(root: Path, examples: list[Sample], books: str = "inside", prefix: str = "mask_") -> Path:
    """Writes workbooks "inside" the split folders, at the "root", or train and val "joint"."""
    for s in examples:
        folder = root / f"{FOLDERS[s.split]}_Folder"
        save(folder / f"img/{s.name}.png", s.image)
        save(folder / f"labelcol/{prefix}{s.name}.png", s.mask)
    groups = {split: (split,) for split in FOLDERS}
    if books == "joint":
        groups = {"train_val": ("train", "val"), "test": ("test",)}
    for key, splits in groups.items():
        name = f"{key.title()}_text.xlsx"
        folder = root / f"{FOLDERS[key]}_Folder" if books == "inside" else root
        rows = [(f"{prefix}{s.name}.png", s.text) for s in examples if s.split in splits]
        workbook(folder / name, ("Image", "Description"), rows)
    return root


def languide(root: Path, examples: list[Sample]) -> Path:
    for s in examples:
        folder = root / ("Test" if s.split == "test" else "Train")
        save(folder / f"Images/{s.name}.png", s.image)
        save(folder / f"GTs/mask_{s.name}.png", s.mask)
    for name, splits in (("train", ("train", "val")), ("test", ("test",))):
        rows = [(f"mask_{s.name}.png", s.text) for s in examples if s.split in splits]
        table(root / f"prompt/{name}.csv", ("Image", "Description"), rows)
    return root


def medclipseg(root: Path, examples: list[Sample], with_ground_truth: bool = True) -> Path:
    for s in examples:
        folder = root / f"{FOLDERS[s.split]}_Folder"
        mask = f"{s.name}_gt.png" if with_ground_truth else f"{s.name}.png"
        save(folder / f"img/{s.name}.png", s.image)
        save(folder / "label" / mask, s.mask)
    for split, name in FOLDERS.items():
        book = "Test_text_original" if split == "test" else f"{name}_text"
        header = ("Image", "Description", "Ground Truth")[: 2 + with_ground_truth]
        rows = [
            (f"{s.name}.png", s.text + "\n", f"{s.name}_gt.png")[: 2 + with_ground_truth]
            for s in examples
            if s.split == split
        ]
        workbook(root / f"Prompts_Folder/{book}.xlsx", header, rows)
    return root


def medvlsm(root: Path, examples: list[Sample]) -> Path:
    for s in examples:
        save(root / f"images/{s.name}.png", s.image)
        save(root / f"masks/{s.name}.png", s.mask)
    for split in FOLDERS:
        entries = [
            {
                "img_name": f"{s.name}.png",
                "mask_name": f"{s.name}.png",
                "prompts": {"p0": "", "p1": "polyp", "p2": [s.text, "another wording"], "p10": ""},
            }
            for s in examples
            if s.split == split
        ]
        path = root / f"anns/{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(entries))
    return root


def plain_csv(root: Path, examples: list[Sample], name: str = "annotations.csv") -> Path:
    for s in examples:
        save(root / f"images/{s.name}.png", s.image)
        save(root / f"masks/mask_{s.name}.png", s.mask)
    header = ("split", "image", "mask", "text", "patient")
    rows = [(s.split, f"{s.name}.png", f"mask_{s.name}.png", s.text, "1") for s in examples]
    table(root / name, header, rows)
    return root


def medclipseg_variants(root: Path, examples: list[Sample], names: tuple[str, ...]) -> Path:
    """Adds one workbook per name; each test prompt starts with {name}."""
    for name in names:
        rows = [(f"{s.name}.png", f"{name}: {s.text}\n") for s in examples if s.split == "test"]
        book = root / f"Prompts_Folder/Test_text_{name}.xlsx"
        workbook(book, ("Image", "Description"), rows[::-1])
    return root


def medclipseg_subset(root: Path, examples: list[Sample], percent: int) -> Path:
    """Adds the workbooks of a published subset of train and val."""
    for split in ("train", "val"):
        rows = [(f"{s.name}.png", s.text, f"{s.name}_gt.png") for s in examples if s.split == split]
        book = root / f"Prompts_Folder/{FOLDERS[split]}_text_{percent}.xlsx"
        workbook(book, ("Image", "Description", "Ground Truth"), rows)
    return root


CT = {"RescaleSlope": 1, "RescaleIntercept": -1024, "BitsStored": 12, "HighBit": 11}


def dicom_file(path, pixels, compressed=False, **fields):
    """Writes a DICOM file of (H, W) or (H, W, 3) pixels; fields by their DICOM keywords."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset.PatientName = "Name^Of^Patient"
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    dataset.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    if pixels.ndim == 3:
        dataset.PlanarConfiguration = 0
    bits = 8 * pixels.itemsize
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    for name, value in fields.items():
        setattr(dataset, name, value)
    if compressed:
        dataset.compress(RLELossless)
    dataset.save_as(path, enforce_file_format=True)
    return path
