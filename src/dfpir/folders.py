"""Many picture files: planned first, journalled as they are done, resumed where they stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfpir.degradation import Degradation
from dfpir.files import (
    SUPPORTED_SUFFIXES,
    ImageFileError,
    find_images,
    image_size,
    read_image,
    write_image,
)
from dfpir.model import Progress
from dfpir.pixels import ValueRange
from dfpir.record import package_version
from dfpir.restorer import Restorer, memory_needed
from dfpir.weights import file_hash

JOURNAL = ".dfpir-journal.jsonl"
"""Name of the file in an output folder that says what has been done there, one line an event."""

TRIAL_SIDE = 256
"""Side in pixels of the picture that `estimate` restores to learn the speed."""


class PlanError(ValueError):
    """The files cannot be planned as asked; one line says why and what to do."""


@dataclass(frozen=True, slots=True)
class Job:
    """One picture to restore: the file to read and the file to write."""

    source: Path
    target: Path

    @property
    def comparison(self) -> Path:
        """Where before and after go side by side, if that is asked for."""
        return self.target.with_name(f"{self.target.stem}-compare.png")

    def outputs(self, *, compare: bool) -> tuple[Path, ...]:
        """Return all files that are to be written."""
        return (self.target, self.comparison) if compare else (self.target,)


@dataclass(frozen=True, slots=True)
class Settings:
    """What is asked for, the same for all files.

    Attributes
    ----------
    degradation : str or Degradation
    strength : float
        0..1.
    ensemble : bool
        Whether to take the mean over eight flips and turns.
    most_steps : int
        Degradations removed one after the other, at the most.
    compare : bool
        Whether to write before and after side by side too.
    overwrite : bool
        Whether files that exist may be replaced.
    resume : bool
        Whether to leave out what the journal says has been done, or has failed.
    retry_failed : bool
        With `resume`, whether to try again what has failed.
    """

    degradation: str | Degradation = "auto"
    strength: float = 1.0
    ensemble: bool = False
    most_steps: int = 1
    compare: bool = False
    overwrite: bool = False
    resume: bool = False
    retry_failed: bool = False

    def key(self, restorer: Restorer) -> str:
        """Return a digest of all that decides what an output looks like, besides its input."""
        degradation = Degradation.from_name(self.degradation) if self.degradation != "auto" else ""
        facts = [
            degradation.value if isinstance(degradation, Degradation) else "auto",
            self.strength,
            self.ensemble,
            self.most_steps,
            self.compare,
            restorer.weights_sha256,
            str(restorer.dtype),
            package_version(),
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one file.

    Attributes
    ----------
    job : Job
    status : {"restored", "unchanged", "skipped", "failed"}
        "unchanged" is a picture that was left as it is, and written out as such.
    text : str
        For people, one line: what was found and done, or why it failed.
    notes : tuple of str
        Conversions that reading and writing needed.
    seconds : float
    """

    job: Job
    status: str
    text: str
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(slots=True)
class Report:
    """What became of all files so far."""

    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failed(self) -> list[Outcome]:
        """The files that could not be done."""
        return [each for each in self.outcomes if each.status == "failed"]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            "dfpir": package_version(),
            "seconds": round(self.seconds, 3),
            "counts": dict(Counter(each.status for each in self.outcomes)),
            "files": [
                {
                    "source": str(each.job.source),
                    "target": str(each.job.target),
                    "status": each.status,
                    "text": each.text,
                    "notes": list(each.notes),
                    "seconds": round(each.seconds, 3),
                }
                for each in self.outcomes
            ],
        }


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the files will take.

    Attributes
    ----------
    pictures : int
    unreadable : tuple of str
        One line for each file that is no picture.
    megapixels : float
    seconds : float
        Expected, at the speed measured on a picture of 256 x 256 pixels.
    memory : int
        Bytes that the largest picture takes if it is restored whole. Where they are not free on a
        graphics card, it is restored in strips.
    """

    pictures: int
    unreadable: tuple[str, ...]
    megapixels: float
    seconds: float
    memory: int


def plan(inputs: Sequence[Path], output: Path, *, recursive: bool = False) -> list[Job]:
    """Name the output of every input.

    Parameters
    ----------
    inputs : sequence of Path
        Pictures and folders of pictures.
    output : Path
        A picture's name where there is one input, else a folder. What lies below it is not taken
        for an input.
    recursive : bool
        Whether to look into the folders' subfolders, which the output then has as well.

    Returns
    -------
    list of Job

    Raises
    ------
    PlanError, ImageFileError
        If several inputs would go to one file, or an input does not exist or is an empty folder.
    """
    places: dict[Path, Path] = {}  # source -> place below the output
    for given in inputs:
        found = find_images([given], recursive=recursive)
        for path in found:
            inside = path != given and output.resolve() in path.resolve().parents
            if not inside:
                places[path] = path.relative_to(given) if path != given else Path(path.name)
    if not places:
        message = f"all pictures found lie below {output} itself; name another output folder"
        raise PlanError(message)
    if output.suffix.lower() in SUPPORTED_SUFFIXES and not output.is_dir():
        if len(places) > 1:
            message = (
                f"{output} names one picture, but there are {len(places)} inputs; name a folder"
            )
            raise PlanError(message)
        return [Job(next(iter(places)), output)]
    jobs: dict[Path, Job] = {}
    for source, place in places.items():
        job = Job(source, output / place)
        if job.target.suffix.lower() not in SUPPORTED_SUFFIXES:
            message = (
                f"{source} does not end in one of {', '.join(sorted(SUPPORTED_SUFFIXES))}, which "
                "says how to write it; restore it alone, to an -o that does"
            )
            raise PlanError(message)
        if job.target in jobs:
            other = jobs[job.target].source
            message = f"{other} and {source} would both become {job.target}; restore them apart"
            raise PlanError(message)
        jobs[job.target] = job
    return list(jobs.values())


class Journal:
    """What has been done in an output folder, as lines that are added and never changed.

    A file is begun, then done or failed. A line that a crash cut short counts for nothing.

    Parameters
    ----------
    folder : Path
        The output folder; nothing is written before the first event.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / JOURNAL
        self.latest: dict[str, dict[str, Any]] = {}
        text = ""
        if self.path.is_file():
            text = self.path.read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                event = json.loads(line)
                self.latest[event["target"]] = event
        self.torn = bool(text) and not text.endswith("\n")

    def of(self, job: Job) -> dict[str, Any]:
        """Return the latest event of a job's target; empty if there is none."""
        return self.latest.get(self.name(job), {})

    def name(self, job: Job) -> str:
        """Return how a target is called here: its place in the folder, whatever the system."""
        return job.target.relative_to(self.folder).as_posix()

    def add(self, job: Job, state: str, **facts: object) -> None:
        """Write down that a job has been "begun", "done" or has "failed"."""
        event = {"target": self.name(job), "state": state, "source": str(job.source), **facts}
        self.latest[self.name(job)] = event
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            # A line of its own even after one that was cut short.
            file.write("\n" * self.torn + json.dumps(event) + "\n")
            # An output is on the disk before it has its name; what is said of it must be too.
            file.flush()
            os.fsync(file.fileno())
        self.torn = False


def digest(path: Path) -> str:
    """Return the SHA-256 of a file; empty where it cannot be read."""
    try:
        return file_hash(path)
    except OSError:
        return ""


def check(jobs: Sequence[Job], settings: Settings, journal: Journal | None) -> None:
    """Make sure that nothing will be replaced unasked.

    Raises
    ------
    PlanError
        If an output exists that no journal claims as begun or done by an earlier run, or a
        comparison would take the place of an input or of what another picture becomes.
    """
    if settings.compare:
        taken = {place.resolve() for job in jobs for place in (job.source, job.target)}
        for job in jobs:
            if job.comparison.resolve() in taken:
                message = (
                    f"{job.comparison}, before and after of {job.source}, would replace another "
                    "picture; leave out --compare, or restore them apart"
                )
                raise PlanError(message)
            taken.add(job.comparison.resolve())
    for job in jobs:
        known = settings.resume and journal is not None and journal.of(job).get("state")
        for output in job.outputs(compare=settings.compare):
            if settings.overwrite or not output.exists():
                continue
            if job.source.resolve() == output.resolve():
                message = f"{output} is an input and would be replaced; add --overwrite, or "
                message += "another -o"
                raise PlanError(message)
            if not known:
                message = f"{output} exists; add --overwrite to replace it, or name another -o"
                raise PlanError(message)


def is_same(event: Mapping[str, Any], source_hash: str, key: str) -> bool:
    """Say whether an event of a job was of this input and with these settings."""
    return (event.get("input_sha256"), event.get("settings")) == (source_hash, key)


def is_done(job: Job, event: Mapping[str, Any], source_hash: str, key: str) -> bool:
    """Say whether the latest event of a job is that it was done, from this input and as asked."""
    return is_same(event, source_hash, key) and event["state"] == "done" and job.target.exists()


def left_to_do(
    jobs: Sequence[Job], restorer: Restorer, settings: Settings, journal: Journal | None
) -> list[Job]:
    """Return the jobs that `restore_files` would not skip as done before."""
    if journal is None or not settings.resume:
        return list(jobs)
    key = settings.key(restorer)
    return [job for job in jobs if not is_done(job, journal.of(job), digest(job.source), key)]


def restore_files(
    jobs: Sequence[Job],
    restorer: Restorer,
    settings: Settings,
    *,
    journal: Journal | None = None,
    progress_of: Callable[[Job], contextlib.AbstractContextManager[Progress]],
) -> Iterator[Outcome]:
    """Restore files one after the other; a file that fails does not keep the others.

    Parameters
    ----------
    jobs : sequence of Job
        As `plan` returns them and `check` has passed them. What was not checked is not replaced
        either, but fails when its turn comes.
    restorer : Restorer
    settings : Settings
    journal : Journal, optional
        Of the output folder. Without one nothing can be resumed.
    progress_of : callable
        Returns a context manager for a job that gives its progress callable.

    Yields
    ------
    Outcome
        After each file.
    """
    key = settings.key(restorer)
    for job in jobs:
        started = time.perf_counter()
        source_hash = digest(job.source)
        earlier = journal.of(job) if journal and settings.resume else {}
        same = is_same(earlier, source_hash, key)
        if is_done(job, earlier, source_hash, key):
            yield Outcome(job, "skipped", "done before")
            continue
        if same and earlier["state"] == "failed" and not settings.retry_failed:
            reason = str(earlier.get("reason", "It failed before."))
            yield Outcome(job, "failed", f"{reason} (Not tried again: see --retry-failed.)")
            continue
        # What an earlier run has begun here is ours to replace, what it finished otherwise is not.
        replace = settings.overwrite or same or earlier.get("state") in ("begun", "failed")
        if job.target.exists() and not replace:
            reason = (
                "was made from another input or with other settings; add --overwrite to replace it"
            )
            yield Outcome(job, "failed", f"{job.target} {reason}")
            continue
        facts = {"input_sha256": source_hash, "settings": key}
        try:
            if journal:
                journal.add(job, "begun", **facts)
            with progress_of(job) as progress:
                outcome, record = restore_file(job, restorer, settings, replace, progress)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            reason = reason if str(job.source) in reason else f"{job.source}: {reason}"
            if journal:
                journal.add(job, "failed", **facts, reason=reason)
            yield Outcome(job, "failed", reason, seconds=time.perf_counter() - started)
            continue
        if journal:
            journal.add(job, "done", **facts, text=outcome.text, record=record)
        seconds = time.perf_counter() - started
        yield Outcome(job, outcome.status, outcome.text, outcome.notes, seconds)


def restore_file(
    job: Job, restorer: Restorer, settings: Settings, replace: bool, progress: Progress
) -> tuple[Outcome, dict[str, object]]:
    """Restore one file; `replace` says whether an existing output may be replaced."""
    picture = read_image(job.source)
    done = restorer.restore(
        picture.array,
        settings.degradation,
        strength=settings.strength,
        ensemble=settings.ensemble,
        most_steps=settings.most_steps,
        on_progress=progress,
    )
    job.target.parent.mkdir(parents=True, exist_ok=True)
    image = np.asarray(done.image)
    notes = [f"{job.source}: {note}" for note in picture.notes]
    written = write_image(job.target, image, picture.metadata, overwrite=replace)
    notes += [f"{job.target}: {note}" for note in written]
    if settings.compare:
        both = side_by_side(picture.array, image, done.record.value_range)
        written = write_image(job.comparison, both, overwrite=replace)
        notes += [f"{job.comparison}: {note}" for note in written]
    status = "restored" if done.steps else "unchanged"
    return Outcome(job, status, done.summary, tuple(notes)), done.record.as_dict()


def side_by_side(before: NDArray[Any], after: NDArray[Any], seen: ValueRange) -> NDArray[Any]:
    """Return before and after in one picture, with a white gap between; floats as 0..1.

    `seen` holds the values that count as black and white.
    """
    if after.dtype.kind == "f":
        low, high = seen
        before, after = ((each - low) / (high - low) for each in (before, after))
    white = 1.0 if after.dtype.kind == "f" else np.iinfo(after.dtype).max
    gap = np.full((after.shape[0], 8, *after.shape[2:]), white, after.dtype)
    return np.concatenate([before, gap, after], axis=1)


def estimate(jobs: Sequence[Job], restorer: Restorer, settings: Settings) -> Estimate:
    """Say what the files will take, by their sizes and the speed on one small picture.

    Of several steps it counts one: most pictures suffer from one thing at the most.
    """
    sizes, unreadable = [], []
    for job in jobs:
        try:
            sizes.append(image_size(job.source))
        except ImageFileError as error:
            unreadable.append(str(error))
    trial = np.zeros((TRIAL_SIDE, TRIAL_SIDE, 3), np.uint8)
    restorer.restore(trial, restorer.model.config.degradations[0])  # the first one is slower
    started = time.perf_counter()
    restorer.restore(trial, restorer.model.config.degradations[0])
    each = (time.perf_counter() - started) / TRIAL_SIDE**2 * (8 if settings.ensemble else 1)
    pixels = sum(height * width for height, width in sizes)
    largest = max(sizes, key=lambda size: size[0] * size[1], default=(1, 1))
    config, device = restorer.model.config, restorer.device
    memory = memory_needed(config, largest, restorer.dtype, device=device)
    return Estimate(len(sizes), tuple(unreadable), pixels / 1e6, pixels * each, memory)
