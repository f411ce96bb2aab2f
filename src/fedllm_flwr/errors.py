"""The one exception that users are meant to read."""


class FedLLMError(Exception):
    """A condition the user can mend; its message names the key, the value and the remedy.

    Entry points print it as one line and exit non-zero. Anything else that escapes is a bug of
    this package and keeps its stack trace.
    """


class ConfigError(FedLLMError):
    """An option, or a combination of options, that cannot work."""


class DataError(FedLLMError):
    """A data file or a record that cannot be used.

    Args:
        message: for the data's owner; may quote them.
        shareable: the same for others, in words that quote nothing and name no path.
    """

    def __init__(self, message: str, shareable: str = "its data cannot be used") -> None:
        super().__init__(message)
        self.shareable = shareable


class ModelError(FedLLMError):
    """A base model, tokenizer or adapter that cannot be used."""


class JudgeError(FedLLMError):
    """A judge of answers that cannot be asked."""


class FederationError(FedLLMError):
    """A federated run that cannot start or go on."""


class RunInterrupted(KeyboardInterrupt):
    """The user stopped a run; the message says what was kept and how to go on."""
