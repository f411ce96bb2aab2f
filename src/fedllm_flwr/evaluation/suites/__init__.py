"""Benchmark suites: what they hold, and scoring a model on them.

A suite is a folder ``evaluation/<name>/`` with a ``suite.yaml`` (see `catalogue`) that lists its
tasks, where their data come from and which metrics are computed. To add one:

1. Write ``evaluation/<name>/suite.yaml``. ``runner: harness`` (the default) scores every task by
   lm-evaluation-harness: each names the harness tasks it consists of and the folder of their YAML
   files, in this package's ``evaluation/<name>/`` or in the harness' own ``tasks/``. Nothing else
   is needed.
2. For anything else (generated code that has to run, answers that a judge reads) give another
   ``runner`` and register it in `fedllm_flwr.commands.evaluate.scorer`. A runner is a function
   ``(SuiteTask, TextModel, RunOptions) -> Samples``: it lets the model answer through
   `model.TextModel.generate` (or ``log_likelihoods``) and returns one plain, JSON-ready dict for
   each example. A sample has at least ``id`` (str, the same for every model) and the fields that
   the metrics of ``suite.yaml`` name in ``column``; ``first_prompt`` goes into `samples.Samples`.
   Options of its own are a part of `options.RunOptions`, which the command fills.

Intervals, differences, tables, figures and the cache then come by themselves.
"""
