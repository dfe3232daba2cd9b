"""Class probabilities as horizontal bars."""

from __future__ import annotations

from collections.abc import Mapping

from qtpy.QtCore import QRectF, QSize, Qt
from qtpy.QtGui import QColor, QPainter, QPaintEvent
from qtpy.QtWidgets import QSizePolicy, QWidget

ROW = 18
NAME_WIDTH = 74
NUMBER_WIDTH = 42
CHOSEN = QColor(77, 148, 255)
OTHER = QColor(128, 128, 128)


class Bars(QWidget):
    """Draws one bar for each name, the chosen one in colour; hidden while there are none."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, float] = {}
        self.chosen = ""
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.hide()

    def show_values(self, values: Mapping[str, float], chosen: str) -> None:
        """Draw these, in their order; values are 0..1."""
        self.values, self.chosen = dict(values), chosen
        self.setFixedHeight(ROW * len(self.values) + 4)
        self.setAccessibleDescription(", ".join(f"{n} {p:.0%}" for n, p in self.values.items()))
        self.setVisible(bool(self.values))
        self.update()

    def sizeHint(self) -> QSize:
        """Return the size Qt should give."""
        return QSize(220, ROW * len(self.values) + 4)

    def paintEvent(self, event: QPaintEvent | None) -> None:
        """Draw the bars with the host's font and text colour."""
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        text = self.palette().windowText().color()
        length = max(self.width() - NAME_WIDTH - NUMBER_WIDTH, 20)
        for number, (name, value) in enumerate(self.values.items()):
            top = number * ROW + 2
            painter.setPen(text)
            left = Qt.AlignmentFlag.AlignLeft | Qt.AlignmentFlag.AlignVCenter
            right = Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter
            painter.drawText(QRectF(0, top, NAME_WIDTH, ROW), left, name)
            edge = self.width() - NUMBER_WIDTH
            painter.drawText(QRectF(edge, top, NUMBER_WIDTH, ROW), right, f"{value:.0%}")
            painter.setPen(Qt.PenStyle.NoPen)
            faint = QColor(OTHER)
            faint.setAlpha(60)
            for colour, share in ((faint, 1.0), (CHOSEN if name == self.chosen else OTHER, value)):
                painter.setBrush(colour)
                bar = QRectF(NAME_WIDTH, top + 4, length * share, ROW - 8)
                painter.drawRoundedRect(bar, 3, 3)
        painter.end()
