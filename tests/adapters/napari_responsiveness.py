"""How long the viewer stands still while the plugin works, and how soon Cancel acts.

    xvfb-run -a python tests/adapters/napari_responsiveness.py [--side 2048] [--runs 5]

A timer on the main thread should fire every 5 ms; the longest pause of a run is its gap. The first
run also imports PyTorch and is reported apart.
"""

# ruff: noqa: T201 - a script; printing is what it is for

import argparse
import time

import napari
import numpy as np
from qtpy.QtCore import QTimer
from qtpy.QtWidgets import QApplication


def pump(until):
    while not until():
        QApplication.processEvents()
        time.sleep(0.001)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    viewer = napari.Viewer()
    noise = np.random.default_rng(0).normal(1000, 200, (options.side, options.side))
    layer = viewer.add_image(noise.clip(0).astype(np.uint16))
    _, widget = viewer.window.add_plugin_dock_widget("dfpir", "Restoration")
    widget.degradation.value = "noise-25"
    ticks = []
    timer = QTimer()
    timer.timeout.connect(lambda: ticks.append(time.perf_counter()))
    timer.start(5)
    gaps, seconds, cancels = [], [], []
    for _ in range(options.runs + 1):
        ticks.clear()
        start = time.perf_counter()
        widget.restore.native.click()
        pump(lambda: not widget.running)
        seconds.append(time.perf_counter() - start)
        gaps.append(max(np.diff(ticks)) * 1000)
        widget.undo.native.click()
    for _ in range(options.runs):
        widget.restore.native.click()
        pump(lambda: ": restoring" in widget._status.text())
        halfway = time.perf_counter() + 0.5
        pump(lambda until=halfway: time.perf_counter() > until)
        start = time.perf_counter()
        widget.cancel.native.click()
        pump(lambda: not widget.running)
        cancels.append(time.perf_counter() - start)
    print(f"{options.side} x {options.side}, napari {napari.__version__}")
    print(f"restore: {np.median(seconds[1:]):.1f} s in the median, first {seconds[0]:.1f} s")
    print(f"worst gap: {np.median(gaps[1:]):.0f} ms in the median run, first {gaps[0]:.0f} ms")
    print(f"cancel: {np.median(cancels):.2f} s in the median, worst {max(cancels):.2f} s")
    assert layer.data.dtype == np.uint16
    viewer.close()


if __name__ == "__main__":
    main()
