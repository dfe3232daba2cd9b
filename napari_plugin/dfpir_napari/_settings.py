"""What the user set in napari's preferences; the defaults of napari.yaml before napari 0.9."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """See `configurations` in napari.yaml, where the defaults stand a second time."""

    device: str = "auto"
    undo_megabytes: int = 2048
    preview_side: int = 512


def read_settings() -> Settings:
    """Return the settings as they are now."""
    try:
        from napari.settings import get_plugin_settings

        chosen = get_plugin_settings("dfpir").restoration
        return Settings(chosen.device, chosen.undo_megabytes, chosen.preview_side)
    except (ImportError, KeyError, AttributeError):
        return Settings()
