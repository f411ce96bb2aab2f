"""Benchmark suites: their catalogue, and scoring a model on them.

A suite is a folder ``evaluation/<name>/`` with a ``suite.yaml`` (see `catalogue`) that defines its
tasks, their data sources and metrics. To add one:

1. Write ``evaluation/<name>/suite.yaml``. ``runner: harness`` (the default) scores every task with
   lm-evaluation-harness: each task names its harness tasks and the folder of their YAML files, in
   this package's ``evaluation/<name>/`` or in the harness' ``tasks/``. Nothing else is needed.
2. For other kinds of tasks (generated code to run, answers to be judged), give another ``runner``
   and register it in `fedllm_flwr.commands.evaluate.scorer`. A runner is a function
   ``(SuiteTask, TextModel, RunOptions) -> Samples``: it generates answers with
   `suite_model.TextModel.generate` (or scores them with ``log_likelihoods``) and returns one
   JSON-ready dict per example. A sample has at least ``id`` (str, the same for every model) and
   the fields that the metrics of ``suite.yaml`` name in ``column``; ``first_prompt`` goes into
   `samples.Samples`. Its own options are part of `options.RunOptions`, set by the command.

Intervals, differences, tables, figures and the cache need no further code.
"""
