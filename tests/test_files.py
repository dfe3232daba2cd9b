"""Reading and writing image files: depth, metadata, refusals, and outputs that are never lost."""

import errno
import io
import os
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from skimage import data as pictures

from dfpir.files import (
    SUPPORTED_SUFFIXES,
    FileMetadata,
    ImageFile,
    ImageFileError,
    find_images,
    read_image,
    write_image,
)

imagecodecs = pytest.importorskip("imagecodecs")
tifffile = pytest.importorskip("tifffile")

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
DAMAGED = "damaged metadata (EXIF, ICC profile or resolution) left out"
GREY_PROFILE = SRGB[:16] + b"GRAY" + SRGB[20:]


def picture(channels: int, dtype: type, height: int = 29, width: int = 37) -> np.ndarray:
    """Give a photograph's corner with noise, so that every bit of every sample matters."""
    photograph = pictures.astronaut()[60 : 60 + height, 200 : 200 + width] / 255
    samples = np.concatenate([photograph, photograph[::-1, :, :1]], axis=2)[..., :channels]
    samples = 0.9 * samples + 0.1 * np.random.default_rng(channels).random(samples.shape)
    if dtype is not np.float32:
        samples = np.rint(samples * np.iinfo(dtype).max)
    samples = samples.astype(dtype)
    return samples[..., 0] if channels == 1 else samples


def exif_block(orientation: int | None = None, order: str = "<") -> bytes:
    """EXIF with a maker, 300 dpi x 150 dpi, an exposure time, a place and 4000 x 3000 pixels."""
    exif = Image.Exif()
    exif.endian = order
    if orientation is not None:
        exif[274] = orientation
    exif[271], exif[315] = "Camera maker", "José".encode()
    exif[282], exif[283], exif[296] = 300.0, 150.0, 2
    exif.get_ifd(34665).update({33434: 0.02, 40962: 4000, 40963: 3000})
    exif.get_ifd(34853).update({1: "N"})
    return exif.tobytes().removeprefix(b"Exif\0\0")


def loaded_exif(block: bytes | None) -> Image.Exif:
    exif = Image.Exif()
    exif.load(b"Exif\0\0" + (block or b""))
    return exif


def save(path: Path, image: Image.Image, name: str, **options: object) -> Path:
    image.save(path, name, **options)
    return path


def refusal(path: Path, *expected: str) -> str:
    """Give the one-line message of a refused file, which names the file and says all expected."""
    with pytest.raises(ImageFileError) as caught:
        read_image(path)
    return checked_message(str(caught.value), path, *expected)


def write_refusal(path: Path, array: np.ndarray, *expected: str) -> str:
    with pytest.raises(ImageFileError) as caught:
        write_image(path, array)
    return checked_message(str(caught.value), path, *expected)


def checked_message(message: str, path: Path, *expected: str) -> str:
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    for part in expected:
        assert part in message
    return message


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        (".png", np.uint8),
        (".png", np.uint16),
        (".tif", np.uint8),
        (".tiff", np.uint16),
        (".tif", np.float32),
        (".webp", np.uint8),
    ],
)
@pytest.mark.parametrize("shape", [(29, 37), (1, 1), (1, 300), (300, 1)])
def test_lossless_round_trip(tmp_path, suffix, dtype, channels, shape):
    array = picture(channels, dtype, *shape)
    notes = write_image(tmp_path / f"out{suffix}", array)
    found = read_image(tmp_path / f"out{suffix}")
    if suffix == ".webp" and channels == 1:
        assert notes == ("grey written as RGB: WebP has no grey",)
        array = np.repeat(array[..., None], 3, axis=2)
    else:
        assert notes == ()
    assert found.array.dtype == dtype
    assert found.array.flags.c_contiguous
    np.testing.assert_array_equal(found.array, array)
    assert (found.metadata.icc_profile, found.metadata.dpi) == (None, None)
    assert found.notes == ()


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_our_tiff_is_read_by_others(tmp_path, channels, dtype):
    # 700 x 500 fills several strips.
    array = np.tile(picture(channels, dtype, 70, 50), (10, 10) + (1,) * (channels > 1))
    write_image(tmp_path / "out.tif", array, FileMetadata(exif_block(), dpi=(300, 150)))
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), array)
    if dtype is np.uint8 or channels == 1:
        with Image.open(tmp_path / "out.tif") as image:
            np.testing.assert_array_equal(np.asarray(image), array)
            assert image.info["dpi"] == (300, 150)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_round_trip_is_close(tmp_path, channels):
    array = pictures.astronaut()[:64, 150:230]
    array = array[..., 1] if channels == 1 else array
    assert write_image(tmp_path / "out.jpg", array) == ()
    found = read_image(tmp_path / "out.jpg").array
    assert found.shape == array.shape
    assert np.abs(found.astype(int) - array).mean() < 2
    with Image.open(tmp_path / "out.jpg") as image:
        assert [layer[1:3] for layer in image.layer] == [(1, 1)] * channels


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_colours_below_transparent_pixels_are_kept(tmp_path, suffix):
    array = picture(4, np.uint8)[::-1]
    array[::2, :, 3] = 0
    write_image(tmp_path / f"out{suffix}", array)
    np.testing.assert_array_equal(read_image(tmp_path / f"out{suffix}").array, array)


def test_trailing_grey_axis_and_other_byte_orders_are_written(tmp_path):
    array = picture(1, np.uint16)
    for number, given_array in enumerate((array[..., None], array.astype(">u2"))):
        write_image(tmp_path / f"{number}.png", given_array)
        write_image(tmp_path / f"{number}.tif", np.asfortranarray(given_array))
        for suffix in (".png", ".tif"):
            found = read_image(tmp_path / f"{number}{suffix}").array
            np.testing.assert_array_equal(found, array)
    assert write_image(tmp_path / "OUT.JPG", picture(4, np.uint8)) == (
        "alpha left out: JPEG has none",
    )


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_deep_pixels_become_8_bits_with_a_note(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    deep = np.full((16, 16, 3), 0x8080, np.uint16)
    notes = write_image(path, deep)
    assert notes == (f"16 bits converted to 8 bits for {'JPEG' if suffix == '.jpg' else 'WebP'}",)
    assert np.ptp(read_image(path).array) == 0
    assert read_image(path).array[0, 0, 0] == 128
    notes = write_image(path, np.full((16, 16, 3), 0.5, np.float32), overwrite=True)
    assert len(notes) == 1
    assert notes[0].startswith("float values converted to 8 bits")
    assert read_image(path).array[0, 0, 0] == 128


def test_float_becomes_16_bit_png_and_says_what_was_clipped(tmp_path):
    array = np.array([[-0.5, 0.0, 0.5, 1.0, 3.0]], np.float64)
    notes = write_image(tmp_path / "out.png", array)
    assert notes == (
        "float64 converted to float32",
        "float values converted to 16 bits for PNG, values from -0.5 to 3 clipped to 0-1",
    )
    found = read_image(tmp_path / "out.png").array
    np.testing.assert_array_equal(found, np.array([[0, 0, 32768, 65535, 65535]], np.uint16))


def test_palette_becomes_rgb(tmp_path):
    image = Image.fromarray(picture(3, np.uint8)).quantize(16)
    for name in ("PNG", "TIFF"):
        found = read_image(save(tmp_path / name, image, name))
        assert found.notes == ("palette converted to RGB",)
        np.testing.assert_array_equal(found.array, np.asarray(image.convert("RGB")))
    found = read_image(save(tmp_path / "clear.png", image, "PNG", transparency=3))
    assert found.notes == ("palette converted to RGBA",)
    np.testing.assert_array_equal(found.array[..., 3] == 0, np.asarray(image) == 3)


@pytest.mark.parametrize("name", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(tmp_path, name):
    image = Image.fromarray(picture(3, np.uint8)).convert("CMYK")
    profile = SRGB[:16] + b"CMYK" + SRGB[20:]
    found = read_image(save(tmp_path / "print", image, name, icc_profile=profile))
    assert found.notes[0] == "CMYK converted to RGB"
    assert "ICC profile left out" in found.notes[1]
    assert found.metadata.icc_profile is None
    assert np.abs(found.array.astype(int) - picture(3, np.uint8)).mean() < 12


def test_grey_with_alpha_becomes_rgba(tmp_path):
    array = picture(3, np.uint16)[..., :2].copy()
    expected = array[..., [0, 0, 0, 1]]
    (tmp_path / "16.png").write_bytes(imagecodecs.png_encode(array))
    image = Image.fromarray((array // 257).astype(np.uint8))
    assert image.mode == "LA"
    save(tmp_path / "8.png", image, "PNG")
    save(tmp_path / "8.tif", image, "TIFF")
    for name in ("16.png", "8.png", "8.tif"):
        found = read_image(tmp_path / name)
        assert found.notes == ("grey with alpha converted to RGBA",)
        wanted = expected if name.startswith("16") else np.asarray(image.convert("RGBA"))
        assert found.array.dtype == wanted.dtype
        np.testing.assert_array_equal(found.array, wanted)


def test_transparent_colour_becomes_alpha(tmp_path):
    array = picture(3, np.uint8)
    colour = tuple(int(value) for value in array[5, 7])
    path = save(tmp_path / "8.png", Image.fromarray(array), "PNG", transparency=colour)
    found = read_image(path)
    assert found.notes == ("transparent colour converted to RGBA",)
    assert found.array[5, 7, 3] == 0
    np.testing.assert_array_equal(found.array[..., :3], array)


def test_one_bit_becomes_8_bit_grey(tmp_path):
    image = Image.fromarray(picture(1, np.uint8)).convert("1")
    for name in ("PNG", "TIFF"):
        found = read_image(save(tmp_path / name, image, name))
        assert found.notes == ("1 bit converted to 8-bit grey",)
        np.testing.assert_array_equal(found.array, np.asarray(image) * np.uint8(255))


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_become_float32(tmp_path, dtype):
    array = np.arange(12).reshape(3, 4).astype(dtype)
    tifffile.imwrite(tmp_path / "in.tif", array)
    found = read_image(tmp_path / "in.tif")
    assert found.array.dtype == np.float32
    assert found.notes == (f"{np.dtype(dtype).name} converted to float32",)
    np.testing.assert_array_equal(found.array, array)


@pytest.mark.parametrize(
    ("dtype", "compression"),
    [
        (dtype, compression)
        for dtype in (np.uint8, np.uint16, np.float32)
        for compression in (None, "zlib", "lzw", "zstd", "lerc")
    ]
    + [(np.uint8, "packbits"), (np.uint16, "packbits")],
)
def test_tiff_compressions(tmp_path, compression, dtype):
    array = picture(3, dtype)
    tifffile.imwrite(tmp_path / "in.tif", array, photometric="rgb", compression=compression)
    np.testing.assert_array_equal(read_image(tmp_path / "in.tif").array, array)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    "options",
    [
        {"tile": (16, 16)},
        {"planarconfig": "separate"},
        {"byteorder": ">"},
        {"bigtiff": True},
        {"predictor": True, "compression": "zlib"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_tiff_layouts(tmp_path, dtype, options):
    array = picture(3, dtype)
    stored = np.moveaxis(array, -1, 0) if "planarconfig" in options else array
    tifffile.imwrite(
        tmp_path / "in.tif", stored, photometric="rgb", resolution=(300, 150), **options
    )
    found = read_image(tmp_path / "in.tif")
    np.testing.assert_array_equal(found.array, array)
    assert found.metadata.dpi == (300, 150)


def test_tiff_with_white_as_zero(tmp_path):
    array = picture(1, np.uint8)
    tifffile.imwrite(tmp_path / "in.tif", 255 - array, photometric="miniswhite")
    np.testing.assert_array_equal(read_image(tmp_path / "in.tif").array, array)
    array = array.astype(np.uint16)
    tifffile.imwrite(tmp_path / "deep.tif", array, photometric="miniswhite")
    refusal(tmp_path / "deep.tif", "photometric 0", "expected", "0 as black")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_fourth_channel_without_meaning(tmp_path, dtype):
    array = picture(4, dtype)
    tifffile.imwrite(tmp_path / "in.tif", array, photometric="rgb", extrasamples=[0])
    refusal(tmp_path / "in.tif", "extra samples (0,)", "alpha marked as such")


def test_first_picture_of_a_camera_jpeg_with_preview(tmp_path):
    main, preview = Image.fromarray(picture(3, np.uint8)), Image.new("RGB", (8, 8))
    path = tmp_path / "camera.jpg"
    save(path, main, "MPO", save_all=True, append_images=[preview], quality=95)
    found = read_image(path)
    assert found.notes == ("first of 2 pictures in the JPEG taken, the others left out",)
    assert found.array.shape == (29, 37, 3)


TARGETS = [
    (".png", np.uint8, 3),
    (".png", np.uint16, 1),
    (".png", np.uint16, 3),
    (".jpg", np.uint8, 3),
    (".webp", np.uint8, 3),
    (".tif", np.uint8, 1),
    (".tif", np.uint8, 4),
]
DEEP_TIFFS = [(".tif", np.uint16, 3), (".tif", np.float32, 4)]


@pytest.mark.parametrize(("suffix", "dtype", "channels"), TARGETS)
@pytest.mark.parametrize("order", ["<", ">"])
def test_metadata_is_kept(tmp_path, suffix, dtype, channels, order):
    profile = GREY_PROFILE if channels == 1 else SRGB
    path = tmp_path / f"out{suffix}"
    metadata = FileMetadata(exif_block(1, order), profile, (300.0, 150.0))
    write_image(path, picture(channels, dtype), metadata)
    found = read_image(path)
    assert found.notes == ()
    assert found.metadata.icc_profile == profile
    assert found.metadata.dpi == pytest.approx((300, 150), rel=1e-4)
    with Image.open(path) as image:
        image.load()
        assert image.info["icc_profile"] == profile
        for exif in (image.getexif(), loaded_exif(found.metadata.exif)):
            assert exif[271] == "Camera maker"
            assert exif[315].encode("latin-1").decode() == "José"
            assert exif[282] == 300
            assert exif.get_ifd(34665)[33434] == 0.02
            assert exif.get_ifd(34853)[1] == "N"

    # A second pass through the same format changes nothing.
    write_image(path, found.array, found.metadata, overwrite=True)
    assert read_image(path).metadata == found.metadata


@pytest.mark.parametrize(("suffix", "dtype", "channels"), DEEP_TIFFS)
def test_deep_tiff_keeps_texts_of_exif_and_says_so(tmp_path, suffix, dtype, channels):
    path = tmp_path / f"out{suffix}"
    metadata = FileMetadata(exif_block(), SRGB, (300.0, 150.0))
    notes = write_image(path, picture(channels, dtype), metadata)
    assert len(notes) == 1
    assert notes[0].startswith("exposure and place (EXIF) left out")
    found = read_image(path)
    assert found.notes == ()
    assert found.metadata.icc_profile == SRGB
    assert found.metadata.dpi == pytest.approx((300, 150))
    exif = loaded_exif(found.metadata.exif)
    assert (exif[271], exif[315]) == ("Camera maker", "José".encode().decode("latin-1"))
    assert write_image(path, found.array, found.metadata, overwrite=True) == ()
    assert read_image(path).metadata == found.metadata


@pytest.mark.parametrize(("suffix", "dtype", "channels"), TARGETS + DEEP_TIFFS)
def test_resolution_alone_is_kept(tmp_path, suffix, dtype, channels):
    path = tmp_path / f"out{suffix}"
    write_image(path, picture(channels, dtype), FileMetadata(dpi=(96.0, 72.0)))
    assert read_image(path).metadata.dpi == pytest.approx((96, 72), rel=1e-3)


ORIENTED = np.array([[1, 2, 3], [4, 5, 6]])
# As the EXIF standard names the sides of the picture that the first row and column hold.
UPRIGHT = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
}


def oriented(kind: str, array: np.ndarray, orientation: int) -> bytes:
    """Give a file of 300 dpi x 150 dpi that is to be turned, as others write it."""
    block, buffer = exif_block(orientation, "<" if orientation % 2 else ">"), io.BytesIO()
    if kind == "png16":
        chunk = struct.pack(">I", len(block)) + b"eXIf" + block
        chunk += struct.pack(">I", zlib.crc32(chunk[4:]))
        whole = imagecodecs.png_encode(array)
        return whole[:-12] + chunk + whole[-12:]  # behind the pixels, as some programs do
    if kind == "tiff16":
        options = {"photometric": "rgb", "resolution": (300, 150), "resolutionunit": 2}
        tifffile.imwrite(buffer, array, **options, extratags=[(274, 3, 1, orientation, True)])
    else:
        name = {"png8": "PNG", "tiff8": "TIFF"}.get(kind, kind.upper())
        options = {"lossless": True} if kind == "webp" else {"dpi": (300, 150)}
        Image.fromarray(array).save(buffer, name, exif=b"Exif\0\0" + block, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["png8", "png16", "webp", "tiff8", "tiff16", "jpeg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_and_reset(tmp_path, orientation, kind):
    samples = 40 * np.kron(ORIENTED, np.ones((8, 8), int))
    expected = 40 * np.kron(np.array(UPRIGHT[orientation]), np.ones((8, 8), int))
    array = samples.astype(np.uint16 if kind.endswith("16") else np.uint8)
    array = np.repeat(array[..., None], 3, axis=2)
    (tmp_path / "in").write_bytes(oriented(kind, array, orientation))
    found = read_image(tmp_path / "in")
    np.testing.assert_allclose(
        found.array[..., 0].astype(int), expected, atol=3 if kind == "jpeg" else 0
    )
    turned = orientation >= 5
    assert found.metadata.dpi == pytest.approx((150, 300) if turned else (300, 150), rel=1e-4)
    assert loaded_exif(found.metadata.exif).get(274, 1) == 1

    # Once more through a file: nothing turns again.
    for suffix in (".tif", ".png", ".webp", ".jpg"):
        write_image(tmp_path / f"out{suffix}", found.array, found.metadata)
        again = read_image(tmp_path / f"out{suffix}")
        assert again.array.shape == found.array.shape
        assert again.metadata.dpi == pytest.approx(found.metadata.dpi, rel=1e-3)


def test_damaged_exif_is_left_out_with_a_note(tmp_path):
    image = Image.fromarray(picture(3, np.uint8))
    path = save(tmp_path / "in.png", image, "PNG", exif=b"Exif\0\0II*\0\xff\xff\0\0")
    found = read_image(path)
    assert found.metadata.exif is None
    assert found.notes == (DAMAGED,)
    notes = write_image(tmp_path / "out.tif", found.array, FileMetadata(b"nonsense"))
    assert notes == (DAMAGED,)


def test_profile_of_another_colour_space_is_left_out(tmp_path):
    path = tmp_path / "out.png"
    notes = write_image(path, picture(1, np.uint8), FileMetadata(icc_profile=SRGB))
    assert notes == ("ICC profile left out: it is for b'RGB ', the pixels are b'GRAY'",)
    assert read_image(path).metadata.icc_profile is None
    save(path, Image.fromarray(picture(3, np.uint8)), "PNG", icc_profile=GREY_PROFILE)
    assert read_image(path).notes[0].startswith("ICC profile left out: it is for b'GRAY'")


def test_what_jpeg_cannot_hold_is_left_out(tmp_path):
    exif = loaded_exif(exif_block())
    exif.get_ifd(34665)[37510] = bytes(70000)
    exif = exif.tobytes()
    path = tmp_path / "out.jpg"
    notes = write_image(path, picture(3, np.uint8), FileMetadata(exif, dpi=(254000, 254000)))
    assert [note.split(":")[0] for note in notes] == ["EXIF left out", "resolution left out"]
    assert read_image(path).metadata.exif is None


def test_micrograph_scale_without_inches_is_kept(tmp_path):
    array = picture(1, np.uint16)
    description = "ImageJ=1.54\nunit=micron\n"
    tifffile.imwrite(
        tmp_path / "in.tif",
        array,
        description=description,
        metadata=None,
        resolution=(6.25, 6.25),
        resolutionunit=1,
    )
    found = read_image(tmp_path / "in.tif")
    assert found.metadata.dpi is None
    write_image(tmp_path / "out.tif", found.array, found.metadata)
    with tifffile.TiffFile(tmp_path / "out.tif") as file:
        tags = file.pages[0].tags
        assert tags["ImageDescription"].value == description.strip()
        assert tags["XResolution"].value == (25, 4)
        assert tags["ResolutionUnit"].value == 1


def test_resolution_in_centimetres_becomes_inches(tmp_path):
    tifffile.imwrite(
        tmp_path / "in.tif", picture(1, np.uint16), resolution=(100, 100), resolutionunit=3
    )
    assert read_image(tmp_path / "in.tif").metadata.dpi == pytest.approx((254, 254))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "does not exist; check the name"),
        (b"", "is empty (0 bytes); expected PNG, JPEG, TIFF or WebP"),
        (b"hello, this is text", "expected PNG, JPEG, TIFF or WebP, found the bytes b'hello, t'"),
        (b"GIF89a" + bytes(100), "found the bytes b'GIF89a"),
        (b"\x89PNG", "is not an image"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(8) + b"\x08\2\0\0\0", "is damaged"),  # 0 x 0
        (b"II*\0" + bytes(100), "cannot be decoded"),
    ],
)
def test_not_an_image(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "in.png").write_bytes(content)
    refusal(tmp_path / "in.png", expected)
    refusal(tmp_path, "is a directory", "name a file")


def encoded(kind: str) -> bytes:
    """Give the bytes of a small picture in each way that we read."""
    buffer = io.BytesIO()
    if kind == "png16":
        return imagecodecs.png_encode(picture(3, np.uint16))
    if kind.startswith("tiff16"):
        compression = kind.partition("-")[2] or None
        array = picture(3, np.uint16)
        tifffile.imwrite(buffer, array, photometric="rgb", compression=compression, rowsperstrip=8)
        return buffer.getvalue()
    if kind == "tiff-ours":
        with tempfile.TemporaryDirectory() as folder:
            metadata = FileMetadata(exif_block(6), SRGB, (300.0, 150.0))
            write_image(Path(folder, "out.tif"), picture(3, np.uint16), metadata)
            return Path(folder, "out.tif").read_bytes()
    name, _, compression = kind.partition("-")
    # Pillow does not write EXIF into a compressed TIFF.
    options = {"compression": compression} if compression else {"exif": b"Exif\0\0" + exif_block(6)}
    if name == "webp":
        options["lossless"] = True
    image = Image.fromarray(picture(3, np.uint8))
    image.save(buffer, name.upper(), icc_profile=SRGB, **options)
    return buffer.getvalue()


KINDS = ["png", "png16", "jpeg", "webp"]
KINDS += ["tiff", "tiff-tiff_lzw", "tiff16", "tiff16-zlib", "tiff-ours"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [0.2, 0.5, 0.8, 0.98, "end"])
def test_truncated_file(tmp_path, kind, part):
    whole = encoded(kind)
    (tmp_path / "in").write_bytes(whole)
    complete = read_image(tmp_path / "in")
    assert complete.array.shape in ((29, 37, 3), (37, 29, 3))
    length = len(whole) - 12 if part == "end" else int(len(whole) * part)
    (tmp_path / "in").write_bytes(whole[:length])
    if kind == "tiff-tiff_lzw" and length > len(whole) - len(SRGB):
        # Only the profile stands at the end: the picture is complete.
        found = read_image(tmp_path / "in")
        np.testing.assert_array_equal(found.array, complete.array)
        assert found.notes == (DAMAGED,)
    else:
        message = refusal(tmp_path / "in", "get a fresh copy")
        assert re.search("cut short|its start is damaged|lacks some", message)


def test_flipped_bits_of_png_are_noticed(tmp_path):
    for kind in ("png", "png16"):
        content = bytearray(encoded(kind))
        content[len(content) // 2] ^= 0xFF
        (tmp_path / kind).write_bytes(content)
        refusal(tmp_path / kind, "cannot be decoded", "damaged")


def test_tiff_with_missing_strips(tmp_path):
    path = tmp_path / "in.tif"
    tifffile.imwrite(path, picture(3, np.uint16), photometric="rgb", rowsperstrip=8)
    with tifffile.TiffFile(path, mode="r+") as file:
        tag = file.pages[0].tags["StripByteCounts"]
        tag.overwrite((0, *tag.value[1:]))
    refusal(path, "lacks some of its strips")


@pytest.mark.parametrize("name", ["PNG", "WEBP"])
def test_animation(tmp_path, name):
    frames = [Image.fromarray(picture(3, np.uint8) // divisor) for divisor in (1, 2, 3)]
    path = save(tmp_path / "in", frames[0], name, save_all=True, append_images=frames[1:])
    refusal(path, "has 3 frames", "expected a single picture", "separate files")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    "options", [{}, {"imagej": True}, {"bigtiff": True}, {"ome": True}], ids=str
)
def test_several_pages(tmp_path, dtype, options):
    stack = np.stack([picture(1, dtype)] * 3)
    tifffile.imwrite(tmp_path / "in.tif", stack, photometric="minisblack", **options)
    refusal(tmp_path / "in.tif", "has 3 frames or pages", "as an array")


@pytest.mark.parametrize("kind", KINDS)
def test_decompression_bomb(tmp_path, monkeypatch, kind):
    (tmp_path / "in").write_bytes(encoded(kind))
    pixels = 29 * 37
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
    assert read_image(tmp_path / "in").array.size == 3 * pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels // 2 - 20)
    refusal(tmp_path / "in", "is too large", "raise PIL.Image.MAX_IMAGE_PIXELS")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_image(tmp_path / "in").array.size == 3 * pixels


def test_huge_tile_is_refused_before_it_is_allocated(tmp_path):
    path = tmp_path / "in.tif"
    tifffile.imwrite(path, picture(1, np.uint16), tile=(16, 16))
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages[0].tags["TileWidth"].overwrite(60000)
        file.pages[0].tags["TileLength"].overwrite(60000)
    refusal(path, "is too large")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity(tmp_path, bad):
    array = picture(3, np.float32)
    array[3, 4, 1] = bad
    tifffile.imwrite(tmp_path / "in.tif", array, photometric="rgb")
    refusal(tmp_path / "in.tif", "holds 1 NaN or infinite values among 3219", "expected finite")
    with pytest.raises(ImageFileError, match="holds 1 NaN or infinite"):
        write_image(tmp_path / "out.tif", array)
    assert not (tmp_path / "out.tif").exists()


@pytest.mark.parametrize("channels", [2, 5, 6])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_other_channel_counts(tmp_path, channels, dtype):
    array = np.ones((6, 7, channels), dtype)
    options = {"photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(tmp_path / "in.tif", array, **options)
    refusal(tmp_path / "in.tif", f"has {channels} channels", "expected grey, RGB or RGBA")


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.full((4, 4), 1e300), "16 NaN or infinite values"),
        (np.ones((3, 4), np.complex64), "complex64 values"),
        (np.ones((3, 4), np.int32), "int32 values"),
        (np.ones((3, 4), np.int8), "int8 values"),
        (np.ones((3, 4), np.uint64), "uint64 values"),
    ],
    ids=["beyond", "complex", "int32", "int8", "uint64"],
)
def test_other_number_types(tmp_path, array, found):
    tifffile.imwrite(tmp_path / "in.tif", array)
    refusal(tmp_path / "in.tif", found, "expected")


@pytest.mark.parametrize(
    ("kind", "package"),
    [("png16", "imagecodecs"), ("tiff16", "tifffile"), ("tiff16-lzw", "imagecodecs")],
)
def test_missing_package_is_named(tmp_path, monkeypatch, kind, package):
    (tmp_path / "in").write_bytes(encoded(kind))
    monkeypatch.setitem(sys.modules, package, None)
    refusal(tmp_path / "in", f"needs {package}", 'pip install "dfpir[cli]"')


def test_base_packages_suffice_for_the_usual_files(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    for suffix in SUPPORTED_SUFFIXES:
        write_image(tmp_path / f"out{suffix}", picture(3, np.uint8))
        assert read_image(tmp_path / f"out{suffix}").array.shape == (29, 37, 3)
    write_image(tmp_path / "grey.png", picture(1, np.uint16))
    assert read_image(tmp_path / "grey.png").array.dtype == np.uint16
    write_refusal(tmp_path / "deep.tif", picture(3, np.uint16), "needs tifffile", "dfpir[cli]")
    write_refusal(tmp_path / "deep.png", picture(3, np.uint16), "needs imagecodecs", "dfpir[cli]")
    assert not [*tmp_path.glob("deep*")]


def test_import_is_light():
    heavy = {"torch", "PIL", "tifffile", "imagecodecs"}
    code = f"import sys, dfpir.files; print({heavy} & {{*sys.modules}})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


WHOLE = {kind: encoded(kind) for kind in KINDS}


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from(KINDS),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    keep=st.floats(0, 1),
    front=st.booleans(),
)
def test_any_bytes_give_a_picture_or_a_refusal(tmp_path, monkeypatch, kind, changes, keep, front):
    # The limit keeps a header that was changed to a huge picture from filling the memory.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    content = bytearray(WHOLE[kind])
    reach = 600 if front else len(content)  # headers and directories matter most
    for place, value in changes:
        content[int(place * min(reach, len(content)))] = value
    content = content[: max(1, int(keep * len(content)))] if keep < 0.5 else content
    path = tmp_path / "mutated"
    path.write_bytes(content)
    try:
        found = read_image(path)
    except ImageFileError as error:
        checked_message(str(error), path)
    else:
        assert isinstance(found, ImageFile)
        assert found.array.dtype in (np.uint8, np.uint16, np.float32)
        assert found.array.size > 0
        write_image(tmp_path / "again.tif", found.array, found.metadata, overwrite=True)
        np.testing.assert_array_equal(read_image(tmp_path / "again.tif").array, found.array)


@pytest.mark.parametrize("name", ["out.bmp", "out", "out.gif", ".png"])
def test_unsupported_output_suffix(tmp_path, name):
    write_refusal(tmp_path / name, picture(3, np.uint8), "suffix", "expected one of .jpeg, .jpg")


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.ones((4, 4), bool), "bool values"),
        (np.ones((4, 4), np.int32), "int32 values"),
        (np.ones((4, 4), np.complex64), "complex64 values"),
        (np.ones((4, 4, 2), np.uint8), "(4, 4, 2)"),
        (np.ones((4, 4, 5), np.uint8), "(4, 4, 5)"),
        (np.ones((2, 4, 4, 3), np.uint8), "(2, 4, 4, 3)"),
        (np.ones(4, np.uint8), "(4,)"),
        (np.ones((0, 4, 3), np.uint8), "(0, 4, 3)"),
    ],
)
def test_arrays_that_no_file_takes(tmp_path, array, found):
    write_refusal(tmp_path / "out.tif", array, found, "expected")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("suffix", "limit"), [(".webp", 16383), (".jpg", 65500)])
def test_picture_too_long_for_the_format(tmp_path, suffix, limit):
    write_refusal(
        tmp_path / f"out{suffix}",
        np.zeros((1, limit + 1), np.uint8),
        "cannot become",
        "write PNG or TIFF",
    )


def test_existing_output_is_kept_unless_overwrite(tmp_path):
    path = tmp_path / "out.png"
    path.write_bytes(b"precious")
    write_refusal(path, picture(3, np.uint8), "exists already", "allow overwriting")
    assert path.read_bytes() == b"precious"
    write_image(path, picture(3, np.uint8), overwrite=True)
    np.testing.assert_array_equal(read_image(path).array, picture(3, np.uint8))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PermissionError(errno.EACCES, ""), "no permission to write it"),
        (OSError(errno.ENOSPC, ""), "the disk is full; nothing was changed"),
        (KeyboardInterrupt(), None),
    ],
    ids=["denied", "full", "interrupted"],
)
@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_failed_write_leaves_the_old_output(tmp_path, monkeypatch, step, error, expected):
    def fail(*_args, **_options):
        raise error

    path = tmp_path / "out.png"
    path.write_bytes(b"precious")
    monkeypatch.setattr(os, step, fail)
    with pytest.raises((ImageFileError, KeyboardInterrupt), match=expected):
        write_image(path, picture(3, np.uint8), overwrite=True)
    assert path.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [path]


def test_unreadable_file(tmp_path, monkeypatch):
    def denied(*_args, **_options):
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "in.png").write_bytes(b"secret")
    monkeypatch.setattr(Path, "read_bytes", denied)
    refusal(tmp_path / "in.png", "no permission to read", "choose another")


def test_missing_folder_and_directory_as_output(tmp_path):
    write_refusal(tmp_path / "none" / "out.png", picture(3, np.uint8), "does not exist", "create")
    (tmp_path / "folder.png").mkdir()
    write_refusal(tmp_path / "folder.png", picture(3, np.uint8), "is a directory")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask modes")
def test_output_follows_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        write_image(tmp_path / "out.png", picture(3, np.uint8))
    finally:
        os.umask(previous)
    assert (tmp_path / "out.png").stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_link_stays_a_link(tmp_path):
    (tmp_path / "real.png").write_bytes(b"old")
    (tmp_path / "link.png").symlink_to("real.png")
    write_image(tmp_path / "link.png", picture(3, np.uint8), overwrite=True)
    assert (tmp_path / "link.png").is_symlink()
    np.testing.assert_array_equal(read_image(tmp_path / "real.png").array, picture(3, np.uint8))


def test_find_images(tmp_path):
    names = ["b.PNG", "a.jpg", "c.tiff", "notes.txt", ".hidden.png", "sub/d.webp", "sub/e.jpeg"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    flat = [tmp_path / name for name in ("a.jpg", "b.PNG", "c.tiff")]
    below = [tmp_path / "sub" / name for name in ("d.webp", "e.jpeg")]
    assert find_images([tmp_path]) == flat
    assert find_images(tmp_path, recursive=True) == flat + below
    assert find_images([tmp_path / "notes.txt", tmp_path, tmp_path / "a.jpg"]) == [
        tmp_path / "notes.txt",
        *flat,
    ]
    assert find_images([]) == []


def test_find_images_refuses(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ImageFileError, match=r"directory without images: none of its 1 entries"):
        find_images([tmp_path])
    with pytest.raises(ImageFileError, match=r"none: does not exist"):
        find_images([tmp_path / "none"])
