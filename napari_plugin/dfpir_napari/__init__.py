"""The napari plugin of dfpir: declares what napari.yaml names and hands layers to `dfpir.stacks`.

Importing it imports neither napari, Qt nor torch; they come with what first needs them.
"""
