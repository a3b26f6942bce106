"""Continues a text of any length; its settings are in `longctx/config/generate.py`.

Costs one prefill of the prompt, in pieces (`longctx/models/decode.py`), and its cache.
"""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from longctx.config import RopeConfig
from longctx.config.generate import GenerateConfig
from longctx.errors import UserError


@dataclass(frozen=True)
class Spent:
    """What a continuation took.

    Args:
        window: tokens the model claims to take.
        prompt_tokens: of the prompt, BOS included.
        new_tokens: written, an end-of-sequence token included.
        prefill_seconds: until the first new token.
        decode_seconds: from there to the end.
        peak_bytes: most ever allocated on the GPU, or most ever resident on CPU.
        context_tokens: that the encoder has read, before the prefill.
        context_seconds: it took.
    """

    window: int
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    peak_bytes: int
    context_tokens: int = 0
    context_seconds: float = 0.0

    def lines(self) -> list[str]:
        """For people."""
        speed = self.prompt_tokens / self.prefill_seconds
        prefill = f"{self.prompt_tokens:,} tokens in {self.prefill_seconds:.2f} s, {speed:,.1f}"
        later, decoding = self.new_tokens - 1, "one token"  # the first comes out of the prefill
        if later:
            decoding = f"{later:,} tokens after the first in {self.decode_seconds:.2f} s"
            decoding += f", {later / self.decode_seconds:,.1f} tokens/s"
        read = f"contexts: {self.context_tokens:,} tokens in {self.context_seconds:.2f} s"
        return [
            *([read] if self.context_tokens else []),
            f"prefill: {prefill} tokens/s (the model's window: {self.window:,})",
            f"decoding: {decoding}",
            f"peak memory: {self.peak_bytes / 2**30:.2f} GiB",
        ]


def read_prompt(cfg: GenerateConfig) -> str:
    """The text to continue: prompt or file, then the question on a line of its own.

    Raises:
        UserError: if the file cannot be read, or there is no text.
    """
    text = cfg.prompt
    if text is None:
        text = _read("prompt_file", cfg.prompt_file or "")
    if not text.strip():
        source = "prompt=" if cfg.prompt_file is None else f"prompt_file={cfg.prompt_file}"
        raise UserError(f"{source} is empty: there is nothing to continue")
    return text if cfg.question is None else f"{text}\n{cfg.question}"


def _read(key: str, path: str) -> str:
    """The text of a file; `key` names the setting that asked for it."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{key}={path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = f"{key}={path} is not UTF-8 text: {error.reason}"
        raise UserError(f"{line} at byte {error.start}") from error


def read_contexts(cfg: GenerateConfig, tokenizer: Any) -> tuple[Tensor, Tensor] | None:
    """Tokens of the context files and which of them are real, both `[1 c l]`; None: no files.

    Each file is cut into pieces of `context_tokens`; its last one is padded.

    Raises:
        UserError: if a file cannot be read, or holds no text.
    """
    rows: list[list[int]] = []
    for path in cfg.context_files:
        ids = tokenizer(_read("context_files", path), add_special_tokens=False, verbose=False)
        found = list(ids["input_ids"])
        if not found:
            raise UserError(f"context_files={path} is empty: there is nothing to read")
        rows += [
            found[i : i + cfg.context_tokens] for i in range(0, len(found), cfg.context_tokens)
        ]
    if not rows:
        return None
    longest = max(map(len, rows))
    padded = [row + [0] * (longest - len(row)) for row in rows]
    real = [[True] * len(row) + [False] * (longest - len(row)) for row in rows]
    return torch.tensor([padded]), torch.tensor([real])


def generate(cfg: GenerateConfig, write: Callable[[str], None]) -> Spent:
    """Streams the continuation; a bar on stderr shows the prefill.

    Args:
        cfg: what to continue, and how.
        write: takes the next piece of text.

    Returns:
        What it took.

    Raises:
        UserError: if the prompt or the model cannot be used as asked.
    """
    from longctx.models.configure import native_window
    from longctx.models.decode import Stream, continue_tokens
    from longctx.models.device import device_for, dtype_for
    from longctx.models.load import load_model, load_tokenizer

    text, device, path = read_prompt(cfg), device_for(cfg.device), cfg.model.path or ""
    tokenizer = load_tokenizer(cfg.model.tokenizer or path)
    ids, given = _tokens(tokenizer, text), read_contexts(cfg, tokenizer)
    rope = _scaling(cfg.rope, len(ids) + cfg.max_new_tokens)
    model = load_model(path, cfg.attention, rope, dtype_for(cfg.dtype, device), device).eval()
    torch.manual_seed(cfg.seed)
    contexts, read, reading = _encoded(cfg, model, given, device)
    begin, first = time.perf_counter(), 0.0
    with tqdm(total=len(ids), desc="prefill", unit="token", disable=None) as bar:

        def first_token() -> None:
            nonlocal first
            first = time.perf_counter()
            bar.update(len(ids) - bar.n)
            bar.close()

        def decode(tokens: list[int]) -> str:
            return str(tokenizer.decode(tokens, skip_special_tokens=True))

        stream = Stream(decode, write, first_token)
        continue_tokens(
            model,
            torch.tensor([ids], device=device),
            cfg.prefill_tokens,
            stream,
            bar.update,
            contexts,
            max_new_tokens=cfg.max_new_tokens,
            pad_token_id=_padding(tokenizer),
            **_sampling(cfg),
        )
    return Spent(
        native_window(model.config),
        len(ids),
        len(stream.tokens),
        first - begin,
        time.perf_counter() - first,
        _peak_memory(device),
        read,
        reading,
    )


@torch.no_grad()
def _encoded(
    cfg: GenerateConfig, model: Any, given: tuple[Tensor, Tensor] | None, device: str
) -> tuple[Any, int, float]:
    """What the model's encoder makes of the contexts, their tokens, and the seconds it took.

    Raises:
        UserError: if it has no encoder, or that one reads fewer tokens at a time.
    """
    if given is None:
        return None, 0, 0.0
    path, begin = cfg.model.path, time.perf_counter()
    if not hasattr(model, "encode"):
        raise UserError(f"model={path} has no encoder for context_files: put them into the prompt")
    window = model.config.encoder_config.max_position_embeddings
    if given[0].shape[2] > window:
        raise UserError(
            f"context_tokens={cfg.context_tokens}, and the encoder of {path} reads {window} at a "
            "time: lower it"
        )
    contexts = model.encode(*(x.to(device) for x in given))
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return contexts, int(given[1].sum()), time.perf_counter() - begin


def _tokens(tokenizer: Any, text: str) -> list[int]:
    """The prompt's tokens; a BOS before them where the tokenizer has one."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return list(ids) if bos is None else [bos, *ids]


def _scaling(rope: RopeConfig, tokens: int) -> RopeConfig | None:
    """The rotary scaling to load with; None: as recorded in the checkpoint."""
    if rope.name == "none":
        return None
    open_end = rope.factor is None and rope.target is None
    return replace(rope, target=tokens) if open_end else rope


def _sampling(cfg: GenerateConfig) -> dict[str, Any]:
    """Arguments of `generate()`; those given here replace what the checkpoint recommends."""
    if not cfg.temperature:
        return {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}  # its defaults
    chosen = {"temperature": cfg.temperature, "top_p": cfg.top_p}
    return {"do_sample": True, "top_k": 0, **chosen}  # 0: off


def _padding(tokenizer: Any) -> int:
    """Any token: one row needs no padding, but `generate()` wants to know one."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in known if token is not None))


def _peak_memory(device: str) -> int:
    """Bytes: most ever allocated on the GPU, or most ever resident on CPU."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
