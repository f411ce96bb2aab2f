"""One-line errors with suggestions for invalid command lines."""

import argparse
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NoReturn

from fedllm_flwr.config.names import closest_key, shown
from fedllm_flwr.errors import ConfigError

AddParser = Callable[..., argparse.ArgumentParser]

# Names of commands in other tools -> the equivalent command.
_SYNONYMS = {
    **dict.fromkeys(("train", "finetune", "simulate", "start", "resume", "sweep"), "run"),
    **dict.fromkeys(("eval", "test", "benchmark", "score"), "evaluate"),
    **dict.fromkeys(("infer", "predict", "chat", "ask"), "generate"),
    **dict.fromkeys(("export", "fuse"), "merge"),
    **dict.fromkeys(("check", "diagnose"), "doctor"),
    "client": "site",
}


class CommandParser(argparse.ArgumentParser):
    """A parser that raises `ConfigError` for an invalid command line."""

    def error(self, message: str) -> NoReturn:
        """Turn argparse's `message` into a `ConfigError`.

        Raises:
            ConfigError: always.
        """
        choice = re.fullmatch(r"argument (\S+): invalid choice: (.+) \(choose from (.+)\)", message)
        if choice is None:
            said = message.replace("the following arguments are required:", "missing")
            said = said.removeprefix("argument ")
            raise ConfigError(f"{self.prog}: {said}; {self.prog} --help shows its usage.")
        name, value = choice[1], choice[2].strip("'")
        known = [text.strip("' ") for text in choice[3].split(",")]
        if name.startswith("-"):
            raise ConfigError(
                f"{name} {value}: choose from {', '.join(known)}.{_hint(value, known)}"
            )
        synonyms = {text: meant for text, meant in _SYNONYMS.items() if meant in known}
        hint = _hint(value, known, synonyms, f"{self.prog} ")
        raise ConfigError(
            f"{self.prog} has no {name} {shown(value)!r}.{hint} Choose from {', '.join(known)}."
        )


def refuse_unknown(
    arguments: Sequence[str],
    unknown: Sequence[str],
    parser: argparse.ArgumentParser,
    takes_overrides: bool,
) -> NoReturn:
    """Raise an error for arguments that a command does not accept.

    Args:
        arguments: the whole command line.
        unknown: the arguments that the command's parser did not recognise.
        parser: the command's parser.
        takes_overrides: whether the command accepts ``section.key=value``.

    Raises:
        ConfigError: always.
    """
    text = unknown[0]
    if not text.startswith("-"):
        raise ConfigError(
            f"{parser.prog}: {shown(text)!r} is one argument too many; {parser.prog} --help "
            "shows its usage."
        )
    option, has_value, value = text.partition("=")
    place = list(arguments).index(text)
    following = arguments[place + 1 : place + 2]
    if not has_value and following and not following[0].startswith("-"):
        value = following[0]
    options = [name for action in parser._actions for name in action.option_strings]
    if close := difflib.get_close_matches(option, options, n=1, cutoff=0.75):
        raise ConfigError(f"{parser.prog} has no option {option}. Did you mean {close[0]}?")
    key = closest_key(option.strip("-").replace("-", "_")) if takes_overrides else None
    if key is not None and "=" not in value:
        meant = f"{key}={value or '<value>'}"
        raise ConfigError(
            f"{parser.prog} has no option {option}; keys are set without dashes. Did you mean "
            f"{shown(meant)}?"
        )
    raise ConfigError(
        f"{parser.prog} has no option {option}; {parser.prog} --help lists its options."
    )


def _hint(
    value: str, known: Iterable[str], synonyms: Mapping[str, str] = {}, prefix: str = ""
) -> str:
    candidates = {**{name: name for name in known}, **synonyms}
    close = difflib.get_close_matches(value.lower(), candidates, n=1, cutoff=0.6)
    return f" Did you mean {prefix + candidates[close[0]]!r}?" if close else ""
