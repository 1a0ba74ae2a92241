"""Image files of every supported kind, and files that must be refused."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFilter

from biclip_jax.core.errors import BadImageError
from biclip_jax.data import image_io, opencv_resize

from . import fixtures

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (9, 7), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
@pytest.mark.parametrize("pixels", [GREY, COLOUR])
def test_lossless_formats_keep_every_pixel(tmp_path, suffix, pixels):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path)
    read = image_io.read_image(path)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, pixels.reshape(9, 7, -1))


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_lossy_formats_are_close(tmp_path, suffix):
    smooth = np.tile(np.arange(0, 240, 8, dtype=np.uint8), (30, 1))
    Image.fromarray(np.stack([smooth] * 3, -1)).save(tmp_path / f"a.{suffix}", quality=95)
    read = image_io.read_image(tmp_path / f"a.{suffix}")
    assert read.shape == (30, 30, 3)
    assert np.abs(read.astype(int) - smooth[..., None]).max() <= 6


def test_16_bit_grey_is_divided_by_257(tmp_path):
    values = np.array([[0, 128, 129, 257], [32768, 65278, 65407, 65535]], np.uint16)
    image_io.write_png(tmp_path / "a.png", values)
    Image.fromarray(values).save(tmp_path / "a.tif")
    expected = np.rint(values / 257).astype(np.uint8)[..., None]
    np.testing.assert_array_equal(image_io.read_image(tmp_path / "a.png"), expected)
    np.testing.assert_array_equal(image_io.read_image(tmp_path / "a.tif"), expected)


def test_palette_cmyk_and_alpha(tmp_path):
    palette_image = Image.fromarray(GREY % 4).convert("L")
    palette_image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255] + [0] * 756)
    palette_image.save(tmp_path / "palette.png")
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    np.testing.assert_array_equal(image_io.read_image(tmp_path / "palette.png"), colours[GREY % 4])
    Image.new("CMYK", (4, 4), (255, 0, 0, 0)).save(tmp_path / "cmyk.tif")
    assert image_io.read_image(tmp_path / "cmyk.tif")[0, 0].tolist() == [0, 255, 255]
    Image.fromarray(np.dstack([COLOUR, GREY])).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(image_io.read_image(tmp_path / "rgba.png"), COLOUR)
    Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(GREY // 2)]).save(tmp_path / "la.png")
    np.testing.assert_array_equal(image_io.read_image(tmp_path / "la.png")[..., 0], GREY)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be displayed rotated by 90 degrees clockwise
    Image.fromarray(COLOUR).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(image_io.read_image(tmp_path / "a.png"), np.rot90(COLOUR, -1))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "bmp"])
def test_rejects_truncated_files(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadImageError) as caught:
        image_io.read_image(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("content", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"GIF89a" * 9])
def test_rejects_files_that_are_not_images(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(BadImageError, match="expected a complete PNG"):
        image_io.read_image(path)


@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_raise_only_bad_image_errors(tmp_path):
    kinds = ("PNG", "JPEG", "TIFF", "WEBP", "BMP")
    for kind in kinds:
        source = tmp_path / f"intact.{kind}"
        Image.fromarray(COLOUR).save(source, kind)
        intact = source.read_bytes()
        for seed in range(60):
            rng = np.random.default_rng(seed)
            data = bytearray(intact)
            for position in rng.integers(0, len(data), 6):
                data[position] = rng.integers(0, 256)
            path = tmp_path / f"damaged_{seed}.{kind}"
            path.write_bytes(data)
            try:
                read = image_io.read_image(path)
            except BadImageError as error:
                assert str(error).startswith(str(path))
            else:
                assert read.dtype == np.uint8 and read.shape[2] in (1, 3)


def test_rejects_oversized_header_before_decoding(tmp_path):
    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 9000, 8000, 8, 0, 0, 0, 0)
    path = tmp_path / "bomb.png"
    # No pixel data follows: decoding would raise a different error.
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))
    with pytest.raises(BadImageError, match=r"bomb\.png: found a header of 9000 x 8000 pixels"):
        image_io.read_image(path)


def test_rejects_missing_multi_page_and_float_files(tmp_path):
    with pytest.raises(BadImageError, match=r"none\.png: found no such file"):
        image_io.read_image(tmp_path / "none.png")
    page = Image.fromarray(GREY)
    page.save(tmp_path / "stack.tif", save_all=True, append_images=[page, page])
    with pytest.raises(BadImageError, match=r"stack\.tif: found 3 pages"):
        image_io.read_image(tmp_path / "stack.tif")
    Image.fromarray(GREY.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(BadImageError, match=r"float\.tif: found floating-point"):
        image_io.read_image(tmp_path / "float.tif")
    Image.fromarray(np.full((2, 2), 70000, np.int32)).save(tmp_path / "int.tif")
    with pytest.raises(BadImageError, match=r"int\.tif: found intensities 70000"):
        image_io.read_image(tmp_path / "int.tif")


def test_masks_of_0_and_1_0_and_255_colour_and_16_bit(tmp_path):
    foreground = (GREY > 127).astype(np.uint8)
    stored = {
        "one": foreground,
        "full": foreground * 255,
        "levels": GREY // 16 * 17,
        "colour": np.stack([foreground * 255] * 3, -1),
        "wide": foreground.astype(np.uint16) * 65535,
        "wide_one": foreground.astype(np.uint16),
        "wide_255": foreground.astype(np.uint16) * 255,
        "empty": foreground * 0,
    }
    for name, array in stored.items():
        image_io.write_png(tmp_path / f"{name}.png", array)
        mask = image_io.read_mask(tmp_path / f"{name}.png")
        assert mask.dtype == np.uint8 and mask.shape == (9, 7, 1)
        np.testing.assert_array_equal(mask[..., 0], foreground if name != "empty" else 0)
    Image.fromarray(foreground > 0).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(image_io.read_mask(tmp_path / "bits.png")[..., 0], foreground)


def test_rejects_masks_that_would_silently_be_empty(tmp_path):
    image_io.write_png(tmp_path / "classes.png", GREY % 3)
    with pytest.raises(
        BadImageError, match=r"classes\.png: found a mask whose brightest pixel is 2"
    ):
        image_io.read_mask(tmp_path / "classes.png")
    Image.fromarray(np.full((16, 16), 4, np.uint8)).save(tmp_path / "black.jpg", quality=90)
    assert image_io.read_mask(tmp_path / "black.jpg").sum() == 0


def test_rejects_an_image_as_mask_but_accepts_soft_edges_and_classes(tmp_path):
    ramp = np.arange(4096).reshape(64, 64) // 16
    image_io.write_png(tmp_path / "xray.png", ramp.astype(np.uint8))
    with pytest.raises(
        BadImageError, match=r"xray\.png: found a mask with intermediate intensities in 75% of"
    ):
        image_io.read_mask(tmp_path / "xray.png")
    image_io.write_png(tmp_path / "classes.png", (ramp // 64 * 85).astype(np.uint8))
    assert image_io.read_mask(tmp_path / "classes.png").mean() == 0.5
    square = Image.new("L", (64, 64))
    square.paste(255, (16, 16, 48, 48))
    square.filter(ImageFilter.GaussianBlur(1)).save(tmp_path / "soft.jpg")
    assert 900 < image_io.read_mask(tmp_path / "soft.jpg").sum() < 1100


def test_resize_image_is_antialiased_and_keeps_channels():
    board = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)[..., None]
    small = image_io.resize_image(board, 8)
    assert small.shape == (8, 8, 1) and small.dtype == np.uint8
    assert np.abs(small[1:-1, 1:-1].astype(int) - 127).max() <= 2
    assert image_io.resize_image(COLOUR, 5).shape == (5, 5, 3)
    assert image_io.resize_image(board, 32) is board


def test_resize_mask_is_the_area_average():
    mask = (RNG.random((12, 18, 1)) > 0.5).astype(np.uint8)
    average = mask.reshape(6, 2, 6, 3).mean((1, 3))
    expected = (average >= 0.5 - 1e-9).astype(np.uint8)[..., None]
    np.testing.assert_array_equal(image_io.resize_mask(mask, 6), expected)
    assert (average == 0.5).any()
    assert image_io.resize_mask(expected, 6) is expected


def test_resize_method_is_selected_by_name():
    np.testing.assert_array_equal(
        image_io.resize_image(COLOUR, 5, "opencv"), opencv_resize.bilinear(COLOUR, 5, 5)
    )
    mask = (GREY > 127).astype(np.uint8)[..., None]
    np.testing.assert_array_equal(
        image_io.resize_mask(mask, 5, "opencv"), opencv_resize.nearest(mask, 5, 5)
    )
    for resize in (image_io.resize_image, image_io.resize_mask):
        square = mask[:7]
        assert resize(square, 7, "opencv") is square
        with pytest.raises(ValueError, match=r"method: found 'cubic'; expected one of antialiased"):
            resize(mask, 5, "cubic")


def test_write_png_replaces_files_atomically_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "a.png"
    image_io.write_png(path, GREY)
    image_io.write_png(path, COLOUR)
    np.testing.assert_array_equal(image_io.read_image(path), COLOUR)
    with pytest.raises(ValueError, match="float32"):
        image_io.write_png(path, GREY.astype(np.float32))
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_rejects_a_dicom_file_as_mask(tmp_path):
    path = fixtures.dicom_file(tmp_path / "a.dcm", np.ones((4, 4), np.uint8))
    with pytest.raises(BadImageError, match=r"a\.dcm: found a DICOM file as a mask; .*as PNG"):
        image_io.read_mask(path)
