"""Read and write PNG, JPEG, TIFF and WebP files without losing depth or metadata.

A picture keeps its 8 or 16 bits (or float32) from file to file, together with EXIF, ICC profile and
resolution. Every refusal is an `ImageFileError` of one line. Pillow does nearly all the work; what
it does not hold, colour of more than 8 bits, imagecodecs (PNG) and tifffile (TIFF) read and write.
All three are imported only when a file needs them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib
import importlib.util
import io
import os
import secrets
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "SUPPORTED_SUFFIXES",
    "FileMetadata",
    "ImageFile",
    "ImageFileError",
    "find_images",
    "image_size",
    "read_image",
    "write_image",
]

_FORMATS = {".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG"}
_FORMATS |= {".tif": "TIFF", ".tiff": "TIFF", ".webp": "WebP"}

SUPPORTED_SUFFIXES = tuple(_FORMATS)
"""File name endings, lower case, that `find_images` looks for and `write_image` accepts."""

_ORIENTATION, _X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT = 274, 282, 283, 296
_EXIF, _GPS, _INTEROPERABILITY = 34665, 34853, 40965
# Document name, description, make, model, software, date, artist, host, copyright.
_TEXTS = (269, 270, 271, 272, 305, 306, 315, 316, 33432)
# The TIFF and EXIF fields that describe a picture; others tell how one file stores its pixels.
_DESCRIPTIVE = {*_TEXTS, _ORIENTATION, _X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT, _EXIF, _GPS}
_LONGEST_EXIF = 65527  # bytes in a JPEG
_LARGE = "if you trust it, cut it into parts or raise PIL.Image.MAX_IMAGE_PIXELS in Python"


class ImageFileError(ValueError):
    """A file that cannot be read or written; the message is one line with what to do."""


@dataclasses.dataclass(frozen=True, slots=True)
class FileMetadata:
    """What travels from an input file to an output file besides the pixels.

    Parameters
    ----------
    exif
        EXIF as a TIFF structure, without the thumbnail; its orientation is 1: pixels are upright.
    icc_profile
        ICC profile of the pixels' colour space.
    dpi
        Resolution along x and y in pixels per inch, both positive.
    """

    exif: bytes | None = None
    icc_profile: bytes | None = None
    dpi: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class ImageFile:
    """A picture as it was read from a file.

    Parameters
    ----------
    array
        (H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA; uint8 0-255, uint16 0-65535, or finite
        float32 in the file's own range. Upright: EXIF orientation is applied.
    metadata
        What `write_image` puts into the output besides the pixels.
    notes
        Conversions that reading needed, in words for the user.
    """

    array: NDArray[Any]
    metadata: FileMetadata
    notes: tuple[str, ...] = ()


def read_image(path: str | os.PathLike[str]) -> ImageFile:
    """Read a PNG, JPEG, TIFF or WebP file; its contents decide which, not its name.

    Parameters
    ----------
    path
        File to read.

    Returns
    -------
    ImageFile
        Pixels with the file's depth. CMYK and palette become RGB, grey with alpha RGBA, 1 bit
        8 bits, other floats float32; `notes` says so.

    Raises
    ------
    ImageFileError
        If the file is missing, unreadable, empty, cut short, damaged, of another format, has
        several frames or pages, more pixels than Pillow's limit, NaN or infinite values, other
        number types, 2 or more than 4 channels, or if an optional package is needed and missing.

    Examples
    --------
    >>> picture = read_image("photo.jpg")  # doctest: +SKIP
    >>> picture.array.dtype, picture.metadata.dpi  # doctest: +SKIP
    (dtype('uint8'), (300.0, 300.0))
    """
    source = Path(path)
    notes: list[str] = []
    with _reporting(source, "read", notes):
        if source.is_dir():
            _refuse("is a directory, not a file; name a file")
        data = source.read_bytes()
        if not data:
            _refuse("is empty (0 bytes); expected PNG, JPEG, TIFF or WebP; get a fresh copy")
        image = _decoded(data, notes)
    return dataclasses.replace(image, notes=tuple(notes))  # damage is noted at the end


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return the height and width of a picture file by its first bytes, without decoding it.

    Parameters
    ----------
    path
        File to look at.

    Returns
    -------
    tuple of int
        In pixels, as stored; EXIF orientation is not applied.

    Raises
    ------
    ImageFileError
        If the file is missing, unreadable or not PNG, JPEG, TIFF or WebP.

    Examples
    --------
    >>> image_size("photo.jpg")  # doctest: +SKIP
    (3000, 4000)
    """
    from PIL import Image

    source = Path(path)
    with _reporting(source, "read", []), source.open("rb") as file:
        start = file.read(4)
        file.seek(0)
        if start in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            with _optional("tifffile", "the size of a TIFF").TiffFile(file) as tiff:
                page = tiff.pages.first
                return int(page.imagelength), int(page.imagewidth)
        with Image.open(file, formats=["PNG", "JPEG", "WEBP"]) as image:
            return image.height, image.width


def write_image(
    path: str | os.PathLike[str],
    array: NDArray[Any],
    metadata: FileMetadata | None = None,
    *,
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Write a picture whole or not at all; the suffix of `path` decides the format.

    PNG, TIFF and WebP are lossless; JPEG is written at quality 95 without chroma subsampling.

    Parameters
    ----------
    path
        Output ending in one of `SUPPORTED_SUFFIXES`. Its folder must exist.
    array
        (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); uint8 0-255, uint16 0-65535, or float. Floats
        go to TIFF unchanged as float32; to PNG as 16 bits, to JPEG and WebP as 8 bits, 0-1 being
        black to white and the rest clipped.
    metadata
        EXIF, ICC profile and resolution to put into the file.
    overwrite
        Whether an existing file may be replaced.

    Returns
    -------
    tuple of str
        Conversions that the format needed, in words for the user; empty where there were none.

    Raises
    ------
    ImageFileError
        If the suffix is not supported, the output exists and `overwrite` is False, the array has
        another shape or dtype, holds NaN or infinity or is too large for the format, an optional
        package is needed and missing, or the file cannot be written (no permission, disk full).

    Examples
    --------
    >>> import numpy as np
    >>> write_image("ramp.png", np.arange(256, dtype=np.uint8)[None])  # doctest: +SKIP
    ()
    """
    destination = Path(path)
    notes: list[str] = []
    with _reporting(destination, "write", notes):
        name = _format_to_write(destination, overwrite)
        pixels = np.asarray(array)
        pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
        pixels = _as_held_by(name, _checked(pixels, notes), notes)
        data = _encoded(name, pixels, metadata or FileMetadata(), notes)
        # A link stays a link: the file it points to is replaced.
        _replace_file(destination.resolve(), data)
    return tuple(notes)


def find_images(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], recursive: bool = False
) -> list[Path]:
    """List the image files that files and directories stand for.

    Parameters
    ----------
    paths
        Files, taken as they are whatever their suffix, and directories, of which the files with
        one of `SUPPORTED_SUFFIXES` (in any case) are taken, sorted; hidden files are left out.
    recursive
        Whether to look into the directories' subdirectories.

    Returns
    -------
    list of Path
        In the order given, each file once.

    Raises
    ------
    ImageFileError
        If a path does not exist or a directory cannot be read or holds no supported file.

    Examples
    --------
    >>> find_images(["photo.jpg", "scans"])  # doctest: +SKIP
    [PosixPath('photo.jpg'), PosixPath('scans/page1.tif'), PosixPath('scans/page2.tif')]
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        with _reporting(path, "read", []):
            path.stat()  # raises where there is nothing
            images = _images_in(path, recursive) if path.is_dir() else [path]
        found.update(dict.fromkeys(images))
    return list(found)


def _images_in(folder: Path, recursive: bool) -> list[Path]:
    entries = sorted(folder.rglob("*") if recursive else folder.iterdir())
    images = [entry for entry in entries if entry.suffix.lower() in _FORMATS and entry.is_file()]
    images = [entry for entry in images if not entry.name.startswith(".")]
    if not images:
        _refuse(
            f"is a directory without images: none of its {len(entries)} entries ends in "
            f"{', '.join(SUPPORTED_SUFFIXES)}; name another directory or the files"
        )
    return images


def _refuse(reason: str) -> NoReturn:
    raise ImageFileError(reason)


@contextlib.contextmanager
def _reporting(path: Path, action: str, notes: list[str]) -> Iterator[None]:
    """Make whatever fails one line that starts with the path, and Pillow's warnings a note."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    except Exception as error:  # decoders raise nearly anything on bytes they did not expect
        if action == "write" and not isinstance(error, ImageFileError | OSError):
            raise
        message = " ".join(f"{path}: {_explained(error, action)}".split())
        raise ImageFileError(message) from error
    if any(warning.category is UserWarning for warning in caught):
        notes.append("damaged metadata (EXIF, ICC profile or resolution) left out")


def _explained(error: Exception, action: str) -> str:
    advice = {
        errno.ENOENT: "does not exist; check the name",
        errno.EACCES: f"no permission to {action} it; change its permissions or choose another",
        errno.ENOSPC: "the disk is full; nothing was changed; free some space and try again",
    }
    if isinstance(error, ImageFileError):
        return str(error)
    if isinstance(error, OSError) and error.errno:
        return advice.get(error.errno, f"cannot {action} it ({error.strerror})")
    if type(error).__name__ == "DecompressionBombError":
        return f"is too large: {error} {_LARGE}"
    found = f"{type(error).__name__}: {error}"
    return f"cannot be decoded ({found}); it is damaged or cut short, get a fresh copy"


def _optional(package: str, reason: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        message = f'{reason} needs {package}, which is missing; run: pip install "dfpir[cli]"'
        raise ImageFileError(message) from error


def _checked(pixels: NDArray[Any], notes: list[str]) -> NDArray[Any]:
    """Give (H, W), (H, W, 3) or (H, W, 4) of uint8, uint16 or finite float32, or refuse."""
    dtype, shape = pixels.dtype.newbyteorder("="), pixels.shape
    if dtype.kind == "f" and dtype != np.float32:
        notes.append(f"{dtype.name} converted to float32")
        dtype = np.dtype(np.float32)
    if dtype not in (np.uint8, np.uint16, np.float32):
        _refuse(
            f"holds {dtype.name} values; expected 8-bit or 16-bit unsigned integers or floats; "
            "convert them first"
        )
    if 0 in shape or not (len(shape) == 2 or shape[2:] in ((3,), (4,))):
        _refuse(
            f"has the shape {shape}; expected pixels, grey (H, W), RGB (H, W, 3) or RGBA "
            "(H, W, 4); select or merge channels first"
        )
    with np.errstate(over="ignore"):
        pixels = np.ascontiguousarray(pixels, dtype)
    bad = pixels.size - int(np.isfinite(pixels).sum())
    if bad:
        _refuse(
            f"holds {bad} NaN or infinite values among {pixels.size}; expected finite numbers; "
            "replace them, for example with numpy.nan_to_num"
        )
    return pixels


def _decoded(data: bytes, notes: list[str]) -> ImageFile:
    from PIL import Image, UnidentifiedImageError

    try:
        image: Any = Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "TIFF", "WEBP"])
    except UnidentifiedImageError:
        if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
            return _by_tifffile(data, notes)
        _refuse(
            "is not an image we read, or its start is damaged; expected PNG, JPEG, TIFF or WebP, "
            f"found the bytes {data[:8]!r}; convert it to PNG or get a fresh copy"
        )
    if image.format == "TIFF":
        tags = image.tag_v2
        eight_bits = max(tags.get(258, (1,))) <= 8 and set(tags.get(339, (1,))) == {1}
        if not eight_bits or tags.get(277, 1) != len(image.getbands()):
            return _by_tifffile(data, notes)
    return _by_pillow(image, data, notes)


def _by_pillow(image: Any, data: bytes, notes: list[str]) -> ImageFile:
    frames, turned = getattr(image, "n_frames", 1), 1
    if image.format == "MPO":
        notes.append(f"first of {frames} pictures in the JPEG taken, the others left out")
    elif frames > 1:
        _refuse_frames(frames)
    if image.format == "TIFF":
        _refuse_gaps([*image.tag_v2.get(279, ()), *image.tag_v2.get(325, ())])
        turned = image.tag_v2.get(_ORIENTATION, 1)  # by Pillow, which then forgets it
    image.load()
    if image.format == "PNG" and b"IEND" not in data:
        _refuse("is cut short: the PNG's end is missing; get a fresh copy")
    exif, orientation = _loaded_exif(image.getexif, notes)
    if image.format == "PNG" and data[24] == 16 and not image.mode.startswith("I"):
        pixels = _optional("imagecodecs", "a 16-bit colour PNG").png_decode(data)
        if pixels.shape[2] == 2:
            notes.append("grey with alpha converted to RGBA")
            pixels = pixels[..., [0, 0, 0, 1]]
    else:
        pixels = np.asarray(_in_plain_mode(image, notes))
        pixels = pixels.astype(np.uint16) if image.mode.startswith("I") else pixels
    pixels = _checked(_turned(pixels, orientation), notes)
    profile = _matching_profile(image.info.get("icc_profile"), pixels, notes)
    # Pillow gives a TIFF without a resolution 1 pixel per inch.
    dpi = image.info.get("dpi") if image.format != "TIFF" else None
    dpi = _dpi(dpi, exif, max(turned, orientation))
    block = exif.tobytes()[6:] if len(exif) else None  # behind "Exif", 0, 0
    return ImageFile(pixels, FileMetadata(block, profile, dpi))


def _in_plain_mode(image: Any, notes: list[str]) -> Any:
    transparent = image.has_transparency_data
    if image.mode in ("RGBA", "I", "I;16") or (image.mode in ("L", "RGB") and not transparent):
        return image
    names = {"1": "1 bit", "P": "palette", "PA": "palette", "LA": "grey with alpha"}
    names |= {"L": "transparent colour", "RGB": "transparent colour"}
    target = "RGBA" if transparent else "L" if image.mode == "1" else "RGB"
    wanted = "8-bit grey" if target == "L" else target
    notes.append(f"{names.get(image.mode, image.mode)} converted to {wanted}")
    return image.convert(target)


def _refuse_frames(count: int) -> NoReturn:
    _refuse(
        f"has {count} frames or pages; expected a single picture; "
        "save them as separate files, or restore the stack as an array"
    )


def _refuse_gaps(lengths: Iterable[int]) -> None:
    # tifffile fills missing parts with zeros, Pillow with whatever is there.
    if 0 in lengths:
        _refuse("lacks some of its strips or tiles of pixels; get a fresh copy")


def _by_tifffile(data: bytes, notes: list[str]) -> ImageFile:
    from PIL import Image

    tifffile = _optional("tifffile", "a TIFF of this kind")
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        if len(file.pages) > 1:
            _refuse_frames(len(file.pages))
        page = file.pages[0]
        _refuse_layout(page)
        if page.compression not in (1, 8, 32946) or page.predictor not in (1, 2):
            _optional("imagecodecs", "a TIFF compressed like this")
        pixels, profile = page.asarray(), page.tags.valueof(34675)

    def load() -> Image.Exif:
        exif = Image.Exif()
        exif.endian, exif.bigtiff = file.byteorder, file.is_bigtiff
        exif.load_from_fp(io.BytesIO(data), page.offset)
        return exif

    exif, orientation = _loaded_exif(load, notes)
    pixels = np.moveaxis(pixels, 0, -1) if page.axes == "SYX" else pixels
    pixels = _checked(_turned(pixels, orientation), notes)
    profile = _matching_profile(profile, pixels, notes)
    block = exif.tobytes()[6:] if len(exif) else None
    return ImageFile(pixels, FileMetadata(block, profile, _dpi(None, exif, orientation)))


def _refuse_layout(page: Any) -> None:
    """Refuse, before anything is allocated, a bomb and what would be read in another sense."""
    from PIL import Image

    limit = 2 * (Image.MAX_IMAGE_PIXELS or float("inf"))
    if max(page.imagewidth * page.imagelength, page.tilewidth * page.tilelength) > limit:
        _refuse(f"is too large: more than {limit} pixels; {_LARGE}")
    _refuse_gaps(page.databytecounts)
    samples, extra = page.samplesperpixel, tuple(map(int, page.extrasamples))
    plain = page.photometric in (1, 2) and page.axes in ("YX", "YXS", "SYX")
    if not plain or (samples, extra) not in ((1, ()), (3, ()), (4, (2,))):
        _refuse(
            f"has {samples} channels in a TIFF layout we do not read (photometric "
            f"{int(page.photometric)}, extra samples {extra}, axes {page.axes}); expected grey, "
            "RGB or RGBA, 0 as black, alpha marked as such; convert it first"
        )


def _turned(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _loaded_exif(load: Callable[[], Image.Exif], notes: list[str]) -> tuple[Image.Exif, int]:
    """Load EXIF, empty if it is damaged, and the orientation, which is then 1 in it."""
    from PIL import Image

    orientation = 1
    try:
        exif = load()
        exif.bigtiff = False  # as it will be written
        orientation = int(exif.get(_ORIENTATION, 1))
        for tag in set(exif) - _DESCRIPTIVE:
            del exif[tag]
        for tag in {_EXIF, _GPS} & set(exif):
            exif.get_ifd(tag).pop(_INTEROPERABILITY, None)
        for tag in set(_TEXTS) & set(exif):
            # Pillow would write letters beyond ASCII as question marks.
            text = exif[tag]
            exif[tag] = text if isinstance(text, bytes) else str(text).encode("latin-1", "replace")
        if _ORIENTATION in exif:
            exif[_ORIENTATION] = 1
        if len(exif.tobytes()) <= _LONGEST_EXIF:
            return exif, orientation
        notes.append(f"EXIF left out: it has more than {_LONGEST_EXIF} bytes")
    except Exception as error:  # Pillow raises nearly anything on bytes it did not expect
        warnings.warn(f"EXIF: {error}", stacklevel=1)  # for _reporting
    return Image.Exif(), orientation


def _dpi(dpi: Any, exif: Image.Exif, orientation: int = 1) -> tuple[float, float] | None:
    if dpi is None and exif.get(_RESOLUTION_UNIT, 2) in (2, 3):
        inch = 2.54 if exif.get(_RESOLUTION_UNIT) == 3 else 1
        dpi = [inch * exif.get(tag, 0) for tag in (_X_RESOLUTION, _Y_RESOLUTION)]
    try:
        x, y = (float(number) for number in dpi)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    if not all(1e-3 <= number <= 1e7 for number in (x, y)):  # nor NaN
        return None
    return (y, x) if orientation in (5, 6, 7, 8) else (x, y)


def _matching_profile(profile: Any, pixels: NDArray[Any], notes: list[str]) -> bytes | None:
    """Drop a profile of another colour space: with it a viewer would show nonsense."""
    found, wanted = (profile or b"")[16:20], b"GRAY" if pixels.ndim == 2 else b"RGB "
    if profile and found != wanted:
        notes.append(f"ICC profile left out: it is for {found!r}, the pixels are {wanted!r}")
    return profile if profile and found == wanted else None


def _format_to_write(path: Path, overwrite: bool) -> str:
    name = _FORMATS.get(path.suffix.lower())
    if name is None:
        _refuse(f"has the suffix {path.suffix!r}; expected one of {', '.join(SUPPORTED_SUFFIXES)}")
    if path.is_dir():
        _refuse("is a directory, not a file; name a file")
    if path.exists() and not overwrite:
        _refuse("exists already and was left as it is; choose another output or allow overwriting")
    if not path.parent.is_dir():
        _refuse(f"the folder {path.parent} does not exist; create it first")
    return name


def _as_held_by(name: str, pixels: NDArray[Any], notes: list[str]) -> NDArray[Any]:
    """Convert depth and channels to what the format holds."""
    if name == "JPEG" and pixels.shape[2:] == (4,):
        notes.append("alpha left out: JPEG has none")
        pixels = pixels[..., :3]
    if name == "WebP" and pixels.ndim == 2:
        notes.append("grey written as RGB: WebP has no grey")
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    bits = 8 if name in ("JPEG", "WebP") else 16
    if pixels.dtype.kind == "f" and name != "TIFF":
        low, high = float(pixels.min()), float(pixels.max())
        clipped = f", values from {low:g} to {high:g} clipped to 0-1" if low < 0 or high > 1 else ""
        notes.append(f"float values converted to {bits} bits for {name}{clipped}")
        scaled = np.clip(pixels, 0, 1).astype(np.float64) * (2**bits - 1)
        pixels = np.rint(scaled).astype(f"uint{bits}")
    elif pixels.dtype == np.uint16 and bits == 8:
        notes.append(f"16 bits converted to 8 bits for {name}")
        pixels = np.rint(pixels / 257.0).astype(np.uint8)
    return np.ascontiguousarray(pixels)


def _encoded(name: str, pixels: NDArray[Any], metadata: FileMetadata, notes: list[str]) -> bytes:
    from PIL import Image

    def load() -> Image.Exif:
        exif = Image.Exif()
        exif.load(metadata.exif or b"")
        return exif

    exif, _ = _loaded_exif(load, notes)
    dpi = _dpi(metadata.dpi, Image.Exif())
    if dpi and name in ("TIFF", "WebP"):
        exif[_X_RESOLUTION], exif[_Y_RESOLUTION], exif[_RESOLUTION_UNIT] = *dpi, 2
    if dpi and name == "JPEG" and max(dpi) > 65535:
        notes.append("resolution left out: JPEG holds at most 65535 pixels per inch")
        dpi = None
    profile = _matching_profile(metadata.icc_profile, pixels, notes)
    if name == "TIFF" and pixels.dtype != np.uint8:
        return _deep_tiff(pixels, exif, profile, notes)
    if name == "PNG" and pixels.dtype != np.uint8 and pixels.ndim == 3:
        return _deep_png(pixels, exif, profile, dpi)
    options: dict[str, Any] = {"exif": exif if len(exif) else None, "dpi": dpi}
    options["icc_profile"] = profile
    options |= {"quality": 95, "subsampling": "4:4:4"} if name == "JPEG" else {}
    # exact: keep the colours below transparent pixels as well
    options |= {"lossless": True, "exact": True} if name == "WebP" else {}
    buffer = io.BytesIO()
    try:
        given = {key: value for key, value in options.items() if value is not None}
        Image.fromarray(pixels).save(buffer, name, **given)
    except Exception as error:  # encoders raise nearly anything on what they cannot hold
        height, width = pixels.shape[:2]
        _refuse(f"{width} x {height} pixels cannot become {name} ({error}); write PNG or TIFF")
    return buffer.getvalue()


def _deep_png(pixels: NDArray[Any], exif: Any, profile: bytes | None, dpi: Any) -> bytes:
    from PIL.PngImagePlugin import putchunk

    encoded: bytes = _optional("imagecodecs", "a 16-bit colour PNG").png_encode(pixels)
    buffer = io.BytesIO()
    buffer.write(encoded[:33])  # the header; imagecodecs writes no metadata to follow it
    if profile:
        putchunk(buffer, b"iCCP", b"ICC Profile\0\0", zlib.compress(profile))
    if dpi:
        putchunk(buffer, b"pHYs", struct.pack(">IIB", *(round(n / 0.0254) for n in dpi), 1))
    if len(exif):
        putchunk(buffer, b"eXIf", exif.tobytes()[6:])
    return buffer.getvalue() + encoded[33:]


def _deep_tiff(
    pixels: NDArray[Any], exif: Image.Exif, profile: bytes | None, notes: list[str]
) -> bytes:
    tifffile = _optional("tifffile", "a TIFF of more than 8 bits")
    if _EXIF in exif or _GPS in exif:
        notes.append("exposure and place (EXIF) left out: a TIFF of more than 8 bits keeps texts")
    # Tags of a micrograph may hold pixels per no unit.
    unit = exif.get(_RESOLUTION_UNIT) if exif.get(_RESOLUTION_UNIT) in (1, 2, 3) else 1
    resolution = _dpi((exif.get(_X_RESOLUTION), exif.get(_Y_RESOLUTION)), exif) or (1, 1)
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        pixels,
        photometric="minisblack" if pixels.ndim == 2 else "rgb",
        extrasamples=["unassalpha"] if pixels.shape[2:] == (4,) else None,
        compression="adobe_deflate",
        predictor=pixels.dtype.kind == "u" and importlib.util.find_spec("imagecodecs") is not None,
        iccprofile=profile,
        resolution=resolution,
        resolutionunit=unit,
        software=False,
        metadata=None,
        extratags=[(tag, 2, None, exif[tag], True) for tag in _TEXTS if tag in exif],
    )
    return buffer.getvalue()


def _replace_file(path: Path, data: bytes) -> None:
    # Not tempfile: its files are for the owner only, these follow the umask.
    temporary = path.with_name(f".dfpir-{secrets.token_hex(8)}.part")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
