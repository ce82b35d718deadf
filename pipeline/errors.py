"""What can go wrong around a run, beyond its stages.

RunError            a run folder or a setting stands in the way
└── TrackingError   the tracking store cannot be used
"""


class RunError(Exception):
    """A run can't start: a folder, a place or a setting stands in the way."""


class TrackingError(RunError):
    """The tracking store cannot be used."""
