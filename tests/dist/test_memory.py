"""What saves memory changes no number: offload, tiles, layer inputs on the CPU, ZeRO 0-3."""

import shutil
from pathlib import Path

import pytest
import torch

from longctx.parallel import mesh
from longctx.train.checkpoint import newest
from longctx.train.trainer import Trainer
from recipes.causal_lm import RECIPE
from tests.helpers.spawn import spawn
from tests.helpers.tiny import make_store, tiny_run

TOLERANCE = 2e-6  # relative to a tensor's largest entry, after six steps in fp32
MORE = ("train.max_steps=6", "train.save_every=3", "train.keep_last=0")
CHECKPOINTED = "parallel.activation_checkpointing=true"
PLAIN = {f"plain-{stage}": (f"parallel.zero_stage={stage}",) for stage in range(4)}
OFFLOADED = {
    f"optimizer-{stage}": (f"parallel.zero_stage={stage}", "parallel.offload_optimizer=true")
    for stage in (1, 2, 3)
} | {
    "parameters-3": ("parallel.zero_stage=3", "parallel.offload_parameters=true"),
    "both-3": (
        "parallel.zero_stage=3", "parallel.offload_parameters=true",
        "parallel.offload_optimizer=true",
    ),
}  # fmt: skip
TILED = {
    f"tiles-{stage}": (
        f"parallel.zero_stage={stage}", "parallel.mlp_tile=20", CHECKPOINTED,
        "parallel.offload_checkpoints=true",
    )
    for stage in range(4)
} | {"tiles_alone-3": ("parallel.zero_stage=3", "parallel.mlp_tile=20")}  # fmt: skip


def train(folder: Path, runs: dict[str, tuple[str, ...]]) -> None:
    """On each rank: one run after another, each in its directory."""
    ranks = mesh.start()
    for name, more in runs.items():
        run = tiny_run(folder / "store", folder / name, *MORE, *more)
        trainer = Trainer(run, RECIPE, ranks)
        trainer.fit()
        trainer.engine.close()
        ranks.barrier()


def state(run_dir: Path) -> dict[str, torch.Tensor]:
    found, problems = newest(run_dir / "checkpoints")
    assert found is not None and not problems and found.step == 6
    return {f"{n}/{kind}": x for n, values in found.state() for kind, x in values.items()}


def furthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[n] - x).abs().max() / x.abs().max()) for n, x in expected.items())


@pytest.mark.dist
def test_what_saves_memory_changes_no_number(tmp_path):
    make_store(tmp_path / "store")
    spawn(train, 2, tmp_path, PLAIN | OFFLOADED | TILED)
    same = {n: furthest(state(tmp_path / n), state(tmp_path / f"plain-{n[-1]}"))
            for n in OFFLOADED | TILED}  # fmt: skip
    assert max(same.values()) <= TOLERANCE, same

    crossed = {}
    for name, source in (("both-3", "plain-1"), ("optimizer-2", "both-3"), ("plain-0", "tiles-3")):
        start = tmp_path / f"after-{source}-{name}"
        step = Path("checkpoints") / "step_00000003"
        shutil.copytree(tmp_path / source / step, start / step)
        crossed[start.name] = (PLAIN | OFFLOADED)[name]
    spawn(train, 2, tmp_path, crossed)
    goes_on = {n: furthest(state(tmp_path / n), state(tmp_path / "plain-1")) for n in crossed}
    assert max(goes_on.values()) <= TOLERANCE, goes_on
