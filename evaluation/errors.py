"""What can go wrong with a comparison. Each message names the key, and the way out."""


class EvaluationError(ValueError):
    """A user can mend it: too few images, or a model whose answers can't be read."""
