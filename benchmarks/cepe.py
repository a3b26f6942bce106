"""Claim: CEPE reads a long context for a fraction of what full attention over it costs.

The end of a text is scored behind n context tokens: by CEPE, which reads them through its encoder
and cross-attention, and by the same decoder with full attention over all of them, once as one would
(states of the scored tokens only, no cache) and once as in the published comparison (a cache and
all logits). Then a decoded token: absorbed cross-attention against projecting the context again. In
turn in one process; median of the ratios of neighbouring calls beside the FLOP bound. Memory is the
peak above the weights, in fresh processes. On CPU a small decoder, one thread and its own CPU
seconds; with a GPU Llama-2-7B's shapes with random weights, and LLaMA-MLM-Large's.

    python benchmarks/cepe.py [--shapes smollm2] [--seconds 60] [--lengths 2048 4096] [--write]
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.measuring import apart, growth, keep, seconds  # noqa: E402
from longctx.models.cepe.encoder import build_encoder  # noqa: E402
from longctx.models.cepe.model import CepeForCausalLM  # noqa: E402
from longctx.models.load import build_model  # noqa: E402

SIDES = ("cepe", "full", "full_wasteful")
LONGEST = 150.0  # seconds that one call may take


Part = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Shapes:
    """What is measured on a device; hidden sizes, layers and feed-forward sizes of both parts.

    Args:
        decoder: (hidden, layers, ffn, heads, key heads).
        encoder: the same of the encoder.
        vocabulary: entries of the output layer.
        rows: decoder tokens behind the contexts, all scored.
        chunk: tokens per context.
        lengths: context tokens.
        dtype: of the weights.
        targets: of the ratios at the longest length.
    """

    decoder: Part
    encoder: Part
    vocabulary: int
    rows: int
    chunk: int
    lengths: tuple[int, ...]
    dtype: str
    targets: dict[str, float]


# The encoder has a sixteenth of the decoder's weights, as in the paper.
CPU = {
    "small": Shapes(
        (256, 6, 688, 4, 4), (96, 2, 256, 4, 4), 4096, 256, 256,
        (2048, 4096, 8192, 16384, 32768), "float32", {},
    ),
    "smollm2": Shapes(  # of 135M
        (576, 30, 1536, 9, 3), (256, 8, 688, 4, 4), 49152, 256, 256,
        (2048, 4096, 8192), "float32", {},
    ),
}  # fmt: skip
CUDA = Shapes(
    (4096, 32, 11008, 32, 32), (1024, 24, 4096, 16, 16), 32000, 4096, 256, (32768, 65536, 131072),
    "bfloat16", {"over full attention": 10.0, "decoding over re-projection": 20.0},
)  # fmt: skip


def build(shapes: Shapes, device: torch.device, alone: bool) -> Any:
    """The CEPE model, or its decoder alone, with random weights."""
    hidden, layers, ffn, heads, keys = shapes.decoder
    dtype = getattr(torch, shapes.dtype)
    decoder = build_model(
        {
            "model_type": "llama", "vocab_size": shapes.vocabulary, "hidden_size": hidden,
            "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": keys,
            "max_position_embeddings": max(shapes.lengths) + shapes.rows,
        },
        dtype=dtype,
    )  # fmt: skip
    if alone:
        return decoder.to(device).eval()
    hidden, layers, ffn, heads, _ = shapes.encoder
    encoder = build_encoder(
        {
            "vocab_size": shapes.vocabulary + 1, "hidden_size": hidden, "intermediate_size": ffn,
            "num_hidden_layers": layers, "num_attention_heads": heads,
            "max_position_embeddings": 2 * shapes.chunk,
        },
        dtype,
    )  # fmt: skip
    return CepeForCausalLM.from_parts(decoder, encoder, init="copy").to(device).eval()


@torch.no_grad()
def score(model: Any, side: str, tokens: Tensor, shapes: Shapes) -> Tensor:
    """Logits of the last tokens behind the others."""
    rows = shapes.rows
    if side == "cepe":
        contexts = tokens[:, :-rows].reshape(1, -1, shapes.chunk)
        positions = torch.arange(rows, device=tokens.device)[None]
        hidden = model.hidden_states(tokens[:, -rows:], positions, contexts, None)
        return model.get_output_embeddings()(hidden)
    if side == "full":
        hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
        return model.get_output_embeddings()(hidden[:, -rows:])
    return model(input_ids=tokens, use_cache=True).logits[:, -rows:]


def _weights(part: Part) -> int:
    hidden, layers, ffn, heads, keys = part
    return layers * (2 * hidden**2 * (heads + keys) // heads + 3 * hidden * ffn)


def flops(shapes: Shapes, side: str, context: int) -> float:
    """Multiplications and additions of one scoring pass."""
    hidden, layers, _, heads, keys = shapes.decoder
    rows, head = shapes.rows, 2 * shapes.rows * shapes.vocabulary * hidden
    if side == "full":
        n = context + rows
        return float(2 * n * _weights(shapes.decoder) + layers * 2 * hidden * n * n + head)
    width, deep, *_ = shapes.encoder
    encoder = 2 * context * _weights(shapes.encoder) + deep * 4 * width * context * shapes.chunk
    decoder = 2 * rows * _weights(shapes.decoder) + layers * 2 * hidden * rows * rows
    projected = 4 * rows * hidden**2 + 4 * context * width * hidden * keys // heads
    crossed = layers * (projected + 4 * rows * context * hidden)
    return float(encoder + decoder + crossed + head)


def peak(side: str, shapes: Shapes, context: int, device: torch.device) -> int:
    """Bytes by which memory peaks above the weights while the end of a text is scored."""
    model = build(shapes, device, side != "cepe")
    tokens = torch.randint(0, shapes.vocabulary, (1, context + shapes.rows), device=device)
    score(model, side, tokens[:, -(shapes.rows + shapes.chunk) :], shapes)  # what is loaded once
    return growth(lambda: score(model, side, tokens, shapes), device)


def in_turn(
    calls: dict[str, Callable[[], Any]], budget: float, device: torch.device
) -> dict[str, list[float]] | None:
    """Seconds of each side, in turn, the first of each left out; None if one takes too long."""
    taken: dict[str, list[float]] = {side: [] for side in calls}
    rounds = 1
    while min(map(len, taken.values())) < rounds + 1:
        for side, call in calls.items():
            taken[side].append(seconds(call, device))
        one = max(values[-1] for values in taken.values())
        if one > LONGEST:
            return None
        rounds = min(max(int(budget / len(calls) / one), 3), 15)
    return {side: values[1:] for side, values in taken.items()}


def row(
    work: str, context: int, slow: list[float], fast: list[float], bound: float
) -> dict[str, Any]:
    """One line of the table: how many times faster, beside the bound."""
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    ratio = statistics.median(ratios)
    taken = {"peer": statistics.median(slow), "cepe": statistics.median(fast)}
    return {"work": work, "tokens": context, "seconds": taken, "ratio": ratio, "ratios": ratios,
            "bound": bound, "of_bound": ratio / bound}  # fmt: skip


def compare(
    name: str, shapes: Shapes, context: int, budget: float, device: torch.device
) -> Iterator[dict[str, Any]]:
    """The rows of one length: against both forms of full attention, then a decoded token."""
    cepe, alone = build(shapes, device, False), build(shapes, device, True)
    tokens = torch.randint(0, shapes.vocabulary, (1, context + shapes.rows), device=device)
    calls: dict[str, Callable[[], Any]] = {
        side: (lambda side=side: score(cepe if side == "cepe" else alone, side, tokens, shapes))
        for side in SIDES
    }
    taken = in_turn(calls, budget, device)
    if taken is not None:
        bound = flops(shapes, "full", context) / flops(shapes, "cepe", context)
        peaks = {
            side: peak(side, shapes, context, device)
            if device.type == "cuda"
            else apart(__file__, side, context, "--shapes", name)
            for side in SIDES
        }
        for side, words in (("full", "over full attention"), ("full_wasteful", "over the paper's")):
            line = row(words, context, taken[side], taken["cepe"], bound)
            yield line | {"memory_bytes": {s: peaks[s] for s in (side, "cepe")},
                          "memory_ratio": peaks[side] / peaks["cepe"]}  # fmt: skip
    yield decoding(cepe, shapes, tokens, budget, device)


@torch.no_grad()
def decoding(
    cepe: Any, shapes: Shapes, tokens: Tensor, budget: float, device: torch.device
) -> dict[str, Any]:
    """Cross-attention of all layers for one decoded token: absorbed against projected again."""
    context = tokens.shape[1] - shapes.rows
    states = cepe.encode(tokens[:, : -shapes.rows].reshape(1, -1, shapes.chunk)).states
    layers = [layer.cross_attn for layer in cepe.get_decoder().layers]
    hidden, width = shapes.decoder[0], shapes.encoder[0]
    heads, inner = layers[0].heads, layers[0].inner
    query = torch.randn(1, heads, 1, hidden // heads, device=device, dtype=states.dtype)
    calls: dict[str, Callable[[], Any]] = {
        "projected": lambda: [x.projected(query, states, None) for x in layers],
        "absorbed": lambda: [x.absorbed(query, states, None) for x in layers],
    }
    taken = in_turn(calls, budget / 4, device)
    assert taken is not None, "one token takes seconds at most"
    projected = 4 * context * width * inner + 4 * context * hidden
    absorbed = 4 * context * heads * width + 4 * width * hidden
    return row("decoding over re-projection", context, taken["projected"], taken["absorbed"],
               projected / absorbed)  # fmt: skip


def main() -> None:
    """Measures and prints; with --write keeps the JSON under benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="to spend on a row's rounds")
    parser.add_argument("--shapes", choices=CPU, default="small", help="on CPU")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens, in place of the device's")
    parser.add_argument("--write", action="store_true", help="keep the JSON")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)  # of one side: `peak` asks
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = CUDA if device.type == "cuda" else CPU[options.shapes]
    torch.set_num_threads(1)
    if options.peak:
        print(peak(options.peak[0], shapes, int(options.peak[1]), torch.device("cpu")))
        return
    rows = []
    for context in options.lengths or shapes.lengths:
        for line in compare(options.shapes, shapes, context, options.seconds, device):
            print(json.dumps({k: v for k, v in line.items() if k != "ratios"}), flush=True)
            rows.append(line)
    if not options.write:
        return
    about = (
        f"decoder {shapes.decoder[0]} wide, {shapes.decoder[1]} layers; encoder "
        f"{shapes.encoder[0]} wide, {shapes.encoder[1]} layers; {shapes.rows:,} scored tokens, "
        f"contexts of {shapes.chunk}; {shapes.dtype}."
    )
    claim = "CEPE over full attention on the same text"
    facts = {"claim": claim, "about": about, "rows": rows, "targets": shapes.targets}
    keep("cepe_smollm2" if shapes is CPU["smollm2"] else "cepe", device, facts)


if __name__ == "__main__":
    main()
