"""Nodes for the live tests: images that no loader gives, and an end that saves nothing.

The tests copy this file into custom_nodes.
"""

import logging

import psutil
import torch


class DFPIRTestImage:
    """Makes images, and writes the memory that the server has then to the log."""

    CATEGORY = "test"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"kind": ("STRING", {"default": "frames"})}}

    def make(self, kind):
        shapes = {
            "empty": (0, 16, 16, 3),
            "five": (1, 16, 16, 5),
            "frame": (1, 512, 512, 3),
            "frames": (64, 512, 512, 3),
            "large": (1, 2048, 2048, 3),
        }
        image = torch.rand(shapes.get(kind, (1, 16, 16, 3)))
        if kind == "nan":
            image[0, 3, 4, 1] = torch.nan
        logging.info("DFPIRTestImage rss %d", psutil.Process().memory_info().rss)
        return (image,)


class DFPIRTestSink:
    """Takes an image."""

    CATEGORY = "test"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "take"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",)}}

    def take(self, image):
        return {"ui": {"text": [str(tuple(image.shape))]}}


NODE_CLASS_MAPPINGS = {"DFPIRTestImage": DFPIRTestImage, "DFPIRTestSink": DFPIRTestSink}
