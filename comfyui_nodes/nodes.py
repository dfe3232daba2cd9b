"""The nodes: what they ask for and show. What they do is dfpir's."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from comfy_api.latest import ComfyExtension, io, ui

from dfpir import Degradation, Tiling
from dfpir.restorer import classify_images, summarise, vote
from dfpir.routing import MOST_STEPS

from . import host

Model = io.Custom("DFPIR_MODEL")

# A name fits a list of choices and a text alike. io.Combo.Output would be a list of its options on
# servers of 2025, which fits neither there.
Name = io.Custom("COMBO,STRING")

CATEGORY = "image/restoration"
WHOLE, SAMPLED = "whole", "sampled"
ONE_FOR_ALL, ONE_EACH = "one for all", "one each"


def optional(**keywords: Any) -> dict[str, Any]:
    """Return those keywords of a schema that this version of ComfyUI knows."""
    known = {field.name for field in dataclasses.fields(io.Schema)}
    return {name: value for name, value in keywords.items() if name in known}


def advanced(widget: Any) -> Any:
    """Return a widget that newer pages fold away; as a keyword, older servers would refuse it."""
    widget.extra_dict = {**(getattr(widget, "extra_dict", None) or {}), "advanced": True}
    return widget


class DFPIRRestore(io.ComfyNode):
    """Finds what degraded images and restores them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs and outputs."""
        return io.Schema(
            node_id="DFPIRRestore",
            display_name="Restore Image (DFPIR)",
            category=CATEGORY,
            description=(
                "Removes noise, rain, haze, motion blur or darkness. Finds out by itself which it "
                "is, and leaves good images alone. Size and framing stay as they are."
            ),
            inputs=[
                io.Image.Input(
                    "image", tooltip="Images to restore; frames of a video are a batch."
                ),
                io.Combo.Input(
                    "degradation",
                    options=[host.AUTO, *(member.value for member in Degradation)],
                    default=host.AUTO,
                    tooltip=(
                        "What to remove. auto finds out, and acts only where it is sure. noise-15, "
                        "-25 and -50 are weak, middling and strong noise."
                    ),
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="0 keeps the image, 1 restores it fully, anything between blends.",
                ),
                Model.Input(
                    "model",
                    optional=True,
                    tooltip="Weights from Load DFPIR Weights. Without it, those that ship with it.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where to restore. Of any size: it is stretched to the image.",
                ),
                advanced(
                    io.Combo.Input(
                        "statistics",
                        options=[WHOLE, SAMPLED],
                        default=WHOLE,
                        optional=True,
                        tooltip=(
                            "What the network takes an image's overall look from. whole: all of "
                            "its pixels, exact. sampled: some windows, once for the whole batch; "
                            "for video, and for images too large for the memory."
                        ),
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "precision",
                        options=[host.AUTO, "float32", "bfloat16", "float16"],
                        default=host.AUTO,
                        optional=True,
                        tooltip=(
                            "auto is float32 unless ComfyUI was started with a precision flag. The "
                            "others save memory on GPUs; on processors they are slow."
                        ),
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "verdict",
                        options=[ONE_FOR_ALL, ONE_EACH],
                        default=ONE_FOR_ALL,
                        optional=True,
                        tooltip=(
                            "With auto: one verdict for the whole batch, by vote, as frames of a "
                            "video want it, or each image its own."
                        ),
                    )
                ),
                advanced(
                    io.Int.Input(
                        "steps",
                        default=1,
                        min=1,
                        max=MOST_STEPS,
                        optional=True,
                        tooltip=(
                            "With auto, for single images and for verdict one each: look again "
                            "after restoring, and go on with what else is surely found."
                        ),
                    )
                ),
            ],
            outputs=[
                io.Image.Output(
                    "restored",
                    display_name="restored",
                    tooltip="The restored images, of the same size.",
                ),
                Name.Output(
                    "found",
                    display_name="found",
                    tooltip="The degradation that was found or named; clean or unsure otherwise.",
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="What was found, how sure that is, and what was done.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            **optional(
                search_aliases=[
                    "denoise",
                    "derain",
                    "dehaze",
                    "deblur",
                    "defog",
                    "low light",
                    "brighten",
                    "restoration",
                    "clean up",
                    "dfpir",
                ],
                has_intermediate_output=True,
            ),
        )

    @classmethod
    def execute(
        cls,
        image: torch.Tensor,
        degradation: str = host.AUTO,
        strength: float = 1.0,
        model: host.Weights | None = None,
        mask: torch.Tensor | None = None,
        statistics: str = WHOLE,
        precision: str = host.AUTO,
        verdict: str = ONE_FOR_ALL,
        steps: int = 1,
    ) -> io.NodeOutput:
        """Restore (B, H, W, C)."""
        restorer = host.loaded_restorer(model or host.Weights.find(), precision, image)
        progress = host.Progress(len(image))
        done = restorer.restore_pixels(
            image.movedim(-1, 1),
            degradation,
            strength=strength,
            mask=mask,
            tiling=Tiling(statistics="sampled") if statistics == SAMPLED else None,
            most_steps=steps,
            one_verdict=verdict == ONE_FOR_ALL,
            on_progress=progress,
            on_image=progress.show,
        )
        host.show_text(done.report, cls.hidden.unique_id)
        restored = host.to_intermediate(done.image.movedim(1, -1))
        return io.NodeOutput(
            restored, done.diagnosis.name, done.report, ui=ui.PreviewText(done.report)
        )


class DFPIRLoadModel(io.ComfyNode):
    """Chooses weights for the restoring node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs and outputs."""
        return io.Schema(
            node_id="DFPIRLoadModel",
            display_name="Load DFPIR Weights",
            category=CATEGORY,
            description=(
                "Weights for Restore Image (DFPIR): those that ship with it, or .safetensors files "
                "in models/dfpir. Not needed unless you want others than the default."
            ),
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=host.weights_names(),
                    default=host.bundled_names()[0],
                    tooltip=(
                        "Bundled weights, and the files of models/dfpir. Press R after adding a "
                        "file."
                    ),
                )
            ],
            outputs=[
                Model.Output(
                    "model",
                    display_name="model",
                    tooltip="Goes into the model input of Restore Image (DFPIR).",
                )
            ],
            **optional(search_aliases=["dfpir", "restoration model", "checkpoint"]),
        )

    @classmethod
    def validate_inputs(cls, model_name: str) -> bool | str:
        """Say what to do about a file that is absent."""
        return True if model_name in host.weights_names() else host.absence(model_name)

    @classmethod
    def fingerprint_inputs(cls, model_name: str) -> Any:
        """Tell a changed file from the one before."""
        return host.Weights.find(model_name).stamp

    @classmethod
    def execute(cls, model_name: str) -> io.NodeOutput:
        """Read the file at once, so that a bad one is reported here."""
        chosen = host.Weights.find(model_name)
        chosen.patcher()
        return io.NodeOutput(chosen)


class DFPIRClassify(io.ComfyNode):
    """Says what degraded images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs and outputs."""
        return io.Schema(
            node_id="DFPIRClassify",
            display_name="Diagnose Image (DFPIR)",
            category=CATEGORY,
            description=(
                "Says what is wrong with images (noise, rain, haze, motion blur, low light, or "
                "nothing) and how sure that is, without changing them."
            ),
            inputs=[
                io.Image.Input("image", tooltip="Images to look at; a batch is judged by vote.")
            ],
            outputs=[
                Name.Output(
                    "degradation",
                    display_name="degradation",
                    tooltip=(
                        "The degradation's name if it is sure, otherwise clean or unsure. Fits the "
                        "degradation input of Restore Image (DFPIR)."
                    ),
                ),
                io.Float.Output(
                    "confidence",
                    display_name="confidence",
                    tooltip="How likely the verdict is, 0 to 1.",
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="The verdict and all probabilities, as text.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,  # so that it runs with nothing behind it
            **optional(search_aliases=["classify", "detect degradation", "image quality", "dfpir"]),
        )

    @classmethod
    def execute(cls, image: torch.Tensor) -> io.NodeOutput:
        """Judge (B, H, W, C)."""
        each = classify_images(image.movedim(-1, 1), host.Progress(len(image)))
        found = vote(each)
        ranked = sorted(found.probabilities.items(), key=lambda item: -item[1])
        table = ", ".join(f"{name} {share:.0%}" for name, share in ranked if share >= 0.005)
        report = f"{summarise(each)}\n{table}"
        host.show_text(report, cls.hidden.unique_id)
        return io.NodeOutput(found.name, found.confidence, report, ui=ui.PreviewText(report))


class DFPIRExtension(ComfyExtension):
    """The pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the nodes, having registered the folder of weights that they list."""
        host.register_folder()  # not in on_load, which servers of 2025 do not call
        return [DFPIRRestore, DFPIRLoadModel, DFPIRClassify]
