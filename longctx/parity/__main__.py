"""The parity certificate: a recipe trains alike however a step is spread over processes.

    longctx parity recipe=cepe                               all topologies, one or two minutes
    longctx parity recipe=pi attention=dca short=true        a few of them
    longctx parity recipe=longgen model=llama2_7b rope=yarn

In a checkout that is not installed: python -m longctx.parity ...

It takes every KEY=VALUE of longctx train. The run is shrunk (rows of 64 tokens, 3 layers, random
weights and documents, fp32) and takes one optimizer step in {1 process, 2 data-parallel, 2 sharing
a row, 2 x 2} x ZeRO 0-3 x accumulation {1, 4} x the kinds of rows that the recipe takes. The table
holds the largest relative error of the loss or of any parameter's gradient against one plain
process without an engine. Exit code 1: one is above 1e-5. Runs on a CPU, with up to 4 processes.
"""

import sys
from functools import partial

from longctx import cli
from longctx.config import RunConfig
from longctx.errors import UserError


def _task(short: bool, run: RunConfig) -> None:
    from longctx.parity.certificate import LIMIT, certify, failures, table

    found = certify(run, short)
    print(f"{run.name}: largest relative error of the loss or of any gradient, fp32, against one "
          f"plain process\n\n{chr(10).join(table(found))}\n")  # fmt: skip
    if wrong := failures(found):
        print("\n".join(wrong) + f"\n{len(wrong)} of {len(found)} topologies above {LIMIT:g}")
        sys.exit(1)
    print(f"{len(found)} topologies, none above {LIMIT:g}")


def _short(arguments: list[str]) -> bool:
    """Takes `short=` off the command line.

    Raises:
        UserError: if it is neither true nor false.
    """
    given = [a for a in arguments if a.startswith("short=")]
    for argument in given:
        arguments.remove(argument)
    value = given[-1].partition("=")[2].lower() if given else "false"
    if value not in ("true", "false"):
        raise UserError(f"short={value} is neither true nor false")
    return value == "true"


def main() -> None:
    """The command."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(str(__doc__).strip())
        return
    with cli.mistakes_in_one_line():
        short = _short(sys.argv)
    cli.run(partial(_task, short), RunConfig, "train", "run_schema")


if __name__ == "__main__":
    main()
