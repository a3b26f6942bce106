"""What a run will do and need: batch arithmetic, memory and time by part, and whether it fits.

    longctx plan recipe=longgen model=llama2_7b seq_len=131072 gpus=8 gpu_memory=80

In a checkout that is not installed: python -m longctx.plan ...

Made from the configuration, the model's shapes (no weight is read) and, where the stores are at
hand, the lengths of their documents. Every KEY=VALUE of train.py is one here. Those of the plan
alone:

    seq_len=N          tokens of a row; short for data.seq_len
    gpus=N             ranks of the run; default 1, or parallel.sp
    gpu_memory=GIB     of one GPU; default 80
    host_memory=GIB    CPU memory that one rank may use; default 200
    reserve=GIB        of gpu_memory, for libraries and gaps; default 3
    peak=TFLOPS        bf16 peak of a GPU; default 989, an H100
    fraction=F         of it that a step reaches; default 0.4
    gpus_per_node=N    default 8
    link=GB/S          that a GPU sends inside a node; default 300
    network=GB/S       that a GPU sends to other nodes; default 40
    host_link=GB/S     between a GPU and CPU memory; default 25

The table has a column for each moment of a step at which something is largest; the run's peak is
the largest column. Below it, the time by part; then FITS or DOES NOT FIT, and the smallest change
that makes it fit, as it is typed. docs/memory.md says how it counts. Exit code 2: a mistake.
"""

import sys
from dataclasses import fields, replace

from longctx import cli
from longctx.config import RunConfig
from longctx.errors import UserError
from longctx.plan.describe import plan
from longctx.plan.machine import Machine
from longctx.recipe import find_recipe

OWN = {field.name: field.type for field in fields(Machine) if field.name != "is_gpu"}


def split(arguments: list[str]) -> tuple[list[str], dict[str, float]]:
    """The run's arguments, and the machine's numbers.

    Args:
        arguments: of the command line, without the program's name.

    Raises:
        UserError: if one of the machine's is not a number above zero.
    """
    rest, own = [], {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "seq_len":
            rest.append(f"data.seq_len={value}")
        elif key not in OWN:
            rest.append(argument)
        else:
            try:
                own[key] = int(value) if OWN[key] is int else float(value)
            except ValueError:
                raise UserError(f"{argument}: give a number") from None
    return rest, own


def main() -> None:
    """The command line."""
    arguments = sys.argv[1:]
    if {"--help", "-h"} & set(arguments):
        print(f"{__doc__.strip()}\n\nChoices and settings of the run: longctx train --help")
        return
    with cli.mistakes_in_one_line():
        sys.argv[1:], own = split(arguments)
        machine = Machine(**own)  # type: ignore[arg-type]

    def show(run: RunConfig) -> None:
        recipe = find_recipe(run.builder)
        ranks = machine.gpus if "gpus" in own else run.parallel.sp
        print(plan(run, recipe, replace(machine, gpus=ranks)))

    cli.run(show, RunConfig, "train", "run_schema")


if __name__ == "__main__":
    main()
