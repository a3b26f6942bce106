"""What a run will do and need: batch arithmetic, memory and time by part, and whether it fits.

    python -m longctx.plan recipe=longgen model=llama2_7b seq_len=131072 gpus=8 gpu_memory=80

Made from the configuration, the model's shapes (no weight is read) and, where the stores are at
hand, the lengths of their documents. Every KEY=VALUE of train.py is one here. Of the plan alone:

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

import importlib
import os
import sys
from dataclasses import asdict, fields, replace
from typing import Any

import yaml
from torch import nn

from longctx import cli
from longctx.attention.longgen import cache_bytes
from longctx.config import RunConfig
from longctx.errors import UserError
from longctx.models.choose import attention_method
from longctx.models.load import RECORD, describe
from longctx.parallel.mesh import rows_at_once
from longctx.planner.budget import Planner
from longctx.planner.check import here
from longctx.planner.machine import GIB, Machine
from longctx.planner.search import smallest
from longctx.planner.words import assumptions, table, time_lines, verdict
from longctx.recipe import Data, Recipe

OWN = {field.name: field.type for field in fields(Machine) if field.name != "is_gpu"}


def batch_arithmetic(run: RunConfig, ranks: int) -> str:
    """Tokens per rank x ranks x accumulation = tokens per step, in one line.

    Tokens of contexts count, unless they are the row's own.

    Raises:
        UserError: if the rows of a step cannot be dealt out evenly.
    """
    sp = run.parallel.sp
    passes = run.train.accumulation(rows_at_once(ranks, sp))
    per_rank = run.train.micro_batch_rows * run.row_tokens / sp
    total = round(per_rank * ranks * passes)
    return (
        f"{per_rank:,.12g} tokens per rank x {ranks} ranks x {passes} accumulation "
        f"= {total:,} tokens per step; x {run.train.max_steps:,} steps "
        f"= {total * run.train.max_steps / 1e9:.4g}B tokens"
    )


def data_lines(run: RunConfig, data: Data) -> list[str]:
    """What the run will read and how often; a warning where text repeats too much."""
    return data.train.describe(run.train.max_steps * run.train.batch_rows)


def report(run: RunConfig, recipe: Recipe) -> str:
    """The resolved run with its arithmetic, data and memory plan, as `dry_run=true` prints it.

    Stores that are not here are no mistake: a plan can be made where the data is not.

    Args:
        run: the run.
        recipe: what it trains.
    """
    ranks = int(os.environ.get("WORLD_SIZE", run.parallel.sp))
    machine = here(ranks) or Machine(gpus=ranks)
    budget = Planner(recipe).budget(run, machine)
    lines = [yaml.safe_dump(asdict(run), sort_keys=False), *_outline(run, recipe, ranks)]
    try:
        lines += data_lines(run, recipe.build_data(run))
    except UserError as error:
        lines += [f"data: {error}"]
    kind = "GPU" if machine.is_gpu else "CPU"
    lines += [*table(budget), f"memory per rank, peak: {budget.peak / GIB:.3f} GiB"]
    lines += [f"of this machine's {kind}: {verdict(budget, None)[0]}"]
    return "\n".join(lines)


def plan(run: RunConfig, recipe: Recipe, machine: Machine) -> str:
    """The whole plan of a run on a machine, as `python -m longctx.plan` prints it.

    Args:
        run: the run.
        recipe: what it trains.
        machine: where it is to run.

    Raises:
        UserError: if the ranks cannot be grouped, or the rows of a step dealt out.
    """
    planner = Planner(recipe)
    budget = planner.budget(run, machine)
    change = None if budget.fits else smallest(planner, run, machine)
    lines = [*_outline(run, recipe, machine.gpus), *table(budget), *time_lines(budget)]
    return "\n".join([*lines, assumptions(budget), *verdict(budget, change)])


def _outline(run: RunConfig, recipe: Recipe, ranks: int) -> list[str]:
    """The batch and the model."""
    model: Any = recipe.sketch(run)
    lines = [f"batch: {batch_arithmetic(run, ranks)}", *_context_lines(run), _model_line(model)]
    trained = sum(p.numel() for p in recipe.trainable(model).values() if p.requires_grad)
    lines += [f"trained parameters: {trained:,}; ZeRO {run.parallel.zero_stage}, {run.train.dtype}"]
    return [*lines, *_added_lines(model), *_cache_lines(run, model)]


def header(run: RunConfig, model: nn.Module, data: Data, ranks: int) -> str:
    """The first lines of a run: what is trained, on what, how much at a time."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = [f"{run.name} -> {run.run_dir}", _model_line(model), *_added_lines(model)]
    lines += [f"trained parameters: {trained:,}; ZeRO {run.parallel.zero_stage}, {run.train.dtype}"]
    lines += [f"batch: {batch_arithmetic(run, ranks)}", *_context_lines(run)]
    lines += data_lines(run, data)
    return "\n".join(lines)


def _context_lines(run: RunConfig) -> list[str]:
    """What a row of the batch is made of, where contexts stand beside it."""
    if not run.contexts.count:
        return []
    own, beside = run.data.seq_len, f"{run.contexts.count} x {run.contexts.size}"
    if run.contexts.repeat:
        return [f"rows: {own:,} tokens, which the encoder reads too, as {beside}; counted once"]
    total = run.train.batch_rows * run.train.max_steps
    return [
        f"rows: {own:,} decoder tokens and {beside} = {run.contexts.tokens:,} context tokens; "
        f"in all {total * own:,} and {total * run.contexts.tokens:,}"
    ]


def _added_lines(model: Any) -> list[str]:
    """The parameters that were added to a decoder, where there are any."""
    if not hasattr(model, "added_parameters"):
        return []
    count = {name: p.numel() for name, p in model.added_parameters(True).items()}
    encoder = sum(p.numel() for p in model.encoder.parameters())
    layers, added, total = (
        len(model.cross_attending()),
        sum(count.values()),
        sum(p.numel() for p in model.parameters()),
    )
    return [
        f"added: {layers} cross-attention layers of {(added - encoder) // layers:,} parameters and "
        f"an encoder of {encoder:,}: {added:,} to {total - added:,}, {total:,} in all"
    ]


def _cache_lines(run: RunConfig, model: Any) -> list[str]:
    """What the cache of one row holds at the run's length, where some layers forget."""
    config = model.config.get_text_config()
    record = getattr(config, RECORD, None)
    method: Any = attention_method(record) if record else None
    if not hasattr(method, "evicts"):
        return []
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    held, full = (
        cache_bytes(x, layers, key_heads, dim, run.data.seq_len, model.dtype.itemsize)
        for x in (method, replace(method, full_layers=list(range(layers))))
    )
    return [
        f"cache of a row of {run.data.seq_len:,} tokens: {held / GIB:.5g} GiB, with full "
        f"attention {full / GIB:.5g} GiB; {1 - held / full:.2%} saved"
    ]


def _model_line(model: Any) -> str:
    facts = describe(model)
    return "model: " + ", ".join(
        f"{k} {v:.7g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items()
    )


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


def main(arguments: list[str]) -> None:
    """The command line."""
    if {"--help", "-h"} & set(arguments):
        print(f"{__doc__.strip()}\n\nChoices and settings of the run: python train.py --help")
        return
    with cli.mistakes_in_one_line():
        sys.argv[1:], own = split(arguments)
        machine = Machine(**own)  # type: ignore[arg-type]

    def show(run: RunConfig) -> None:
        recipe = importlib.import_module(run.builder).RECIPE
        ranks = machine.gpus if "gpus" in own else run.parallel.sp
        print(plan(run, recipe, replace(machine, gpus=ranks)))

    cli.run(show, RunConfig, "train", "run_schema")


if __name__ == "__main__":
    main(sys.argv[1:])
