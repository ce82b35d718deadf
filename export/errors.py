"""Errors of the export room."""


class ExportError(RuntimeError):
    """There is nothing to export, or the folder that was written does not give the checkpoint's outputs."""


class PublishError(RuntimeError):
    """A predictor can't be pushed, pulled, promoted or rolled back."""
