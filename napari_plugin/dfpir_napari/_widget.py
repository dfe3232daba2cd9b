"""The widget: what to restore, what was found, preview, restore in place, undo, record."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from magicgui.widgets import (
    CheckBox,
    ComboBox,
    Container,
    FloatSlider,
    LineEdit,
    ProgressBar,
    PushButton,
    create_widget,
)
from napari.layers import Image, Labels, Layer, Shapes
from napari.qt.threading import create_worker
from napari.utils import cancelable_progress
from napari.utils.notifications import show_error, show_info, show_warning
from qtpy.QtCore import Qt
from qtpy.QtWidgets import (
    QApplication,
    QComboBox,
    QDockWidget,
    QFileDialog,
    QGridLayout,
    QLabel,
    QScrollArea,
    QVBoxLayout,
    QWidget,
)

from dfpir.degradation import CLEAN, Degradation, caution, headline
from dfpir_napari import _layers
from dfpir_napari._bars import Bars
from dfpir_napari._history import History
from dfpir_napari._settings import read_settings

if TYPE_CHECKING:
    from napari.viewer import Viewer

    from dfpir.degradation import Diagnosis
    from dfpir.stacks import StackRestoration, Step

logger = logging.getLogger(__name__)

DEGRADATIONS = [
    ("automatic", "auto"),
    # The dock is narrow, and the number at the end has to be seen.
    *((each.label.removeprefix("Gaussian "), each.value) for each in Degradation),
]
BY_NAME, ALIKE = "as the axes are named", "none: all planes are alike"
ESTIMATES = "Restored values are estimates: look at them, segment them, do not measure them."
REPORT = (
    "How the restored values stand to the raw ones. Slope 1, offset 0 and an unchanged mean: "
    "intensities were kept. A slope above 1: contrast was lost, or noise is left; below 1: "
    "contrast was added."
)
WELCOME = "Diagnose says what is wrong; Restore changes the layer; Undo brings the original back."


def row(*widgets: Any) -> Container:
    """Return widgets side by side."""
    box = Container(widgets=widgets, layout="horizontal", labels=False)
    box.margins = (0, 0, 0, 0)
    return box


def form(*widgets: Any) -> Container:
    """Return widgets below each other, their labels in a column at the left."""
    native = QWidget()
    grid = QGridLayout(native)
    grid.setContentsMargins(0, 0, 0, 0)
    grid.setColumnStretch(1, 1)
    # Not Container(labels=True): it measures the labels before napari's font is set.
    for number, each in enumerate(widgets):
        if isinstance(each.native, QComboBox):
            policy = QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon
            each.native.setSizeAdjustPolicy(policy)
            each.native.setMinimumContentsLength(10)
        grid.addWidget(QLabel(each.label), number, 0)
        grid.addWidget(each.native, number, 1)
    return holding(native)


class Lines(QLabel):
    """Some lines of text that can be selected; they take no room while there are none."""

    def __init__(self) -> None:
        super().__init__()
        self.setWordWrap(True)
        self.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        self.hide()

    def setText(self, words: str | None) -> None:
        """Show other words."""
        super().setText(words)
        self.setVisible(bool(words))


def below(*natives: QWidget) -> Container:
    """Return Qt widgets below each other."""
    native = QWidget()
    column = QVBoxLayout(native)
    column.setContentsMargins(0, 0, 0, 0)
    for each in natives:
        column.addWidget(each)
    return holding(native)


def holding(native: QWidget) -> Container:
    """Return a container around a Qt widget."""
    box = Container(labels=False)
    box.margins = (0, 0, 0, 0)
    box.native.layout().addWidget(native)
    return box


WIDGETS: weakref.WeakSet[RestorationWidget] = weakref.WeakSet()


def docked_in(viewer: Viewer) -> RestorationWidget | None:
    """Bring up the widget that a viewer has already, with its undo; None if it has none."""
    for widget in list(WIDGETS):
        # Viewers are compared by their windows: they may come wrapped, and have no identity then.
        if widget.show_in(viewer.window):
            return widget
    return None


class RestorationWidget(Container):
    """Restores image layers in place.

    Parameters
    ----------
    napari_viewer : napari.viewer.Viewer, optional
        Handed over by napari; without one, layers are what `layer.choices` holds.
    """

    def __init__(self, napari_viewer: Viewer | None = None) -> None:
        super().__init__(labels=False)
        self._viewer = napari_viewer
        self._history = History()
        self._worker: Any = None
        self._queue: list[Image] = []
        self._preview_layer: Layer | None = None
        self._closed = self._followed = False
        self._add_controls()
        self._connect()
        self._refresh()
        WIDGETS.add(self)

    # What is seen

    def show_in(self, window: Any) -> bool:
        """Show the dock that holds the widget, if it is in that window; return whether it is."""
        if self._closed or self._viewer is None or self._viewer.window != window:
            return False
        place = self.native.parent()
        while place is not None and not isinstance(place, QDockWidget):
            place = place.parent()
        if place is None:
            return False
        place.show()
        place.raise_()
        return True

    def _add_controls(self) -> None:
        layer = create_widget(annotation=Image, name="layer", label="layer")
        layer.tooltip = "The image layer to restore"
        scope = ComboBox(name="scope", choices=list(_layers.SCOPES.items()), value=_layers.PLANE)
        scope.tooltip = "Which part of the layer changes. The last two axes are the image plane."
        region = ComboBox(name="region", choices=self._region_layers, nullable=True)
        region.tooltip = "A Shapes or Labels layer that marks where to restore, for such a scope"
        degradation = ComboBox(name="degradation", choices=DEGRADATIONS, value="auto")
        degradation.tooltip = "What to remove; automatic acts only where the diagnosis is sure"
        strength = FloatSlider(name="strength", min=0.0, max=1.0, step=0.05, value=1.0)
        strength.tooltip = "0 keeps the input, 1 restores fully"
        self.diagnose = PushButton(name="diagnose", text="Diagnose")
        self.diagnose.tooltip = "Say what is wrong with the image, and how sure that is"
        self.preview = PushButton(name="preview", text="Preview")
        self.preview.tooltip = "Restore what is in view into a temporary layer"
        self.restore = PushButton(name="restore", text="Restore")
        self.restore.tooltip = "Restore the layer in place; Undo brings the original back"
        self.undo = PushButton(name="undo", text="Undo")
        self.undo.tooltip = "Bring back the very data the latest restoration replaced"
        self.cancel = PushButton(name="cancel", text="Cancel")
        self.progress = ProgressBar(name="progress", min=0, max=1000)
        self._found, self._status, self._report = Lines(), Lines(), Lines()
        self._report.setToolTip(REPORT)
        self.bars = Bars()
        self.more = more = CheckBox(name="more", text="More", value=False)
        self._advanced = self._advanced_controls()
        choices = form(layer, scope, region, degradation, strength)
        self.layer, self.scope, self.region = layer, scope, region
        self.degradation, self.strength = degradation, strength
        self._work_row = row(self.progress, self.cancel)
        self._controls = Container(
            widgets=[
                choices,
                row(self.diagnose, self.preview),
                row(self.restore, self.undo),
                self._work_row,
                below(self._found, self.bars, self._status, self._report),
                more,
                self._advanced,
            ],
            labels=False,
        )
        self._controls.native.layout().addStretch(1)
        # Not Container(scrollable=True): napari takes what is in the scroll area, without it.
        area = QScrollArea()
        area.setWidgetResizable(True)
        area.setFrameShape(QScrollArea.Shape.NoFrame)
        area.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        area.setMinimumWidth(310)
        area.setWidget(self._controls.native)
        self.native.layout().addWidget(area)
        self.margins = (0, 0, 0, 0)
        self._status.setText(WELCOME)

    def _advanced_controls(self) -> Container:
        self.channels = ComboBox(name="channels", choices=self._channel_choices, label="channels")
        self.channels.tooltip = (
            "The axis of stains or detectors: each of them gets its own value range and verdict"
        )
        self.residual = PushButton(name="residual", text="Residual")
        self.residual.tooltip = "Show what was taken away, raw - restored, as another layer"
        self.save = PushButton(name="save", text="Save with record...")
        self.save.tooltip = "Write an OME-TIFF with the pixel size, and a JSON file with the record"
        self.python = LineEdit(name="python", value="", label="in Python")
        self.python.native.setReadOnly(True)
        self.python.tooltip = "The same in Python, for napari's console or a script"
        self.copy = PushButton(name="copy", text="Copy the Python line")
        advanced = Container(
            widgets=[
                row(self.residual, self.save),
                form(self.channels, self.python),
                row(self.copy),
            ],
            labels=False,
            visible=False,
        )
        advanced.margins = (0, 0, 0, 0)
        return advanced

    def _connect(self) -> None:
        self.diagnose.changed.connect(self.start_diagnosis)
        self.preview.changed.connect(self.start_preview)
        self.restore.changed.connect(self.start_restoration)
        self.cancel.changed.connect(self.stop)
        self.undo.changed.connect(self.undo_latest)
        self.residual.changed.connect(self.show_residual)
        self.save.changed.connect(self.ask_where_to_save)
        self.copy.changed.connect(self.copy_python)
        self.more.changed.connect(self._show_more)
        for control in (self.layer, self.scope, self.degradation, self.strength, self.channels):
            control.changed.connect(self._refresh)
        self.degradation.changed.connect(self._say_caution)
        self.layer.changed.connect(self._layer_chosen)
        self.native.destroyed.connect(self._close)
        if self._viewer is not None:
            self._viewer.layers.selection.events.active.connect(self._follow)
            self._viewer.layers.events.removed.connect(self._forget_removed)
            self._viewer.dims.events.current_step.connect(self._refresh)

    def _show_more(self, shown: bool) -> None:
        self._advanced.visible = shown
        self._refresh()

    def _region_layers(self, _: Any = None) -> list[Layer]:
        if self._viewer is None:
            return []
        return [each for each in self._viewer.layers if isinstance(each, Labels | Shapes)]

    def _channel_choices(self, _: Any = None) -> list[tuple[str, int]]:
        layer = self.layer.value if hasattr(self, "layer") else None
        axes = range(layer.ndim - 2) if layer is not None else ()
        return [(BY_NAME, -2), (ALIKE, -1), *((f"axis {axis}", axis) for axis in axes)]

    def _follow(self, _: Any = None) -> None:
        """Take the layer that the user made active."""
        active = self._viewer.layers.selection.active if self._viewer is not None else None
        chosen = self._known([active])
        if chosen and self._worker is None and active != self._preview_layer:
            self.layer.value = chosen[0]

    def _layer_chosen(self, _: Any = None) -> None:
        self.channels.reset_choices()
        self._found.setText("")
        self.bars.show_values({}, "")
        self._report.setText("")

    def _forget_removed(self, event: Any) -> None:
        self._history.forget(event.value)
        self._refresh()

    def _refresh(self, _: Any = None) -> None:
        """Show and enable what makes sense now."""
        if self._closed:
            return
        layer, running = self.layer.value, self._worker is not None
        ready = layer is not None and not running
        for button in (self.diagnose, self.preview, self.restore):
            button.enabled = ready
        entry = self._history.latest(layer)
        self.undo.enabled = self.residual.enabled = ready and entry is not None
        self.save.enabled = ready
        self._work_row.visible = running
        self.cancel.enabled = running
        self.region.enabled = self.scope.value not in (_layers.PLANE, _layers.STACK)
        if layer is not None and self.more.value:
            self.python.value = self._python_line(layer)
            self.python.native.setCursorPosition(0)

    def reset_choices(self, *_: Any) -> None:
        """Look for layers anew; napari calls this when they come and go."""
        for control in (self.layer, self.region, self.channels):
            control.reset_choices()
        if not self._followed and self.layer.choices:
            self._followed = True  # Once, when docked; magicgui has taken the first layer by then.
            self._follow()
        self._refresh()

    def say(self, words: str) -> None:
        """Show a line of status."""
        self._status.setText(words)

    def _say_caution(self, _: Any = None) -> None:
        """Warn of restorations that have no meaning on the chosen layer."""
        layer = self.layer.value
        if layer is None or self.degradation.value == "auto":
            return
        words = caution(Degradation.from_name(self.degradation.value), rgb=layer.rgb)
        self.say(words or "")

    # What is asked for

    @property
    def running(self) -> bool:
        """Whether something is being worked on."""
        return self._worker is not None

    def _plane(self, layer: Image) -> tuple[int, ...]:
        point = None if self._viewer is None else self._viewer.dims.point
        return _layers.current_plane(layer, point)

    def _channel_axis(self, layer: Image) -> int | None:
        chosen = self.channels.value
        if chosen == -2:
            return _layers.channel_axis(layer)
        return None if chosen in (-1, None) or chosen >= layer.ndim - 2 else chosen

    def _request(self, layer: Image, scope: str) -> dict[str, Any]:
        marks = self.region.value if scope != _layers.PLANE else None
        channels = self._channel_axis(layer)
        return _layers.request(layer, scope, self._plane(layer), marks=marks, channels=channels)

    def _python_line(self, layer: Image) -> str:
        scope, marks = self.scope.value, None
        if scope in _layers.MARKED:
            marks, scope = self.region.value, _layers.MARKED[scope]
            if marks is None:
                return f"# {_layers.NO_REGION}"
        asked = self._request(layer, scope)
        if self.strength.value != 1:
            asked["strength"] = round(self.strength.value, 4)
        device = read_settings().device
        return _layers.python_line(layer, self.degradation.value, asked, marks, device)

    def _steps(self, kind: str, *arguments: Any, **options: Any) -> Generator[Step, None, Any]:
        """Start the core's generator of that name; runs in the worker, where torch may load."""
        from dfpir import stacks
        from dfpir.restorer import shared_restorer

        options["restorer"] = shared_restorer(None, read_settings().device, "auto")
        options["threads"] = stacks.spare_threads()
        return (yield from getattr(stacks, kind)(*arguments, **options))

    # The buttons

    def _may_begin(self, layers: list[Image]) -> bool:
        """Say what is missing, since palette commands come at any time."""
        if self.running:
            show_warning("dfpir is at work already; wait for it, or cancel it first.")
        elif not layers:
            show_warning("dfpir: select an image layer first.")
        return bool(layers) and not self.running

    def _known(self, layers: list[Any]) -> list[Image]:
        """Return the image layers among these, as napari's own objects."""
        return [known for each in layers for known in self.layer.choices if known == each]

    def start_diagnosis(self, _: Any = None) -> None:
        """Ask the classifier."""
        layer = self.layer.value
        if not self._may_begin(self._known([layer])):
            return
        with self._reporting_errors():
            asked = self._request(layer, self.scope.value)
            steps = self._steps("classify_steps", _layers.stack_of(layer), **asked)
            self._run(steps, self._say_diagnoses, f"Diagnosing {layer.name}")

    def _say_diagnoses(self, found: tuple[Diagnosis, ...]) -> None:
        self._show_diagnoses(found)
        if any(each.verdict == "degraded" for each in found):
            self.say("Preview shows a part of it restored; Restore changes the layer.")
        else:
            self.say("Automatic restoration leaves it alone. Choose a degradation to insist.")

    def _show_diagnoses(self, found: tuple[Diagnosis, ...]) -> None:
        lines = [headline(each) for each in found]
        if len(lines) > 1:
            lines = [f"Channel {number}: {line}" for number, line in enumerate(lines)]
        self._found.setText("\n".join(lines))
        first = found[0]
        names = [*(each.value for each in Degradation), CLEAN]
        chosen = first.degradation.value if first.degradation else CLEAN
        values = {name: first.probabilities.get(name, 0.0) for name in names}
        self.bars.show_values({} if first.told else values, chosen)

    def start_preview(self, _: Any = None) -> None:
        """Restore what is in view into a temporary layer."""
        layer = self.layer.value
        if not self._may_begin(self._known([layer])):
            return
        with self._reporting_errors():
            scope = _layers.STACK if self.scope.value in _layers.WHOLE else _layers.PLANE
            asked = self._request(layer, scope)
            plane = self._plane(layer)
            box = _layers.visible_box(layer, read_settings().preview_side)
            steps = self._steps(
                "preview_steps",
                _layers.stack_of(layer),
                plane,
                box,
                self.degradation.value,
                strength=self.strength.value,
                **asked,
            )
            self._run(
                steps,
                lambda done: self._show_preview(layer, plane, box, done),
                f"Previewing {layer.name}",
            )

    def _show_preview(
        self,
        layer: Image,
        plane: tuple[int, ...],
        box: tuple[slice, slice],
        done: StackRestoration,
    ) -> None:
        if not done.diagnoses[0].told:
            self._show_diagnoses(done.diagnoses)
        if not done.changed:
            self.say(f"Nothing to preview: {done.summary}. Choose a degradation to see it anyway.")
            return
        corner = (*plane, box[0].start, box[1].start)
        facts = _layers.placed(_layers.attributes(layer), layer, corner)
        facts["name"] = f"{layer.name} preview"
        image = done.image[(np.newaxis,) * len(plane)]
        self._drop_preview()
        self._preview_layer = self._show_layer(image, facts, beside=layer)
        height, width = image.shape[len(plane) : len(plane) + 2]
        self.say(
            f"Preview of {height} x {width} pixels: {done.summary}. Click the eye of "
            f"{facts['name']!r} to compare; Restore takes it away again."
        )

    def _drop_preview(self) -> None:
        if self._preview_layer is not None and self._viewer is not None:
            present = [each for each in self._viewer.layers if each == self._preview_layer]
            for each in present:
                self._viewer.layers.remove(each)
        self._preview_layer = None

    def start_restoration(self, _: Any = None) -> None:
        """Restore the chosen layer in place."""
        self.restore_layers([self.layer.value])

    def restore_layers(self, layers: list[Any]) -> None:
        """Restore image layers in place, one after the other."""
        if not self.running:
            self._drop_preview()
        chosen = self._known(layers)
        if not self._may_begin(chosen):
            return
        self._queue = chosen
        self._next_layer()

    def _next_layer(self) -> None:
        # Layers may have been removed since they were asked for.
        self._queue = self._known(self._queue)
        if not self._queue:
            return
        layer = self._queue.pop(0)
        with self._reporting_errors():
            self.layer.value = layer
            asked = self._request(layer, self.scope.value)
            before, facts = layer.data, _layers.attributes(layer)
            steps = self._steps(
                "restore_steps",
                _layers.stack_of(layer),
                self.degradation.value,
                strength=self.strength.value,
                **asked,
            )
            self._run(
                steps,
                lambda done: self._put_back(layer, before, facts, done),
                f"Restoring {layer.name}",
            )

    def _put_back(
        self, layer: Image, before: Any, facts: dict[str, Any], done: StackRestoration
    ) -> None:
        """Put a result into its layer, or beside it if that is not what it was."""
        if not done.diagnoses[0].told:
            self._show_diagnoses(done.diagnoses)
        if not done.changed:
            self.say(f"{layer.name}: {done.summary}. Choose a degradation to restore it anyway.")
            show_info(f"dfpir left {layer.name} as it is")
            return
        records = [record.as_dict() for record in done.records]
        reports = [each.linearity.summary for each in done.records if each.linearity]
        self._report.setText("\n".join([*reports, ESTIMATES]))
        notes = sorted({note for record in done.records for note in record.notes})
        present = self._viewer is None or any(each == layer for each in self._viewer.layers)
        if present and _layers.held_by(layer, before):
            most = read_settings().undo_megabytes * 10**6
            self._history.replace(layer, done.image, records, most)
            self.say(" ".join([f"{layer.name}: {done.summary}.", *notes]))
        else:
            facts["name"] += " restored"
            facts["metadata"][_layers.RECORDS] = [
                *facts["metadata"].get(_layers.RECORDS, []),
                *records,
            ]
            self._show_layer(done.image, facts, beside=layer if present else None)
            what = "was changed" if present else "was removed"
            show_warning(f"{layer.name} {what} meanwhile; the result is a layer of its own.")
        for note in notes:
            show_warning(f"dfpir: {note}")

    def undo_latest(self, _: Any = None) -> None:
        """Bring back what the latest restoration of the chosen layer replaced."""
        layer = self.layer.value
        if self.running:
            show_info("dfpir is at work; wait for it, or cancel it before undoing.")
            return
        if layer is None or self._history.latest(layer) is None:
            show_info("dfpir: there is nothing to undo in this layer.")
            return
        if self._history.undo(layer):
            self.say(f"{layer.name}: the original data are back.")
        else:
            show_warning(f"{layer.name} was changed by something else since; nothing was undone.")
        self._report.setText("")
        self._refresh()

    def show_residual(self, _: Any = None) -> None:
        """Show what the latest restoration took away as another layer."""
        from dfpir.stacks import residual

        layer = self.layer.value
        entry = self._history.latest(layer)
        if entry is None:
            return
        with self._reporting_errors():
            before, after = (_layers.levels_held(each)[0] for each in (entry.before, entry.after))
            image = residual(before, after, rgb=layer.rgb)
            facts = _layers.residual_attributes(_layers.attributes(layer))
            shown = self._show_layer(image, facts, beside=layer)
            limit = max(abs(float(each)) for each in shown.contrast_limits) or 1.0
            shown.contrast_limits_range = shown.contrast_limits = (-limit, limit)

    def ask_where_to_save(self, _: Any = None) -> None:
        """Ask for a file and write the chosen layer there."""
        name, _ = QFileDialog.getSaveFileName(
            self.native, "Save with record", f"{self.layer.value.name}.ome.tif", "TIFF (*.tif)"
        )
        if name:
            # The dialog has asked about this file, if it exists, but about no other.
            self.save_to(name, overwrite=Path(name).exists())

    def save_to(self, path: str, *, overwrite: bool = False) -> None:
        """Write the chosen layer as OME-TIFF and its records as JSON.

        What has no suffix of a TIFF gets one. `overwrite` says whether the file at just this path
        may be replaced, and its records with it.
        """
        layer = self.layer.value
        if not path.lower().endswith((".tif", ".tiff")):
            path, overwrite = f"{path}.ome.tif", False

        def steps() -> Generator[Step, None, Any]:
            from dfpir.stacks import save_steps

            return (
                yield from save_steps(
                    path,
                    _layers.stack_of(layer),
                    layer.metadata.get(_layers.RECORDS, []),
                    rgb=layer.rgb,
                    axes=_layers.tiff_axes(layer),
                    pixel_size=_layers.pixel_size(layer),
                    overwrite=overwrite,
                )
            )

        def say(written: Any) -> None:
            self.say(f"Written: {written[0]} and {written[1].name}")

        with self._reporting_errors():
            self._run(steps(), say, f"Saving {layer.name}")

    def copy_python(self, _: Any = None) -> None:
        """Put the equivalent Python on the clipboard."""
        QApplication.clipboard().setText(self.python.value)

    def _show_layer(self, image: Any, facts: dict[str, Any], *, beside: Image | None) -> Image:
        """Add a layer and leave the selection where it was."""
        layer = Layer.create(image, facts, "image")
        if self._viewer is not None:
            self._viewer.add_layer(layer)
            if beside is not None:
                self._viewer.layers.selection.active = beside
        return layer

    # Work

    def _reporting_errors(self) -> Any:
        """Return a context in which an error becomes a notification."""
        return Reporting(self._fail)

    def _fail(self, error: BaseException) -> None:
        logger.error("dfpir failed", exc_info=error)
        known = isinstance(error, ValueError | ImportError | OSError | WorkError)
        words = str(error) if known and str(error) else f"{type(error).__name__}: {error}"
        self._queue = []
        if not self._closed:
            self.say(f"Not done. {words}")
        show_error(f"dfpir: {words}")

    def _run(
        self, steps: Generator[Step, None, Any], then: Callable[[Any], None], doing: str
    ) -> None:
        """Advance a generator in a worker; `then` gets its result, on the main thread."""

        def work() -> Generator[Step, None, Any]:
            try:
                return (yield from steps)
            except RuntimeError as error:
                raise WorkError(str(error)) from error

        bar = cancelable_progress(total=1000, desc=doing)
        worker = create_worker(work, _start_thread=False, _ignore_errors=True)
        state: dict[str, Any] = {"at": 0}

        def advance(step: Step) -> None:
            at = int(step.fraction * 1000)
            passed, state["at"] = at - state["at"], at
            if not self._closed:
                self.progress.value = at
                self.say(f"{doing}: {step.doing}")
            # Last, since napari handles other events meanwhile, and the end may be among them.
            bar.update(passed)
            if bar.is_canceled:
                self.stop()

        def finish(result: Any) -> None:
            if self._closed:
                return
            with self._reporting_errors():
                then(result)

        def abandon() -> None:
            # Closing waits for the core's step to end: in a worker, not where the user does.
            closer = create_worker(lambda: steps.close(), _start_thread=False, _ignore_errors=True)
            state["closer"] = closer
            closer.finished.connect(end)
            closer.start()

        def end() -> None:
            bar.close()
            self._worker = None
            self._refresh()
            if worker.abort_requested and not self._closed:
                self.say(f"Cancelled: {doing[0].lower()}{doing[1:]}. It has changed nothing.")
            if self._queue and not self._closed:
                self._next_layer()

        def end_unless_closing() -> None:
            if "closer" not in state:
                end()

        worker.yielded.connect(advance)
        worker.returned.connect(finish)
        worker.aborted.connect(abandon)
        worker.errored.connect(self._fail)
        worker.finished.connect(end_unless_closing)
        self._worker = worker
        self.progress.value = 0
        self.say(f"{doing}: starting")
        self._refresh()
        worker.start()

    def stop(self, _: Any = None) -> None:
        """Cancel what is being worked on; nothing changes."""
        if self._worker is not None:
            self._worker.quit()
            self._queue = []
            if not self._closed:
                self.cancel.enabled = False
                self.say("Cancelling...")

    def _close(self, _: Any = None) -> None:
        """Stop when the widget goes."""
        self._closed = True
        self.stop()


class WorkError(Exception):
    """A RuntimeError of the core, on its way to the screen.

    Raised as such in a worker, it would be taken for a sign that Qt is going, and be dropped.
    """


class Reporting:
    """A context manager that hands errors to a function instead of raising them."""

    def __init__(self, fail: Callable[[BaseException], None]) -> None:
        self.fail = fail

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        """Report an error, if there was one."""
        if not isinstance(error, Exception):
            return False
        self.fail(error)
        return True
