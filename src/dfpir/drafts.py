"""Folders that are made part by part: hidden until they are whole, continued after interruptions.

A draft lies beside the place of its output and keeps a list of the parts that are finished. Its
name holds a hash of all that the parts depend on, so that only a run which would make the very same
ones goes on with it.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import stat
from collections.abc import Collection
from pathlib import Path

KEY_DIGITS = 16
"""Hexadecimal digits of a key that a draft's name has."""


class Draft:
    """An output folder that is not whole yet.

    Parameters
    ----------
    output : Path
        Its final place.
    key : str
        Hexadecimal hash of all that the parts depend on.

    Attributes
    ----------
    content : Path
        What will be the output.
    finished : set of str
        Names of the parts that are in it.
    """

    def __init__(self, output: Path, key: str) -> None:
        self.output = output
        self.folder = beside(output, f"{key[:KEY_DIGITS]}.part")
        self.content = self.folder / "content"
        self.list = self.folder / "finished.txt"
        self.finished: set[str] = set()

    def open(self) -> None:
        """Take over what an interrupted run has finished, or else start with an empty folder."""
        if self.content.is_dir() and self.list.is_file():
            text = self.list.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]  # The last line may have been cut short.
            self.finished = set(whole.splitlines())
            self.list.write_text(whole, encoding="utf-8")
        if not self.finished:
            remove(self.folder)
            self.folder.mkdir(parents=True)
        for torn in self.content.rglob("*.partial"):
            torn.unlink()

    def finish(self, name: str) -> None:
        """Note that a part is written."""
        with self.list.open("a", encoding="utf-8") as file:
            file.write(f"{name}\n")
        self.finished.add(name)

    def interrupt(self, error: BaseException) -> None:
        """Say on an error that the finished parts are kept; leave nothing if there are none."""
        if self.finished:
            error.add_note("What is finished is kept; the same command goes on with it.")
        else:
            remove(self.folder)

    def publish(self, *, overwrite: bool) -> None:
        """Put the whole folder in its place, and remove other drafts of it.

        One folder cannot replace another at one stroke. If the process dies between the two moves,
        `recover` brings the old output back.

        Raises
        ------
        FileExistsError
            If something is there that may not be replaced.
        """
        old = beside(self.output, "old")
        if self.output.exists():
            if not overwrite:
                message = f"{self.output} has appeared meanwhile; the new one is {self.content}."
                raise FileExistsError(message)
            self.output.rename(old)
        try:
            self.content.rename(self.output)
        except OSError:
            if old.exists():
                old.rename(self.output)
            raise
        for left in (old, *hidden(self.output, "*.part")):
            remove(left)


def copy_folder(source: Path, folder: Path, leave_out: Collection[Path] = ()) -> None:
    """Copy a folder, without some of what is in it, so that the copy can be written to.

    A source may be protected from that.

    Raises
    ------
    OSError
        If something in it cannot be read, or there is no room for it.
    """
    try:
        shutil.copytree(
            source,
            folder,
            ignore=lambda at, names: [name for name in names if Path(at) / name in leave_out],
            copy_function=shutil.copyfile,
        )
    except shutil.Error as error:  # All that failed, each with its whole path twice.
        (path, _, reason), *others = error.args[0]
        more = f" (nor can {len(others)} more)" if others else ""
        message = f"{path}: cannot be copied to the output{more}: {reason}"
        raise OSError(message) from None
    for place, _, _ in os.walk(folder):
        Path(place).chmod(Path(place).stat().st_mode | stat.S_IRWXU)


def beside(output: Path, what: str) -> Path:
    """Name a hidden folder beside an output."""
    return output.with_name(f".{output.name}.{what}")


def hidden(output: Path, pattern: str) -> list[Path]:
    """List the hidden folders beside an output."""
    return list(output.parent.glob(f".{glob.escape(output.name)}.{pattern}"))


def remove(folder: Path) -> None:
    """Remove a folder, if it is there; cut short, that leaves none of its name behind."""
    waste = folder.with_name(f"{folder.name}.waste")
    shutil.rmtree(waste, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(waste)
    shutil.rmtree(waste, ignore_errors=True)


def recover(output: Path) -> None:
    """Mend what a run that was killed while it replaced an output has left."""
    old = beside(output, "old")
    if old.exists() and not output.exists():
        old.rename(output)
    remove(old)
    for waste in hidden(output, "*.waste"):
        shutil.rmtree(waste, ignore_errors=True)
