"""What a run will do and need, in words: batch arithmetic, memory, time, and whether it fits.

Made from the configuration, the model's shapes (no weight is read) and, where the stores are at
hand, the lengths of their documents.
"""

import os
from dataclasses import asdict
from typing import Any

import yaml
from torch import nn

from longctx.attention.full import Full
from longctx.attention.method import EvictingMethod
from longctx.config import RunConfig
from longctx.errors import UserError
from longctx.models.export.restore import recorded
from longctx.models.load import describe
from longctx.parallel.mesh import rows_at_once
from longctx.plan.budget import Planner
from longctx.plan.budget_tables import assumptions, table, time_lines, verdict
from longctx.plan.check import here
from longctx.plan.machine import GIB, Machine
from longctx.plan.search import smallest
from longctx.recipe import Data, Recipe


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
    method = recorded(config)
    if not isinstance(method, EvictingMethod):
        return []
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    held, full = (
        x.cache_bytes(layers, key_heads, dim, run.data.seq_len, model.dtype.itemsize)
        for x in (method, Full())
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
