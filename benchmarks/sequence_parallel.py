"""Claim: two ranks that share a row hold half of its activations each (Ulysses, parallel.sp=2).

One training step of a row of 8,192 tokens on one process and on two with `parallel.sp=2`, in fresh
processes; memory is what a rank's resident set peaks above what it held before the step, weights,
gradients and optimizer states included in what it held. Prints the ratio, and that of the seconds.

    python benchmarks/sequence_parallel.py [--length 8192] [--write]
"""

import argparse
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.measuring import growth, keep  # noqa: E402
from longctx import cli  # noqa: E402
from longctx.config import RunConfig  # noqa: E402
from longctx.parallel import mesh  # noqa: E402
from longctx.parity.measure import on_ranks  # noqa: E402
from tests.helpers.tiny import make_store  # noqa: E402

TARGET = 1.8  # times less a rank
SHAPES = {
    "model_type": "llama", "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 768,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32,
    "max_position_embeddings": 8192, "tie_word_embeddings": True, "initializer_range": 0.02,
}  # fmt: skip


def configuration(folder: Path, length: int, sp: int) -> RunConfig:
    """One row a step of a small decoder with random weights."""
    architecture = ", ".join(f"{k}: {v}" for k, v in SHAPES.items()).replace("True", "true")
    arguments = [
        "recipe=pretrain", f"++model.architecture={{{architecture}}}", "model.tokenizer=null",
        f"data.store=['{folder}/store']", "data.held_out=[]", f"data.seq_len={length}",
        f"parallel.sp={sp}", "parallel.zero_stage=1", "train.dtype=fp32", "train.batch_rows=1",
        "train.micro_batch_rows=1", "train.eval_rows=0", "train.max_steps=1000", "logger=none",
        f"run_dir='{folder}/run'",
    ]  # fmt: skip
    return cli.compose(arguments, RunConfig, "train", "run_schema")


def step(folder: Path, length: int, sp: int) -> None:
    """On each rank: one step to settle, one measured; rank 0 writes what it saw."""
    from longctx.recipes.causal_lm import RECIPE
    from longctx.train.trainer import Trainer

    ranks = mesh.start(sp)
    trainer = Trainer(configuration(folder, length, sp), RECIPE, ranks)
    trainer.train_step(0)
    begin = time.perf_counter()
    peak = growth(partial(trainer.train_step, 1), ranks.device)
    seconds = time.perf_counter() - begin
    trainer.rows.close()
    peaks = [ranks.sum(peak if ranks.rank == r else 0) for r in range(ranks.ranks)]
    if ranks.main:
        (folder / f"{sp}.json").write_text(json.dumps({"bytes": max(peaks), "seconds": seconds}))
    ranks.barrier()


def main() -> None:
    """Measures and prints; with --write keeps the JSON under benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=8192, help="tokens of the row")
    parser.add_argument("--write", action="store_true", help="keep the JSON")
    options = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc keeps nothing freed: peaks count
    found: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_store(folder / "store", documents=8, longest=3 * options.length)
        for sp in (1, 2):
            on_ranks(sp, partial(step, folder, options.length, sp))
            found[sp] = json.loads((folder / f"{sp}.json").read_text())
    facts = {
        "claim": "a rank's activations with parallel.sp=2 against those of one process",
        "target": TARGET,
        "shapes": SHAPES,
        "length": options.length,
        "found": found,
        "memory_ratio": found[1]["bytes"] / found[2]["bytes"],
        "seconds_ratio": found[1]["seconds"] / found[2]["seconds"],
    }
    print(json.dumps(facts, indent=1))
    if options.write:
        keep("sequence_parallel", torch.device("cpu"), facts)


if __name__ == "__main__":
    main()
