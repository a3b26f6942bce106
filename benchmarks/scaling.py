"""Claim: two processes train twice the rows of one in nearly the same time (weak scaling).

The same rows per process, three ways in turn, each in fresh processes: one process alone; two that
know nothing of each other, which share the machine's memory; two that train one model. Tokens per
second of the last over the first is the scaling; of the time of a step there, what the second way
does not take is communication and waiting for each other.

    python benchmarks/scaling.py [--steps 30] [--rounds 3] [--stage 2] [--write]
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.multiprocessing  # noqa: E402

from benchmarks.measuring import keep  # noqa: E402
from longctx import cli  # noqa: E402
from longctx.config import RunConfig  # noqa: E402
from longctx.parallel import mesh  # noqa: E402
from tests.helpers.spawn import free_port, spawn  # noqa: E402
from tests.helpers.tiny import make_store  # noqa: E402

WARM_UP = 3
TARGET = 1.7  # tokens/s of two processes over one
ROWS = 2  # per process and step


def configuration(folder: Path, store: Path, processes: int, stage: int) -> RunConfig:
    """The lab's shapes on random weights and tokens: rows of 1,024."""
    arguments = [
        "recipe=pi",
        "model=lab_scratch",
        "model.tokenizer=null",
        "rope.factor=4",
        "data.seq_len=1024",
        f"data.store=['{store}']",
        "data.held_out=[]",
        f"parallel.zero_stage={stage}",
        "train.dtype=fp32",
        f"train.batch_rows={ROWS * processes}",
        f"train.micro_batch_rows={ROWS}",
        "train.eval_rows=0",
        "train.max_steps=100000",
        "logger=none",
        f"run_dir='{folder}'",
    ]
    return cli.compose(arguments, RunConfig, "train", "run_schema")


def train(folder: Path, store: Path, stage: int, steps: int, out: Path) -> None:
    """On each rank: trains, and writes the median seconds of a step."""
    from longctx.recipes.causal_lm import RECIPE
    from longctx.train.trainer import Trainer

    ranks = mesh.start()
    trainer = Trainer(configuration(folder, store, ranks.ranks, stage), RECIPE, ranks)
    found = []
    for step in range(WARM_UP + steps):
        begin = time.perf_counter()
        trainer.train_step(step)
        found.append(time.perf_counter() - begin)
    trainer.rows.close()
    if ranks.main:
        out.write_text(json.dumps(statistics.median(found[WARM_UP:])))
    ranks.barrier()


def apart(number: int, port: int, folder: Path, arguments: tuple[Path, int, int]) -> None:
    """One of two processes that know nothing of each other."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port + number), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    train(folder / f"apart-{number}", *arguments, folder / f"apart-{number}.json")


def one_round(folder: Path, store: Path, stage: int, steps: int) -> dict[str, float]:
    """Seconds of a step: alone, apart, together."""
    more = (store, stage, steps)
    spawn(train, 1, folder / "alone", *more, folder / "alone.json")
    torch.multiprocessing.spawn(apart, (free_port(), folder, more), 2)
    spawn(train, 2, folder / "together", *more, folder / "together.json")
    names = ("alone", "apart-0", "apart-1", "together")
    alone, *two, together = (
        float(json.loads((folder / f"{name}.json").read_text())) for name in names
    )
    return {"alone": alone, "apart": max(two), "together": together}


def main() -> None:
    """Measures and prints; with --write keeps the JSON under benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="counted steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage")
    parser.add_argument("--write", action="store_true", help="keep the JSON")
    options = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as name:
        store = make_store(Path(name) / "store", documents=60, longest=6000)
        for number in range(options.rounds):
            folder = Path(name) / str(number)
            folder.mkdir()
            rounds.append(one_round(folder, store, options.stage, options.steps))
    ratios = sorted(2 * r["alone"] / r["together"] for r in rounds)
    shares = sorted(1 - r["apart"] / r["together"] for r in rounds)
    facts = {
        "claim": "tokens/s of two processes over one, the same rows each",
        "target": TARGET,
        "stage": options.stage,
        "rounds": rounds,
        "ratios": ratios,
        "median_of_ratios": statistics.median(ratios),
        "communication_shares": shares,
        "median_communication_share": statistics.median(shares),
    }
    print(json.dumps(facts, indent=1))
    if options.write:
        keep("scaling", torch.device("cuda" if torch.cuda.is_available() else "cpu"), facts)


if __name__ == "__main__":
    main()
