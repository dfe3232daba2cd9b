"""Arrays in, arrays out: the one door between pictures as users hold them and network pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

UPPER_PERCENTILE = 99.99
"""Grey values above this percentile of a stack count as outliers and pass through unclipped."""

ValueRange = tuple[float, float]


class PixelError(ValueError):
    """An array is not an image that can be restored; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class PixelForm:
    """What `to_pixels` took away from an array and `to_array` gives back.

    Attributes
    ----------
    dtype : numpy.dtype
        Of the array.
    shape : tuple of int
        Of the array.
    channel_axis : int or None
        Where the channels are, None for grey.
    value_range : tuple of float
        The values that became 0 and 1.
    alpha : ndarray or None, (N, 1, H, W)
        The fourth channel, carried through untouched.
    notes : tuple of str
        What the user should know of the conversion.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    channel_axis: int | None
    value_range: ValueRange
    alpha: NDArray[Any] | None = None
    notes: tuple[str, ...] = ()

    @property
    def grey(self) -> bool:
        """Whether the array has one channel only."""
        return self.channel_axis is None or self.shape[self.channel_axis] == 1


def find_channel_axis(array: NDArray[Any]) -> int | None:
    """Return the axis of the channels as people lay images out, None for a grey one.

    (H, W) is grey, (H, W, 3 or 4 or 1) and (N, H, W, 3 or 4 or 1) have channels last; anything
    else has to be told.

    Raises
    ------
    PixelError
        If the array's layout is not one of these.
    """
    if array.ndim == 2:
        return None
    if array.ndim in (3, 4) and array.shape[-1] in (1, 3, 4):
        return array.ndim - 1
    if array.ndim == 3 and array.shape[-1] in (2, 5):
        message = (
            f"Image has {array.shape[-1]} channels on axis -1; DFPIR restores 1 (grey), 3 (RGB) or "
            "4 (RGBA, alpha kept). Pass channel_axis=... or select channels."
        )
        raise PixelError(message)
    message = (
        f"Cannot tell the channels of an array of shape {array.shape}; expected (H, W), (H, W, C) "
        "or (N, H, W, C) with C of 1, 3 or 4. Pass channel_axis=... for another layout, or "
        "restore the planes of a stack one by one."
    )
    raise PixelError(message)


def check(array: NDArray[Any]) -> None:
    """Refuse what is not an image of real, finite numbers.

    Raises
    ------
    PixelError
    """
    problem = None
    if array.size == 0:
        problem = f"Image has shape {array.shape} and so no pixels; expected at least 1x1"
    elif array.dtype == bool:
        problem = "Image is boolean, a mask; expected grey levels. Convert it to uint8 first"
    elif not np.issubdtype(array.dtype, np.integer) and not np.issubdtype(array.dtype, np.floating):
        problem = f"Image has dtype {array.dtype}; expected integers or floats"
    elif np.issubdtype(array.dtype, np.integer) and array.dtype.itemsize > 4:
        problem = f"Image has dtype {array.dtype}; expected at most 32 bits. Convert it first"
    elif np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        problem = f"Image has {bad} values that are NaN or infinite; replace them first"
    if problem:
        message = problem + "."
        raise PixelError(message)


def check_pixels(pixels: Tensor) -> None:
    """Refuse what is not a batch of images of finite floats.

    Parameters
    ----------
    pixels : Tensor, (N, C, H, W)
        C is 1, 3 or 4.

    Raises
    ------
    PixelError
    """
    problem = None
    if pixels.ndim != 4:
        problem = f"Pixels have shape {tuple(pixels.shape)}; expected four axes: (N, C, H, W)"
    elif pixels.numel() == 0:
        count, _, height, width = pixels.shape
        problem = (
            f"Found {count} images of {height}x{width} pixels, so nothing to restore; expected at "
            "least one of 1x1"
        )
    elif pixels.shape[1] not in (1, 3, 4):
        problem = (
            f"Image has {pixels.shape[1]} channels; DFPIR restores 1 (grey), 3 (RGB) or 4 (RGBA, "
            "alpha kept). Select channels first"
        )
    elif not pixels.is_floating_point():
        problem = f"Pixels have dtype {pixels.dtype}; expected floats, 0 (black) to 1 (white)"
    else:  # Image by image, as the batch may fill the memory.
        bad = sum(image.numel() - int(image.isfinite().sum()) for image in pixels)
        if bad:
            problem = f"Image has {bad} values that are NaN or infinite; replace them first"
    if problem:
        message = problem + "."
        raise PixelError(message)


def colours_of(image: Tensor) -> Tensor:
    """Return what the network sees of one image (1, 3 or 4, H, W): its colours, (1, 3, H, W)."""
    return image[:3].expand(3, -1, -1)[None]


def put_colours(image: Tensor, colours: Tensor) -> None:
    """Undo `colours_of`: write colours (1, 3, H, W) into an image, grey as their mean."""
    channels = image[:3]
    channels.copy_(colours[0] if len(channels) == 3 else colours.mean(dim=1))


def clamped(restored: Tensor, given: Tensor) -> Tensor:
    """Keep restored values within the range that 0..1 and the given picture span."""
    return restored.clamp(min(float(given.min()), 0.0), max(float(given.max()), 1.0))


def is_grey(pixels: Tensor) -> Tensor:
    """Say of each image (N, C, H, W) whether its channels are equal; the shape is (N, 1, 1, 1)."""
    return (pixels == pixels[:, :1]).flatten(1).all(dim=1).reshape(-1, 1, 1, 1)


def untinted(restored: Tensor, given: Tensor) -> Tensor:
    """Return restored images (N, 3, H, W), grey where the given ones are.

    The network may tint what has no colour.
    """
    return torch.where(is_grey(given), restored.mean(dim=1, keepdim=True), restored)


def natural_range(array: NDArray[Any], *, grey: bool) -> ValueRange:
    """Return the values to become 0 and 1 where the caller gives none.

    8 bits: 0..255. RGB: all of a 16-bit dtype, 0..1 for floats. Grey of more than 8 bits: from the
    smallest value to the 99.99th percentile, because a camera seldom uses all of its range.
    """
    if array.dtype == np.uint8:
        return 0.0, 255.0
    if not grey:
        if np.issubdtype(array.dtype, np.integer):
            limits = np.iinfo(array.dtype)
            return float(limits.min), float(limits.max)
        return 0.0, 1.0
    low = float(array.min())
    high = float(np.percentile(array, UPPER_PERCENTILE, method="higher"))
    return (low, high) if high > low else (low, low + 1.0)


def to_pixels(
    array: NDArray[Any],
    *,
    channel_axis: int | None = None,
    value_range: ValueRange | None = None,
) -> tuple[Tensor, PixelForm]:
    """Turn an image, or a stack of equal images, into network pixels.

    Parameters
    ----------
    array : ndarray
        (H, W), (H, W, C), (N, H, W, C) or, with `channel_axis`, any of (C, H, W), (N, C, H, W);
        C is 1, 3 or 4. Real numbers of at most 32 bits, or float64.
    channel_axis : int, optional
        Axis of the channels; found by `find_channel_axis` if not given.
    value_range : tuple of float, optional
        The values that become 0 and 1; by default those of `natural_range`. One range holds for
        the whole stack. Nothing is clipped.

    Returns
    -------
    pixels : Tensor, (N, 3, H, W), float32
        Grey is repeated three times.
    form : PixelForm

    Raises
    ------
    PixelError
        If the array is not such an image.

    Examples
    --------
    >>> pixels, form = to_pixels(np.zeros((4, 5), np.uint8))
    >>> tuple(pixels.shape), form.value_range
    ((1, 3, 4, 5), (0.0, 255.0))
    """
    array = np.asarray(array)
    check(array)
    axis = find_channel_axis(array) if channel_axis is None else channel_axis
    if axis is not None:
        axis = normalised_axis(array, axis)
    planes = array[..., None] if axis is None else np.moveaxis(array, axis, -1)
    if planes.ndim == 3:
        planes = planes[None]
    if planes.ndim != 4:
        message = (
            f"Expected an image or a stack of images; found shape {array.shape} with channels on "
            f"axis {axis}. Restore the planes of a deeper stack one by one."
        )
        raise PixelError(message)
    grey = planes.shape[-1] == 1
    alpha = np.moveaxis(planes[..., 3:], -1, 1) if planes.shape[-1] == 4 else None
    colours = planes[..., :3]
    low, high = value_range or natural_range(colours, grey=grey)
    if not np.isfinite([low, high]).all() or not high > low:
        message = f"value_range is {(low, high)}; expected two finite numbers, the larger last."
        raise PixelError(message)
    scaled = (np.moveaxis(colours, -1, 1).astype(np.float64) - low) / (high - low)
    pixels = torch.from_numpy(np.ascontiguousarray(scaled, dtype=np.float32))
    if grey:
        pixels = pixels.expand(-1, 3, -1, -1).contiguous()
    form = PixelForm(array.dtype, array.shape, axis, (low, high), alpha)
    return pixels, form


def normalised_axis(array: NDArray[Any], axis: int) -> int:
    """Return a channel axis counted from the front, having checked it.

    Raises
    ------
    PixelError
    """
    if not -array.ndim <= axis < array.ndim or array.ndim not in (3, 4):
        message = (
            f"channel_axis={axis} does not fit an image of shape {array.shape}; expected "
            "(H, W, C), (C, H, W) or a stack of them. Leave it out for a grey image."
        )
        raise PixelError(message)
    if array.shape[axis] not in (1, 3, 4):
        message = (
            f"Image has {array.shape[axis]} channels on axis {axis}; DFPIR restores 1 (grey), 3 "
            "(RGB) or 4 (RGBA, alpha kept). Pass channel_axis=... or select channels."
        )
        raise PixelError(message)
    return axis % array.ndim


def to_array(pixels: Tensor, form: PixelForm) -> NDArray[Any]:
    """Undo `to_pixels`: values, channels, alpha, layout, dtype.

    Integers are rounded to the nearest and clipped to what their dtype can hold; floats are not
    clipped. Grey is the mean of the three channels.

    Parameters
    ----------
    pixels : Tensor, (N, 3, H, W)
    form : PixelForm
        As returned by `to_pixels`.

    Returns
    -------
    ndarray
        Of the original array's shape and dtype.
    """
    low, high = form.value_range
    values = pixels.detach().to("cpu", torch.float64).numpy()
    if form.grey:
        values = values.mean(axis=1, keepdims=True)
    values = values * (high - low) + low
    if np.issubdtype(form.dtype, np.integer):
        limits = np.iinfo(form.dtype)
        values = np.clip(np.rint(values), limits.min, limits.max)
    array = values.astype(form.dtype)
    if form.alpha is not None:
        array = np.concatenate([array, form.alpha], axis=1)
    if form.channel_axis is None:
        return np.ascontiguousarray(array[:, 0].reshape(form.shape))
    array = np.moveaxis(array, 1, -1)
    if len(form.shape) == 3:
        array = array[0]
    return np.ascontiguousarray(np.moveaxis(array, -1, form.channel_axis))
