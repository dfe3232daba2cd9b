"""Between a napari layer and `dfpir.stacks`: what is asked of the core, in the core's words.

Nothing here needs Qt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from napari.layers import Image, Labels, Shapes
    from numpy.typing import NDArray

    Place = tuple[int | None, ...]

RECORDS = "dfpir"
"""Key of a layer's metadata under which the records of its restorations stand, in order."""

PLANE, STACK, REGION, REGION_OF_STACK = "plane", "stack", "region", "region of stack"
SCOPES = {
    "this plane": PLANE,
    "whole stack": STACK,
    "region of this plane": REGION,
    "region of whole stack": REGION_OF_STACK,
}

WHOLE = (STACK, REGION_OF_STACK)
"""Scopes that take all planes."""

MARKED = {REGION: PLANE, REGION_OF_STACK: STACK}
"""Scopes that a region limits, and what they are without it."""

CHANNEL_NAMES = {"c", "ch", "channel", "channels"}
TIFF_LETTERS = {"t": "T", "time": "T", "z": "Z", "depth": "Z"} | dict.fromkeys(CHANNEL_NAMES, "C")


def levels_held(data: Any) -> list[Any]:
    """Return the arrays behind a layer's data, finest first."""
    is_levels = isinstance(data, Sequence) and not isinstance(data, np.ndarray)
    return list(data) if is_levels else [data]


def held_by(layer: Image, data: Any) -> bool:
    """Return whether a layer's data are these very arrays."""
    now, then = levels_held(layer.data), levels_held(data)
    return len(now) == len(then) and all(a is b for a, b in zip(now, then, strict=True))


def stack_of(layer: Image) -> Any:
    """Return a layer's data as the core takes them: an array, or a list of levels."""
    return levels_held(layer.data) if layer.multiscale else layer.data


def finest(layer: Image) -> Any:
    """Return the array of a layer's finest level."""
    return levels_held(layer.data)[0]


def axis_names(layer: Image) -> list[str]:
    """Return the names of a layer's axes in lower case."""
    return [str(name).lower() for name in getattr(layer, "axis_labels", ())]


def channel_axis(layer: Image) -> int | None:
    """Return the leading axis that is named as channels, None if there is none."""
    for axis, name in enumerate(axis_names(layer)[: layer.ndim - 2]):
        if name in CHANNEL_NAMES:
            return axis
    return None


def current_plane(layer: Image, point: Iterable[float] | None) -> tuple[int, ...]:
    """Return which plane of a layer is in view; `point` is the viewer's, in world units."""
    lengths = finest(layer).shape[: layer.ndim - 2]
    if point is None:
        return (0,) * len(lengths)
    place = layer.world_to_data(np.asarray(list(point))[-layer.ndim :])[: len(lengths)]
    return tuple(
        int(np.clip(round(float(at)), 0, length - 1))
        for at, length in zip(place, lengths, strict=True)
    )


def visible_box(layer: Image, most: int) -> tuple[slice, slice]:
    """Return rows and columns in view, or the middle of them if a side is longer than `most`."""
    height, width = finest(layer).shape[layer.ndim - 2 : layer.ndim]
    corners = np.asarray(layer.corner_pixels, dtype=float)[:, -2:]
    if layer.multiscale:
        corners = corners * np.asarray(layer.downsample_factors)[layer.data_level][-2:]
    sides = []
    for axis, length in enumerate((height, width)):
        low, last = sorted(np.clip(corners[:, axis], 0, length - 1).astype(int))
        high = last + 1
        if high - low < 16:  # Nothing is drawn yet, or another axis is in view.
            low, high = 0, length
        excess = max(high - low - most, 0)
        sides.append(slice(low + excess // 2, low + excess // 2 + min(high - low, most)))
    return sides[0], sides[1]


def mask_from_labels(layer: Image, labels: Labels) -> NDArray[np.bool_]:
    """Return where a labels layer is not background, on the pixels of an image layer.

    Raises
    ------
    ValueError
        If the two do not lie on the same pixels.
    """
    shape = tuple(finest(layer).shape)[: layer.ndim]
    found = tuple(finest(labels).shape)
    same_place = np.allclose(labels.scale[-2:], layer.scale[-2:]) and np.allclose(
        labels.translate[-2:], layer.translate[-2:]
    )
    if found not in (shape, shape[-2:]) or not same_place:
        message = (
            f"Labels {labels.name!r} have shape {found}; expected {shape} or {shape[-2:]} and the "
            f"scale and place of {layer.name!r}. Make them with that layer selected."
        )
        raise ValueError(message)
    return np.asarray(finest(labels)) > 0


def outline(vertices: NDArray[Any], kind: str) -> NDArray[Any]:
    """Return the corners of a shape; an ellipse, which is stored as its box, gets 64."""
    if kind != "ellipse":
        return vertices
    centre = vertices.mean(axis=0)
    across = (vertices[1] - vertices[0]) / 2
    down = (vertices[3] - vertices[0]) / 2
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)[:, None]
    return centre + np.cos(angles) * across + np.sin(angles) * down


def mask_from_shapes(layer: Image, shapes: Shapes, plane: Place | None = None) -> NDArray[np.bool_]:
    """Return the pixels (H, W) of an image layer that lie in the closed shapes of another layer.

    With a plane, only shapes that are drawn on it, or on all of them alike, count; None in its
    place stands for any index.

    Raises
    ------
    ValueError
        If there are none.
    """
    from skimage.draw import polygon

    height, width = finest(layer).shape[layer.ndim - 2 : layer.ndim]
    mask = np.zeros((height, width), bool)
    for vertices, kind in zip(shapes.data, shapes.shape_type, strict=True):
        if kind in ("line", "path"):
            continue
        corners = []
        for vertex in outline(np.asarray(vertices), kind):
            world = np.asarray(shapes.data_to_world(vertex))
            missing = layer.ndim - len(world)
            world = np.concatenate([np.zeros(max(missing, 0)), world])[-layer.ndim :]
            corners.append(np.asarray(layer.world_to_data(world)))
        *leading, rows, columns = np.transpose(corners)
        drawn = len(leading) - max(layer.ndim - shapes.ndim, 0)  # of these the shapes know
        if plane is not None and any(
            index is not None and (np.rint(each) != index).any()
            for each, index in zip(leading[::-1][:drawn], plane[::-1], strict=False)
        ):
            continue
        mask[polygon(rows, columns, mask.shape)] = True
    if not mask.any():
        message = (
            f"Shapes {shapes.name!r} enclose no pixel of {layer.name!r}. Draw a rectangle, an "
            "ellipse or a polygon on the image first."
        )
        raise ValueError(message)
    return mask


NO_REGION = "There is no region yet. Draw one in a Shapes or Labels layer and choose it."


def mask_from(
    layer: Image, marks: Labels | Shapes | None, plane: Place | None = None
) -> NDArray[np.bool_]:
    """Return where a region layer asks for restoration, of one plane if that is given.

    Raises
    ------
    ValueError
    """
    if marks is None:
        raise ValueError(NO_REGION)
    if hasattr(marks, "shape_type"):
        return mask_from_shapes(layer, marks, plane)
    return mask_from_labels(layer, marks)


def without_channel(plane: tuple[int, ...], channels: int | None) -> Place:
    """Return a plane with None for its channel: a region is meant for all of them."""
    return tuple(None if axis == channels else index for axis, index in enumerate(plane))


def request(
    layer: Image,
    scope: str,
    plane: tuple[int, ...],
    *,
    marks: Labels | Shapes | None = None,
    channels: int | None = None,
) -> dict[str, Any]:
    """Return the arguments of `dfpir.stacks.restore_stack` for a layer and a scope.

    Raises
    ------
    ValueError
        If a region is asked for and none is marked.
    """
    asked: dict[str, Any] = {}
    if layer.rgb:
        asked["rgb"] = True
    if channels is not None:
        asked["channel_axis"] = channels
    if scope in (REGION, REGION_OF_STACK):
        place = None if scope == REGION_OF_STACK else without_channel(plane, channels)
        asked["mask"] = mask_from(layer, marks, place)
    if scope in (PLANE, REGION) and plane:
        asked["planes"] = [plane]
    return asked


def python_line(
    layer: Image,
    degradation: str,
    asked: dict[str, Any],
    marks: Labels | Shapes | None = None,
    device: str = "auto",
) -> str:
    """Return the Python that does the same, for napari's console or a script.

    The number of threads decides on the last bits; the widget leaves one to the screen. A region
    is named, so that nobody need compute it for that.
    """
    name = f"viewer.layers[{layer.name!r}]"
    words = [f"list({name}.data)" if layer.multiscale else f"{name}.data", repr(degradation)]
    words += [f"{key}={value!r}" for key, value in asked.items()]
    imported = ""
    if marks is not None:
        [plane] = asked.get("planes", [None])
        place = plane and without_channel(plane, asked.get("channel_axis"))
        words.append(f"mask=mask_from({name}, viewer.layers[{marks.name!r}], {place})")
        imported = "from dfpir_napari._layers import mask_from; "
    if device != "auto":
        words.append(f"restorer=Restorer(device={device!r})")
        imported += "from dfpir import Restorer; "
    return (
        f"import torch; {imported}from dfpir.stacks import restore_stack, spare_threads; "
        "torch.set_num_threads(spare_threads()); "
        f"done = restore_stack({', '.join(words)})"
    )


def attributes(layer: Image) -> dict[str, Any]:
    """Return all of a layer but its data, enough to make another one like it."""
    found = dict(layer.as_layer_data_tuple()[1])
    found["metadata"] = dict(layer.metadata)
    return found


def residual_attributes(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes of a residual's layer: in the same place, coloured by sign."""
    place = ("scale", "translate", "rotate", "shear", "affine", "units", "axis_labels")
    return {key: facts[key] for key in place if key in facts} | {
        "name": f"{facts['name']} residual",
        "colormap": "PiYG",
        "rgb": False,
    }


def placed(attributes: dict[str, Any], layer: Image, corner: Sequence[float]) -> dict[str, Any]:
    """Return the attributes of a part of a layer that begins at `corner`, in data units."""
    start, origin = (np.asarray(layer.data_to_world(at)) for at in (corner, np.zeros(len(corner))))
    moved = np.linalg.solve(np.asarray(layer.affine.linear_matrix), start - origin)
    return attributes | {"translate": np.asarray(layer.translate) + moved, "multiscale": False}


def tiff_axes(layer: Image) -> str | None:
    """Return the letters of a layer's leading axes where all are named, else None."""
    names = axis_names(layer)[: layer.ndim - 2]
    letters = "".join(TIFF_LETTERS.get(name, "") for name in names)
    return letters if len(letters) == layer.ndim - 2 == len(set(letters)) else None


def pixel_size(layer: Image) -> dict[str, tuple[float, str]]:
    """Return the size of a step along X and Y, and along the named axes before, with units."""
    usual = {1: "Z", 2: "TZ", 3: "TZC"}.get(layer.ndim - 2, "")  # as `save_stack` has it
    letters = [*(tiff_axes(layer) or usual), "Y", "X"]
    units = [str(unit) for unit in getattr(layer, "units", ["pixel"] * layer.ndim)]
    return {
        letter: (float(size), unit)
        for letter, size, unit in zip(letters, layer.scale, units, strict=False)
        if letter != "C"
    }
