"""The model under test and its tokenizer, loaded when the first task needs them.

Costs nothing until then, and one reading of the weights after.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from longctx.data.store import Store, tokenizer_sha256
from longctx.eval.config import EvalConfig
from longctx.models.load import load_model, load_tokenizer, local_tokenizer
from longctx.models.place import device_for, dtype_for

Sample = dict[str, Any]
TaskResult = tuple[dict[str, Any], list[Sample]]


@dataclass(frozen=True)
class Subject:
    """The model under test, loaded on first use."""

    cfg: EvalConfig

    @cached_property
    def model(self) -> Any:
        """The loaded model."""
        cfg = self.cfg
        device = device_for(cfg.device)
        dtype = dtype_for(cfg.dtype, device)
        return load_model(cfg.path, cfg.attention, cfg.scaling, dtype, device)

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return load_tokenizer(self.cfg.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Text to tokens, no special tokens added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, tokens: list[int]) -> str:
        """Tokens to text, without special tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def open_store(cfg: EvalConfig, path: str | None = None) -> Store:
    """A store of the model's tokenizer.

    Args:
        cfg: the evaluation.
        path: its directory; None: that of `held_out`.

    Raises:
        UserError: if there is no store, or it was made with another tokenizer.
    """
    store = Store(path or cfg.held_out or "")
    store.require_tokenizer(tokenizer_sha256(local_tokenizer(cfg.tokenizer)), cfg.tokenizer)
    return store
