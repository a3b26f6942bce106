"""Claim: LongGen trains, prefills and decodes faster than full attention, with a smaller cache.

The same random model with full attention in every layer, and with the middle third of them full
and the others sparse (`longgen_window`, `longgen_blocks`), in turn in one process: a training step
(forward and backward), a prefill into a cache, and decoding at a filled cache. Prints the median of
the ratios of neighbouring calls, beside it what the arithmetic allows (FLOPs; decoding: bytes),
and their quotient; and the bytes that the caches hold, beside the formula. On CPU a narrow model,
one thread and its own CPU seconds, which other processes do not add to; with a GPU the layers
are Llama-2-7B's.

    python benchmarks/longgen.py [--seconds 60] [--lengths 2048 4096] [--write]
"""

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.measuring import keep, seconds  # noqa: E402
from longctx.attention.method import EvictingMethod  # noqa: E402
from longctx.models.evicting_cache import cache_bytes  # noqa: E402
from longctx.models.export.restore import recorded  # noqa: E402
from longctx.models.load import build_model  # noqa: E402

DECODED = 16  # tokens that one timed call decodes
LONGEST = 60.0  # seconds that one call may take
Call = Callable[[], Any]


@dataclass(frozen=True)
class Shapes:
    """What is measured on a device.

    Args:
        layers: of the model; a third of them is full.
        heads: query heads, as many key heads.
        dim: d.
        ffn: hidden size of the feed-forward layers.
        dtype: of the weights.
        checkpointing: recompute each layer in the backward pass.
        lengths: tokens.
        kept: tokens that a sparse layer keeps.
        targets: of the ratios at the longest length.
    """

    layers: int
    heads: int
    dim: int
    ffn: int
    dtype: str
    checkpointing: bool
    lengths: tuple[int, ...]
    kept: int
    targets: dict[str, float]


# Kept: 1/64 of the longest context, as in the paper.
CPU = Shapes(
    6, 2, 64, 256, "float32", False, (2048, 4096, 8192, 16384), 256, {"training step": 2.2}
)
CUDA = Shapes(
    6, 32, 128, 11008, "bfloat16", True, (32768, 65536, 131072), 2048,
    {"training step": 1.6, "prefill": 1.67, "decode": 1.41},
)  # fmt: skip


def attentions(shapes: Shapes) -> dict[str, dict[str, Any]]:
    """By side: the attention, both sparse ones at the same number of kept tokens."""
    sinks, block, longest = 64, 64, max(shapes.lengths)
    local = shapes.kept // 2 // block
    stride = longest // (shapes.kept - local * block)
    return {
        "full": {"name": "full"},
        "longgen_window": {
            "name": "longgen_window",
            "sink_tokens": sinks,
            "window_tokens": shapes.kept - sinks,
        },
        "longgen_blocks": {
            "name": "longgen_blocks",
            "block_size": block,
            "local_blocks": local,
            "stride": stride,
        },
    }


def model_of(shapes: Shapes, attention: dict[str, Any], device: torch.device) -> Any:
    """The decoder with random weights, the same for every attention."""
    hidden = shapes.heads * shapes.dim
    architecture = {
        "model_type": "llama", "vocab_size": 256, "hidden_size": hidden,
        "intermediate_size": shapes.ffn, "num_hidden_layers": shapes.layers,
        "num_attention_heads": shapes.heads, "num_key_value_heads": shapes.heads,
        "head_dim": shapes.dim, "max_position_embeddings": max(shapes.lengths) + DECODED,
    }  # fmt: skip
    model = build_model(architecture, attention, dtype=getattr(torch, shapes.dtype)).to(device)
    if shapes.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def flops(shapes: Shapes, model: Any, length: int, training: bool) -> float:
    """Of one pass. Matrix products: a weight 1 forward and 2 backward, a score 2 and 5."""
    hidden = shapes.heads * shapes.dim
    weights = 4 * hidden**2 + 3 * hidden * shapes.ffn
    again = 1 if shapes.checkpointing else 0
    linear, scores = (3 + again, 7 + 2 * again) if training else (1, 2)
    attended = recorded(model.config).pairs(torch.arange(length), shapes.layers) * 2 * hidden
    return float(linear * 2 * length * weights * shapes.layers + scores * attended)


def bytes_read(model: Any, length: int) -> float:
    """Moved by one decoded token: every weight but the embedding table, and the cache.

    Transformers' caches, and that of the strided blocks, copy themselves for each token: read,
    written and read again, three times their size. The window's ring is read once.
    """
    table = model.get_input_embeddings().weight.numel()
    weights = (sum(p.numel() for p in model.parameters()) - table) * model.dtype.itemsize
    config, method = model.config, recorded(model.config)
    ring = isinstance(method, EvictingMethod) and method.ring() is not None
    token = 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    moved = 0
    for layer in range(config.num_hidden_layers):
        once = ring and not method.is_full(layer)
        moved += token * method.cache_tokens(length, layer) * (1 if once else 3)
    return float(weights + moved)


def held(model: Any, length: int) -> int:
    """Bytes of the cache after `length` tokens, by the formula."""
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    sizes = layers, heads, model.config.head_dim, length, int(model.dtype.itemsize)
    return recorded(model.config).cache_bytes(*sizes)


def training_step(model: Any, tokens: torch.Tensor) -> None:
    """Forward and backward through the decoder; the loss is a sum, so that no head is measured."""
    model.train()
    model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state.sum().backward()
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def prefill(model: Any, tokens: torch.Tensor) -> Any:
    """The filled cache."""
    model.eval()
    return model.get_decoder()(input_ids=tokens, use_cache=True).past_key_values


@torch.no_grad()
def decode(model: Any, token: torch.Tensor, cache: Any) -> None:
    """`DECODED` tokens, one at a time."""
    for _ in range(DECODED):
        model.get_decoder()(input_ids=token, past_key_values=cache, use_cache=True)


def measured(
    calls: dict[str, Callable[[], Call]], budget: float, device: torch.device
) -> dict[str, list[float]] | None:
    """Seconds of each side, in turn; None if a call takes longer than `LONGEST`.

    Args:
        calls: by side, what makes ready (not timed) and gives the call.
        budget: seconds to spend.
        device: where.
    """
    taken: dict[str, list[float]] = {side: [] for side in calls}
    rounds = 1
    while len(taken["full"]) < rounds + 1:
        for side, call in calls.items():
            taken[side].append(seconds(call(), device))
        one = max(values[-1] for values in taken.values())
        if one > LONGEST:
            return None
        rounds = min(max(int(budget / len(calls) / one), 3), 15)
    return {side: values[1:] for side, values in taken.items()}  # the first is a warm-up


def compare(
    shapes: Shapes, length: int, budget: float, device: torch.device
) -> Iterator[dict[str, Any]]:
    """The rows of one length: training step, prefill, decode; cache bytes beside the last."""
    models = {side: model_of(shapes, a, device) for side, a in attentions(shapes).items()}
    tokens = torch.randint(0, 256, (1, length), device=device)
    caches = {side: prefill(model, tokens) for side, model in models.items()}
    sizes = {side: cache_bytes(cache) for side, cache in caches.items()}
    works: dict[str, tuple[Callable[[str], Call], Callable[[Any], float]]] = {
        "training step": (
            lambda side: partial(training_step, models[side], tokens),
            lambda model: flops(shapes, model, length, True),
        ),
        "prefill": (
            lambda side: partial(prefill, models[side], tokens),
            lambda model: flops(shapes, model, length, False),
        ),
        "decode": (
            lambda side: partial(decode, models[side], tokens[:, :1], copy.deepcopy(caches[side])),
            lambda model: bytes_read(model, length),
        ),
    }
    for name, (work, cost) in works.items():
        calls = {side: (lambda work=work, side=side: work(side)) for side in models}
        taken = measured(calls, budget, device)
        if taken is None:
            yield {"length": length, "work": name, "skipped": f"over {LONGEST:g} s a call"}
            continue
        for side in list(models)[1:]:
            ratios = sorted(a / b for a, b in zip(taken["full"], taken[side], strict=True))
            ratio, bound = statistics.median(ratios), cost(models["full"]) / cost(models[side])
            yield {
                "length": length, "work": name, "side": side,
                "seconds": {s: statistics.median(taken[s]) for s in ("full", side)},
                "ratio": ratio, "bound": bound, "of_bound": ratio / bound, "ratios": ratios,
                "cache_bytes": {s: sizes[s] for s in ("full", side)},
                "formula_bytes": {s: held(models[s], length) for s in ("full", side)},
            }  # fmt: skip


def main() -> None:
    """Measures and prints; with --write keeps the JSON under benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="to spend on a row's rounds")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens, in place of the device's")
    parser.add_argument("--write", action="store_true", help="keep the JSON")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = CUDA if device.type == "cuda" else CPU
    torch.set_num_threads(1)
    rows = []
    for length in options.lengths or shapes.lengths:
        for row in compare(shapes, length, options.seconds, device):
            print(json.dumps({k: v for k, v in row.items() if k != "ratios"}), flush=True)
            rows.append(row)
    if options.write:
        claim = "LongGen over full attention in every layer"
        about = {"shapes": asdict(shapes), "attentions": attentions(shapes)}
        keep("longgen", device, {"claim": claim, **about, "rows": rows})


if __name__ == "__main__":
    main()
