"""Commands of the palette; each opens the widget and presses a button there."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import napari.viewer

    from dfpir_napari._widget import RestorationWidget


# napari reads these annotations to hand the viewer over: quoted, and no __future__ annotations.


def opened(viewer: "napari.viewer.Viewer") -> "RestorationWidget":
    """Return the widget, opened if need be."""
    from dfpir_napari._widget import docked_in

    # napari would open a second one beside that of the menu, which it knows by another name.
    widget = docked_in(viewer)
    if widget is None:
        _, widget = viewer.window.add_plugin_dock_widget("dfpir", "Restoration")
    return widget


def restore_selected_layers(viewer: "napari.viewer.Viewer") -> None:
    """Restore all selected image layers, one after the other."""
    opened(viewer).restore_layers(list(viewer.layers.selection))


def diagnose(viewer: "napari.viewer.Viewer") -> None:
    """Say what is wrong with the active layer."""
    opened(viewer).start_diagnosis()


def undo_restoration(viewer: "napari.viewer.Viewer") -> None:
    """Undo the latest restoration of the active layer."""
    opened(viewer).undo_latest()
