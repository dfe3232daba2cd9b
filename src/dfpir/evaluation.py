"""Scores of a network on public test pictures, by the protocol of the paper's tables."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dfpir import classical, weights
from dfpir.degradation import Degradation
from dfpir.files import ImageFileError, find_images, read_image
from dfpir.model import Progress
from dfpir.pixels import to_pixels
from dfpir.record import package_version
from dfpir.restorer import AUTO, Restorer
from dfpir.routing import check_steps

SCHEMA = 1
MULTIPLE = 16
"""Sides are cropped to a multiple of this, whatever the network itself needs."""

PROTOCOL = (
    "Whole images without tiles, the degradation told; input and target centre-cropped to "
    "multiples of 16; PSNR and SSIM over RGB, or over grey where the set is grey, on the float "
    "output clipped to 0..1 and not quantised; SSIM of scikit-image with its default window; "
    "added noise is clipped and rounded to 8 bits, one draw per seed, sigma and image."
)

UNTOLD = (
    "Untold: the classifier decides, and where it is not sure the input stands as it is; named: "
    "the fraction of inputs it was sure of and right about, all noise being one."
)
CLASSICAL = (
    "Classical: the best of scikit-image's and kornia's filters for it, told likewise, "
    "its parameters tuned on validation pictures."
)

Picture = NDArray[np.uint8]
"""(H, W, 3), or (H, W) for a grey set."""


class EvaluationError(ValueError):
    """The pictures cannot be evaluated; the message is one line with what to do."""


@dataclass(frozen=True, slots=True)
class ImageSet:
    """One of the folders that `evaluate` knows.

    Attributes
    ----------
    name : str
        Of the folder.
    degradation : Degradation or None
        What the network is told; None where it is the noise nearest to the level that is added, or
        estimated on each input.
    noise : tuple of float
        Standard deviations in grey levels of the noise that the clean pictures of the folder get
        here, one row of the result for each; empty where the folder holds pairs.
    grey : bool
        Whether the pictures have one channel.
    note : str
        What has to be said wherever a score of this set stands; may be empty.
    """

    name: str
    degradation: Degradation | None = None
    noise: tuple[float, ...] = ()
    grey: bool = False
    note: str = ""

    @property
    def tasks(self) -> tuple[tuple[Degradation | None, float | None], ...]:
        """What is told and which noise is added, for each row of the result."""
        if self.noise:
            return tuple((Degradation.nearest_noise(sigma), sigma) for sigma in self.noise)
        return ((self.degradation, None),)


IMAGE_SETS = (
    # 60 and 75 are beyond what the network can be told.
    ImageSet("CBSD68", noise=(15.0, 25.0, 50.0, 60.0, 75.0)),
    ImageSet("Rain100L", Degradation.RAIN),
    ImageSet(
        "SOTS_indoor",
        Degradation.HAZE,
        note="is not the SOTS-outdoor of the published tables.",
    ),
    ImageSet(
        "GoPro",
        Degradation.BLUR,
        note="is GoPro-derived, a few pictures only: not comparable with published GoPro scores.",
    ),
    ImageSet(
        "LowLight",
        Degradation.LOW_LIGHT,
        note="is real low light, but not LOL: not comparable with published LOL scores.",
    ),
    ImageSet(
        "W2S",
        grey=True,
        note="is grey fluorescence, told as the noise nearest to the level estimated on its input.",
    ),
)
"""The folders that `evaluate` knows, in the order of the rows."""


@dataclass(frozen=True, slots=True)
class Score:
    """Means over the pictures of a set.

    Attributes
    ----------
    psnr : float
        dB; infinite if an image equals its target.
    ssim : float
        -1..1.
    """

    psnr: float
    ssim: float


PAPER_CITATION = (
    "Tian et al., CVPR 2025, the three-degradation setting, as printed in the authors' README"
)
PAPER: dict[tuple[str, float | None], tuple[int, Score]] = {
    ("CBSD68", 15.0): (68, Score(34.14, 0.935)),
    ("CBSD68", 25.0): (68, Score(31.47, 0.893)),
    ("CBSD68", 50.0): (68, Score(28.25, 0.806)),
    ("Rain100L", None): (100, Score(38.65, 0.982)),
}
"""Number of pictures and published scores, only where the pictures are the paper's."""


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """Scores on one set of pictures that suffer alike.

    Attributes
    ----------
    name : str
        Of the set.
    told : Degradation or None
        What the network was told; None where the noise level was estimated per picture.
    sigma : float or None
        Standard deviation in grey levels of 0..255 of the noise that was added; None if none was.
    images : int
        Number of pictures.
    given, restored : Score
        Of the degraded inputs, and of what the network made of them.
    seconds : float
        Mean time of restoring a picture, reading and scoring not counted.
    blind : Score or None
        Of what the network made of them untold, as the classifier decided; None if not asked for.
    named : float or None
        Fraction of the inputs whose degradation the classifier was sure of and right about, all
        levels of noise counting as one.
    classical : Score or None
        Of the best classical tool, told the same; None if not asked for.
    """

    name: str
    told: Degradation | None
    sigma: float | None
    images: int
    given: Score
    restored: Score
    seconds: float
    blind: Score | None = None
    named: float | None = None
    classical: Score | None = None

    @property
    def tool(self) -> str | None:
        """The classical tool; None if none was asked for."""
        if self.classical is None:
            return None
        return classical.BEST[self.told or Degradation.NOISE_25].name

    @property
    def paper(self) -> Score | None:
        """The published score of the same pictures, None where there is none."""
        images, score = PAPER.get((self.name, self.sigma), (0, None))
        return score if images == self.images else None

    def as_dict(self) -> dict[str, object]:
        """Return plain values, ready for JSON; what is infinite becomes None."""
        return {
            "set": self.name,
            "sigma": self.sigma,
            "told": self.told.value if self.told else "noise, level estimated",
            "images": self.images,
            "input": plain(self.given),
            "restored": plain(self.restored),
            "seconds": round(self.seconds, 4),
            "blind": plain(self.blind) if self.blind else None,
            "named": self.named,
            "classical": plain(self.classical) if self.classical else None,
            "tool": self.tool,
            "paper": plain(self.paper) if self.paper else None,
        }


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The scores of one set of weights.

    Attributes
    ----------
    rows : tuple of EvaluationRow
    weights, weights_sha256 : str
        File or name, and hash; empty for a network that was handed over.
    seed : int
        Of the added noise.
    limit : int or None
        At most this many pictures of a set were taken, all if None.
    date : str
        ISO 8601, UTC.
    most_steps : int
        Of "auto", where pictures were restored untold too; otherwise 0.
    """

    rows: tuple[EvaluationRow, ...]
    weights: str
    weights_sha256: str
    seed: int
    limit: int | None
    date: str
    most_steps: int = 0

    def as_dict(self) -> dict[str, object]:
        """Return plain values, ready for JSON."""
        return {
            **provenance(SCHEMA, self.date),
            "weights": {"name": self.weights, "sha256": self.weights_sha256},
            "most_steps": self.most_steps,
            "protocol": PROTOCOL,
            "seed": self.seed,
            "limit": self.limit,
            "paper": PAPER_CITATION,
            "rows": [row.as_dict() for row in self.rows],
        }

    def markdown(self) -> str:
        """Return a table for people, with the notes that belong to its sets."""
        return table(self.as_dict())


def table(scores: Mapping[str, Any], *, timed: bool = True) -> str:
    """Return what `Evaluation.as_dict` holds as a Markdown table with its notes.

    Parameters
    ----------
    scores : mapping
    timed : bool
        Whether to show the time per image, which says little about another machine.
    """
    rows = scores["rows"]
    columns = {
        "input": [cell(row["input"]) for row in rows],
        "classical": [cell(row.get("classical"), row.get("tool")) for row in rows],
        "restored": [cell(row["restored"]) for row in rows],
        "restored, untold": [cell(row.get("blind")) for row in rows],
        "named": ["" if row.get("named") is None else f"{row['named']:.0%}" for row in rows],
        "paper": [cell(row.get("paper")) for row in rows],
        "s/image": [f"{row['seconds']:.2f}" if timed else "" for row in rows],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    lines = [
        f"| set | n | {' | '.join(shown)} |",
        f"| --- | ---: | {' | '.join(['---:'] * len(shown))} |",
    ]
    for row, cells in zip(rows, zip(*shown.values(), strict=True), strict=True):
        sigma = "" if row["sigma"] is None else f", sigma {row['sigma']:.0f}"
        lines.append(f"| {row['set']}{sigma} | {row['images']} | {' | '.join(cells)} |")
    lines += ["", "Cells are PSNR in dB / SSIM."]
    if "restored, untold" in shown:
        lines.append(UNTOLD)
    if "classical" in shown:
        lines.append(CLASSICAL)
    lines.append(f"Weights: {scores['weights']['name'] or 'a network handed over'}. {PROTOCOL}")
    if scores["limit"] is not None:
        lines.append(f"Only the first {scores['limit']} pictures of each set: not a full score.")
    if "paper" in shown:
        lines.append(f"Paper: {PAPER_CITATION}.")
    named = {row["set"] for row in rows}
    notes = [
        f"- {each.name} {each.note}" for each in IMAGE_SETS if each.note and each.name in named
    ]
    return "\n".join([*lines, "", *notes] if notes else lines)


def plain(score: Score) -> dict[str, float | None]:
    """Return a score rounded for a file; JSON has no infinity."""
    return {
        name: round(value, 4) if math.isfinite(value) else None
        for name, value in asdict(score).items()
    }


def cell(score: Mapping[str, float | None] | None, tool: str | None = None) -> str:
    """Return a score as a cell of a table, with the name of the tool that earned it."""
    if score is None:
        return ""
    psnr, ssim = (math.inf if score[name] is None else score[name] for name in ("psnr", "ssim"))
    return f"{psnr:.2f} / {ssim:.3f}" + (f" ({tool})" if tool else "")


def scikit_image(part: str) -> Any:
    """Return a module of scikit-image, such as "metrics".

    Raises
    ------
    EvaluationError
        If it is not installed.
    """
    try:
        return import_module(f"skimage.{part}")
    except ImportError:
        message = 'Evaluation needs scikit-image, which is missing; run: pip install "dfpir[cli]"'
        raise EvaluationError(message) from None


def check_limit(limit: int | None) -> None:
    """Refuse to take no picture of a set.

    Raises
    ------
    EvaluationError
    """
    if limit is not None and limit < 1:
        message = f"limit is {limit}; expected at least 1 picture, or None for all."
        raise EvaluationError(message)


def provenance(schema: int, date: str) -> dict[str, object]:
    """Return what every file of scores begins with: its schema, when and by what it was made."""
    return {
        "schema": schema,
        "date": date,
        "dfpir": package_version(),
        "torch": torch.__version__,
        "classifier_sha256": weights.file_hash(weights.resolve(role="classifier")),
    }


def evaluate(
    data: Path,
    *,
    restorer: Restorer | None = None,
    sets: Sequence[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    blind: int = 0,
    classically: bool = False,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Score a network on folders of public pictures by the protocol of the paper's tables.

    Parameters
    ----------
    data : Path
        A folder with any of the sub-folders of `IMAGE_SETS`. CBSD68 holds clean 8-bit RGB
        pictures, (H, W, 3); the others hold ``input/`` and ``target/`` with equal names, 8-bit
        RGB, for W2S 8-bit grey. All are at least 16x16.
    restorer : Restorer, optional
        What to score; the bundled default on the best device if not given.
    sets : sequence of str, optional
        Sub-folders to take; by default all there are.
    limit : int, optional
        Take the first `limit` pictures of each set, by name; at least 1.
    seed : int
        Of the added noise, not negative. The draw of a picture depends on `seed`, the sigma and
        the picture's place in its folder, on nothing else.
    blind : int
        Also restore untold, as "auto" does with this many steps at the most; 0 does not.
    classically : bool
        Also restore by the best classical tool, see `dfpir.classical`.
    on_progress : callable, optional
        ``on_progress(done, total)`` in pictures; raising from it cancels.

    Returns
    -------
    Evaluation

    Raises
    ------
    EvaluationError, ImageFileError
        If scikit-image is missing, or the folders or pictures are not as described.
    ValueError
        If `blind` is out of range.

    References
    ----------
    .. [1] Tian et al., "Degradation-Aware Feature Perturbation for All-in-One Image
       Restoration", CVPR 2025, section 4.

    Examples
    --------
    >>> evaluation = evaluate(Path("eval"), sets=["Rain100L"])  # doctest: +SKIP
    >>> print(evaluation.markdown())  # doctest: +SKIP
    """
    check_limit(limit)
    if blind:
        check_steps(blind)
    scikit_image("metrics")
    # Everything that can be wrong with the folders is found before the first picture is restored.
    pairs = {each: list_pairs(data / each.name, each)[:limit] for each in chosen_sets(data, sets)}
    restorer = restorer or Restorer()
    for each in pairs:
        for told, _ in each.tasks:
            if told and told not in restorer.model.config.degradations:
                message = (
                    f"The weights were not trained for {told.value!r}, as which {each.name} is "
                    "restored; name the sets to take."
                )
                raise EvaluationError(message)
    total = sum(len(found) * len(each.tasks) for each, found in pairs.items())
    done = 0

    def picture_done() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, total)

    rows = tuple(
        score_set(
            restorer,
            each,
            told,
            sigma,
            read_pairs(found, each, sigma, seed),
            blind,
            classically,
            picture_done,
        )
        for each, found in pairs.items()
        for told, sigma in each.tasks
    )
    return Evaluation(
        rows,
        # Where on a disk the file lies is nobody's business.
        Path(restorer.weights).name,
        restorer.weights_sha256,
        seed,
        limit,
        datetime.now(UTC).isoformat(timespec="seconds"),
        blind,
    )


def chosen_sets(data: Path, names: Sequence[str] | None) -> list[ImageSet]:
    """Return the sets asked for, or all whose folders are there, in the order of `IMAGE_SETS`.

    Raises
    ------
    EvaluationError
        If a name is not known, a folder is missing, or there is none at all.
    """
    known = ", ".join(each.name for each in IMAGE_SETS)
    if not data.is_dir():
        message = f"{data}: not a folder; expected one with any of the sub-folders {known}."
        raise EvaluationError(message)
    wanted = names
    if wanted is None:
        # One that is misspelt would otherwise be left out without a word.
        entries = sorted(entry for entry in data.iterdir() if entry.is_dir())
        wanted = [entry.name for entry in entries if not entry.name.startswith(".")]
    if not wanted:
        message = f"{data}: no set to evaluate; expected any of the sub-folders {known}."
        raise EvaluationError(message)
    for name in wanted:
        if name not in {each.name for each in IMAGE_SETS}:
            message = (
                f"{data / name}: not a set that can be evaluated; expected any of {known}. "
                "Rename it, or name the sets to take."
            )
            raise EvaluationError(message)
        if not (data / name).is_dir():
            message = f"{data / name}: no such folder; take the sets that {data} has."
            raise EvaluationError(message)
    return [each for each in IMAGE_SETS if each.name in wanted]


def list_pairs(folder: Path, image_set: ImageSet) -> list[tuple[Path, Path]]:
    """Return the (input, target) files of a set, by name; both are the same where noise is added.

    Raises
    ------
    EvaluationError
        If there are no pictures, or one has no partner.
    """
    if image_set.noise:
        return [(path, path) for path in list_pictures(folder)]
    sides = [folder / "input", folder / "target"]
    named = [{path.name: path for path in list_pictures(side)} for side in sides]
    inputs, targets = named
    for side, here, there in ((sides[1], inputs, targets), (sides[0], targets, inputs)):
        alone = sorted(here.keys() - there.keys())
        if alone:
            more = f" (nor have {len(alone) - 1} more)" if len(alone) > 1 else ""
            message = (
                f"{here[alone[0]]}: has no partner {side / alone[0]}{more}; expected the same "
                "names in input/ and target/. Add or remove files."
            )
            raise EvaluationError(message)
    return [(inputs[name], targets[name]) for name in sorted(inputs)]


def list_pictures(folder: Path) -> list[Path]:
    """Return the pictures of a folder, sorted by name.

    Raises
    ------
    EvaluationError
        If it is missing or has none.
    """
    if not folder.is_dir():
        message = f"{folder}: no such folder; expected pictures in it."
        raise EvaluationError(message)
    try:
        return sorted(find_images([folder]))
    except ImageFileError as error:
        raise EvaluationError(str(error)) from None


def score_set(
    restorer: Restorer,
    image_set: ImageSet,
    told: Degradation | None,
    sigma: float | None,
    pairs: Iterator[tuple[Picture, Picture]],
    blind: int,
    classically: bool,
    picture_done: Callable[[], None],
) -> EvaluationRow:
    """Restore the pictures of a set, all told the same, and average their scores.

    Parameters
    ----------
    told : Degradation or None
        None estimates the level of the noise on each input.
    sigma : float or None
        Of the noise that was added.
    pairs : iterator of tuple of ndarray
        Input and target.
    blind : int
        Steps of "auto" at the most; 0 leaves it out.
    classically : bool
        Whether to score the classical tool too.
    picture_done : callable
        Called after each picture.
    """
    scores: dict[str, list[Score]] = {"given": [], "restored": [], "blind": [], "classical": []}
    named, seconds = [], 0.0
    for given, target in pairs:
        level = sigma if told else noise_level(given)
        degradation = told or Degradation.nearest_noise(level or 0.0)
        start = time.perf_counter()
        restored, _ = restore_whole(restorer, given, degradation)
        seconds += time.perf_counter() - start
        scores["given"].append(compare(given, target))
        scores["restored"].append(compare(restored, target))
        if blind:
            untold, found = restore_whole(restorer, given, AUTO, most_steps=blind)
            named.append(is_right(found, degradation))
            scores["blind"].append(compare(untold, target))
        if classically:
            filtered = classical.restore(given / np.float32(255), degradation, level)
            scores["classical"].append(compare(filtered, target))
        picture_done()
    count = len(scores["given"])
    return EvaluationRow(
        image_set.name,
        told,
        sigma,
        count,
        mean(scores["given"]),
        mean(scores["restored"]),
        seconds / count,
        mean(scores["blind"]) if blind else None,
        round(sum(named) / count, 4) if blind else None,
        mean(scores["classical"]) if classically else None,
    )


def is_right(found: Degradation | None, truth: Degradation) -> bool:
    """Whether a degradation was named rightly; all levels of noise are one."""
    if found is None or (found.sigma is None) != (truth.sigma is None):
        return False
    return found is truth or found.sigma is not None


def read_pairs(
    pairs: Sequence[tuple[Path, Path]], image_set: ImageSet, sigma: float | None, seed: int
) -> Iterator[tuple[Picture, Picture]]:
    """Yield the cropped inputs and targets of a set.

    Raises
    ------
    EvaluationError, ImageFileError
        If a file is no such picture, or the two of a pair differ in size.
    """
    for index, (input_path, target_path) in enumerate(pairs):
        target = read_picture(target_path, grey=image_set.grey)
        if sigma is not None:
            clean = cropped(target)
            yield with_noise(clean, sigma, seed, index), clean
            continue
        given = read_picture(input_path, grey=image_set.grey)
        if given.shape != target.shape:
            sizes = [f"{each.shape[1]}x{each.shape[0]}" for each in (given, target)]
            message = (
                f"{input_path}: is {sizes[0]}, but its target is {sizes[1]}; expected equal sizes. "
                "Replace the pair."
            )
            raise EvaluationError(message)
        yield cropped(given), cropped(target)


def read_picture(path: Path, *, grey: bool) -> Picture:
    """Read an 8-bit picture as (H, W, 3), or as (H, W) where the set is grey.

    Raises
    ------
    EvaluationError, ImageFileError
        If it cannot be read, is smaller than 16x16, or of another kind.
    """
    array = read_image(path).array
    # WebP has no grey pictures: they come as three equal channels.
    if grey and array.ndim == 3 and np.array_equal(array, array[..., :1].repeat(3, axis=2)):
        array = array[..., 0]
    if array.dtype != np.uint8 or (array.ndim != 2 if grey else array.shape[2:] != (3,)):
        expected = "grey" if grey else "RGB"
        message = (
            f"{path}: has dtype {array.dtype} and shape {array.shape}; expected an 8-bit "
            f"{expected} picture. Convert it."
        )
        raise EvaluationError(message)
    if min(array.shape[:2]) < MULTIPLE:
        message = (
            f"{path}: is {array.shape[1]}x{array.shape[0]}; expected at least "
            f"{MULTIPLE}x{MULTIPLE}. Remove it."
        )
        raise EvaluationError(message)
    return array


def cropped(picture: Picture) -> Picture:
    """Return the middle of a picture, with sides that are multiples of 16."""
    height, width = picture.shape[:2]
    top, left = height % MULTIPLE // 2, width % MULTIPLE // 2
    return picture[
        top : top + height // MULTIPLE * MULTIPLE, left : left + width // MULTIPLE * MULTIPLE
    ]


def with_noise(clean: Picture, sigma: float, seed: int, index: int) -> Picture:
    """Add Gaussian noise of `sigma` grey levels, clip and round to 8 bits.

    The draw depends on the numbers given and the shape, not on what was drawn before.
    """
    generator = np.random.default_rng((seed, round(sigma), index))
    noisy = clean + sigma * generator.standard_normal(clean.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def noise_level(picture: Picture) -> float:
    """Estimate the standard deviation of the noise in grey levels of 0..255.

    It is the median absolute diagonal detail of a Daubechies-2 wavelet over that of a standard
    normal variable: what scikit-image's `estimate_sigma` returns, apart from the picture's rim.
    That function needs PyWavelets, which does not come with scikit-image.

    References
    ----------
    .. [1] Donoho and Johnstone, "Ideal spatial adaptation by wavelet shrinkage", Biometrika 1994.
    """
    root = math.sqrt(3)
    lowpass = np.array([1 + root, 3 + root, 3 - root, 1 - root]) / (4 * math.sqrt(2))
    highpass = lowpass[::-1] * [1, -1, 1, -1]
    windows = np.lib.stride_tricks.sliding_window_view(picture, (4, 4), axis=(0, 1))[::2, ::2]
    details = np.einsum("...ij,i,j->...", windows, highpass, highpass)
    # Flat, saturated regions carry no noise to be measured.
    details = details[details != 0]
    return float(np.median(np.abs(details)) / 0.6744897501960817) if details.size else 0.0


def restore_whole(
    restorer: Restorer, given: Picture, degradation: str | Degradation, *, most_steps: int = 1
) -> tuple[NDArray[Any], Degradation | None]:
    """Restore a whole picture, told or not.

    Returns
    -------
    restored : ndarray of float32, of the same shape
        Clipped to 0..1.
    found : Degradation or None
        What was surely found, or told; None where nothing was.
    """
    pixels, _ = to_pixels(given)
    done = restorer.restore_pixels(pixels, degradation, most_steps=most_steps)
    assert isinstance(done.image, torch.Tensor)
    restored = done.image[0].float().clamp(0, 1).permute(1, 2, 0).numpy()
    if given.ndim == 2:
        restored = restored.mean(axis=-1)
    return restored, done.diagnosis.degradation if done.diagnosis.verdict == "degraded" else None


def compare(image: NDArray[Any], target: Picture) -> Score:
    """Score an image against its target; integers count as 0..255, floats as 0..1."""
    first, second = (
        each / np.float32(255) if each.dtype == np.uint8 else each for each in (image, target)
    )
    error = float(np.mean(np.square(first - second, dtype=np.float64)))
    ssim = scikit_image("metrics").structural_similarity(
        first, second, data_range=1, channel_axis=-1 if target.ndim == 3 else None
    )
    return Score(-10 * math.log10(error) if error else math.inf, float(ssim))


def mean(scores: Sequence[Score]) -> Score:
    """Return the mean of each measure, as the published tables do."""
    count = len(scores)
    return Score(
        sum(score.psnr for score in scores) / count, sum(score.ssim for score in scores) / count
    )
