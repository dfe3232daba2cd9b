"""Draw the pictures of the example workflows: ``python tests/adapters/comfyui_thumbnails.py``.

Photographs of scikit-image, degraded by `dfpir.synthesis` and restored by the bundled weights.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from skimage import data
from torch.nn import functional

from dfpir import Degradation, Restorer, synthesis

FOLDER = Path(__file__).resolve().parents[2] / "comfyui_nodes/example_workflows"
SIDE = 400
NOISE = Degradation.NOISE_50
RESTORER = Restorer(device="cpu")


def picture(name, top=0, left=0, side=SIDE):
    pixels = torch.from_numpy(np.ascontiguousarray(getattr(data, name)())).movedim(-1, 0)
    return pixels[None, :, top : top + side, left : left + side].float() / 255


def degraded(pixels, degradation, seed):
    generator = torch.Generator().manual_seed(seed)
    return synthesis.degrade(pixels, degradation, generator)


def to_image(pixels):
    return Image.fromarray((pixels[0].clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy())


def halves(given, degradation):
    """The picture before, on the left of a white line, and after."""
    before = to_image(given)
    after = to_image(RESTORER.restore_pixels(given, degradation).image)
    middle = before.width // 2
    after.paste(before.crop((0, 0, middle, before.height)), (0, 0))
    ImageDraw.Draw(after).line([(middle, 0), (middle, after.height)], "white", 2)
    return after


def save(image, name):
    image.save(FOLDER / f"{name}.jpg", quality=85, optimize=True)


def restore_image():
    given = degraded(picture("astronaut", 0, 60), Degradation.RAIN, 5)
    save(halves(given, Degradation.RAIN), "restore_image")


def diagnose_then_restore():
    sheet = Image.new("RGB", (SIDE, SIDE))
    draw = ImageDraw.Draw(sheet)
    half = SIDE // 2
    cases = {"noise-25": 5, "rain": 5, "haze": 9, "low-light": 11}  # seeds of plain cases
    for number, (name, seed) in enumerate(cases.items()):
        given = degraded(picture("coffee", 60, 180, half), Degradation.from_name(name), seed)
        left, top = number % 2 * half, number // 2 * half
        sheet.paste(to_image(given), (left, top))
        found = RESTORER.classify_pixels(given)[0]
        draw.rectangle([left, top + half - 30, left + half, top + half], "black")
        place = (left + half // 2, top + half - 15)
        draw.text(place, found.name, "white", ImageFont.load_default(18), anchor="mm")
    save(sheet, "diagnose_then_restore")


def restore_video_frames():
    strip = Image.new("RGB", (SIDE, SIDE), "black")
    width, height, margin = SIDE - 60, SIDE // 2 - 15, 10
    for number in range(2):
        frame = picture("chelsea", 20, 30 + 40 * number, 360)[..., :198, :]
        larger = functional.interpolate(frame, size=(height, width), mode="bilinear")
        given = degraded(larger, NOISE, number)
        strip.paste(halves(given, NOISE), (30, margin + number * (height + margin)))
    draw = ImageDraw.Draw(strip)
    for top in range(8, SIDE, 28):
        for left in (8, SIDE - 22):
            draw.rounded_rectangle([left, top, left + 14, top + 14], 3, "white")
    save(strip, "restore_video_frames")


if __name__ == "__main__":
    restore_image()
    diagnose_then_restore()
    restore_video_frames()
