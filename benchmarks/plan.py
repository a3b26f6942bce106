"""Claim: the plan's peak memory is within 15 percent of what a run takes.

Each case trains two steps of a model of random weights for real, on one or two CPU processes, and
prints the most that a rank's memory grew over what it held before, beside the plan's peak.

    python benchmarks/plan.py [--write] [--only N]    --only: that case alone, counted from 0
"""

import argparse
import gc
import os
import socket
import sys
import tempfile
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
from longctx.plan.budget import SAVE, Planner  # noqa: E402
from longctx.plan.machine import GIB, Machine  # noqa: E402
from longctx.recipes.causal_lm import RECIPE  # noqa: E402

SHAPE = (
    "{model_type: llama, vocab_size: 4096, hidden_size: %d, intermediate_size: %d,"
    " num_hidden_layers: %d, num_attention_heads: 8, num_key_value_heads: 4,"
    " max_position_embeddings: 16384, tie_word_embeddings: false,"
    " rope_parameters: {rope_type: default, rope_theta: 10000.0}}"
)
NARROW, WIDE = SHAPE % (256, 688, 4), SHAPE % (768, 2048, 4)
CHECKPOINTING = "parallel.activation_checkpointing"
# ranks, shape, tokens, ZeRO stage, the rest
CASES: list[tuple[int, str, int, int, list[str]]] = [
    (1, NARROW, 4096, 1, []),
    (1, NARROW, 4096, 1, [f"{CHECKPOINTING}=true", "parallel.mlp_tile=512"]),
    (1, WIDE, 1024, 0, []),
    (2, WIDE, 512, 2, [f"{CHECKPOINTING}=true"]),
    (2, WIDE, 512, 3, [f"{CHECKPOINTING}=true"]),
]
TARGET = 0.15


def configured(shape: str, tokens: int, stage: int, ranks: int, more: list[str]) -> RunConfig:
    """The run of a case; rows are given to the engine, so no store is read."""
    arguments = [
        "recipe=pretrain", f"++model.architecture={shape}", "model.tokenizer=null",
        f"data.seq_len={tokens}", "data.store=[]", "data.held_out=[]", "optim.lr=1e-3",
        "train.micro_batch_rows=1", f"train.batch_rows={ranks}", "train.eval_rows=0",
        f"parallel.zero_stage={stage}", f"{CHECKPOINTING}=false", *more,
    ]  # fmt: skip
    return cli.compose(arguments, RunConfig, "train", "run_schema")


def two_steps(run: RunConfig, ranks: mesh.Mesh) -> None:
    """Builds the model and the engine, and trains on random tokens."""
    from longctx.parallel.zero import Engine
    from longctx.train.optim import adamw, freeze_all_but
    from longctx.train.trainer import Scored

    model = RECIPE.build_model(run)
    trainable = RECIPE.trainable(model)
    freeze_all_but(model, trainable)
    optimizer = adamw(trainable.values(), run.optim)
    engine = Engine(Scored(model, RECIPE, run), trainable, optimizer, run, ranks)
    del model
    length = run.data.seq_len
    tokens = torch.randint(0, 4096, (1, length))
    positions = torch.arange(length)[None]
    for _ in range(2):
        loss, _ = engine(tokens=tokens, labels=tokens, positions=positions)
        engine.backward(loss, float(length * run.train.batch_rows))
        del loss
        engine.step(1e-3)
    engine.close()


def planned(run: RunConfig, ranks: int) -> tuple[float, str]:
    """The plan's peak over these steps, bytes, and when; nothing is saved in them."""
    machine = Machine(gpus=ranks, gpu_memory=1e6, reserve=0, is_gpu=False)
    moments = Planner(RECIPE).budget(run, machine).moments
    sums = {name: sum(parts.values()) for name, parts in moments.items() if name != SAVE}
    top = max(sums, key=lambda name: sums[name])
    return sums[top], top


def measure(rank: int, ranks: int, port: int, folder: str, cases: list[Any]) -> None:
    """On one rank: the growth of each case, after a small run that loads what is loaded once."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    here = mesh.start()
    two_steps(configured(SHAPE % (64, 128, 1), 32, cases[0][3], ranks, []), here)
    for number, (_, shape, tokens, stage, more) in enumerate(cases):
        run = configured(shape, tokens, stage, ranks, more)
        gc.collect()
        grown = growth(partial(two_steps, run, here), here.device)
        if here.main:
            (Path(folder) / f"{number}").write_text(str(grown))


def on_ranks(ranks: int, cases: list[Any]) -> list[int]:
    """Bytes that each case took on the first of so many processes."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        torch.multiprocessing.spawn(measure, (ranks, port, folder, cases), ranks)
        return [int((Path(folder) / f"{number}").read_text()) for number in range(len(cases))]


def compared(case: Any, grown: int) -> dict[str, Any]:
    """A case's plan beside what was measured, printed and as a row of the JSON."""
    ranks, shape, tokens, stage, more = case
    run = configured(shape, tokens, stage, ranks, more)
    plan, moment = planned(run, ranks)
    row = {
        "ranks": ranks, "hidden": int(run.model.architecture["hidden_size"]), "tokens": tokens,
        "zero": stage, "more": " ".join(more), "planned": plan, "measured": grown,
        "ratio": plan / grown, "moment": moment,
    }  # fmt: skip
    print(
        f"{ranks} ranks, hidden {row['hidden']}, {tokens} tokens, ZeRO {stage} {row['more']}: "
        f"planned {plan / GIB:.3f} GiB ({moment}), measured {grown / GIB:.3f}, "
        f"ratio {plan / grown:.3f}",
        flush=True,
    )
    return row


def main() -> None:
    """Measures and prints; with --write keeps the JSON under benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the JSON")
    parser.add_argument("--only", type=int, help="one case alone")
    options = parser.parse_args()
    if options.write and options.only is not None:
        parser.error("--write keeps all cases")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc hands back what is freed
    chosen = CASES if options.only is None else [CASES[options.only]]
    rows: list[dict[str, Any]] = []
    for ranks in sorted({case[0] for case in chosen}):
        cases = [case for case in chosen if case[0] == ranks]
        rows += map(compared, cases, on_ranks(ranks, cases))
    print(f"furthest: {max(abs(row['ratio'] - 1) for row in rows):.1%}")
    if options.write:
        keep("plan", torch.device("cpu"), {"cases": rows, "target": TARGET})


if __name__ == "__main__":
    main()
