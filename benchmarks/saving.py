"""Claims: saving beside the run costs a step 5 percent at most, and CEPE saves its own part only.

Saving: blocks of `--every` steps of one trainer, in turn without a checkpoint, with one that the
run waits for, and with one written beside it (its copy, and the wait for it at the block's end,
included); wall time, median of the ratios of neighbouring blocks. The recipes of the papers save
every 100 steps or more (`save_every` in conf/recipe). Size and resume time: a checkpoint of
`recipe=cepe` (encoder and cross-attention) beside one of the same model with its decoder trained
too: bytes, and seconds from the files to an engine that goes on.

    python benchmarks/saving.py [--every 50] [--blocks 6] [--write]
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.measuring import keep  # noqa: E402
from longctx import cli  # noqa: E402
from longctx.config import RunConfig  # noqa: E402
from longctx.parallel import mesh  # noqa: E402
from longctx.recipe import Recipe  # noqa: E402
from longctx.recipes.cepe import RECIPE  # noqa: E402
from longctx.train.checkpoint import reader  # noqa: E402
from longctx.train.checkpoint.background import Saver  # noqa: E402
from longctx.train.trainer import Trainer  # noqa: E402
from tests.helpers.tiny import make_store  # noqa: E402

HOW = ("without", "waiting", "beside")
TARGET = 1.05


def configuration(folder: Path, store: Path) -> RunConfig:
    """CEPE on the lab's shapes, random weights and tokens: 2 rows of 256 behind 8 contexts."""
    arguments = [
        "recipe=cepe",
        "model=lab_scratch",
        "model.tokenizer=null",
        "encoder=lab_scratch",
        "encoder.path=null",
        "cepe.start=null",
        "data=store",
        f"data.store=['{store}']",
        "data.held_out=[]",
        "data.seq_len=256",
        "contexts.count=8",
        "contexts.size=64",
        "parallel.activation_checkpointing=false",
        "train.dtype=fp32",
        "train.batch_rows=2",
        "train.micro_batch_rows=2",
        "train.eval_rows=0",
        "train.max_steps=100000",
        "train.keep_last=1",
        "logger=none",
        f"run_dir='{folder}'",
    ]
    return cli.compose(arguments, RunConfig, "train", "run_schema")


def block(trainer: Trainer, saver: Saver | None, every: int) -> float:
    """Seconds of `every` steps with one checkpoint begun after the first, and waited for."""
    begin = time.perf_counter()
    for i in range(every):
        trainer.train_step(trainer.step)
        trainer.step += 1
        if saver is not None and i == 0:
            saver.save(trainer.step, trainer.engine.state(), trainer._about())
        _, *news = trainer.mesh.sums(False, *(saver.news() if saver else (False, False)))
        if saver is not None:
            saver.hear(*news)
    if saver is not None:
        saver.finish()
    return time.perf_counter() - begin


def overhead(trainer: Trainer, every: int, blocks: int) -> dict[str, Any]:
    """Seconds per step of each way, and their ratios to steps without a checkpoint."""
    savers = {
        how: Saver(
            trainer.checkpoints,
            dataclasses.replace(trainer.run.train, save_async=how == "beside"),
            trainer.mesh,
            None,
        )
        for how in HOW[1:]
    }
    block(trainer, None, 3)
    found: dict[str, list[float]] = {how: [] for how in HOW}
    for _ in range(blocks):
        for how in HOW:
            found[how].append(block(trainer, savers.get(how), every) / every)
    ratios = {
        how: sorted(a / b for a, b in zip(found[how], found["without"], strict=True))
        for how in HOW[1:]
    }
    return {
        "every": every,
        "target": TARGET,
        "seconds_per_step": {how: statistics.median(found[how]) for how in HOW},
        "ratios": ratios,
        "median_of_ratios": {how: statistics.median(ratios[how]) for how in HOW[1:]},
    }


def everything(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """All parameters of a model, as if its decoder were trained too."""
    return dict(model.named_parameters())


def kept_and_resumed(run: RunConfig, recipe: Recipe, ranks: mesh.Mesh) -> dict[str, float]:
    """Bytes and parameters of a checkpoint, seconds to write it and to go on from it."""
    trainer = Trainer(run, recipe, ranks)
    trainer.train_step(0)
    trainer.step = 1
    begin = time.perf_counter()
    path = trainer.save_last()
    written = time.perf_counter() - begin
    begin = time.perf_counter()
    found = reader.open_checkpoint(path)
    reader.load_weights(trainer.model, found)
    trainer.engine.restore(1, found.state())
    resumed = time.perf_counter() - begin
    trainer.rows.close()
    trainer.engine.close()
    return {
        "parameters": sum(p.numel() for p in trainer.engine.trainable.values()),
        "bytes": sum(file.stat().st_size for file in path.iterdir()),
        "save_seconds": written,
        "resume_seconds": resumed,
    }


def main() -> None:
    """Measures and prints; with --write keeps the JSON under benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=50, help="steps between two checkpoints")
    parser.add_argument("--blocks", type=int, default=6, help="counted blocks of each way")
    parser.add_argument("--write", action="store_true", help="keep the JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ranks = mesh.start()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = make_store(folder / "store", documents=60, longest=6000)
        full = dataclasses.replace(RECIPE, trainable=everything)
        sizes = {
            part: kept_and_resumed(configuration(folder / part, store), recipe, ranks)
            for part, recipe in (("cepe", RECIPE), ("full", full))
        }
        trainer = Trainer(configuration(folder / "steps", store), RECIPE, ranks)
        facts = {
            "claim": "seconds per step with a checkpoint in it over those without",
            **overhead(trainer, options.every, options.blocks),
            "sizes": sizes,
        }
        trainer.rows.close()
    print(json.dumps(facts, indent=1))
    if options.write:
        keep("saving", ranks.device, facts)


if __name__ == "__main__":
    main()
