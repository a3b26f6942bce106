"""Settings of the evaluation inside a training run."""

from dataclasses import dataclass, field

from longctx.config.typed import positive
from longctx.errors import UserError


@dataclass(frozen=True)
class InLoopConfig:
    """Cheap tasks every some steps, through the engine that trains; see `longctx/eval/in_loop.py`.

    Args:
        every: steps between two; 0: never, else also at the end.
        lengths: of the windows and prompts, tokens.
        documents: windows of `data.held_out` at each length, one a document; 0: no perplexity.
        target_tokens: scored at the end of a window, the same ones at every length.
        passkeys: prompts at each length, spread over depths; 0: none.
    """

    every: int = 0
    lengths: list[int] = field(default_factory=list)
    documents: int = 8
    target_tokens: int = 64
    passkeys: int = 10

    def __post_init__(self) -> None:
        for key in ("every", "documents", "passkeys"):
            if getattr(self, key) < 0:
                raise UserError(f"in_loop.{key}={getattr(self, key)} must be at least 0")
        positive(self.target_tokens, "in_loop.target_tokens")
        if not self.every:
            return
        if not self.lengths or not self.documents + self.passkeys:
            raise UserError(
                f"in_loop.every={self.every} needs in_loop.lengths=[..] and in_loop.documents or "
                "in_loop.passkeys above 0"
            )
        if self.documents and min(self.lengths) <= self.target_tokens:
            raise UserError(
                f"in_loop.target_tokens={self.target_tokens} must be shorter than every window of "
                f"in_loop.lengths={list(self.lengths)}"
            )
