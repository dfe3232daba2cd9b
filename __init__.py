"""Lets a clone of this repository in ComfyUI's custom_nodes work as a pack."""

if __package__:  # a clone in ComfyUI's custom_nodes; pytest imports this file without a package
    from .comfyui_nodes import comfy_entrypoint as comfy_entrypoint

    WEB_DIRECTORY = "./comfyui_nodes/web"
