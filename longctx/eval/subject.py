"""The model under test and its tokenizer, loaded when the first task needs them.

Costs nothing until then, and one reading of the weights after.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from longctx.data.store import DEFINING, Store, tokenizer_sha256
from longctx.errors import UserError
from longctx.eval.config import EvalConfig
from longctx.eval.journal import Journal
from longctx.eval.spread import spread
from longctx.models.device import device_for, dtype_for
from longctx.models.load import load_model, load_tokenizer, local_tokenizer
from longctx.parallel.mesh import Mesh

Sample = dict[str, Any]
TaskResult = tuple[dict[str, Any], list[Sample]]


@dataclass(frozen=True)
class Subject:
    """The model under test, loaded on first use.

    Args:
        cfg: the evaluation.
        journal: through which a task does its work, piece by piece.
        mesh: the ranks, where several may share a row; None: this process alone.
    """

    cfg: EvalConfig
    journal: Journal = field(default_factory=Journal)
    mesh: Mesh | None = None

    @cached_property
    def model(self) -> Any:
        """The loaded model."""
        cfg = self.cfg
        device = device_for(cfg.device)
        dtype = dtype_for(cfg.dtype, device)
        return spread(load_model(cfg.path, cfg.attention, cfg.scaling, dtype, device), self.mesh)

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


def require_own_tokenizer(cfg: EvalConfig) -> None:
    """Raises UserError if the model brings a tokenizer along and is asked with another one."""
    own = Path(cfg.path).expanduser()
    brings = any((own / name).is_file() for name in DEFINING)
    if cfg.model.tokenizer is None or not brings:
        return
    if tokenizer_sha256(own) != tokenizer_sha256(local_tokenizer(cfg.tokenizer)):
        raise UserError(
            f"model.tokenizer={cfg.model.tokenizer} is not the tokenizer that {own} brings along: "
            "leave it out"
        )


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
