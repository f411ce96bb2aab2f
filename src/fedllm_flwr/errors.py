"""Exceptions whose message is written for the user."""


def first_line(error: BaseException) -> str:
    """First line of a library's error message, or the class's name if it is empty."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class FedLLMError(Exception):
    """An error that the user can fix; its message names the key, the value and the remedy.

    Entry points print it as one line and exit non-zero. Any other exception that escapes is a bug
    of this package and keeps its stack trace.

    Args:
        message: for the user of this process; may quote its data, settings and paths.
        shareable: a text for another party, which quotes no record, path or setting of this
            machine. None: another party learns only the class of the error.
    """

    def __init__(self, message: str = "", shareable: str | None = None) -> None:
        super().__init__(message)
        self.shareable = shareable


class ConfigError(FedLLMError):
    """An invalid option, or an invalid combination of options."""


class RefusedError(ConfigError):
    """A site's refusal of a server's request.

    Its message is meant for the server: the request, the limit, and who can change it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, message)


class DataError(FedLLMError):
    """A data file or a record that cannot be used."""

    def __init__(self, message: str, shareable: str | None = "its data cannot be used") -> None:
        super().__init__(message, shareable)


class ModelError(FedLLMError):
    """A base model, tokenizer or adapter that cannot be used."""


class JudgeError(FedLLMError):
    """A judge of answers that cannot be reached or used."""


class FederationError(FedLLMError):
    """A federated run that cannot start or continue."""


class ApprovalPending(RefusedError):  # noqa: N818 - a kind of `Failure`
    """A run that waits for the operator of a site."""


class ApprovalDeclined(RefusedError):  # noqa: N818 - a kind of `Failure`
    """A run that the operator of a site has declined."""


class NotFiniteError(FederationError):
    """Tensors or scores with NaN, Inf or values out of range."""


class LostDownloadError(FederationError):
    """A client that lacks the tensors from which the steps of its download lead."""


class DivergedError(NotFiniteError):
    """A round in which training diverged to NaN or Inf at every client."""


class RunInterrupted(KeyboardInterrupt):
    """The user stopped a run; the message says what was saved and how to resume."""
