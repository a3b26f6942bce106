"""Stores the teacher's distributions of a distilling run, so that several runs can read them.

    longctx teacher recipe=ceped teacher.source=stored teacher.store=DIR [...]

The command line is that of the run: the same settings give the same rows, in the same order. One
forward of the decoder over every row with its contexts; the whole model on each device, a part of
the rows to each process (under torchrun). Not in data_prep/: that knows no model. Finished parts
stay, so the same command resumes an interrupted one.
"""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from longctx import cli
from longctx.config import RunConfig, TeacherConfig
from longctx.data.stored_teacher import Array, Plan, begin, write_part
from longctx.errors import UserError
from longctx.parallel import mesh
from longctx.parallel.mesh import Mesh
from longctx.recipe import find_recipe
from longctx.train.distill import decoder_digest, kept, teacher_states
from longctx.train.log import say
from longctx.train.loss import LOGITS_BYTES


def distributions(model: Any, loader: Any, samples: range, run: RunConfig) -> Iterator[Any]:
    """(ids `[s k]`, probabilities `[s k+1]`) of each sample, in order.

    Args:
        model: the recipe's.
        loader: its training rows.
        samples: global sample numbers.
        run: its micro-batch, k and temperature.
    """
    head, device = model.get_output_embeddings(), next(model.parameters()).device
    chunk = max(1, LOGITS_BYTES // (4 * head.out_features))
    micro = run.train.micro_batch_rows
    for first in range(0, len(samples), micro):
        batch = loader.batch(list(samples[first : first + micro])).to(device)
        with torch.no_grad():
            for states in teacher_states(model, batch):
                logits = map(head, states.split(chunk))
                pieces = [kept(x, run.kl.top_k, run.kl.temperature) for x in logits]
                ids, top, rest = (torch.cat(parts) for parts in zip(*pieces, strict=True))
                probabilities = torch.cat([top, rest], dim=-1)
                yield ids.cpu().numpy(), probabilities.cpu().numpy()


def plan_of(run: RunConfig, model: Any, loader: Any) -> Plan:
    """What a run's stored teacher holds.

    Raises:
        UserError: if `kl` keeps the whole vocabulary.
    """
    vocabulary = int(model.get_output_embeddings().out_features)
    if run.kl.top_k >= vocabulary:
        raise UserError(f"kl.top_k={run.kl.top_k} must be below the vocabulary's {vocabulary}")
    return Plan(
        rows=run.train.max_steps * run.train.batch_rows,
        seq_len=run.data.seq_len,
        top_k=run.kl.top_k,
        temperature=run.kl.temperature,
        vocab_size=vocabulary,
        model=decoder_digest(model),
        identity=dict(loader.identity),
    )


def announce(path: Path, plan: Plan, missing: list[int], run: RunConfig) -> None:
    """Prints what will be written, and refuses if the disk is too small.

    Raises:
        UserError: if the disk has less room.
    """
    left = sum(len(plan.samples(part)) for part in missing)
    say(
        f"{path}: {plan.rows:,} rows x {plan.seq_len:,} positions x "
        f"{plan.row_bytes // plan.seq_len} bytes = {plan.rows * plan.row_bytes / 1e9:,.2f} GB in "
        f"{plan.parts:,} parts; {left:,} rows are missing, for which the decoder reads "
        f"{left * run.row_tokens:,} tokens"
    )
    room = shutil.disk_usage(path).free
    if room < left * plan.row_bytes:
        raise UserError(
            f"{path}: {left * plan.row_bytes / 1e9:,.2f} GB are to be written and "
            f"{room / 1e9:,.2f} GB are free"
        )


def write(run: RunConfig, ranks: Mesh) -> Path:
    """Writes the missing parts of a run's stored teacher. Collective.

    Args:
        run: with `teacher.source=stored`.
        ranks: who shares the work.

    Raises:
        UserError: if the run stores no teacher, or the directory is another run's.
    """
    if run.teacher.source != "stored" or run.teacher.store is None:
        raise UserError("writing a teacher needs teacher.source=stored teacher.store=DIR")
    recipe = find_recipe(run.builder)
    if not recipe.distils:
        raise UserError(f"recipe {run.name} has no teacher: it does not distil")
    asked = replace(run, teacher=TeacherConfig())  # as if it were on line: nothing is read back
    loader, model = recipe.build_data(asked).train, recipe.build_model(asked)
    path, plan = Path(run.teacher.store), plan_of(run, model, loader)
    if not ranks.main:
        ranks.barrier()  # one process begins
    missing = begin(path, plan)
    if ranks.main:
        announce(path, plan, missing, run)
        ranks.barrier()
    model.to(ranks.device).eval()
    mine = missing[ranks.dp_rank :: ranks.dp_size]
    total = sum(len(plan.samples(part)) for part in mine)
    with tqdm(total=total, unit="row", disable=None if ranks.main else True) as bar:
        for part in mine:
            rows = distributions(model, loader, plan.samples(part), run)
            write_part(path, plan, part, _counted(rows, bar))
    ranks.barrier()
    return path


def _counted(rows: Iterator[tuple[Array, Array]], bar: Any) -> Iterator[tuple[Array, Array]]:
    for row in rows:
        yield row
        bar.update()


def store(run: RunConfig) -> None:
    """Writes the teacher of a run, on as many processes as were started."""
    ranks = mesh.start()
    path = write(run, ranks)
    if ranks.main:
        say(f"{path} is complete")


def main() -> None:
    """The command line."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        say(f"{__doc__}\nChoices and settings of the run: longctx train --help")
    else:
        cli.run(store, RunConfig, "train", "run_schema")


if __name__ == "__main__":
    main()
