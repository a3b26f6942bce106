"""Claims: one forward tells a passkey's answer faster; perplexity's memory is flat in vocabulary.

The lab model answers the same prompts in turn, in one process: by one forward of a batch, by greedy
decoding through the cache, a prompt at a time (the task's mode `generate`), and by that in the same
batches. On CPU it is one thread and its own CPU seconds, which other processes do not add to. The
prompts fill the model's window, so that most but not all keys are found: where none is, the same
answers would say nothing. Both read the prompt once, so what is saved is one decoding step for each
token of the answer after the first, and the less the longer the prompt. Memory is the growth of the
resident peak while a text is scored, in a fresh process for each vocabulary, beside what all logits
would take.

    python benchmarks/eval.py [--samples 200] [--lengths 96 128 256] [--write]
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.measuring import apart, growth, keep, seconds  # noqa: E402
from longctx.data.passkey_text import build  # noqa: E402
from longctx.eval.quiz import Quiz, Trial, run_trials  # noqa: E402
from longctx.eval.score import evaluating, token_nll  # noqa: E402
from longctx.models.load import build_model, load_model, load_tokenizer  # noqa: E402

LAB = ROOT / "assets" / "lab-llama"
GROUP = 20  # prompts in a batch
TARGET = 5.0  # times faster than generating a prompt at a time
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
VOCABULARIES = (32_768, 65_536, 131_072, 262_144)
TOKENS = 2048
HIDDEN = 32


def answers(samples: int, length: int, device: torch.device) -> dict[str, Any]:
    """All ways over the same prompts, a group of them at a time."""
    model = load_model(str(LAB), dtype="fp32", device=str(device))
    tokenizer: Any = load_tokenizer(str(LAB))

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    def trial(number: int) -> Trial:
        depth, index = DEPTHS[number % len(DEPTHS)], number // len(DEPTHS)
        prompt = build(encode, tokenizer.bos_token_id, length, depth, 0, index)
        return Trial(prompt, length, depth, None, index)

    trials = [trial(n) for n in range(samples)]
    groups = [trials[i : i + GROUP] for i in range(0, samples, GROUP)]
    found: dict[str, list[bool]] = {"teacher_forced": [], "generate": [], "generate_batched": []}
    spent: dict[str, list[float]] = {mode: [] for mode in found}

    def ask(mode: str, group: list[Trial]) -> None:
        if mode == "generate_batched":
            found[mode] += batched(model, group, device)
            return
        quiz = Quiz(model, encode, tokenizer.bos_token_id, 1, 0, mode, GROUP * length)
        done = run_trials(quiz, group, len(group), mode)
        found[mode] += [record["correct"] for record in done]

    for mode, told in found.items():  # warm
        ask(mode, groups[0])
        told.clear()
    for group in groups:
        for mode, times in spent.items():
            times.append(seconds(lambda mode=mode, group=group: ask(mode, group), device))  # type: ignore[misc]
    forced = spent["teacher_forced"]
    ratios = [b / a for a, b in zip(forced, spent["generate"], strict=True)]
    together = [b / a for a, b in zip(forced, spent["generate_batched"], strict=True)]
    return {
        "samples": samples,
        "length": length,
        "batch": GROUP,
        "seconds": {mode: sum(times) for mode, times in spent.items()},
        "times_faster": statistics.median(ratios),
        "least_and_most": [min(ratios), max(ratios)],
        "times_faster_than_batched": statistics.median(together),
        "same_answers": found["teacher_forced"] == found["generate"] == found["generate_batched"],
        "correct": sum(found["generate"]),
    }


def batched(model: Any, group: Sequence[Trial], device: torch.device) -> list[bool]:
    """Whether greedy decoding finds each key, all prompts in one batch, padded on the left."""
    starts = [trial.prompt.answer[0] for trial in group]
    rows = [
        [0] * (max(starts) - n) + t.prompt.tokens[:n] for t, n in zip(group, starts, strict=True)
    ]
    real = [[0] * (max(starts) - n) + [1] * n for n in starts]
    most = max(trial.prompt.answer[1] - n for trial, n in zip(group, starts, strict=True))
    with evaluating(model):
        out = model.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(real, device=device),
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=0,
        )
    told = out[:, max(starts) :].tolist()
    answers = [trial.prompt.tokens[n:] for trial, n in zip(group, starts, strict=True)]
    return [row[: len(right)] == right for row, right in zip(told, answers, strict=True)]


def peak(vocabulary: int) -> int:
    """Bytes that scoring a text adds, of a model with such a vocabulary."""
    torch.set_num_threads(1)
    model = build_model(
        {
            "model_type": "llama", "vocab_size": vocabulary, "hidden_size": HIDDEN,
            "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "max_position_embeddings": TOKENS, "tie_word_embeddings": True,
        }
    )  # fmt: skip
    tokens = torch.randint(1000, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    return growth(lambda: token_nll(model, tokens, slice(1, None)), torch.device("cpu"))


def memory() -> dict[str, Any]:
    """Peak by vocabulary, beside the bytes of all logits."""
    found = {v: apart(__file__, v) for v in VOCABULARIES}
    for v, held in found.items():
        print(f"vocabulary {v:>7,}: {held / 2**20:6.0f} MiB; all logits {TOKENS * v / 2**18:,.0f}")
    return {
        "tokens": TOKENS,
        "peak_bytes": {str(v): held for v, held in found.items()},
        "all_logits_bytes": {str(v): 4 * TOKENS * v for v in VOCABULARIES},
        "largest_to_smallest": max(found.values()) / min(found.values()),
    }


def main(samples: int, lengths: list[int], write: bool) -> None:
    """Prints both claims, and keeps them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    rows = []
    for length in lengths:
        both = answers(samples, length, device)
        rows.append(both)
        print(
            f"passkey, {samples} prompts of {length} tokens: one forward is "
            f"{both['times_faster']:.1f} times faster than generating (wanted: {TARGET}), "
            f"{both['times_faster_than_batched']:.1f} times than generating in batches, same "
            f"answers: {both['same_answers']}, {both['correct']} correct",
            flush=True,
        )
    held = memory()
    print(f"perplexity's memory, largest to smallest: {held['largest_to_smallest']:.2f}")
    if write:
        keep("eval", device, {"target": TARGET, "passkey": rows, "perplexity": held})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--lengths", type=int, nargs="+", default=[96, 128, 256])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peak:
        print(peak(asked.peak))
    else:
        main(asked.samples, asked.lengths, asked.write)
