"""Every error that scr_runtime raises on purpose.

SCRError
├── ConfigurationError      a setting is out of range, or two settings contradict each other
├── UnsupportedModelError   the model's family, attention implementation or state is not one that SCR knows
├── AttachError             SCR is attached twice, or detached while a forward pass is running
├── PredictorError          something is wrong with a predictor
│   ├── PredictorNotFoundError   there is no predictor folder at that place
│   ├── PredictorCorruptError    the folder is there, but a file is missing, unreadable or changed
│   ├── PredictorVersionError    the folder was written in another version of its format
│   └── PredictorMismatchError   the predictor was fitted for another model
├── PrefillError            the visual tokens of a prompt cannot be mapped to patch grids
├── SessionError            a question is not about the session's image, or the session is closed
├── NonFiniteScoresError    a source provider returned NaN or infinite scores
└── EditNotFiredError       a prefill went by without every edit, so the output is not an SCR output
"""


class SCRError(Exception):
    """Base of all errors of this library."""


class ConfigurationError(SCRError, ValueError):
    """A setting is out of range, or two settings contradict each other."""


class UnsupportedModelError(SCRError, ValueError):
    """The model's family, attention implementation or state is not one that SCR knows."""


class AttachError(SCRError, RuntimeError):
    """SCR is attached twice, or detached while a forward pass is running."""


class PredictorError(SCRError):
    """Something is wrong with a predictor."""


class PredictorNotFoundError(PredictorError, FileNotFoundError):
    """There is no predictor folder at that place."""


class PredictorCorruptError(PredictorError):
    """The predictor folder is there, but a file is missing, unreadable or changed."""


class PredictorVersionError(PredictorError):
    """The predictor folder was written in another version of its format, newer or older."""


class PredictorMismatchError(PredictorError):
    """The predictor was fitted for another model."""


class PrefillError(SCRError, ValueError):
    """The visual tokens of a prompt cannot be mapped to patch grids."""


class SessionError(SCRError, ValueError):
    """A question is not about the session's image, or the session is closed."""


class NonFiniteScoresError(SCRError, ArithmeticError):
    """A source provider returned NaN or infinite scores."""


class EditNotFiredError(SCRError, RuntimeError):
    """A prefill went by without every edit, so its output is not an SCR output."""
