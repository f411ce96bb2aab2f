"""Lists suites and tasks; reads only the suites' files."""

import textwrap

from fedllm_flwr.evaluation.suites.catalogue import all_suites, chosen_suites

_WIDTH = 100


def list_suites() -> str:
    """The suites with their tasks, on one screen."""
    parts, count = [], 0
    for suite in all_suites().values():
        names = ", ".join(task.name for task in suite.tasks)
        count += sum(len(task.metrics) for task in suite.tasks) + len(suite.averages)
        parts.append(f"{suite.name:<12}{suite.title}")
        parts.append(textwrap.fill(names, _WIDTH, initial_indent="    ", subsequent_indent="    "))
    parts.append(f"\n{count} metrics in {len(all_suites())} suites; fedllm evaluate --list SUITE")
    return "\n".join(parts)


def list_suite(name: str) -> str:
    """One suite: all tasks with source, split, shots, licence, protocol and files.

    Raises:
        ConfigError: the suite is unknown.
    """
    [suite] = chosen_suites([name], "--list ")
    lines = [f"{suite.name}: {suite.title}"]
    for task in suite.tasks:
        shots = f"{task.shots} shots; " if task.shots else ""
        files = f"; --data-root files: {', '.join(task.files)}" if task.files else ""
        lines += [
            _filled(task.name, f"{task.title}; metrics: {', '.join(m.name for m in task.metrics)}"),
            _filled("", f"{task.source}; {task.split}; {shots}licence: {task.licence}"),
            _filled("", f"protocol: {task.protocol}{files}"),
        ]
    for average in suite.averages:
        lines.append(_filled(average.name, f"mean {average.metric} of {', '.join(average.tasks)}"))
    return "\n".join(lines)


def _filled(name: str, text: str) -> str:
    """A name, and next to it a wrapped text."""
    start = f"  {name:<24}"
    return textwrap.fill(text, _WIDTH, initial_indent=start, subsequent_indent=" " * 26)
