"""Claims: distillation without s x v logits, a teacher on line for what it costs, and no disk.

Three parts. `memory`: by how much memory peaks while the loss and its gradient are computed at
v = 32,000, chunked and written down plainly, in fresh processes that hand back what they free
(CPU) or by the allocator's own count (GPU). `teacher`: seconds of a training step with the teacher
on line, stored and without any, on a CEPE model of the lab's size; beside it the ratio of matrix
products at the paper's size. `disk`: bytes that a stored teacher would take there, by formula.

    python benchmarks/ceped.py [--tokens 8192] [--rounds 8] [--parts memory teacher disk] [--write]
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

from benchmarks.measuring import apart, growth, keep, seconds  # noqa: E402
from longctx import cli  # noqa: E402
from longctx.batch import Batch  # noqa: E402
from longctx.config import RunConfig  # noqa: E402
from longctx.config.distill import MODES, KlConfig  # noqa: E402
from longctx.data.store import StoreWriter  # noqa: E402
from longctx.data.stored_teacher import Plan  # noqa: E402
from longctx.recipes import cepe, ceped  # noqa: E402
from longctx.train import meter  # noqa: E402
from longctx.train.distill import chunked_distillation, kept, teacher_states  # noqa: E402
from longctx.train.loss import LOGITS_BYTES  # noqa: E402

VOCABULARY = 32_000
HIDDEN = {"cpu": 64, "cuda": 4096}  # the head's input is no part of the claim
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
TARGET = 5.0  # times less memory at 8,192 tokens
SHAPE = (
    "{model_type: llama, vocab_size: %d, hidden_size: %d, intermediate_size: %d,"
    " num_hidden_layers: %d, num_attention_heads: %d, num_key_value_heads: %d, head_dim: %d,"
    " max_position_embeddings: %d, tie_word_embeddings: true, rms_norm_eps: 1.0e-5,"
    " rope_parameters: {rope_type: default, rope_theta: 10000.0}}"
)
LAB = SHAPE % (4096, 128, 384, 4, 4, 4, 32, 256)
BILLION = SHAPE % (4096, 2048, 8192, 16, 32, 8, 64, 4096)


def plain(hidden: Tensor, teacher: Tensor, head: nn.Linear, labels: Tensor, kl: KlConfig) -> Tensor:
    """The loss as one would write it down: all logits whole, differentiated by autograd."""
    logits = head(hidden).float()
    loss = kl.lm_weight * cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    log_q = torch.log_softmax(logits / kl.temperature, -1)
    with torch.no_grad():
        log_p = torch.log_softmax(head(teacher).float() / kl.temperature, -1)
        p = log_p.exp()
    return loss + kl.weight * kl.temperature**2 * (p * (log_p - log_q)).sum()


def peak(form: str, tokens: int, device: torch.device) -> int:
    """Bytes by which memory peaks above what the inputs hold, forward and backward.

    Args:
        form: `plain`, or a mode of the divergence.
        tokens: positions.
        device: where.
    """
    dtype, hidden = DTYPE[device.type], HIDDEN[device.type]
    head = nn.Linear(hidden, VOCABULARY, bias=False, dtype=dtype, device=device)
    head.requires_grad_(False)

    def call(n: int) -> Callable[[], None]:
        draw = torch.Generator(device).manual_seed(0)
        states = [
            torch.randn(1, n, hidden, generator=draw, dtype=dtype, device=device) for _ in range(2)
        ]
        labels = torch.randint(0, VOCABULARY, (1, n), generator=draw, device=device)
        student, teacher = states[0].requires_grad_(), states[1]
        kl = KlConfig() if form == "plain" else KlConfig(form)

        def run() -> None:
            if form == "plain":
                plain(student, teacher, head, labels, kl).backward()
            else:
                chunked_distillation(student, teacher, head, labels, kl)[0].backward()

        return run

    call(64)()  # what is loaded once
    return growth(call(tokens), device)


def memory(tokens: int, device: torch.device) -> dict[str, Any]:
    """Peaks of every form, and how many times less each mode takes than the plain form."""
    found = {
        form: peak(form, tokens, device) if device.type == "cuda" else apart(__file__, form, tokens)
        for form in ("plain", *MODES)
    }
    return {
        "tokens": tokens,
        "vocabulary": VOCABULARY,
        "logits_bytes_of_one_model": tokens * VOCABULARY * 4,
        "logits_bytes_at_once": LOGITS_BYTES,
        "growth_bytes": found,
        "times_less": {mode: found["plain"] / found[mode] for mode in MODES},
        "target": TARGET,
    }


def small_run(device: torch.device, store: Path, *more: str) -> RunConfig:
    """A run of `recipe=ceped` with random weights: the lab's shapes, on a GPU those of 1B."""
    return cli.compose(
        [
            "recipe=ceped",
            "recipe_model=ceped_lab",
            "model=lab_scratch",
            f"++model.architecture={LAB if device.type == 'cpu' else BILLION}",
            "model.tokenizer=null",
            "encoder.path=null",
            "cepe.start=null",
            "cepe.init=copy",
            "data=store",
            f"data.store=['{store}']",
            f"train.dtype={'fp32' if device.type == 'cpu' else 'bf16'}",
            *([] if device.type == "cpu" else ["data.seq_len=2048", "contexts.count=8",
                                               "contexts.size=256", "train.micro_batch_rows=1"]),
            "train.max_steps=1",
            "train.batch_rows=16",
            *more,
        ],
        RunConfig,
        "train",
        "run_schema",
    )  # fmt: skip


def random_store(path: Path, tokens: int) -> Path:
    """One document of random tokens of the lab's vocabulary."""
    about: Any = {"tokenizer_sha256": "0" * 64, "vocab_size": 4096, "bos_id": 1, "eos_id": 2}
    text = np.random.default_rng(0).integers(4, 4096, tokens)
    with StoreWriter(path, **about, source={}) as store:
        store.add(np.array([1, *text, 2]))
    return path


def teacher(rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds of a step without a teacher, with a stored one and with one on line, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        run = small_run(device, random_store(Path(folder) / "store", 300_000))
        model: Any = ceped.build_model(run).to(device)
        batch = ceped.build_data(run).train.step(0, 0, 1)[0].to(device)
        trained = list(ceped.RECIPE.trainable(model).values())
        optimizer = torch.optim.AdamW(trained, lr=1e-5)
        head, k = model.get_output_embeddings(), run.kl.top_k
        with torch.no_grad():
            ids, top, rest = kept(head(teacher_states(model, batch)).flatten(0, 1), k, 1.0)
        shape = batch.tokens.shape
        found = {"teacher_ids": ids.view(*shape, k)}
        found["teacher_probabilities"] = torch.cat([top, rest], -1).half().view(*shape, k + 1)
        stored = replace(batch, **found)

        def step(loss: Callable[..., Any], kl: KlConfig, given: Batch) -> None:
            total, count = loss(replace(run, kl=kl), model, given)
            (total / count).backward()
            optimizer.step()
            optimizer.zero_grad()

        short = KlConfig("topk_rest")
        sides: dict[str, Callable[[], None]] = {
            "none": lambda: step(cepe.RECIPE.loss, KlConfig(), batch),
            "stored": lambda: step(ceped.RECIPE.loss, short, stored),
            "online_full": lambda: step(ceped.RECIPE.loss, KlConfig(), batch),
            "online_topk_rest": lambda: step(ceped.RECIPE.loss, short, batch),
        }
        taken: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds + 1):  # the first is a warm-up
            for name, call in sides.items():
                taken[name].append(seconds(call, device))
    ratios = {
        name: statistics.median(a / b for a, b in zip(values[1:], taken["none"][1:], strict=True))
        for name, values in taken.items()
    }
    return {
        "rows": batch.tokens.shape[0],
        "decoder_tokens": run.data.seq_len,
        "contexts": [run.contexts.count, run.contexts.size],
        "rounds": rounds,
        "seconds": {name: statistics.median(values[1:]) for name, values in taken.items()},
        "ratio_to_none": ratios,
        "matrix_products": products(model, run),
        "matrix_products_at_paper_size": products(*paper()),
    }


def paper() -> tuple[Any, RunConfig]:
    """Shapes (no weights) and run of the paper's size."""
    given = ["recipe=ceped", "model=llama2_7b_chat", "data=store", "data.store=[x]"]
    run = cli.compose(given, RunConfig, "train", "run_schema")
    return ceped.RECIPE.sketch(run), run


def products(model: Any, run: RunConfig) -> dict[str, float]:
    """FLOPs of one row: the student's step, the teacher's pass, and their ratio.

    Frozen weights have no gradient of their own: 4 operations a weight and token, trained ones 6,
    a teacher's 2. With recomputed activations the student's forward counts twice.
    """
    own, before = run.data.seq_len, run.contexts.tokens
    added = model.added_parameters(True)
    linear = {f"{n}.weight": m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    base = sum(w.numel() for n, w in linear.items() if n not in added)
    positions = torch.arange(own)[None]
    contexts = torch.zeros(1, run.contexts.count, run.contexts.size, dtype=torch.long)
    student = meter.batch_flops(
        meter.counts(model), Batch(positions, positions, positions, contexts)
    )
    reading = 2.0 * base * (before + own) + 2.0 * meter.attention_width(model) * (before + own) ** 2
    on_context = ("k_proj", "v_proj", "encoder.")
    total = {True: 0.0, False: 0.0}
    for name, weight in linear.items():
        total[name in added and any(x in name for x in on_context)] += 2.0 * weight.numel()
    again = total[True] * before + total[False] * own
    return {
        "student": student,
        "teacher": reading,
        "step_over_step_without": 1 + reading / student,
        "the_same_with_recomputed_activations": 1 + reading / (student + again),
    }


def disk() -> dict[str, Any]:
    """Bytes of a stored teacher at the paper's size: here, and as its code stored it."""
    _, run = paper()
    plan = Plan(
        run.train.max_steps * run.train.batch_rows,
        run.data.seq_len, run.kl.top_k, 1.0, 32_000, "", {},
    )  # fmt: skip
    reference = plan.rows * plan.seq_len * (51 * 2 + 50 * 4)
    return {
        "rows": plan.rows,
        "positions": plan.seq_len,
        "bytes_per_position": plan.row_bytes // plan.seq_len,
        "bytes": plan.rows * plan.row_bytes,
        "reference_bytes_per_position": 51 * 2 + 50 * 4,
        "reference_bytes": reference,
        "bytes_with_teacher_on_line": 0,
    }


def main() -> None:
    """Measures and prints; with --write keeps the JSON under benchmarks/results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help="positions of the memory part")
    parser.add_argument("--rounds", type=int, default=8, help="of the teacher part")
    parser.add_argument("--parts", nargs="+", default=["memory", "teacher", "disk"])
    parser.add_argument("--write", action="store_true", help="keep the JSON")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)  # of one form: `memory` asks
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    if options.peak:
        print(peak(options.peak[0], int(options.peak[1]), torch.device("cpu")))
        return
    make = {
        "memory": lambda: memory(options.tokens, device),
        "teacher": lambda: teacher(options.rounds, device),
        "disk": disk,
    }
    parts = {}
    for part in options.parts:
        parts[part] = make[part]()
        print(json.dumps({part: parts[part]}, indent=1), flush=True)
    if options.write:
        claim = "distillation without s x v logits, with a teacher on line"
        keep("ceped", device, {"claim": claim, **parts})


if __name__ == "__main__":
    main()
