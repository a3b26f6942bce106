"""The model under test and its tokenizer, loaded when the first task needs them.

Costs nothing until then, not even the import of transformers, and one reading of the weights after.
"""

import platform
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from longctx.data.store import DEFINING, Store, tokenizer_sha256
from longctx.errors import UserError
from longctx.eval.evaluation import Evaluation
from longctx.eval.journal import Journal
from longctx.models.device import device_for, dtype_for
from longctx.parallel.mesh import Mesh


@dataclass(frozen=True)
class Subject:
    """The model under test, loaded on first use.

    Args:
        cfg: the evaluation.
        journal: through which a task does its work, piece by piece.
        mesh: the ranks, where several may share a row; None: this process alone.
    """

    cfg: Evaluation
    journal: Journal = field(default_factory=Journal)
    mesh: Mesh | None = None

    @cached_property
    def model(self) -> Any:
        """The loaded model."""
        from longctx.eval.shared_rows import spread
        from longctx.models.load import load_model

        cfg = self.cfg
        device = device_for(cfg.device)
        dtype = dtype_for(cfg.dtype, device)
        return spread(load_model(cfg.path, cfg.attention, cfg.scaling, dtype, device), self.mesh)

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        from longctx.models.load import load_tokenizer

        return load_tokenizer(self.cfg.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Text to tokens, no special tokens added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, tokens: list[int]) -> str:
        """Tokens to text, without special tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def tokenizer_hash(cfg: Evaluation) -> str:
    """The hash of the files that define the tokenizer.

    Raises:
        UserError: if the hub has no such tokenizer or cannot be reached.
    """
    from longctx.models.load import local_tokenizer

    return tokenizer_sha256(local_tokenizer(cfg.tokenizer))


def require_own_tokenizer(cfg: Evaluation) -> None:
    """Raises UserError if the model comes with a tokenizer and another one is given."""
    own = Path(cfg.path).expanduser()
    brings = any((own / name).is_file() for name in DEFINING)
    if cfg.model.tokenizer is None or not brings:
        return
    if tokenizer_sha256(own) != tokenizer_hash(cfg):
        raise UserError(
            f"model.tokenizer={cfg.model.tokenizer} is not the tokenizer that {own} comes with: "
            "leave it out"
        )


def check_vocabulary(subject: Subject, token: int) -> None:
    """Raises UserError if the model has no such token: its tokenizer is another model's."""
    known = getattr(getattr(subject.model, "config", None), "vocab_size", None)
    if known is not None and token >= known:
        raise UserError(
            f"the tokenizer gives token {token}, and the model knows {known}: it is the tokenizer "
            "of another model"
        )


def open_store(cfg: Evaluation, path: str | None = None) -> Store:
    """A store of the model's tokenizer.

    Args:
        cfg: the evaluation.
        path: its directory; None: that of `held_out`.

    Raises:
        UserError: if there is no store, or it was made with another tokenizer.
    """
    store = Store(path or cfg.held_out or "")
    store.require_tokenizer(tokenizer_hash(cfg), cfg.tokenizer)
    return store


def digest_of(store: Store) -> str:
    """A short hash of a store's content."""
    return str(store.meta["digest"][:16])


def device_name(device: torch.device) -> str:
    """The device's name as its driver or the system reports it."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    cpus = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpus.read_text()) if cpus.exists() else None
    return f"{found[1] if found else platform.machine()}, {torch.get_num_threads()} threads"
