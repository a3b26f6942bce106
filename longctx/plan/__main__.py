"""What a run will do and need: batch arithmetic, memory and time by part, and whether it fits."""

import sys
from dataclasses import fields, replace

from longctx import cli
from longctx.config import RunConfig
from longctx.errors import UserError
from longctx.plan.machine import Machine

OWN = {field.name: field for field in fields(Machine) if field.name != "is_gpu"}
HELP = """\
Plans a run: batch arithmetic, memory and time by part, and whether it fits.

    longctx plan recipe=longgen model=llama2_7b seq_len=131072 gpus=8 gpu_memory=80

In a checkout that is not installed: python -m longctx.plan ...

It reads the configuration, the model's shapes (no weights) and, where the stores are here, the
lengths of their documents. It takes every KEY=VALUE of longctx train, and of its own:

    seq_len=N          tokens of a row; short for data.seq_len
    gpus=N             ranks of the run; default {gpus}, or parallel.sp
    gpu_memory=GIB     of one GPU; default {gpu_memory:g}
    host_memory=GIB    CPU memory that one rank may use; default {host_memory:g}
    reserve=GIB        of gpu_memory, for libraries and gaps; default {reserve:g}
    peak=TFLOPS        bf16 peak of a GPU; default {peak:g}, an H100
    fraction=F         of the peak that a step reaches; default {fraction:g}
    gpus_per_node=N    default {gpus_per_node}
    link=GB/S          that a GPU sends inside a node; default {link:g}
    network=GB/S       that a GPU sends to other nodes; default {network:g}
    host_link=GB/S     between a GPU and CPU memory; default {host_link:g}

The table has one column for each moment of a step at which memory peaks; the largest column is the
run's peak. Below it stand the time by part, then FITS or DOES NOT FIT, and the smallest change that
makes it fit, ready to be typed. docs/memory.md explains how it counts.

Choices and settings of the run: longctx train --help"""


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
                own[key] = int(value) if OWN[key].type is int else float(value)
            except ValueError:
                raise UserError(f"{argument}: give a number") from None
    return rest, own


def main() -> None:
    """The command line."""
    arguments = sys.argv[1:]
    if {"--help", "-h"} & set(arguments):
        print(HELP.format(**{name: field.default for name, field in OWN.items()}))
        return
    with cli.mistakes_in_one_line():
        sys.argv[1:], own = split(arguments)
        machine = Machine(**own)  # type: ignore[arg-type]

    def show(run: RunConfig) -> None:
        from longctx.plan.describe import plan
        from longctx.recipe import find_recipe

        recipe = find_recipe(run.builder)
        ranks = machine.gpus if "gpus" in own else run.parallel.sp
        print(plan(run, recipe, replace(machine, gpus=ranks)))

    cli.run(show, RunConfig, "train", "run_schema")


if __name__ == "__main__":
    main()
