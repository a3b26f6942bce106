"""What saves memory changes no number: offload, tiles, layer inputs on the CPU, start in shards."""

import shutil
from pathlib import Path

import pytest
import torch

from longctx.parallel import mesh, zero
from longctx.train.checkpoint.reader import newest
from longctx.train.trainer import Trainer
from longctx.recipes.causal_lm import RECIPE
from tests.helpers.spawn import spawn
from tests.helpers.tiny import make_store, tiny_run

TOLERANCE = 2e-6  # relative to a tensor's largest entry, after four steps in fp32
STEPS, SAVED = 4, 2
MORE = (
    f"train.max_steps={STEPS}", f"train.save_every={SAVED}", "train.keep_last=0",
    "train.micro_batch_rows=2", "data.held_out=[]",
)  # fmt: skip
STAGE_2, STAGE_3 = "parallel.zero_stage=2", "parallel.zero_stage=3"
OPTIMIZER = "parallel.offload_optimizer=true"
RUNS = {
    "plain-2": (STAGE_2,),
    "plain-3": (STAGE_3,),
    "optimizer-2": (STAGE_2, OPTIMIZER),
    "both-3": (STAGE_3, OPTIMIZER, "parallel.offload_parameters=true"),
    "tiles-3": (
        STAGE_3, "parallel.mlp_tile=20", "parallel.activation_checkpointing=true",
        "parallel.offload_checkpoints=true",
    ),
}  # fmt: skip
RESUMED, SOURCE = "both_after_optimizer-2", "optimizer-2"


def count_whole(folder: Path, name: list[str]) -> None:
    """Notes how many elements a module still holds when DeepSpeed gets it."""
    usual = zero.deepspeed.initialize

    def initialize(model, **named):
        held = sum(p.data.numel() for p in model.parameters())
        (folder / f"{name[-1]}.held").write_text(str(held))
        return usual(model=model, **named)

    zero.deepspeed.initialize = initialize


def train(folder: Path) -> None:
    """On each rank: one run after another, each in its directory; the last one resumes."""
    ranks, at = mesh.start(), [""]
    if ranks.main:
        count_whole(folder, at)
    for name, more in {**RUNS, RESUMED: RUNS["both-3"]}.items():
        at.append(name)
        if name == RESUMED and ranks.main:
            step = Path("checkpoints") / f"step_{SAVED:08d}"
            shutil.copytree(folder / SOURCE / step, folder / name / step)
        ranks.barrier()
        run = tiny_run(folder / "store", folder / name, *MORE, *more)
        trainer = Trainer(run, RECIPE, ranks)
        trainer.fit()
        trainer.engine.close()
        ranks.barrier()


def state(run_dir: Path) -> dict[str, torch.Tensor]:
    found, problems = newest(run_dir / "checkpoints")
    assert found is not None and not problems and found.step == STEPS
    return {f"{n}/{kind}": x for n, values in found.state() for kind, x in values.items()}


def furthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[n] - x).abs().max() / x.abs().max()) for n, x in expected.items())


@pytest.mark.dist
def test_what_saves_memory_changes_no_number(tmp_path):
    make_store(tmp_path / "store")
    spawn(train, 2, tmp_path)
    plain = {stage: state(tmp_path / f"plain-{stage}") for stage in "23"}
    assert furthest(plain["3"], plain["2"]) <= TOLERANCE
    switched = [name for name in (*RUNS, RESUMED) if not name.startswith("plain")]
    same = {n: furthest(state(tmp_path / n), plain[n[-1]]) for n in switched}
    assert max(same.values()) <= TOLERANCE, same
    for name in RUNS:
        held = int((tmp_path / f"{name}.held").read_text())
        assert (held == 0) == name.endswith("3"), (name, held)
