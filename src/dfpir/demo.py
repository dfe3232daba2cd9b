"""Bundled pictures degraded in each way, diagnosed, restored and laid out on a contact sheet."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dfpir.degradation import CLEAN, Degradation, Diagnosis
from dfpir.files import write_image
from dfpir.model import Progress
from dfpir.pixels import to_array, to_pixels
from dfpir.record import describe, package_version
from dfpir.restorer import Restorer
from dfpir.synthesis import degrade

SCHEMA = 1
SIDE = 288
"""Side of every picture of the demo in pixels."""

CONTACT_SHEET = "contact-sheet.png"
REPORT = "report.json"

Picture = NDArray[np.uint8]


class DemoError(ValueError):
    """The demo cannot run; the message is one line with what to do."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A picture that comes with scikit-image, and what is done to it.

    Attributes
    ----------
    name : str
        Of the function of `skimage.data`.
    box : tuple of int
        Left, top and side in pixels of the square that is taken; it is shrunk to `SIDE`.
    degradation : Degradation
    seed : int
        Chosen by eye, so that the degradation is plainly there and the scene still is.
    """

    name: str
    box: tuple[int, int, int]
    degradation: Degradation
    seed: int


# All are in the public domain, CC0 or without known restrictions, and come with the wheel.
SUBJECTS = (
    Subject("retina", (0, 250, 900), Degradation.NOISE_15, 0),
    Subject("immunohistochemistry", (0, 0, 512), Degradation.NOISE_25, 1),
    Subject("chelsea", (80, 6, 288), Degradation.NOISE_50, 2),
    Subject("rocket", (200, 0, 427), Degradation.RAIN, 41),
    Subject("camera", (60, 0, 452), Degradation.HAZE, 36),
    Subject("astronaut", (60, 0, 288), Degradation.BLUR, 54),
    Subject("coffee", (110, 20, 370), Degradation.LOW_LIGHT, 70),
)
"""One picture for each degradation, in the order of the columns."""

# Dusk, haze on the horizon and a soft lens are in the other pictures from the start.
CLEAN_SUBJECTS = ("immunohistochemistry", "chelsea", "astronaut", "coffee")
"""The pictures that are also shown to the classifier as they are."""


@dataclass(frozen=True, slots=True)
class DegradedResult:
    """What became of a degraded picture.

    Attributes
    ----------
    picture : str
    degradation : Degradation
        What was done to it.
    diagnosis : Diagnosis
        What was found.
    before, after : float
        PSNR in dB, over RGB and 8 bits, of the degraded picture and of the restored one.
    """

    picture: str
    degradation: Degradation
    diagnosis: Diagnosis
    before: float
    after: float

    @property
    def named_rightly(self) -> bool:
        """Whether exactly this degradation was found, the noise level included."""
        return (
            self.diagnosis.verdict == "degraded" and self.diagnosis.degradation is self.degradation
        )

    def as_dict(self) -> dict[str, object]:
        """Return plain values, ready for JSON; what is infinite becomes None."""
        before, after = (
            round(psnr, 4) if math.isfinite(psnr) else None for psnr in (self.before, self.after)
        )
        return {
            "picture": self.picture,
            "degradation": self.degradation.value,
            "diagnosis": describe(self.diagnosis),
            "confidence": round(self.diagnosis.confidence, 4),
            "named_rightly": self.named_rightly,
            "psnr_degraded": before,
            "psnr_restored": after,
        }


@dataclass(frozen=True, slots=True)
class CleanResult:
    """What became of a picture that nothing had been done to."""

    picture: str
    diagnosis: Diagnosis
    unchanged: bool

    def as_dict(self) -> dict[str, object]:
        """Return plain values, ready for JSON."""
        return {
            "picture": self.picture,
            "diagnosis": describe(self.diagnosis),
            "confidence": round(self.diagnosis.confidence, 4),
            "unchanged": self.unchanged,
        }


@dataclass(frozen=True, slots=True)
class DemoReport:
    """What the demo found and where it put its pictures.

    Attributes
    ----------
    output : Path
        The folder.
    degraded : tuple of DegradedResult
    clean : tuple of CleanResult
    weights, weights_sha256 : str
        File or name, and hash; empty for a network that was handed over.
    """

    output: Path
    degraded: tuple[DegradedResult, ...]
    clean: tuple[CleanResult, ...]
    weights: str
    weights_sha256: str

    @property
    def summary(self) -> str:
        """One line: how often the diagnosis was right."""
        rightly = sum(each.named_rightly for each in self.degraded)
        alone = sum(each.unchanged for each in self.clean)
        return (
            f"{rightly} of {len(self.degraded)} degradations named rightly, "
            f"{alone} of {len(self.clean)} clean pictures left alone"
        )

    def lines(self) -> list[str]:
        """Return the report for a terminal: an aligned table and the summary."""
        names = [each.picture for each in self.degraded] + [each.picture for each in self.clean]
        picture = max(map(len, names))
        rows = [
            f"{'picture':<{picture}}  {'degraded by':<11}  {'found':<17}  {'sure':>5}  "
            f"{'degraded':>8}  {'restored':>8}"
        ]
        for each in self.degraded:
            rows.append(
                f"{each.picture:<{picture}}  {each.degradation.value:<11}  "
                f"{found(each.diagnosis):<17}  {each.diagnosis.confidence:>5.0%}  "
                f"{each.before:>5.2f} dB  {each.after:>5.2f} dB"
            )
        for clean in self.clean:
            done = "left alone" if clean.unchanged else "changed"
            rows.append(
                f"{clean.picture:<{picture}}  {'-':<11}  {found(clean.diagnosis):<17}  "
                f"{clean.diagnosis.confidence:>5.0%}  {done:>18}"
            )
        return [*rows, "", f"Pictures: {self.output / CONTACT_SHEET}", f"{self.summary}."]

    def as_dict(self) -> dict[str, object]:
        """Return plain values, ready for JSON."""
        return {
            "schema": SCHEMA,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "dfpir": package_version(),
            "torch": torch.__version__,
            "weights": {"name": self.weights, "sha256": self.weights_sha256},
            "summary": self.summary,
            "degraded": [each.as_dict() for each in self.degraded],
            "clean": [each.as_dict() for each in self.clean],
        }


def run_demo(
    output: Path,
    *,
    restorer: Restorer | None = None,
    on_progress: Progress | None = None,
) -> DemoReport:
    """Degrade scikit-image's bundled pictures in each way, diagnose and restore them.

    The folder gets ``contact-sheet.png``, ``report.json``, and in ``clean/``, ``degraded/`` and
    ``restored/`` a PNG (8-bit RGB, 288x288) named after each degradation. Those of an earlier demo
    are replaced, other files left alone.

    Parameters
    ----------
    output : Path
        The folder, made if it is not there.
    restorer : Restorer, optional
        What to demonstrate; the bundled default on the best device if not given.
    on_progress : callable, optional
        ``on_progress(done, total)`` in pictures; raising from it cancels.

    Returns
    -------
    DemoReport

    Raises
    ------
    DemoError
        If scikit-image is missing, or `output` is a file.
    ImageFileError, OSError
        If the pictures cannot be written.

    Examples
    --------
    >>> report = run_demo(Path("dfpir-demo"))  # doctest: +SKIP
    >>> print(report.lines()[-1])  # doctest: +SKIP
    7 of 7 degradations named rightly, 4 of 4 clean pictures left alone.
    """
    originals = {subject.name: original(subject) for subject in SUBJECTS}
    make_folders(output)
    restorer = restorer or Restorer()
    total = len(SUBJECTS) + len(CLEAN_SUBJECTS)
    degraded: list[DegradedResult] = []
    clean: list[CleanResult] = []
    columns: list[Column] = []
    for subject in SUBJECTS:
        result, column = demonstrate(restorer, subject, originals[subject.name])
        degraded.append(result)
        columns.append(column)
        if on_progress is not None:
            on_progress(len(degraded), total)
    for name in CLEAN_SUBJECTS:
        done = restorer.restore(originals[name])
        unchanged = np.array_equal(np.asarray(done.image), originals[name])
        clean.append(CleanResult(name, done.diagnosis, unchanged))
        if on_progress is not None:
            on_progress(len(degraded) + len(clean), total)
    report = DemoReport(
        output,
        tuple(degraded),
        tuple(clean),
        # Where on a disk the file lies is nobody's business.
        Path(restorer.weights).name,
        restorer.weights_sha256,
    )
    write_outputs(report, columns)
    return report


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the contact sheet, from top to bottom; pictures are (SIDE, SIDE, 3)."""

    result: DegradedResult
    degraded: Picture
    restored: Picture
    clean: Picture


def bundled_pictures() -> Any:
    """Return `skimage.data`.

    Raises
    ------
    DemoError
        If scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError:
        message = 'The demo needs scikit-image, which is missing; run: pip install "dfpir[cli]"'
        raise DemoError(message) from None
    return data


def original(subject: Subject) -> Picture:
    """Return a bundled picture's square as (SIDE, SIDE, 3)."""
    left, top, side = subject.box
    picture = Image.fromarray(getattr(bundled_pictures(), subject.name)()).convert("RGB")
    square = picture.crop((left, top, left + side, top + side))
    return np.array(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def make_folders(output: Path) -> None:
    """Make the output folder and those in it.

    Raises
    ------
    DemoError
        If one of the names is a file's.
    """
    for folder in (output, *(output / name for name in ("clean", "degraded", "restored"))):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            message = f"{folder}: there is a file in the way of this folder; name another output."
            raise DemoError(message) from None


def demonstrate(
    restorer: Restorer, subject: Subject, clean: Picture
) -> tuple[DegradedResult, Column]:
    """Degrade a picture, and let the restorer find out and restore it."""
    pixels, form = to_pixels(clean)
    generator = torch.Generator().manual_seed(subject.seed)
    degraded = to_array(degrade(pixels, subject.degradation, generator), form)
    done = restorer.restore(degraded)
    restored = np.asarray(done.image)
    result = DegradedResult(
        subject.name,
        subject.degradation,
        done.diagnosis,
        psnr(degraded, clean),
        psnr(restored, clean),
    )
    return result, Column(result, degraded, restored, clean)


def psnr(picture: Picture, clean: Picture) -> float:
    """Return the peak signal-to-noise ratio in dB of 8-bit pictures, infinite for equal ones."""
    error = float(np.mean(np.square(picture.astype(np.float64) - clean)))
    return 10 * math.log10(255**2 / error) if error else math.inf


def found(diagnosis: Diagnosis) -> str:
    """Return what was found in one or two words."""
    name = diagnosis.degradation.value if diagnosis.degradation else CLEAN
    return f"unsure: {name}" if diagnosis.verdict == "unsure" else name


def write_outputs(report: DemoReport, columns: list[Column]) -> None:
    """Write the pictures, the contact sheet and the report."""
    for column in columns:
        name = f"{column.result.degradation.value}.png"
        write_image(report.output / "clean" / name, column.clean, overwrite=True)
        write_image(report.output / "degraded" / name, column.degraded, overwrite=True)
        write_image(report.output / "restored" / name, column.restored, overwrite=True)
    sheet = draw_contact_sheet(report, columns)
    write_image(report.output / CONTACT_SHEET, np.asarray(sheet), overwrite=True)
    text = json.dumps(report.as_dict(), indent=2) + "\n"
    (report.output / REPORT).write_text(text, encoding="utf-8")


# Measures of the contact sheet in pixels, its fonts and colours.
MARGIN = 56
GUTTER = 124
GAP = 20
TITLE_HEIGHT = 118
HEADING_HEIGHT = 72
CAPTION_HEIGHT = 46
TITLE_SIZE, HEADING_SIZE, TEXT_SIZE = 40, 23, 21
PAPER, INK, FAINT, RIGHT, WRONG = "#ffffff", "#16202c", "#66717f", "#1c7a45", "#b3261e"
ROWS = ("degraded", "restored", "original")


def draw_contact_sheet(report: DemoReport, columns: list[Column]) -> Image.Image:
    """Lay the pictures out: a column for each degradation, degraded, restored and original."""
    sheet = Image.new("RGB", sheet_size(len(columns)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw_title(draw, report)
    for row, name in enumerate(ROWS):
        middle = row_top(row) + SIDE // 2
        write(draw, (MARGIN, middle), name, TEXT_SIZE, FAINT, "lm")
    for number, column in enumerate(columns):
        draw_column(sheet, draw, column, MARGIN + GUTTER + number * (SIDE + GAP))
    return sheet


def sheet_size(columns: int) -> tuple[int, int]:
    """Return width and height of a contact sheet."""
    width = 2 * MARGIN + GUTTER + columns * SIDE + (columns - 1) * GAP
    # Under the last row stands no caption: the margin follows the picture.
    return width, row_top(len(ROWS) - 1) + SIDE + MARGIN


def row_top(row: int) -> int:
    """Return where the pictures of a row begin."""
    return MARGIN + TITLE_HEIGHT + HEADING_HEIGHT + row * (SIDE + CAPTION_HEIGHT)


def draw_title(draw: ImageDraw.ImageDraw, report: DemoReport) -> None:
    """Write the title and the summary, from the left margin."""
    title = "Degraded, diagnosed and restored automatically"
    write(draw, (MARGIN, MARGIN), title, TITLE_SIZE, INK, "la")
    words = f"{report.summary}. Weights: {report.weights}" if report.weights else report.summary
    write(draw, (MARGIN, MARGIN + 58), f"{words}.", TEXT_SIZE, FAINT, "la")


def draw_column(sheet: Image.Image, draw: ImageDraw.ImageDraw, column: Column, left: int) -> None:
    """Draw what was done and found, the three pictures, and the PSNRs under two of them."""
    result = column.result
    label = result.degradation.label
    top = row_top(0)
    write(draw, (left, top - 46), label[0].upper() + label[1:], HEADING_SIZE, INK, "ls")
    colour = RIGHT if result.named_rightly else WRONG
    write(draw, (left, top - 16), verdict(result.diagnosis), TEXT_SIZE, colour, "ls")
    for row, picture in enumerate((column.degraded, column.restored, column.clean)):
        sheet.paste(Image.fromarray(picture), (left, row_top(row)))
    for row, caption in enumerate(captions(result)):
        write(draw, (left, row_top(row) + SIDE + 8), caption, TEXT_SIZE, INK, "la")


def verdict(diagnosis: Diagnosis) -> str:
    """Return what stands over a column: what was found, and how surely."""
    words = f"{found(diagnosis)}, {diagnosis.confidence:.0%}"
    return words if diagnosis.verdict == "unsure" else f"found: {words}"


def captions(result: DegradedResult) -> tuple[str, str]:
    """Return what stands under the degraded and under the restored picture."""
    gain = result.after - result.before
    return f"{result.before:.1f} dB", f"{result.after:.1f} dB ({gain:+z.1f})"


def write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    size: int,
    colour: str,
    anchor: str,
) -> None:
    """Write a line with the one font that comes with Pillow; it has no arrows and no Greek."""
    draw.text(place, text, fill=colour, font=ImageFont.load_default(size), anchor=anchor)
