"""Undo for image layers, which napari has not: the replaced arrays, kept as they are."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dfpir_napari._layers import RECORDS, held_by, levels_held

if TYPE_CHECKING:
    from napari.layers import Image


def bytes_in_memory(data: Any) -> int:
    """Return what a layer's data takes; arrays that live elsewhere count nothing."""
    import numpy as np

    return sum(each.nbytes for each in levels_held(data) if type(each) is np.ndarray)


@dataclass(slots=True, eq=False)  # arrays do not compare to one truth
class Entry:
    """One restoration that can be undone.

    Attributes
    ----------
    layer : weakref
    before, after : array_like
        The layer's data, the very objects.
    records : int
        How many records were added to the layer's metadata.
    contrast_limits, contrast_limits_range : tuple of float
        Before.
    """

    layer: weakref.ref[Image]
    before: Any
    after: Any
    records: int
    contrast_limits: tuple[float, float]
    contrast_limits_range: tuple[float, float]


class History:
    """The restorations of all layers, latest last, bounded by bytes."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def replace(
        self, layer: Image, image: Any, records: list[dict[str, object]], most_bytes: int
    ) -> None:
        """Put a restored image into its layer and keep what was there."""
        entry = Entry(
            weakref.ref(layer),
            layer.data,
            None,
            len(records),
            tuple(layer.contrast_limits),
            tuple(layer.contrast_limits_range),
        )
        layer.data = image
        entry.after = layer.data
        layer.metadata.setdefault(RECORDS, []).extend(records)
        self.entries.append(entry)
        self.trim(most_bytes)

    def trim(self, most_bytes: int) -> None:
        """Forget layers that are gone, and the oldest originals beyond the bound."""
        self.entries = [entry for entry in self.entries if entry.layer() is not None]
        while len(self.entries) > 1 and self.bytes_held() > most_bytes:
            del self.entries[0]

    def bytes_held(self) -> int:
        """Return what the originals take."""
        return sum(bytes_in_memory(entry.before) for entry in self.entries)

    def latest(self, layer: Image | None) -> Entry | None:
        """Return what an undo of a layer would undo."""
        of_layer = [entry for entry in self.entries if entry.layer() is layer is not None]
        return of_layer[-1] if of_layer else None

    def undo(self, layer: Image) -> bool:
        """Bring back what the latest restoration replaced; False if something else is there now."""
        entry = self.latest(layer)
        if entry is None:
            return False
        if not held_by(layer, entry.after):
            self.forget(layer)
            return False
        layer.data = entry.before
        layer.contrast_limits_range = entry.contrast_limits_range
        layer.contrast_limits = entry.contrast_limits
        kept = layer.metadata.get(RECORDS, [])[: -entry.records]
        if kept:
            layer.metadata[RECORDS] = kept
        else:
            layer.metadata.pop(RECORDS, None)
        self.entries.remove(entry)
        return True

    def forget(self, layer: Image) -> None:
        """Drop the entries of a layer."""
        self.entries = [entry for entry in self.entries if entry.layer() is not layer]
