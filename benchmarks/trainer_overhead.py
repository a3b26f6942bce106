"""Claim: the trainer costs under 3 percent over a bare DeepSpeed loop on the same batches.

Two engines of the same model train in one process, in turn, a block of steps each, on the same
batches with the same loss: once through `Trainer.train_step` with its logging, once as a bare loop
of forward, backward and step over batches that lie ready. Prints the ratio of the medians, and
beside it the share of the model's arithmetic at this process's measured matmul peak.

    python benchmarks/trainer_overhead.py [--blocks 12] [--steps 4] [--write]
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import deepspeed  # noqa: E402
import torch  # noqa: E402

from longctx import cli  # noqa: E402
from longctx.config import RunConfig  # noqa: E402
from longctx.parallel import mesh, zero  # noqa: E402
from longctx.recipes.causal_lm import RECIPE  # noqa: E402
from longctx.train import meter  # noqa: E402
from longctx.train.optim import adamw, freeze_all_but  # noqa: E402
from longctx.train.trainer import Scored, Trainer  # noqa: E402
from tests.helpers.tiny import make_store  # noqa: E402


def configuration(folder: Path, name: str) -> RunConfig:
    """The lab's shapes on random weights and random tokens: rows of 2,048, two per step."""
    store = make_store(folder / f"store-{name}", documents=60, longest=6000)
    arguments = [
        "recipe=pi",
        "model=lab_scratch",
        "model.tokenizer=null",
        "rope.factor=8",
        "data.seq_len=2048",
        f"data.store=['{store}']",
        "data.held_out=[]",
        "train.dtype=fp32",
        "train.batch_rows=2",
        "train.eval_rows=0",
        "train.max_steps=100000",
        "logger=none",
        f"run_dir='{folder / name}'",
    ]
    return cli.compose(arguments, RunConfig, "train", "run_schema")


def main() -> None:
    """Measures and prints; with --write keeps the JSON under benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=12, help="counted blocks of each side")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps per block")
    parser.add_argument("--write", action="store_true", help="keep the JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ranks = mesh.start()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = configuration(folder, "ours")
        trainer = Trainer(run, RECIPE, ranks)
        log = trainer._open_log()
        model = RECIPE.build_model(run)
        trainable = RECIPE.trainable(model)
        freeze_all_but(model, trainable)
        bare, *_ = deepspeed.initialize(
            model=Scored(model, RECIPE, run),
            optimizer=adamw(trainable.values(), run.optim),
            model_parameters=list(trainable.values()),
            config=zero.deepspeed_config(run, ranks.dp_size),
        )
        seconds: dict[str, list[float]] = {"trainer": [], "bare": []}
        flops = 0.0
        for block in range(options.blocks + 1):  # the first is a warm-up
            first = block * options.steps
            ready = [trainer.data.train.step(first + i, 0, 1) for i in range(options.steps)]

            begin = time.perf_counter()
            for i in range(options.steps):
                result = trainer.train_step(first + i)
                log.step(trainer._metrics(result, None))
            ours = time.perf_counter() - begin
            flops = result.flops

            begin = time.perf_counter()
            for batches in ready:
                for batch in batches:
                    loss, count = bare(**batch.tensors())
                    bare.backward(loss / count)
                    bare.step()
            theirs = time.perf_counter() - begin
            if block:
                seconds["trainer"].append(ours / options.steps)
                seconds["bare"].append(theirs / options.steps)
        log.close()
    facts = measured(seconds, flops / meter.peak_flops(ranks.device))
    print(json.dumps(facts, indent=1))
    if options.write:
        target = ROOT / "benchmarks" / "results" / "trainer_overhead_cpu.json"
        target.write_text(json.dumps(facts, indent=1) + "\n")


def measured(seconds: dict[str, list[float]], bound: float) -> dict[str, Any]:
    """The claim, what was measured and where; `bound`: seconds that arithmetic alone takes."""
    medians = {k: statistics.median(v) for k, v in seconds.items()}
    pairs = sorted(a / b for a, b in zip(seconds["trainer"], seconds["bare"], strict=True))
    return {
        "claim": "trainer step time over a bare DeepSpeed loop",
        "target": 1.03,
        "ratio_of_medians": medians["trainer"] / medians["bare"],
        "median_of_ratios": statistics.median(pairs),
        "ratios": pairs,
        "seconds_per_step": medians,
        "arithmetic_bound_seconds": bound,
        "device": platform.processor() or platform.machine(),
        "threads": 1,
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "command": " ".join(sys.argv),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip(),
    }


if __name__ == "__main__":
    main()
