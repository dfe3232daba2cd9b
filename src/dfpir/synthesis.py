"""The degradations as batched torch functions: for training, for the demo and for sample pictures.

Every function takes sharp pixels (N, 3, H, W) with values 0..1 in sRGB and returns degraded ones
of the same shape, 8-bit quantised and clipped as a picture file would be. Every image of a batch
gets parameters of its own. Random numbers are drawn by the `torch.Generator` given, on its device:
one of the CPU yields the same pictures wherever the pixels are, one of the pixels' own device keeps
a training there from waiting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from kornia.color import linear_rgb_to_rgb, rgb_to_linear_rgb
from kornia.enhance import jpeg_codec_differentiable
from kornia.filters import filter2d, gaussian_blur2d
from torch import Generator, Tensor
from torch.nn import functional as F

from dfpir.degradation import NOISE_BORDERS, NOISES, Degradation
from dfpir.pixels import is_grey

LEVELS = 255.0
"""Grey levels of an 8-bit picture."""

GLOBAL = (Degradation.HAZE, Degradation.LOW_LIGHT)
"""Degradations judged from the whole scene."""


def rand(*shape: int, generator: Generator) -> Tensor:
    """Draw values from 0..1 on the generator's device."""
    return torch.rand(shape, generator=generator, device=generator.device)


def uniform(count: int, low: float, high: float, generator: Generator) -> Tensor:
    """Draw `count` values from low..high, shaped (count, 1, 1, 1) to act on a batch."""
    return low + (high - low) * rand(count, 1, 1, 1, generator=generator)


def log_uniform(count: int, low: float, high: float, generator: Generator) -> Tensor:
    """Draw like `uniform`, evenly on a logarithmic scale."""
    return uniform(count, math.log(low), math.log(high), generator).exp()


def prompted(count: int, generator: Generator) -> Tensor:
    """Return the sigmas (count, 1, 1, 1) of noise prompts, each as likely as the others."""
    device = generator.device
    drawn = torch.randint(len(NOISES), (count,), generator=generator, device=device)
    return torch.tensor(list(NOISES.values()), device=device)[drawn].reshape(-1, 1, 1, 1)


def given_or(value: float | None, drawn: Tensor) -> Tensor:
    """Return what was drawn, or `value` for every image if it is given.

    What is not used is drawn all the same: the random numbers that follow do not depend on it.
    """
    return drawn if value is None else torch.full_like(drawn, value)


def normal_like(pixels: Tensor, generator: Generator) -> Tensor:
    """Draw standard normal values of the shape of `pixels`, on its device."""
    drawn = torch.randn(pixels.shape, generator=generator, device=generator.device)
    return drawn.to(pixels.device)


def quantised(pixels: Tensor) -> Tensor:
    """Clip to 0..1 and round to the nearest of 256 grey levels."""
    return (pixels.clamp(0, 1) * LEVELS).round() / LEVELS


def gaussian_noise(pixels: Tensor, sigma: Tensor | float, generator: Generator) -> Tensor:
    """Add white Gaussian noise without clipping or quantising; a grey picture stays grey.

    `sigma`, in grey levels of 0..255, is one number or one per image, shaped (N, 1, 1, 1).
    """
    if isinstance(sigma, Tensor):
        sigma = sigma.to(pixels.device)
    noise = normal_like(pixels, generator)
    noise = torch.where(is_grey(pixels), noise[:, :1], noise)
    return pixels + noise * (sigma / LEVELS)


def line_kernels(length: Tensor, width: Tensor, angle: Tensor, size: int) -> Tensor:
    """Return (N, size, size) kernels of soft line segments with a peak of 1.

    `length` and `width` (standard deviation across) are in pixels, `angle` in radians from the
    vertical; all are shaped (N, 1, 1, 1).
    """
    steps = torch.arange(size, device=angle.device) - size // 2
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    angle, length, width = (value[:, 0] for value in (angle, length, width))
    along = rows * angle.cos() + columns * angle.sin()
    across = columns * angle.cos() - rows * angle.sin()
    ends = torch.sigmoid((length / 2 - along.abs()) / (0.08 * length))
    return ends * torch.exp(-0.5 * (across / width) ** 2)


def rain(pixels: Tensor, generator: Generator, density: float | None = None) -> Tensor:
    """Add layers of bright streaks that share one direction per image, some under a thin veil.

    `density`, the streaks of a layer per pixel, is drawn from 0.0003 to 0.006 if not given.
    """
    count, _, height, width = pixels.shape
    size = 49
    direction = uniform(count, -0.6, 0.6, generator)
    streaks = torch.zeros(count, 1, height, width, device=generator.device)
    for layer in range(3):
        present = rand(count, 1, 1, 1, generator=generator) < (1.0, 0.7, 0.4)[layer]
        frequency = given_or(density, log_uniform(count, 3e-4, 6e-3, generator))
        shape = (count, 1, height + size - 1, width + size - 1)
        drops = rand(*shape, generator=generator)
        brightness = 0.3 + 0.7 * rand(*shape, generator=generator)
        drops = (drops < frequency) * brightness
        kernels = line_kernels(
            log_uniform(count, 8, 44, generator),
            log_uniform(count, 0.3, 1.0, generator),
            direction + uniform(count, -0.06, 0.06, generator),
            size,
        )
        opacity = uniform(count, 0.15, 0.9, generator) * present
        drawn = filter2d(drops, kernels, border_type="constant", padding="valid")
        streaks = streaks + opacity * drawn.clamp(max=1.2)
    veil = (uniform(count, -0.15, 0.15, generator)).clamp(min=0)
    tint = uniform(count, 0.85, 1.0, generator)
    # From adding light only to also covering what lies behind.
    cover = uniform(count, 0.0, 0.4, generator)
    streaks, veil, tint, cover = (value.to(pixels.device) for value in (streaks, veil, tint, cover))
    veiled = pixels * (1 - veil) + 0.7 * veil
    return quantised(veiled + streaks * (tint - cover * veiled))


def smooth_field(count: int, height: int, width: int, cells: int, generator: Generator) -> Tensor:
    """Return (N, 1, H, W) smooth random fields with values about 0..1, `cells` bumps across."""
    coarse = rand(count, 1, cells, cells, generator=generator)
    return F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)


def scene_depth(pixels: Tensor, generator: Generator) -> Tensor:
    """Invent a depth map (N, 1, H, W), 1 where it is farthest, as of a street or a room.

    The inverse depth of a plane is linear in the coordinates of a picture. What is seen of a
    floor, a ceiling, two walls and the ground between them is the nearest of their planes; some of
    them are absent. On it lie soft relief and objects: a random mixture of colours, smoothed and
    cut into bands, has its edges on edges of the picture; what is bright is farther, more often
    than not. Nothing need be near: the nearest point is at a random part, up to three tenths, of
    the distance of the farthest, or beyond it.
    """
    count, _, height, width = pixels.shape
    device = generator.device
    rows, columns = (torch.linspace(-1, 1, side, device=device) for side in (height, width))
    rows = rows[:, None] - uniform(count, -0.6, 0.6, generator)
    columns = columns[None, :] - uniform(count, -0.6, 0.6, generator)
    nearness = torch.ones(count, 1, height, width, device=device)
    for distance, likely in ((rows, 0.8), (-rows, 0.4), (columns, 0.4), (-columns, 0.4)):
        present = rand(count, 1, 1, 1, generator=generator) < likely
        steepness = log_uniform(count, 0.8, 10, generator) * present
        nearness = torch.maximum(nearness, steepness * distance)
    relief = smooth_field(count, height, width, 4, generator)
    mixture = rand(count, 3, 1, 1, generator=generator) - 0.6  # the sky is bright and far
    blurred = gaussian_blur2d(pixels.to(device), (9, 9), (2.0, 2.0))
    objects = (blurred * mixture).sum(dim=1, keepdim=True)
    objects = (objects - objects.amin((2, 3), True)) / (
        objects.amax((2, 3), True) - objects.amin((2, 3), True) + 1e-3
    )
    bands = uniform(count, 2, 6, generator).round()
    objects = (objects * bands).round() / bands
    strength = uniform(count, 0, 1, generator), uniform(count, 0, 1, generator)
    nearness = nearness * torch.exp(strength[0] * relief + strength[1] * objects)
    depth = nearness.amin((2, 3), True) / nearness
    nearest = depth.amin((2, 3), True)
    moved = torch.maximum(nearest, uniform(count, 0, 0.3, generator))
    depth = moved + (depth - nearest) * (1 - moved) / (1 - nearest).clamp(min=1e-3)
    return depth.to(pixels.device)


def haze(
    pixels: Tensor,
    generator: Generator,
    beta: float | None = None,
    depth: Tensor | None = None,
) -> Tensor:
    """Scatter light on the way to the camera: J t + A (1 - t) with t = exp(-beta * depth).

    Depth (N, 1, H, W) is 1 at the farthest point; `beta` is drawn from 0.5 to 5 if not given. In
    half of the images the haze is as bright as white, as an exposure for what is near makes it; in
    the others it is grey, down to 0.65. A network that expects grey leaves some of white haze.

    References
    ----------
    .. [1] Narasimhan and Nayar, "Vision and the Atmosphere", IJCV 2002, section 3.
    """
    count = len(pixels)
    thickness = given_or(beta, log_uniform(count, 0.5, 5.0, generator))
    light = uniform(count, 0.65, 1.35, generator).clamp(max=1)
    tint = 1 + 0.06 * (rand(count, 3, 1, 1, generator=generator) - 0.5)
    thickness, light = (value.to(pixels.device) for value in (thickness, light * tint))
    if depth is None:
        depth = scene_depth(pixels, generator)
    transmission = torch.exp(-thickness * depth)
    return quantised(pixels * transmission + light * (1 - transmission))


def lit_from_near(pixels: Tensor, depth: Tensor, generator: Generator) -> Tensor:
    """Let the light of three images in five fall off with depth (N, 1, H, W): by up to exp(-1.5).

    So it does away from a window, a lamp or a flash, in rooms and at night. In pictures by
    daylight what is farthest is the bright sky: a network that has seen no others takes a dark
    wall behind haze for that.
    """
    fall = uniform(len(pixels), -1.0, 1.5, generator).clamp(min=0).to(pixels.device)
    return pixels * torch.exp(-fall * (depth - depth.amin((2, 3), True)))


def steeper(pixels: Tensor, gain: float | Tensor) -> Tensor:
    """Return images (..., 3, H, W) with `gain` times the contrast around their means, clipped."""
    mean = pixels.mean(dim=(-3, -2, -1), keepdim=True)
    return (mean + gain * (pixels - mean)).clamp(0, 1)


def contrasted(pixels: Tensor, generator: Generator) -> Tensor:
    """Give half of the images up to twice the contrast around their mean, or a little less.

    In rooms, and against the light, windows are white and corners black. A network that has seen
    softer scenes alone takes such contrast behind haze for less haze.
    """
    count = len(pixels)
    gain = log_uniform(count, 0.8, 2.0, generator)
    gain = torch.where(rand(count, 1, 1, 1, generator=generator) < 0.5, gain, 1.0)
    return steeper(pixels, gain.to(pixels.device))


def shake_kernels(count: int, extent: Tensor, size: int, generator: Generator) -> Tensor:
    """Return (N, size, size) kernels, each summing to 1, of the path of an unsteady hand.

    The path is an inertial random walk; `extent` (N, 1, 1, 1) is its largest diameter in pixels.
    """
    moments = 48
    inertia = 1 - 10 ** -uniform(count, 0.5, 2.5, generator)[:, 0]  # (N, 1, 1)
    device = generator.device
    push = torch.randn(count, moments, 2, generator=generator, device=device)
    velocity = [torch.randn(count, 1, 2, generator=generator, device=device) * 3]
    for moment in range(1, moments):
        velocity.append(
            inertia * velocity[-1] + (1 - inertia) ** 0.5 * push[:, moment : moment + 1]
        )
    path = torch.cat(velocity, dim=1).cumsum(dim=1)
    path = path - path.mean(dim=1, keepdim=True)
    reach = path.norm(dim=2).amax(dim=1)[:, None, None].clamp(min=1e-6)
    path = path / reach * (extent[:, 0] / 2)
    steps = torch.arange(size, device=device) - size // 2
    # Shared by the nearest pixels: what does not move stays as sharp as it was.
    near_rows = (1 - (steps - path[..., :1]).abs()).clamp(min=0)  # (N, moments, size)
    near_columns = (1 - (steps - path[..., 1:]).abs()).clamp(min=0)
    kernels: Tensor = near_rows.transpose(1, 2) @ near_columns
    return kernels / kernels.sum(dim=(1, 2), keepdim=True)


def motion_blur(pixels: Tensor, generator: Generator, length: float | None = None) -> Tensor:
    """Blur along the path of an unsteady hand, in linear light, with a little sensor noise.

    In half of the images a second path, softly bounded, stands for something that moves otherwise.
    Half of them are compressed as JPEG then. `length`, the diameter of a path in pixels, is drawn
    from 0 to 24 if not given.
    """
    count, _, height, width = pixels.shape
    light = rgb_to_linear_rgb(pixels)
    border = "reflect" if min(height, width) > 15 else "replicate"
    moved = []
    for _ in range(2):
        extent = given_or(length, uniform(count, 0, 24, generator))
        kernels = shake_kernels(count, extent, 31, generator).to(pixels.device)
        moved.append(filter2d(light, kernels, border_type=border))
    several = rand(count, 1, 1, 1, generator=generator) < 0.5
    region = torch.sigmoid(20 * (smooth_field(count, height, width, 3, generator) - 0.5)) * several
    blurred = torch.lerp(moved[0], moved[1], region.to(pixels.device))
    sigma = uniform(count, -1.0, 2.0, generator).clamp(min=0)
    blurred = linear_rgb_to_rgb(blurred.clamp(0, 1))
    blurred = quantised(gaussian_noise(blurred, sigma, generator))
    quality = uniform(count, 60, 98, generator).flatten()
    lossy = rand(count, 1, 1, 1, generator=generator) < 0.5
    quality, lossy = (value.to(pixels.device) for value in (quality, lossy))
    return torch.where(lossy, quantised(jpeg_codec_differentiable(blurred, quality)), blurred)


def softened(pixels: Tensor, generator: Generator) -> Tensor:
    """Take half of the images through a lens that is not quite sharp: by up to 1.3 pixels.

    Where every target is as sharp as can be, a network learns to sharpen whatever it sees. What a
    lens has done, and no motion, is not for it to undo.
    """
    deviation = uniform(len(pixels), -0.65, 1.3, generator).clamp(min=0.05).reshape(-1, 1)
    return gaussian_blur2d(pixels, (9, 9), deviation.expand(-1, 2).to(pixels.device))


WHITE = 0.8
"""What is brighter than this in all channels may be a source of light."""


def light_of_scene(pixels: Tensor, generator: Generator) -> Tensor:
    """Return the light (N, 3, H, W) on a sensor, 1 for a white thing, of well exposed pictures.

    A camera squeezes what is bright, so that a good exposure shows it nearer to grey than it is: in
    the dark white stands out more, by up to six times. In half of the images what is white is a
    lamp, a window or the sky besides, up to 60 times as bright as a white thing. And what is black
    is not: three of four lenses spread up to three tenths of the light over the picture.
    """
    count = len(pixels)
    shining = rand(count, 1, 1, 1, generator=generator) < 0.5
    excess = torch.where(shining, log_uniform(count, 1, 60, generator) - 1, 0.0)
    shoulder = uniform(count, 0, 5, generator)
    glare = log_uniform(count, 0.02, 0.3, generator)
    glare = torch.where(rand(count, 1, 1, 1, generator=generator) < 3 / 4, glare, 0.0)
    excess, shoulder, glare = (value.to(pixels.device) for value in (excess, shoulder, glare))
    white = ((pixels.amin(dim=1, keepdim=True) - WHITE) / (1 - WHITE)).clamp(min=0)
    light = rgb_to_linear_rgb(pixels)
    light = light * (1 + excess * white**2) / (1 + shoulder * (1 - light))
    return torch.lerp(light, light.mean(dim=(2, 3), keepdim=True), glare)


def low_light(pixels: Tensor, generator: Generator, exposure: float | None = None) -> Tensor:
    """Expose too little: less light, shifted white balance and black, sensor noise, gamma, 8 bits.

    In most images the noise is shot and read noise, in half of those smeared over neighbouring
    pixels, as the interpolation of colours and a camera's own denoising leave it. `exposure`, the
    fraction of the light of what is white, is drawn from 0.004 to 0.2 if not given; in two of
    three images it is four and a half to seven stops too little, as in most pictures that somebody
    wants to brighten. The white balance is off by up to a half for each colour: that of lamps is
    hard to find in the dark. What the light is of, see `light_of_scene`.
    """
    count = len(pixels)
    # Cameras draw curves of their own through the shadows: a power, with a straight foot that is
    # often shorter than that of sRGB, and more or less contrast.
    power = uniform(count, 0.38, 0.55, generator)
    foot = log_uniform(count, 3e-5, 3e-3, generator)
    contrast = log_uniform(count, 0.7, 1.6, generator)
    usual = log_uniform(count, 2**-7, 2**-4.5, generator)
    any_light = log_uniform(count, 0.004, 0.2, generator)
    drawn = torch.where(rand(count, 1, 1, 1, generator=generator) < 2 / 3, usual, any_light)
    light = given_or(exposure, drawn) ** (1 / contrast)
    balance = (0.8 * (rand(count, 3, 1, 1, generator=generator) - 0.5)).exp()
    # More often too much is left of a sensor's offset than too little.
    black = 0.001 * (rand(count, 1, 1, 1, generator=generator) - 0.25)
    black = black + 0.0003 * (rand(count, 3, 1, 1, generator=generator) - 0.5)
    noisy = (rand(count, 1, 1, 1, generator=generator) < 0.8).float()
    smeared = rand(count, 1, 1, 1, generator=generator) < 0.5
    shot = noisy * log_uniform(count, 1e-6, 4e-4, generator)
    read = noisy * log_uniform(count, 1e-4, 2e-3, generator)
    noise = normal_like(pixels, generator)
    scene = light_of_scene(pixels, generator)
    gain, black, smeared, shot, read, power, foot, contrast = (
        value.to(pixels.device)
        for value in (light * balance, black, smeared, shot, read, power, foot, contrast)
    )
    photons = gain * scene
    noise = (shot * photons + read**2).sqrt() * noise
    # The blur takes a factor of about 2.8 from white noise.
    noise = torch.where(smeared, 2 * gaussian_blur2d(noise, (5, 5), (0.8, 0.8)), noise)
    sensed = (photons + black + noise).clamp(0, 1)
    encoded = ((sensed + foot) ** power - foot**power) / ((1 + foot) ** power - foot**power)
    return quantised(encoded.clamp(min=0) ** contrast)


WELL_EXPOSED = 0.46
"""Mean of a well exposed picture in sRGB: a reflectance of 18 % in linear light."""


def well_exposed(pixels: Tensor) -> Tensor:
    """Bring the mean of each darker picture up to `WELL_EXPOSED`, by a gamma curve.

    Nobody restores a dark picture to get a dark one, and how dark the scene itself was the picture
    does not tell. A bright scene is left as bright as it is: of two dark pictures the brighter one
    is mostly of the brighter scene.
    """
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True).clamp(0.02, 0.98)
    exponent = math.log(WELL_EXPOSED) / mean.log()
    return pixels.clamp(min=1e-4) ** exponent.clamp(0.5, 1)


MOST_VEIL = 0.2
"""How much light is taken for a veil at the most: more of it is a bright thing, as the sky is."""


def full_contrast(pixels: Tensor) -> Tensor:
    """Take away the veil that a sharp picture has of its own, until a hundredth of it is black.

    From a picture alone nobody can tell the haze that was added from what was there before: a
    network that learns to leave the latter leaves some of every haze.
    """
    darkest = pixels.amin(dim=1).flatten(1).quantile(0.01, dim=1).clamp(max=MOST_VEIL)
    veil = darkest.reshape(-1, 1, 1, 1)
    return ((pixels - veil) / (1 - veil)).clamp(min=0)


PHYSICAL: dict[Degradation, Callable[[Tensor, Generator, float | None], Tensor]] = {
    Degradation.RAIN: rain,
    Degradation.HAZE: haze,
    Degradation.BLUR: motion_blur,
    Degradation.LOW_LIGHT: low_light,
}
"""The degradations that are not additive noise."""


def degrade(
    pixels: Tensor,
    degradation: Degradation,
    generator: Generator,
    severity: float | None = None,
) -> Tensor:
    """Degrade every image in one way, with parameters drawn for each.

    Parameters
    ----------
    pixels : Tensor, (N, 3, H, W), values 0..1
    degradation : Degradation
        Noise has exactly the standard deviation of its name.
    generator : torch.Generator
    severity : float, optional
        Sigma of the noise, density of the rain, beta of the haze, length of the blur or exposure,
        for all images; without it that too is drawn.

    Returns
    -------
    Tensor, (N, 3, H, W), 8-bit quantised values 0..1
    """
    if degradation.sigma is not None:
        sigma = degradation.sigma if severity is None else severity
        return quantised(gaussian_noise(pixels, sigma, generator))
    return PHYSICAL[degradation](pixels, generator, severity)


def noise_pairs(pixels: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return noisy inputs, their targets and the sigmas (N,) in grey levels, for training.

    Half of the sigmas are the prompts' own, an eighth is strong, from 50 to 80, and the others
    spread from 3 to 75; some of the noise grows with the light (see `shot_noise`). Half of the
    images are clipped and quantised as in the paper's protocol; the others are dimmed, raised on a
    pedestal and left unclipped, as a camera's raw counts are, and their targets with them. Without
    these a network learns that noise on dark ground must be darkened. A sixth of the images are
    turned grey: their noise is the same in all channels, which is no noise to a network that has
    only seen it differ between them.
    """
    count = len(pixels)
    turned = (rand(count, 1, 1, 1, generator=generator) < 1 / 6).to(pixels.device)
    pixels = torch.where(turned, pixels.mean(dim=1, keepdim=True), pixels)
    exact = prompted(count, generator)
    spread = log_uniform(count, 3, 75, generator)
    strong = uniform(count, 50, 80, generator)
    draw = rand(count, 1, 1, 1, generator=generator)
    sigma = torch.where(draw < 0.5, exact, torch.where(draw < 0.625, strong, spread))
    raw = rand(count, 1, 1, 1, generator=generator) < 0.5
    gain = torch.where(raw, uniform(count, 0.3, 1.0, generator), 1.0)
    pedestal = torch.where(raw, uniform(count, 0.0, 0.3, generator), 0.0)
    raw, gain, pedestal = (value.to(pixels.device) for value in (raw, gain, pedestal))
    targets = pixels * gain + pedestal
    noisy = gaussian_noise(targets, shot_noise(targets, sigma, generator), generator)
    return torch.where(raw, noisy, quantised(noisy)), targets, sigma.flatten()


def shot_noise(pixels: Tensor, sigma: Tensor, generator: Generator) -> Tensor:
    """Let the noise of two images in five grow with their light, as that of photons does.

    Returns
    -------
    Tensor, (N, 3, H, W)
        Standard deviation at each value, in grey levels. Its mean square over an image is that of
        `sigma` (N, 1, 1, 1); from a third to all of the variance is proportional to the value.
    """
    count = len(pixels)
    part = uniform(count, 1 / 3, 1, generator)
    part = part * (rand(count, 1, 1, 1, generator=generator) < 0.4)
    part, sigma = part.to(pixels.device), sigma.to(pixels.device)
    light = pixels.clamp(min=1e-3)
    light = light / light.mean(dim=(1, 2, 3), keepdim=True)
    return sigma * (1 - part + part * light).sqrt()


def nearest_noise(sigmas: Tensor) -> Tensor:
    """Return the index of the prompt that `Degradation.nearest_noise` gives for each sigma (N,)."""
    borders = torch.tensor(NOISE_BORDERS, device=sigmas.device)
    place = torch.bucketize(sigmas, borders, right=True)
    return torch.tensor([kind.index for kind in NOISES], device=sigmas.device)[place]


def varied(
    pixels: Tensor, photographs: Sequence[bool], generator: Generator, *, blend: bool
) -> Tensor:
    """Vary sharp pictures, so that a few hundred of them stand for more.

    Half of the photographs get their channels in another order and half a gamma of 0.7 to 1.4; what
    fluoresces or is stained keeps its colours.

    Parameters
    ----------
    pixels : Tensor, (N, 3, H, W), values 0..1
    photographs : sequence of bool
        Which of the images are photographs.
    generator : torch.Generator
    blend : bool
        Whether a third of the images are seen through the one before, with a weight of up to a
        half: not where a degradation is judged from the scene.

    Returns
    -------
    Tensor, (N, 3, H, W)
    """
    count, device = len(pixels), generator.device
    natural = torch.tensor(photographs, device=device).reshape(-1, 1, 1, 1)
    order = rand(count, 3, generator=generator).argsort(dim=1)
    swapped = natural & (rand(count, 1, 1, 1, generator=generator) < 0.5)
    gamma = uniform(count, -0.35, 0.35, generator).exp()
    bent = natural & (rand(count, 1, 1, 1, generator=generator) < 0.5)
    weight = uniform(count, 0.3, 0.5, generator)
    weight = weight * (rand(count, 1, 1, 1, generator=generator) < 1 / 3)
    gamma = torch.where(bent, gamma, 1.0)
    order, swapped, gamma, weight = (
        value.to(pixels.device) for value in (order, swapped, gamma, weight)
    )
    images = torch.arange(count, device=pixels.device)[:, None]
    pixels = torch.where(swapped, pixels[images, order], pixels) ** gamma
    return torch.lerp(pixels, pixels.roll(1, dims=0), weight) if blend else pixels


def training_pairs(
    pixels: Tensor, kinds: Sequence[Degradation | None], generator: Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Degrade each image of a batch in its own way.

    Parameters
    ----------
    pixels : Tensor, (N, 3, H, W), values 0..1
    kinds : sequence of Degradation or None
        One per image; None asks for noise of any strength (see `noise_pairs`).
    generator : torch.Generator

    Returns
    -------
    inputs, targets : Tensor, (N, 3, H, W)
    indices : Tensor, (N,), int64
        The degradation of each image; noise has the prompt nearest to its sigma.
    sigmas : Tensor, (N,)
        Standard deviation of added noise in grey levels, 0 where the kind is not noise.
    """
    inputs, targets = pixels.clone(), pixels.clone()
    device = generator.device
    indices = torch.zeros(len(pixels), dtype=torch.int64, device=device)
    sigmas = torch.zeros(len(pixels), device=device)
    for kind in [None, *Degradation]:
        places = [i for i, each in enumerate(kinds) if each is kind]
        if not places:
            continue
        chosen = torch.tensor(places, device=pixels.device)
        if kind is None:
            inputs[chosen], targets[chosen], strengths = noise_pairs(pixels[chosen], generator)
            sigmas[chosen.to(device)] = strengths
            indices[chosen.to(device)] = nearest_noise(strengths)
        else:
            sharp = pixels[chosen]
            if kind is Degradation.HAZE:
                depth = scene_depth(sharp, generator)
                sharp = contrasted(lit_from_near(sharp, depth, generator), generator)
                sharp = full_contrast(sharp)
                inputs[chosen] = haze(sharp, generator, depth=depth)
            else:
                if kind is Degradation.LOW_LIGHT:
                    sharp = well_exposed(full_contrast(contrasted(sharp, generator)))
                elif kind is Degradation.BLUR:
                    sharp = softened(sharp, generator)
                inputs[chosen] = degrade(sharp, kind, generator)
            targets[chosen] = sharp
            indices[chosen.to(device)] = kind.index
            sigmas[chosen.to(device)] = kind.sigma or 0.0
    return inputs, targets, indices.to(pixels.device), sigmas
