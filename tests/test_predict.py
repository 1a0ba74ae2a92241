"""The predict command: images in, predicted masks out."""

import csv

import numpy as np
import pytest
from PIL import Image

import biclip_jax
from biclip_jax import predict
from biclip_jax.data import dicom
from tests.data.fixtures import CT, dicom_file

PROMPT = "unilateral pulmonary infection, one infected area, lower left lung."


def run(*argv):
    with pytest.raises(SystemExit) as stopped:
        predict.main(list(map(str, argv)))
    return stopped.value.code


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (70, 90)).astype(np.uint8)).save(folder / "a.png")
    Image.fromarray(rng.integers(0, 256, (64, 48, 3)).astype(np.uint8)).save(folder / "b.jpg")
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_writes_mask_probability_and_overlay_at_the_size_of_the_image(trained, images, tmp_path):
    out = tmp_path / "out"
    argv = (images / "a.png", "--model", trained, "--prompt", PROMPT)
    assert run(*argv, "-o", out) == 0
    expected = biclip_jax.load(trained).predict(images / "a.png", PROMPT)
    mask = np.asarray(Image.open(out / "a_mask.png"))
    probability = np.asarray(Image.open(out / "a_probability.png"))
    assert mask.shape == probability.shape == (70, 90)
    np.testing.assert_array_equal(mask, expected.mask * 255)
    np.testing.assert_allclose(probability / 65535, expected.probability, atol=1e-5)
    assert Image.open(out / "a_overlay.png").size == (90, 70)


def test_tta_reports_the_epistemic_uncertainty(trained, images, tmp_path):
    out = tmp_path / "out"
    argv = (images / "b.jpg", "--model", trained, "--prompt", PROMPT, "--tta")
    assert run(*argv, "-o", out) == 0
    expected = biclip_jax.load(trained).predict_views(images / "b.jpg", PROMPT)
    probability = np.asarray(Image.open(out / "b_probability.png"))
    np.testing.assert_allclose(probability / 65535, expected.probability, atol=1e-5)
    with open(out / "predictions.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["mean_epistemic_nats"]) == pytest.approx(expected.epistemic.mean(), rel=1e-4)


def test_segments_a_folder_with_a_prompts_file(trained, images, tmp_path, capsys):
    table = tmp_path / "prompts.csv"
    table.write_text(f'image,text\na.png,"{PROMPT}"\nb.jpg,\nc.png,unused\n')
    out = tmp_path / "out"
    argv = (images, "--model", trained, "--prompts-file", table, "-o", out)
    assert run(*argv) == 0
    assert "prompts.csv: no image for c.png (1 in total)" in capsys.readouterr().err
    with open(out / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["text"]) for row in rows] == [("a.png", PROMPT), ("b.jpg", "")]
    share = (np.asarray(Image.open(out / "b_mask.png")) == 255).mean()
    assert float(rows[1]["foreground_share"]) == pytest.approx(share)
    assert Image.open(out / "b_mask.png").size == (48, 64)


def test_skips_and_names_an_unreadable_image(trained, images, tmp_path, capsys):
    (images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    out = tmp_path / "out"
    assert run(images, "--model", trained, "-o", out) == 1
    captured = capsys.readouterr()
    assert "broken.png" in captured.err
    assert "2 of 3 images" in captured.out
    assert (out / "a_mask.png").exists()
    assert not (out / "broken_mask.png").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,text\na.png,x\n", "b.jpg"),
        ("name,text\na.png,x\n", "expected image and text"),
        ("", "expected image and text"),
        (None, "cannot be read"),
    ],
)
def test_rejects_invalid_prompts_files(trained, images, tmp_path, capsys, content, message):
    table = tmp_path / "prompts.csv"
    if content is not None:
        table.write_text(content)
    argv = (images, "--model", trained, "--prompts-file", table)
    assert run(*argv, "-o", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_rejects_missing_images_and_conflicting_outputs(trained, images, tmp_path, capsys):
    argv = ("--model", trained, "-o", tmp_path / "out")
    assert run(*argv, tmp_path / "nowhere") == 2
    (tmp_path / "empty").mkdir()
    assert run(*argv, tmp_path / "empty") == 2
    inside = (images, "--model", trained, "-o", images)
    assert run(*inside) == 2
    assert "contains the input images" in capsys.readouterr().err
    Image.new("L", (4, 4)).save(images / "a.bmp")
    assert run(*argv, images) == 2
    assert "overwrite" in capsys.readouterr().err


def test_segments_a_folder_of_dicom_files(trained, tmp_path, capsys):
    folder, out = tmp_path / "study", tmp_path / "out"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("1.2.840.1", "1.2.840.2", "scan.dcm"):
        pixels = rng.integers(0, 4096, (40, 30)).astype(np.uint16)
        dicom_file(folder / name, pixels, **CT, WindowCenter=40, WindowWidth=400)
    dicom_file(folder / "report", pixels, PixelData=None)
    (folder / "DICOMDIR").write_bytes((folder / "scan.dcm").read_bytes())
    (folder / "notes").write_text("not an image")
    argv = (folder, "--model", trained, "--prompt", PROMPT, "-o", out)
    assert run(*argv, "--window=-500,1500") == 1
    captured = capsys.readouterr()
    assert "3 of 4 images segmented" in captured.out
    assert "report: found a DICOM file without pixels (CT Image Storage)" in captured.err
    for name in ("1.2.840.1", "1.2.840.2", "scan"):
        assert Image.open(out / f"{name}_mask.png").size == (30, 40)
        assert Image.open(out / f"{name}_uncertainty.png").size
    # --window overrides the window of the file.
    pixels_in_window = dicom.read(folder / "scan.dcm", dicom.Window(-500, 1500))
    assert (pixels_in_window != dicom.read(folder / "scan.dcm")).any()
    expected = biclip_jax.load(trained).predict(pixels_in_window, PROMPT).probability
    probability = np.asarray(Image.open(out / "scan_probability.png"))
    np.testing.assert_allclose(probability / 65535, expected, atol=1e-5)
    for file in out.iterdir():
        assert b"Name^Of^Patient" not in file.read_bytes()


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ("40", "expected --window=CENTER,WIDTH"),
        ("40,0", "width of at least 1"),
        ("nan,400", "expected --window=CENTER,WIDTH"),
        ("40,400", "DICOM files only, but there are none"),
    ],
)
def test_rejects_invalid_windows(trained, images, tmp_path, capsys, window, message):
    argv = (images, "--model", trained, "-o", tmp_path / "out")
    assert run(*argv, f"--window={window}") == 2
    assert message in capsys.readouterr().err
