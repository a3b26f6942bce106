"""What a run will do and need, before it starts: batch arithmetic, memory, the model's header.

Computed from the configuration, the model's shapes (meta device: no weight is made) and, where the
stores are at hand, the lengths of their documents. The memory plan counts what a formula gives; see
`report` for what it leaves out.
"""

import os
from dataclasses import asdict, replace
from typing import Any

import yaml
from torch import nn

from longctx.attention.longgen import cache_bytes
from longctx.config import RunConfig
from longctx.errors import UserError
from longctx.models.choose import attention_method
from longctx.models.load import RECORD, describe
from longctx.recipe import Data, Recipe
from longctx.train.loss import LOGITS_BYTES

GIB = 2**30


def batch_arithmetic(run: RunConfig, ranks: int) -> str:
    """Tokens per rank x ranks x accumulation = tokens per step, in one line.

    Tokens of contexts count, unless they are the row's own.

    Raises:
        UserError: if the rows of a step cannot be dealt out evenly.
    """
    passes = run.train.accumulation(ranks)
    per_rank = run.train.micro_batch_rows * run.row_tokens
    total = per_rank * ranks * passes
    return (
        f"{per_rank:,} tokens per rank x {ranks} ranks x {passes} accumulation "
        f"= {total:,} tokens per step; x {run.train.max_steps:,} steps "
        f"= {total * run.train.max_steps / 1e9:.4g}B tokens"
    )


def memory(run: RunConfig, parameters: int, trained: int, ranks: int) -> dict[str, float]:
    """Bytes per rank of what a formula gives.

    Mixed precision keeps bf16 weights and gradients and, per trained parameter, an fp32 copy and
    two Adam moments; ZeRO 1 shards those over the ranks, 2 also the gradients, 3 also the weights.

    Args:
        run: the run.
        parameters: of the model.
        trained: of them, trained.
        ranks: data-parallel size.
    """
    width = 2 if run.train.dtype == "bf16" else 4
    stage = run.parallel.zero_stage
    master = 4 if width == 2 or stage else 0
    return {
        "weights": width * parameters / (ranks if stage == 3 else 1),
        "gradients": width * trained / (ranks if stage >= 2 else 1),
        "optimizer": (8 + master) * trained / (ranks if stage >= 1 else 1),
    }


def activations(run: RunConfig, model: Any) -> dict[str, float]:
    """Bytes per rank for one micro-batch: layer inputs kept, and the logits that exist at once."""
    tokens = run.train.micro_batch_rows * run.data.seq_len
    width = 2 if run.train.dtype == "bf16" else 4
    config: Any = model.config
    inputs = tokens * config.hidden_size * config.num_hidden_layers * width
    logits = min(LOGITS_BYTES, 4 * tokens * config.vocab_size)
    plan = {"layer inputs": float(inputs), "logits and their gradient": 2.0 * logits}
    if run.contexts.count:
        encoder = model.encoder.config
        context = run.train.micro_batch_rows * run.contexts.tokens * width
        plan["encoder's layer inputs"] = context * encoder.hidden_size * encoder.num_hidden_layers
    return plan


def data_lines(run: RunConfig, data: Data) -> list[str]:
    """What the run will read and how often; a warning where text repeats too much."""
    return data.train.describe(run.train.max_steps * run.train.batch_rows)


def report(run: RunConfig, recipe: Recipe) -> str:
    """The resolved run with its arithmetic, data and memory plan, as `dry_run=true` prints it.

    Activations inside a layer are not in the plan: with activation checkpointing one layer's
    worth exists at a time, without it all of them. Stores that are not here are no mistake: a plan
    can be made where the data is not.

    Args:
        run: the run.
        recipe: what it trains.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    model = recipe.sketch(run)
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in recipe.trainable(model).values())
    lines = [yaml.safe_dump(asdict(run), sort_keys=False)]
    lines += [f"batch: {batch_arithmetic(run, ranks)}", *_context_lines(run), _model_line(model)]
    lines += [*_added_lines(model), *_cache_lines(run, model)]
    try:
        lines += data_lines(run, recipe.build_data(run))
    except UserError as error:
        lines += [f"data: {error}"]
    plan = memory(run, parameters, trained, ranks) | activations(run, model)
    lines += [f"memory per rank, {name}: {size / GIB:.3f} GiB" for name, size in plan.items()]
    lines += [f"memory per rank, sum: {sum(plan.values()) / GIB:.3f} GiB"]
    return "\n".join(lines)


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
