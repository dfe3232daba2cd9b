"""The napari plugin of dfpir. It is not written yet: this package keeps its place."""
