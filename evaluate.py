"""Evaluates one model at several lengths: `python evaluate.py model=DIR lengths=[..] out=DIR`.

See `python evaluate.py --help`.
"""

from longctx import cli
from longctx.eval.config import EvalConfig


def main(cfg: EvalConfig) -> None:
    """Runs the missing tasks, writes figures and tables, prints the tables."""
    from longctx.eval.run import evaluate

    _, report = evaluate(cfg)
    print(report)
    print(f"{cfg.out}/report.md has the figures")


if __name__ == "__main__":
    cli.run(main, EvalConfig, "evaluate", "eval_schema")
