"""What can go wrong with a comparison. Each message names the key, and the way out."""


class EvaluationError(ValueError):
    """A user can mend it: too few images, or a model whose answers can't be read."""


class UnfinishedError(EvaluationError):
    """This rank has done its share, and others have not: no result yet."""
