"""From a name in weights.json to a verified file, and from there to a network."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dfpir.checkpoint import load
from dfpir.model import DFPIR

SCHEMA = 1
FOLDER_VARIABLE = "DFPIR_WEIGHTS"
"""Environment variable: a folder of weights files that were fetched or imported by hand."""

ASSETS = Path(__file__).parent / "assets"


class WeightsError(ValueError):
    """Weights are unknown, absent or damaged; the message says what to do."""


@dataclass(frozen=True, slots=True)
class WeightsEntry:
    """One file of the manifest.

    Attributes
    ----------
    name : str
        What users call it.
    role : str
        ``"restorer"`` or ``"classifier"``.
    source : str
        ``"bundled"`` in the package, or ``"by-hand"``: to be fetched by the user from `page`.
    facts : dict
        The whole entry, licence, attribution, training and scores included.
    """

    name: str
    role: str
    summary: str
    filename: str
    bytes: int | None
    sha256: str | None
    source: str
    page: str
    licence: str
    facts: dict[str, Any]


def manifest_path() -> Path:
    """Return where weights.json is: in the package, or at the root of the checkout.

    Raises
    ------
    WeightsError
        If it is in neither place.
    """
    here = Path(__file__).parent
    places = [here / "weights.json", here.parents[1] / "weights.json"]
    for place in places:
        if place.is_file():
            return place
    looked = " and ".join(map(str, places))
    message = f"weights.json is missing; looked at {looked}. Reinstall dfpir."
    raise WeightsError(message)


@lru_cache(maxsize=1)
def manifest() -> dict[str, Any]:
    """Read weights.json.

    Raises
    ------
    WeightsError
        If it is absent, unreadable or of another schema.
    """
    path = manifest_path()
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = content["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{path}: cannot be read as the weights manifest ({error!r}). Reinstall dfpir."
        raise WeightsError(message) from None
    if found != SCHEMA:
        message = f"{path}: schema is {found!r}, expected {SCHEMA}. Reinstall dfpir."
        raise WeightsError(message)
    return content


def entries(role: str | None = None) -> list[WeightsEntry]:
    """Return the files of the manifest, of one role or all."""
    return [
        entry
        for name in manifest()["files"]
        if (entry := find_entry(name)).role == role or role is None
    ]


def find_entry(name: str) -> WeightsEntry:
    """Return the manifest's entry called `name`.

    Raises
    ------
    WeightsError
        If there is none; the message lists those there are. Or if its filename is more than a
        name, and could lead out of the folders that weights are taken from.
    """
    files = manifest()["files"]
    if name not in files:
        known = ", ".join(files)
        message = (
            f"Unknown weights {name!r}; expected one of: {known}, or the path of a .safetensors "
            "file."
        )
        raise WeightsError(message)
    facts = files[name]
    filename = str(facts["filename"])
    if {"/", "\\"} & set(filename) or filename in ("", ".", ".."):
        message = (
            f"{manifest_path()}: filename of {name!r} is {filename!r}; expected a bare name. "
            "Reinstall dfpir."
        )
        raise WeightsError(message)
    return WeightsEntry(
        name,
        facts["role"],
        facts["summary"],
        facts["filename"],
        facts.get("bytes"),
        facts.get("sha256"),
        facts["source"],
        facts["page"],
        facts["licence"],
        facts,
    )


def default_name(role: str = "restorer") -> str:
    """Return the name of the weights used when none are asked for."""
    return str(manifest()["default"][role])


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folders() -> list[Path]:
    """Return where files of the manifest may lie: the package, then $DFPIR_WEIGHTS."""
    given = os.environ.get(FOLDER_VARIABLE)
    return [ASSETS, *([Path(given)] if given else [])]


def locate(entry: WeightsEntry) -> Path | None:
    """Return the entry's file if it is present, unverified."""
    for folder in folders():
        path = folder / entry.filename
        if path.is_file():
            return path
    return None


def verified(entry: WeightsEntry) -> Path:
    """Return the entry's file after comparing its hash.

    Raises
    ------
    WeightsError
        If the file is absent or its hash is another.
    """
    path = locate(entry)
    if path is None:
        if entry.source == "bundled":
            message = (
                f"{entry.name}: {entry.filename} is missing from the package. Reinstall dfpir."
            )
        else:
            message = (
                f"{entry.name}: not on this computer, and no program may fetch it. Get it by hand "
                f"from {entry.page}, run `{entry.facts['command']}`, and set {FOLDER_VARIABLE} to "
                "its folder."
            )
        raise WeightsError(message)
    if entry.sha256 is not None:
        found = file_hash(path)
        if found != entry.sha256:
            message = (
                f"{path}: damaged or another file: expected SHA-256 {entry.sha256}, found {found}. "
                f"{'Reinstall dfpir.' if entry.source == 'bundled' else 'Fetch it again.'}"
            )
            raise WeightsError(message)
    return path


def resolve(name_or_path: str | Path | None = None, role: str = "restorer") -> Path:
    """Return the verified file for a name of the manifest, a path, or nothing (the default).

    A name wins over a file of the same name in the working directory.

    Raises
    ------
    WeightsError
        If there is no such name or file, or its hash is wrong.
    """
    name = str(name_or_path or default_name(role))
    path = Path(name)
    if name in manifest()["files"] or not (path.suffix or len(path.parts) > 1 or path.exists()):
        return verified(find_entry(name))
    if not path.is_file():
        message = (
            f"{path}: no such weights file. Give an existing .safetensors file, or a name that "
            "`dfpir weights list` shows."
        )
        raise WeightsError(message)
    return path


def load_model(name_or_path: str | Path | None = None) -> DFPIR:
    """Return the network of a name in weights.json, or of a safetensors file.

    Parameters
    ----------
    name_or_path : str or Path, optional
        The bundled default if not given.

    Returns
    -------
    DFPIR
        float32, on the CPU, in evaluation mode.

    Raises
    ------
    WeightsError, CheckpointError
        If there is no such file, or it is not a DFPIR network; see their messages.

    Examples
    --------
    >>> load_model().config.width
    32
    """
    path = resolve(name_or_path)
    model = load(path)
    model.requires_grad_(False)
    return model
