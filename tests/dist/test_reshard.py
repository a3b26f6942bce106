"""A checkpoint goes on with other ranks, shared rows and ZeRO stages, and nobody can tell.

Its files hold whole parameters, so what differs afterwards is the order of some sums.
"""

import json
import shutil
from pathlib import Path

import pytest

from longctx.parallel import mesh
from longctx.train.checkpoint.reader import newest
from longctx.train.trainer import Trainer
from longctx.recipes.causal_lm import RECIPE
from tests.helpers.entry import run_entry
from tests.helpers.spawn import spawn
from tests.helpers.tiny import make_store, tiny_arguments, tiny_run

MORE = ("train.max_steps=6", "train.save_every=3", "train.keep_last=0")
TOLERANCE = 1e-6  # relative, of a loss near 4


def train(store: Path, runs: list[tuple[Path, int, int]]) -> None:
    """On each rank: one run after another, each in its directory, at its ZeRO stage and sp."""
    for run_dir, stage, sp in runs:
        ranks = mesh.start(sp)
        more = (f"parallel.zero_stage={stage}", f"parallel.sp={sp}")
        run = tiny_run(store, run_dir, *MORE, *more)
        trainer = Trainer(run, RECIPE, ranks)
        trainer.fit()
        trainer.engine.close()
        ranks.barrier()


def alone(store: Path, run_dir: Path, stage: int) -> None:
    arguments = tiny_arguments(store, run_dir, *MORE, f"parallel.zero_stage={stage}")
    done = run_entry(arguments, run_dir.with_suffix(".log"))
    assert done.code == 0, done.err[-2000:]


def losses(run_dir: Path) -> dict[int, tuple[float, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return {m["step"]: (m["loss"], m["grad_norm"]) for m in found}


def half_of(run_dir: Path, copy: Path) -> Path:
    """A run directory that holds nothing but the checkpoint of step 3."""
    name = Path("checkpoints") / "step_00000003"
    shutil.copytree(run_dir / name, copy / name)
    return copy


def same(run_dir: Path, whole: dict[int, tuple[float, float]], first: int) -> None:
    found = losses(run_dir)
    assert list(found) == list(range(first, 7))
    for step, values in found.items():
        assert values == pytest.approx(whole[step], rel=TOLERANCE), (run_dir.name, step)


@pytest.mark.dist
def test_other_ranks_and_stages_go_on_with_the_same_losses(tmp_path):
    store = make_store(tmp_path / "store")
    alone(store, tmp_path / "one", 1)
    whole = losses(tmp_path / "one")
    assert whole[1] != pytest.approx(whole[6], rel=1e-3)  # it moves

    on_two = [
        (half_of(tmp_path / "one", tmp_path / f"two-{stage}-{sp}"), stage, sp)
        for stage, sp in ((0, 1), (2, 1), (3, 1), (1, 2))
    ]
    fresh = [(tmp_path / "fresh-3", 3, 1), (tmp_path / "shared-3", 3, 2)]
    spawn(train, 2, store, on_two + fresh)
    for run_dir, _, _ in on_two:
        same(run_dir, whole, first=4)
    for run_dir, _, _ in fresh:
        same(run_dir, whole, first=1)

    for stage, start in ((0, "fresh-3"), (2, "shared-3")):
        back = half_of(tmp_path / start, tmp_path / f"back-{stage}")
        alone(store, back, stage)
        same(back, whole, first=4)
        last, problems = newest(back / "checkpoints")
        assert last is not None and last.step == 6 and problems == []
