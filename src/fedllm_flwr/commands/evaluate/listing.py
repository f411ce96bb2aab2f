"""The list of what can be evaluated; reads the suites' files and nothing else."""

from fedllm_flwr.evaluation.suites.catalogue import all_suites


def list_suites() -> str:
    """Every metric with its suite, source, split, shots and licence."""
    lines, count = [], 0
    for suite in all_suites().values():
        lines.append(f"{suite.name}: {suite.title}")
        for task in suite.tasks:
            metrics = ", ".join(metric.name for metric in task.metrics)
            count += len(task.metrics)
            lines.append(f"  {task.name:<22} {metrics}")
            about = f"{task.title}; {task.source}; {task.split}; {task.shots} shots"
            lines.append(f"  {'':<22} {about}; licence: {task.licence}")
            files = ", ".join(task.files)
            lines.append(f"  {'':<22} protocol: {task.protocol}; --data-root files: {files}")
        for average in suite.averages:
            count += 1
            lines.append(
                f"  {average.name:<22} mean {average.metric} of {', '.join(average.tasks)}"
            )
        lines.append("")
    lines.append(f"{count} metrics in {len(all_suites())} suites")
    return "\n".join(lines)
