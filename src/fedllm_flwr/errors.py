"""Exceptions whose message is written for the user."""


def first_line(error: BaseException) -> str:
    """First line of a library's error message; the class's name where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class FedLLMError(Exception):
    """A condition the user can mend; its message names the key, the value and the remedy.

    Entry points print it as one line and exit non-zero. Anything else that escapes is a bug of
    this package and keeps its stack trace.

    Args:
        message: for whoever runs this process; may quote its data, its settings and its paths.
        shareable: the same in words made for another party, which quote no record, no path and
            no setting of this machine. None: another party learns the class of the error only.
    """

    def __init__(self, message: str = "", shareable: str | None = None) -> None:
        super().__init__(message)
        self.shareable = shareable


class ConfigError(FedLLMError):
    """An option, or a combination of options, that cannot work."""


class RefusedError(ConfigError):
    """A site's refusal of what a server asks for.

    Its message is made for the server: what was asked, what is allowed, who can change that.
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
    """A judge of answers that cannot be asked."""


class FederationError(FedLLMError):
    """A federated run that cannot start or go on."""


class ApprovalPending(RefusedError):  # noqa: N818 - a kind of `Failure`
    """A run that waits for the operator of a site."""


class ApprovalDeclined(RefusedError):  # noqa: N818 - a kind of `Failure`
    """A run that the operator of a site has declined."""


class NotFiniteError(FederationError):
    """Tensors or scores that hold NaN, Inf or absurd numbers."""


class DivergedError(NotFiniteError):
    """A round in which training left the finite numbers at every client."""


class RunInterrupted(KeyboardInterrupt):
    """The user stopped a run; the message says what was kept and how to go on."""
