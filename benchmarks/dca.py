"""Claim: Dual Chunk Attention costs what plain attention costs, in time and in memory.

`DualChunk` and `F.scaled_dot_product_attention(is_causal=True)` run in turn in one process on the
same tensors, forward, and forward with backward. Prints the median of the ratios of neighbouring
calls, and beside each time what the arithmetic alone would take at this process's matmul peak. On
CPU one thread and its own CPU seconds, which other processes do not add to; memory is the resident
peak of fresh processes that hand back what they free. With a GPU the shapes are Llama-2-7B's.

    python benchmarks/dca.py [--seconds 40] [--lengths 2048 4096] [--write]
"""

import argparse
import json
import statistics
import sys
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.attention import SDPBackend  # noqa: E402

from benchmarks.measuring import apart, growth, keep, seconds  # noqa: E402
from longctx.attention.dca import DualChunk  # noqa: E402
from longctx.train.meter import peak_flops  # noqa: E402

PASSES = {"forward": 2, "forward and backward": 7}  # matrix products of a causal half each
SIDES = ("dca", "sdpa")
LONGEST = 30.0  # seconds that one call may take


@dataclass(frozen=True)
class Shapes:
    """What is measured on a device.

    Args:
        heads: query heads, as many key heads.
        dim: d.
        window: L of the model, which DCA's numbers follow from (preset `paper`).
        dtype: of the tensors.
        lengths: tokens.
        target: for the ratio of times, from 8,192 tokens on.
    """

    heads: int
    dim: int
    window: int
    dtype: str
    lengths: tuple[int, ...]
    target: float


CPU = Shapes(8, 64, 2048, "float32", (2048, 4096, 8192, 16384, 32768), 1.15)
CUDA = Shapes(32, 128, 4096, "bfloat16", (4096, 8192, 16384, 32768, 65536, 131072), 1.05)
MEMORY_TARGET = 1.05


def inputs(shapes: Shapes, length: int, device: torch.device, grad: bool) -> list[Tensor]:
    """Query, key, value `[1 h n d]` laid out as a model's projections lay them out."""
    generator = torch.Generator(device).manual_seed(0)
    size, dtype = (1, length, shapes.heads, shapes.dim), getattr(torch, shapes.dtype)
    made = [
        torch.randn(size, generator=generator, device=device, dtype=dtype).transpose(1, 2)
        for _ in range(3)
    ]
    return [x.requires_grad_(grad) for x in made]


def calls(shapes: Shapes, device: torch.device) -> dict[str, Callable[..., Any]]:
    """By side: a call on query, key and value, with a backward pass if they want gradients."""
    method = DualChunk().for_window(shapes.window)
    inv_freq = 10000.0 ** -(torch.arange(0, shapes.dim, 2, device=device) / shapes.dim)
    layer = nn.Module()
    layer.layer_idx = 0  # type: ignore[assignment]
    rotary = types.SimpleNamespace(inv_freq=inv_freq)

    def dca(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        positions = torch.arange(q.shape[2], device=device)[None]
        return method.attend(layer, q, k, v, None, position_ids=positions, rotary=rotary)[0]

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def run(side: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Any:
        out = side(q, k, v)
        if not q.requires_grad:
            return out
        return torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    return {side.__name__: lambda *x, side=side: run(side, *x) for side in (dca, sdpa)}


def peak(side: str, shapes: Shapes, length: int, grad: bool, device: torch.device) -> int:
    """Bytes by which memory peaks above what the inputs hold, during one call."""
    call = calls(shapes, device)[side]
    call(*inputs(shapes, 64, device, grad))  # what is loaded once
    given = inputs(shapes, length, device, grad)
    return growth(lambda: call(*given), device)


def memory(shapes: Shapes, length: int, grad: bool, device: torch.device) -> dict[str, Any]:
    """Peaks of both sides, bytes; on CPU each in a process of its own."""
    found = {
        side: peak(side, shapes, length, grad, device)
        if device.type == "cuda"
        else apart(__file__, side, length, int(grad))
        for side in SIDES
    }
    held = 3 * length * shapes.heads * shapes.dim * getattr(torch, shapes.dtype).itemsize
    ratio = (held + found["dca"]) / (held + found["sdpa"])
    return {"inputs_bytes": held, "growth_bytes": found, "memory_ratio": ratio}


def compare(
    shapes: Shapes, length: int, name: str, budget: float, device: torch.device
) -> dict[str, Any] | None:
    """One row of the table; None if a call takes longer than `LONGEST`.

    Args:
        shapes: what is measured.
        length: tokens.
        name: of the pass.
        budget: seconds to spend on the rounds, of which there are 3 to 25.
        device: where.
    """
    grad = name != "forward"
    sides, given = calls(shapes, device), inputs(shapes, length, device, grad)
    taken: dict[str, list[float]] = {side: [] for side in SIDES}
    flops = PASSES[name] * 2 * shapes.heads * shapes.dim * length * (length + 1) / 2
    if flops / peak_flops(device) > LONGEST:
        return None
    rounds = 1
    while len(taken["sdpa"]) < rounds + 1:
        for side in SIDES:
            taken[side].append(seconds(lambda call=sides[side]: call(*given), device))
        one = max(taken[side][-1] for side in SIDES)
        if one > LONGEST:
            return None
        rounds = min(max(int(budget / 2 / one), 3), 25)
    taken = {side: values[1:] for side, values in taken.items()}  # the first is a warm-up
    pairs = sorted(a / b for a, b in zip(taken["dca"], taken["sdpa"], strict=True))
    return {
        "length": length,
        "pass": name,
        "sdpa_backend": SDPBackend(torch._fused_sdp_choice(*given, is_causal=True)).name,
        "seconds": {side: statistics.median(values) for side, values in taken.items()},
        "ratio": statistics.median(pairs),
        "ratios": pairs,
        "arithmetic_bound_seconds": flops / peak_flops(device),
        **memory(shapes, length, grad, device),
    }


def main() -> None:
    """Measures and prints; with --write keeps the JSON under benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=40.0, help="to spend on a row's rounds")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens, in place of the device's")
    parser.add_argument("--write", action="store_true", help="keep the JSON")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)  # of one side: `memory` asks
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = CUDA if device.type == "cuda" else CPU
    torch.set_num_threads(1)
    if options.peak:
        side, length, grad = options.peak
        print(peak(side, shapes, int(length), bool(int(grad)), torch.device("cpu")))
        return
    rows = []
    for name in PASSES:
        for length in options.lengths or shapes.lengths:
            row = compare(shapes, length, name, options.seconds, device)
            if row is not None:
                print(json.dumps({k: v for k, v in row.items() if k != "ratios"}), flush=True)
                rows.append(row)
    if options.write:
        about = {
            "claim": "Dual Chunk Attention over scaled_dot_product_attention",
            "target": shapes.target,
            "memory_target": MEMORY_TARGET,
            "shapes": asdict(shapes),
            "numbers": asdict(DualChunk().for_window(shapes.window)),
            "peak_flops": peak_flops(device),
        }
        keep("dca", device, {**about, "rows": rows})


if __name__ == "__main__":
    main()
