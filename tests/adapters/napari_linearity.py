"""What the plugin's road does to real fluorescence: PSNR, and the line of raw on restored.

    python tests/adapters/napari_linearity.py DIR [--images N]

DIR holds `input` and `target` pictures of equal names, 8-bit grey. Each is restored twice, as it is
and as a 16-bit camera might have it (times 16, plus 100), told the noise nearest to its level.
"""

# ruff: noqa: T201 - a script; printing is what it is for

import argparse
from pathlib import Path

import numpy as np

from dfpir.degradation import Degradation
from dfpir.files import find_images, read_image
from dfpir.restorer import classify
from dfpir.stacks import restore_stack


def psnr(image, target):
    error = np.mean((image.astype(float) - target) ** 2)
    return 10 * np.log10(255**2 / error)


def grey(path):
    array = read_image(path).array
    return array if array.ndim == 2 else array[..., 0]


def rows(folder, limit):
    for path in find_images(folder / "input")[:limit]:
        raw, target = grey(path), grey(folder / "target" / path.name)
        for kind, stack in (("8 bits", raw), ("16 bits", raw.astype(np.uint16) * 16 + 100)):
            sigma = classify(stack).sigma
            told = Degradation.nearest_noise(sigma) if sigma else Degradation.NOISE_25
            done = restore_stack(stack, told)
            seen = done.image.astype(float)
            seen = seen if kind == "8 bits" else (seen - 100) / 16
            yield kind, path.name, psnr(raw, target), psnr(seen, target), done.records[0].linearity


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int)
    options = parser.parse_args()
    found = list(rows(options.folder, options.images))
    for kind in ("8 bits", "16 bits"):
        some = [row for row in found if row[0] == kind]
        lines = [row[4] for row in some]
        offsets = [abs(line.offset) / line.span for line in lines]
        drifts = [abs(line.mean_drift) / line.span for line in lines]
        worst = min(some, key=lambda row: row[3])
        print(
            f"{kind}: n {len(some)}, PSNR {np.mean([row[2] for row in some]):.2f} -> "
            f"{np.mean([row[3] for row in some]):.2f} dB; median slope "
            f"{np.median([line.slope for line in lines]):.3f}, "
            f"|offset| {np.median(offsets):.2%}, |drift| {np.median(drifts):.2%} of the raw span; "
            f"worst {worst[1]}: {worst[2]:.2f} -> {worst[3]:.2f} dB, {worst[4].summary}"
        )


if __name__ == "__main__":
    main()
