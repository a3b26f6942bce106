"""A bad step leaves no trace: weights, moments and what follows are those of a run without it.

Each ZeRO stage, two ranks, two micro-batches each; the fault is on one rank in one micro-batch.
"""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longctx.batch import Batch
from longctx.errors import UserError
from longctx.parallel import mesh
from longctx.train.checkpoint.reader import newest
from longctx.train.trainer import Trainer
from longctx.recipes.causal_lm import RECIPE
from tests.helpers.spawn import spawn
from tests.helpers.tiny import make_store, tiny_run

BAD = {2: "loss nan", 3: "loss inf", 5: "gradient nan", 6: "gradient inf", 8: "gradient huge"}
STEPS = 9
MORE = (
    f"train.max_steps={STEPS}",
    "train.micro_batch_rows=2",
    "optim.schedule=constant",
    "optim.warmup_steps=0",
)


class Poison(torch.autograd.Function):
    """The same loss; its gradient times a number."""

    @staticmethod
    def forward(context, loss: Tensor, factor: float) -> Tensor:
        context.factor = factor
        return loss.clone()

    @staticmethod
    def backward(context, gradient: Tensor):
        return gradient * context.factor, None


class Faulty:
    """The loss of RECIPE, bad in one micro-batch of some steps on one rank."""

    def __init__(self, bad: dict[int, str], rank: int) -> None:
        self.bad, self.rank, self.step, self.calls = bad, rank, 0, 0

    def __call__(self, run, model, batch: Batch) -> tuple[Tensor, Tensor]:
        total, count = RECIPE.loss(run, model, batch)
        self.calls += 1
        word = self.bad.get(self.step, "") if self.rank == 1 and self.calls % 2 else ""
        where, _, what = word.partition(" ")
        factor = {"nan": math.nan, "inf": math.inf, "huge": 1e4, "": 1.0}[what]
        if where == "gradient":
            return Poison.apply(total, factor), count
        return (total * factor, count) if where else (total, count)


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    return {
        f"{name}/{kind}": value.clone()
        for name, values in trainer.engine.state()
        for kind, value in values.items()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def faulty_trainer(run, ranks, bad: dict[int, str]) -> tuple[Trainer, Faulty]:
    loss = Faulty(bad, ranks.rank)
    return Trainer(run, dataclasses.replace(RECIPE, loss=loss), ranks), loss


def check_stage(store: Path, out: Path, ranks: mesh.Mesh, stage: int, dtype: str) -> None:
    more = (*MORE, f"parallel.zero_stage={stage}", "train.skip_above=100", f"train.dtype={dtype}")
    run = tiny_run(store, out / f"bad-{stage}", *more)
    trainer, loss = faulty_trainer(run, ranks, BAD)
    trainer.guard.norms = [1.0] * 20  # as if some steps had been taken, so that huge is huge
    clean, _ = faulty_trainer(tiny_run(store, out / f"clean-{stage}", *more), ranks, {})
    for step in range(STEPS):
        loss.step = step
        before = state_of(trainer)
        result = trainer.train_step(step)
        after = state_of(trainer)
        assert result.taken == (step not in BAD), (stage, step)
        if step in BAD:
            assert same(before, after), (stage, step)
            continue
        expected = clean.train_step(step)
        assert not same(before, after)
        assert (result.loss, result.grad_norm) == (expected.loss, expected.grad_norm), (stage, step)
        assert same(after, state_of(clean)), (stage, step)
    assert trainer.guard.skipped == len(BAD) and clean.guard.skipped == 0
    trainer.engine.close()
    clean.engine.close()


def first_is_bad(store: Path, out: Path, ranks: mesh.Mesh, stage: int) -> None:
    """A run that is saved before its first update, and goes on from there as one that is not."""
    more = (*MORE, f"parallel.zero_stage={stage}", "train.max_steps=4")
    finals = []
    for name, saves in (("halves", 2), ("whole", 0)):
        run_dir = out / f"{name}-{stage}"
        for part in [2, 4] if saves else [4]:
            run = tiny_run(store, run_dir, *more, f"train.save_every={saves}")
            trainer, loss = faulty_trainer(run, ranks, {0: "loss nan", 1: "gradient inf"})
            log = trainer._open_log()
            while trainer.step < part:
                loss.step = trainer.step
                trainer._step_and_save(log)
            if log:
                log.close()
            if part == 4:
                finals.append(state_of(trainer))
            trainer.engine.close()
            ranks.barrier()
    assert same(*finals), stage
    if ranks.main:
        found, _ = newest(out / f"halves-{stage}" / "checkpoints")
        assert found is not None and found.step == 2
        assert found.meta["guard"] == {"skipped": 2, "in_a_row": 2, "norms": []}
        lines = (out / f"halves-{stage}" / "metrics.jsonl").read_text().splitlines()
        seen = [
            (m["loss"] is None, m["grad_norm"] is None, m["skipped"])
            for m in map(json.loads, lines)
        ]
        assert seen == [(True, True, 1), (False, True, 2), (False, False, 2), (False, False, 2)]


def on_ranks(store: Path, out: Path) -> None:
    ranks = mesh.start()
    for stage in (0, 1, 2, 3):
        check_stage(store, out, ranks, stage, "fp32")
        first_is_bad(store, out, ranks, stage)
    for stage in (1, 3):
        check_stage(store, out, ranks, stage, "bf16")
    run = tiny_run(store, out / "stops", *MORE, "train.max_skipped=3")
    trainer, loss = faulty_trainer(run, ranks, dict.fromkeys((1, 2, 4, 5, 6), "loss nan"))
    with pytest.raises(UserError, match=r"step 7: .*bad step number 3 in a row"):
        for step in range(STEPS):
            loss.step = step
            trainer.train_step(step)


@pytest.mark.dist
def test_bad_steps_leave_no_trace(tmp_path):
    store = make_store(tmp_path / "store")
    spawn(on_ranks, 2, store, tmp_path)
