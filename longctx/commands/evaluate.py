"""Evaluates a model at several context lengths, and writes tables and figures."""

import os
from datetime import timedelta

from longctx import cli
from longctx.eval.config import EvalConfig, help_of_tasks

# Ranks wait for one that works alone (efficiency, lm-eval); one that dies ends them all anyway.
WAIT = timedelta(weeks=52)


def evaluate(cfg: EvalConfig) -> None:
    """Runs the missing tasks, writes figures and tables, prints the tables."""
    from longctx.eval.evaluate import evaluate
    from longctx.parallel import mesh, orphans

    orphans.end_with_launcher()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 or cfg.parallel_sp > 1
    _, report = evaluate(cfg, mesh.start(cfg.parallel_sp, WAIT) if several else None)
    if report:
        print(report)
        print(f"{cfg.out}/report.html has the figures")


def main() -> None:
    """The command line."""
    words = {"TASKS": help_of_tasks}
    cli.run(evaluate, EvalConfig, "evaluate", "eval_schema", words=words)
