"""What a length costs: time of a prefill and of a decoded token, peak memory, bytes of the cache.

Prompts are random tokens of the vocabulary, since no kernel's time depends on the values. The
whole prompt goes through in one pass into the model's own cache, and logits are made of its last
token alone. A model with an encoder reads what its decoder does not as contexts; that reading is
part of the prefill, and the encoded states count as cache. Costs 1 + `repetitions` prefills a
length, each with some decoding steps; the first rank does it alone.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
from torch import Tensor

from longctx.config.typed import positive
from longctx.errors import UserError
from longctx.eval.evaluation import Evaluation
from longctx.eval.figures import legend, length_axis, look, new_row, save
from longctx.eval.headline import Column, cells_of, certain, count, shared
from longctx.eval.results import Results, result_of
from longctx.eval.score import context_window, device_of, evaluating, has_encoder
from longctx.eval.subject import Subject, device_name
from longctx.eval.tables import image, table
from longctx.eval.task import Found, Task, TaskResult
from longctx.models.device import device_for, dtype_for

MIB = 2**20


@dataclass(frozen=True)
class Efficiency(Task):
    """Time and memory of a prefill and of decoding, by length.

    Args:
        batch: rows of a prompt.
        new_tokens: tokens decoded, and timed, behind each prompt.
        repetitions: timed passes a length, after one that is not; medians are reported.
        decoder_tokens: of a model with an encoder, tokens that its decoder reads; it reads the rest
            of a length as contexts. None: the decoder's window.
        context_tokens: of each context. None: the encoder's window.
    """

    place: ClassVar[int] = 120
    by_length: ClassVar[bool] = True
    compared_by: ClassVar[tuple[str, ...]] = ("device_name", "dtype")

    batch: int = 1
    new_tokens: int = 8
    repetitions: int = 3
    decoder_tokens: int | None = None
    context_tokens: int | None = None

    def __post_init__(self) -> None:
        for key in ("batch", "new_tokens", "repetitions"):
            positive(getattr(self, key), f"efficiency.{key}")
        for key in ("decoder_tokens", "context_tokens"):
            if (value := getattr(self, key)) is not None:
                positive(value, f"efficiency.{key}")

    def inputs(self, cfg: Evaluation) -> dict[str, Any]:
        """The device, the type and torch."""
        device = device_for(cfg.device)
        named = device_name(torch.device(device))
        return {"device": named, "dtype": dtype_for(cfg.dtype, device), "torch": torch.__version__}

    def run(self, cfg: Evaluation, subject: Subject) -> TaskResult:
        """A row a length, shortest first; no records."""
        model = subject.model
        with evaluating(model):
            rows = subject.journal.each(
                self.name,
                sorted(set(cfg.lengths)),
                lambda length: measure(model, self, length, cfg.seed),
                unit="length",
                alone=True,
            )
        kernel = str(model.config._attn_implementation)
        return {"kernel": kernel, **self.inputs(cfg), "rows": rows}, []

    @classmethod
    def section(cls, found: Found, out: Path) -> Iterator[str]:
        """A row a model and length."""
        yield from ("## Efficiency", "")
        yield (
            "One prompt of random tokens in one pass into the model's own cache, logits of the "
            "last token only, then decoding a token at a time; seconds on the wall, medians over "
            "repetitions [fastest, slowest]. Peak: growth of memory above the weights in the first "
            "prefill and decoding step (of the process on a CPU, of the allocator on a GPU); "
            "cache: what the next token needs besides the weights, an encoder's states included."
        )
        yield ""
        for model, result in found:
            own = model["tasks"][cls.name]["settings"]
            yield (
                f"- {model['label']}: {result['device']}, {result['dtype']}, torch "
                f"{result['torch']}, kernel `{result['kernel']}`, batch {own['batch']}, "
                f"{own['repetitions']} repetitions of {own['new_tokens']} new tokens"
            )
        yield ""
        rows = [[m["label"], *_cells(row)] for m, r in found for row in r["rows"]]
        head = ["model", "prompt, tokens", "of them encoded", "prefill, s", "tokens/s"]
        yield from table([*head, "decode, ms a token", "peak, MiB", "cache, MiB"], rows)
        figure = efficiency_figure([m for m, _ in found], out / "efficiency.png")
        yield from image("Time and cache by prompt length", figure)

    @classmethod
    def columns(cls, models: Sequence[Results]) -> Iterator[Column]:
        """Speed and cache at the longest length; times have no interval."""
        rows = [{r["length"]: r for r in cells_of(m, cls.name, "rows")} for m in models]
        for length in shared(rows)[-1:]:
            at = [r.get(length, {}) for r in rows]
            speed = certain([r.get("prefill_tokens_per_second") for r in at])
            yield Column(f"prefill at {length:,}, tokens/s", speed, count, ranked=False)
            decode, title = certain([r.get("decode_seconds") for r in at]), "decode, ms a token"
            yield Column(title, decode, lambda v: f"{1000 * v:.1f}", rising=False, ranked=False)
            cache = certain([r.get("cache_bytes") for r in at])
            yield Column("cache, MiB", cache, lambda v: f"{v / MIB:,.1f}", rising=False)


@dataclass(frozen=True)
class Prompt:
    """What is read before the first new token.

    Args:
        tokens: `[b s]` of the decoder.
        contexts: `[b c l]` of the encoder; None: there is none, or nothing is left for it.
    """

    tokens: Tensor
    contexts: Tensor | None


def prompt_of(model: Any, own: Efficiency, length: int, seed: int) -> Prompt:
    """Random tokens of a length.

    Raises:
        UserError: if an encoder cannot read what its decoder leaves.
    """
    vocabulary, device = model.config.vocab_size, device_of(model)
    inside = length
    if has_encoder(model):
        inside = min(length, own.decoder_tokens or model.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(seed)
    # The last id may be an encoder's mask token, which no text holds.
    ids = torch.randint(vocabulary - 1, (own.batch, length), generator=generator).to(device)
    if inside == length:
        return Prompt(ids, None)
    size = own.context_tokens or context_window(model) or 1
    if (length - inside) % size:
        raise UserError(
            f"efficiency: lengths={length} is {inside} tokens of the decoder and {length - inside} "
            f"of contexts, not a multiple of efficiency.context_tokens={size}"
        )
    before = ids[:, : length - inside]
    return Prompt(ids[:, length - inside :], before.view(own.batch, -1, size))


class Reading:
    """A model in the middle of a text: its cache, and what its encoder has read.

    Args:
        model: a decoder with `get_decoder()` and `get_output_embeddings()`.
        prompt: read at once.
    """

    def __init__(self, model: Any, prompt: Prompt) -> None:
        self.model, self.cache = model, None
        self.contexts = None if prompt.contexts is None else model.encode(prompt.contexts)
        self.last = self.feed(prompt.tokens)

    def feed(self, tokens: Tensor) -> Tensor:
        """Reads `[b s]`; the most likely token behind them, `[b 1]`."""
        named = {} if self.contexts is None else self.contexts.named()
        out = self.model.get_decoder()(
            input_ids=tokens, past_key_values=self.cache, use_cache=True, **named
        )
        self.cache = out.past_key_values
        logits: Tensor = self.model.get_output_embeddings()(out.last_hidden_state[:, -1:])
        return logits.argmax(-1)

    def decode(self) -> None:
        """One more token."""
        self.last = self.feed(self.last)

    def held_bytes(self) -> int:
        """Bytes of all tensors that the next token needs besides the weights."""
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                    for t in _tensors((self.cache, self.contexts), set())}.values())  # fmt: skip


def _tensors(found: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor in an object, its parts, and theirs."""
    if id(found) in seen:
        return
    seen.add(id(found))
    if isinstance(found, Tensor):
        yield found
        return
    if isinstance(found, dict):
        parts: Any = found.values()
    elif isinstance(found, list | tuple):
        parts = found
    else:
        parts = getattr(found, "__dict__", {}).values()
    for part in parts:
        if not isinstance(part, torch.nn.Module | type | str | int | float):
            yield from _tensors(part, seen)


def _seconds(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds on the wall of one call, and what it returned."""
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    made = call()
    if gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin, made


def _growth(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes by which memory peaks in a call above what was held; None where nothing reports it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return int(torch.cuda.max_memory_allocated(device) - before)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the process's peak starts anew
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except OSError:
        call()
        return None


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) * 1024


def measure(model: Any, own: Efficiency, length: int, seed: int) -> dict[str, Any]:
    """The row of a length.

    Args:
        model: see `Reading`. Call it inside `longctx.eval.score.evaluating`.
        own: rows, new tokens, repetitions.
        length: of the prompt, tokens.
        seed: of the prompt.

    Raises:
        UserError: if an encoder cannot read what its decoder leaves.
    """
    prompt, device = prompt_of(model, own, length, seed), device_of(model)
    peak = _growth(lambda: Reading(model, prompt).decode(), device)
    prefills, steps = [], []
    for _ in range(own.repetitions):
        seconds, reading = _seconds(lambda: Reading(model, prompt), device)
        prefills.append(seconds)
        held = reading.held_bytes()
        steps += [_seconds(reading.decode, device)[0] for _ in range(own.new_tokens)]
        del reading  # its cache goes before the next one is made
    prefill = median(prefills)
    return {
        "length": length,
        "encoded": 0 if prompt.contexts is None else prompt.contexts[0].numel(),
        "prefill_seconds": prefill,
        "prefill_range": [min(prefills), max(prefills)],
        "prefill_tokens_per_second": own.batch * length / prefill,
        "decode_seconds": median(steps),
        "decode_range": [min(steps), max(steps)],
        "peak_bytes": peak,
        "cache_bytes": held,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    fast, slow = row["prefill_range"]
    quick, late = (1000 * x for x in row["decode_range"])
    peak = row["peak_bytes"]
    return [
        f"{row['length']:,}",
        f"{row['encoded']:,}",
        f"{row['prefill_seconds']:.3f} [{fast:.3f}, {slow:.3f}]",
        f"{row['prefill_tokens_per_second']:,.0f}",
        f"{1000 * row['decode_seconds']:.2f} [{quick:.2f}, {late:.2f}]",
        "unknown" if peak is None else f"{peak / MIB:,.1f}",
        f"{row['cache_bytes'] / MIB:,.2f}",
    ]


def efficiency_figure(models: Sequence[Results], path: Path) -> str:
    """Prefill time, time of a decoded token and cache against the prompt's length.

    Args:
        models: contents of `results.json` that hold the task.
        path: PNG to write.

    Returns:
        The file's name.
    """
    figure, row = new_row(9.6, 3.6, 3)
    shown = (
        ("prefill_seconds", "prefill, s", 1.0),
        ("decode_seconds", "decode, ms a token", 1e3),
        ("cache_bytes", "cache, MiB", 2**-20),
    )
    for axes, (key, name, factor) in zip(row, shown, strict=True):
        for i, model in enumerate(models):
            rows = (result_of(model, "efficiency") or {})["rows"]
            axes.plot(
                [r["length"] for r in rows],
                [factor * r[key] for r in rows],
                label=model["label"],
                **look(model, i),
                markersize=4,
            )
        lengths = {r["length"] for m in models for r in (result_of(m, "efficiency") or {})["rows"]}
        length_axis(axes, sorted(lengths), "prompt, tokens")
        axes.set_ylim(0, 1.08 * axes.dataLim.y1 or 1)
        axes.set_title(name, fontsize=10)
    legend(figure)
    return save(figure, path)
