"""What large pictures take: memory, a cluster's throughput, seams, and how soon work stops.

    python tests/large_measured.py memory [--side 20000]
    python tests/large_measured.py cluster [--side 4096] [--rounds 3]
    python tests/large_measured.py seams [--side 4096] [--tile 512] [--pictures FILE ...]
    python tests/large_measured.py cancel [--side 2048]
    python tests/large_measured.py exact [--preset paper] [--height 1088] [--width 1920]

`memory` restores a zarr array in a process of its own and reports the most it held. `cluster` does
so on local workers of one thread each: one and two, in turn, then two of which one is killed
halfway. `seams` compares blocks of a slide or, with `--tile`, tiles of a picture with sampled
statistics, to the picture restored as a whole, for every degradation. `cancel` asks every preset to
stop at moments spread over their work, and reports how long that takes. `exact` compares what the
package computes in tiles to the answer of the passes that other devices run in strips, and reports
the memory. Not for Windows.
"""

# ruff: noqa: T201 - a script; printing is what it is for

import argparse
import itertools
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import dask
import numpy as np
import torch
import zarr
from skimage import data, transform
from skimage.metrics import peak_signal_noise_ratio

from dfpir import benchmark, files, slides, synthesis, weights
from dfpir.degradation import Degradation
from dfpir.restorer import Restorer
from dfpir.tiling import Tiling
from dfpir.zarr_files import restore_zarr

BLOCK = slides.BLOCK

SIDES = {"memory": 20_000, "cluster": 4096, "seams": 4096, "cancel": 2048, "exact": 1088}

OVERLAP = Tiling().overlap
"""Of the tiles of a picture, in pixels."""

MOMENTS = (0.02, 0.25, 0.5, 0.75, 0.95)
"""When to ask for a stop, of the time that the whole work takes."""


def say(line):
    """Print a line at once: each of these takes minutes."""
    print(line, flush=True)


def scene(side):
    """Photographs side by side, (side, side, 3) of 0..1, from those of scikit-image."""
    photographs = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket(), data.retina()]
    canvas = np.zeros((side, side, 3), np.float32)
    cell = -(-side // 4)
    for number in range(16):
        picture = photographs[number % len(photographs)]
        square = min(picture.shape[:2])
        part = np.rot90(picture[:square, :square], number // len(photographs))
        part = transform.resize(part, (cell, cell), order=3).clip(0, 1)
        top, left = (number // 4) * cell, (number % 4) * cell
        space = canvas[top : top + cell, left : left + cell]
        space[:] = part[: space.shape[0], : space.shape[1]]
    return canvas


def write_noisy(path, side):
    """Write a noisy grey slide, chunk by chunk."""
    array = zarr.create_array(str(path), shape=(side, side), chunks=(BLOCK, BLOCK), dtype=np.uint8)
    generator = np.random.default_rng(0)
    picture = np.tile(data.camera(), (BLOCK // 512, BLOCK // 512)).astype(np.float32)
    for top in range(0, side, BLOCK):
        for left in range(0, side, BLOCK):
            noisy = picture + generator.normal(0, 25, picture.shape).astype(np.float32)
            block = noisy[: side - top, : side - left].clip(0, 255).astype(np.uint8)
            array[top : top + BLOCK, left : left + BLOCK] = block
    return path


def memory(options):
    with tempfile.TemporaryDirectory() as folder:
        source = write_noisy(Path(folder, "in.zarr"), options.side)
        started = time.monotonic()
        command = ["restore", source, "-o", Path(folder, "out.zarr"), "--degradation", "noise-25"]
        subprocess.run([sys.executable, "-m", "dfpir", *map(str, command)], check=True)
        seconds = time.monotonic() - started
        written = zarr.open_array(str(Path(folder, "out.zarr")), mode="r")
        middle = slice(options.side // 2, options.side // 2 + 512)
        spread = float(np.std(written[middle, middle].astype(float)))
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    megapixels = options.side**2 / 1e6
    say(f"{options.side} x {options.side}: {seconds:.0f} s, {megapixels / seconds:.2f} MP/s")
    say(f"peak of the process: {peak / 1e9:.2f} GB; standard deviation amid: {spread:.1f}")


def cluster(options):
    with tempfile.TemporaryDirectory() as folder:
        source = write_noisy(Path(folder, "in.zarr"), options.side)
        blocks = (-(-options.side // BLOCK)) ** 2
        say(f"{options.side} x {options.side}, {blocks} blocks")
        lazy = slides.restore_lazily(zarr.open_array(str(source), mode="r"), "noise-25").image
        tasks = len(dict(dask.optimize(lazy)[0].__dask_graph__()))
        attention = Restorer(device="cpu").measure(torch.zeros(1, 3, 64, 64), Degradation.NOISE_25)
        size = len(pickle.dumps(attention))
        say(f"{tasks / blocks:.1f} tasks a block; the attention is {size / 1e6:.2f} MB")
        gains, rates = [], {1: [], 2: []}
        for number in range(options.rounds):
            # Turn and turn about: the machine may be faster at one time than at another.
            output, totals = {}, {}
            for workers in (1, 2):
                output[workers] = Path(folder, f"{number}-{workers}.zarr")
                totals[workers], rate, moved = on_workers(source, output[workers], workers)
                rates[workers].append(rate)
                say(
                    f"workers: {workers}; {totals[workers]:.1f} s in all; once attention is known "
                    f"{rate:.3f} blocks/s; {moved / blocks / 1e6:.2f} MB a block moved"
                )
            gains.append(rates[2][-1] / rates[1][-1])
            say(
                f"two over one: blocks/s {gains[-1]:.2f}, in all {totals[1] / totals[2]:.2f}; "
                f"equal exactly: {equal(*output.values())}"
            )
        each = np.median(rates[2]) / 2
        say(f"median: two over one {np.median(gains):.2f}; {each:.3f} blocks/s per worker of two")
        killed = Path(folder, "killed.zarr")
        seconds, _, _ = on_workers(source, killed, 2, kill=True)
        say(
            f"one of two killed halfway: {seconds:.1f} s; equal exactly: {equal(output[2], killed)}"
        )


def on_workers(source, output, workers, *, kill=False):
    """Restore on local workers of one thread each, of which one may be killed halfway.

    Returns the seconds, the blocks a second from the first one done to the last, and the bytes that
    workers sent each other.
    """
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as local,
        Client(local) as client,
    ):
        client.run(slides.shared_restorer, weights.default_name(), "cpu", "auto")
        victims = [next(iter(local.workers.values())).process.pid] if kill else []
        times = []

        def on_step(step):
            if step.doing == "restoring blocks":
                times.append(time.monotonic())
            if step.fraction > 0.5 and victims:
                os.kill(victims.pop(), signal.SIGKILL)

        started = time.monotonic()
        restore_zarr(
            source,
            output,
            "noise-25",
            device="cpu",
            scheduler=local.scheduler_address,
            on_step=on_step,
        )
        seconds = time.monotonic() - started
        moved = client.run(lambda dask_worker: dask_worker.transfer_outgoing_bytes_total)
    # When the first is done, the other workers are about to be.
    rate = (len(times) - workers) / (times[-1] - times[0])
    return seconds, rate, sum(moved.values())


def equal(first, second):
    """Compare two zarr arrays, block by block."""
    arrays = [zarr.open_array(str(path), mode="r") for path in (first, second)]
    assert arrays[0].shape == arrays[1].shape
    rows = range(0, arrays[0].shape[0], BLOCK)
    return all(np.array_equal(*(each[row : row + BLOCK] for each in arrays)) for row in rows)


def step_across(image, side):
    """Return the 99th percentile of the step across block borders, in grey levels."""
    borders = range(side, image.shape[0], side)
    image = image.astype(np.float32)
    down = [np.abs(image[at] - image[at - 1]).ravel() for at in borders]
    across = [np.abs(image[:, at] - image[:, at - 1]).ravel() for at in borders]
    return float(np.quantile(np.concatenate([*down, *across]), 0.99))


def seams(options):
    side = options.side
    pictures = {"scikit-image's photographs": scene(side)}
    if options.pictures:
        pictures = {}
        for path in options.pictures:
            array = files.read_image(path).array[..., :3] / 255
            scale = side / min(array.shape[:2])
            size = [max(round(length * scale), side) for length in array.shape[:2]]
            pictures[path.name] = transform.resize(array, size, order=3).clip(0, 1)[:side, :side]
    restorer = Restorer(device="cpu")
    losses = []
    for name, picture in pictures.items():
        clean = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float()
        for kind in Degradation:
            pixels = synthesis.degrade(clean, kind, torch.Generator().manual_seed(1))
            degraded = (pixels[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
            target = (picture * 255).round().astype(np.uint8)
            whole = restorer.restore(degraded, kind).image
            if options.tile:
                tiling = Tiling(options.tile, OVERLAP, statistics="sampled")
                done = restorer.restore(degraded, kind, tiling=tiling)
                blocks, border, statistics = done.image, options.tile, done.record.statistics
            else:
                slide = slides.restore_lazily(degraded, kind, device="cpu", rgb=True)
                blocks, border = np.asarray(slide.image), BLOCK
                statistics = slide.records[0].statistics
            seam = step_across(blocks, border) - step_across(whole, border)
            ours, theirs, between = (
                peak_signal_noise_ratio(*pair)
                for pair in ((target, blocks), (target, whole), (whole, blocks))
            )
            losses.append(theirs - ours)
            say(
                f"{name}, {kind.value} ({statistics}): seam {seam:+.2f} grey "
                f"levels; to the whole {between:.1f} dB; to the original: whole {theirs:.2f}, "
                f"blocks {ours:.2f} dB"
            )
    say(f"median loss: {np.median(losses):+.3f} dB")


class Stopped(Exception):
    """Raised by `on_progress`."""


def seconds_to_stop(restorer, pixels, after):
    """Ask for a stop after some seconds; return how long it takes from there, None if too late."""
    asked = []
    timer = threading.Timer(after, lambda: asked.append(time.monotonic()))

    def stop_if_asked(done, total):
        if asked:
            raise Stopped

    timer.start()
    try:
        restorer.restore_pixels(pixels, Degradation.RAIN, on_progress=stop_if_asked)
    except Stopped:
        return time.monotonic() - asked[0]
    timer.cancel()
    return None


def cancel(options):
    pixels = benchmark.picture(options.side, options.side)
    for name, preset in benchmark.PRESETS.items():
        restorer = Restorer(model=benchmark.network(preset()))
        times = [time.monotonic()]
        restorer.restore_pixels(
            pixels, Degradation.RAIN, on_progress=lambda *_, t=times: t.append(time.monotonic())
        )
        times.append(time.monotonic())
        silence = max(later - earlier for earlier, later in itertools.pairwise(times))
        whole = times[-1] - times[0]
        say(
            f"{name}, {options.side} x {options.side}: {whole:.1f} s; longest time between two of "
            f"{len(times) - 2} calls of on_progress {silence:.2f} s"
        )
        for moment in MOMENTS:
            seconds = seconds_to_stop(restorer, pixels, whole * moment)
            stopped = "was done by then" if seconds is None else f"stopped after {seconds:.2f} s"
            say(f"  asked to stop at {moment:.0%}: {stopped}")


def exact(options):
    height, width = options.side, options.width
    model = benchmark.network(benchmark.PRESETS[options.preset]())
    pixels = benchmark.picture(height, width)
    started = time.monotonic()
    with torch.inference_mode():
        tiles = model(pixels, Degradation.RAIN)
    between = time.monotonic()
    # Where gradients might be wanted, the passes are the ones that other devices run in strips.
    with torch.enable_grad():
        strips = model(pixels, Degradation.RAIN, rows=64)
    ended = time.monotonic()
    error = benchmark.distance(tiles, strips)
    say(
        f"{options.preset}, {height} x {width}: relative L2 {error:.1e}; in tiles "
        f"{between - started:.1f} s, in strips {ended - between:.1f} s"
    )
    peak = benchmark.peak_in_child(options.preset, (height, width), "dfpir", "float32")
    say(f"  peak beyond the network, in tiles: {peak / 1e9:.2f} GB")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=list(SIDES))
    parser.add_argument("--side", "--height", type=int)
    parser.add_argument("--width", type=int, default=1920)
    parser.add_argument("--preset", choices=list(benchmark.PRESETS), default="paper")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tile", type=int, metavar="SIDE")
    parser.add_argument("--pictures", type=Path, nargs="+", metavar="FILE")
    options = parser.parse_args()
    options.side = options.side or SIDES[options.what]
    measures = [memory, cluster, seams, cancel, exact]
    {each.__name__: each for each in measures}[options.what](options)


if __name__ == "__main__":
    main()
