"""Settings of distillation: the divergence, and where the teacher's distribution comes from."""

from dataclasses import dataclass

from longctx.config.typed import choice, positive
from longctx.errors import UserError

MODES = ("full", "topk_rest", "topk_drop")


@dataclass(frozen=True)
class KlConfig:
    """A loss of `lm_weight x CE + weight x temperature^2 x KL(teacher || student)`.

    Args:
        mode: `full` (the whole vocabulary) `| topk_rest` (the teacher's most probable tokens, and
            all others as one) `| topk_drop` (those tokens alone, as CEPE's code has it; not a
            divergence, it can fall below zero).
        top_k: how many tokens the two short modes keep.
        temperature: T of both distributions in the divergence; the cross entropy stays at 1.
        weight: of the divergence.
        lm_weight: of the cross entropy.
    """

    mode: str = "full"
    top_k: int = 50
    temperature: float = 1.0
    weight: float = 2.0
    lm_weight: float = 1.0

    def __post_init__(self) -> None:
        choice(self.mode, MODES, "kl.mode")
        positive(self.top_k, "kl.top_k")
        positive(self.temperature, "kl.temperature")
        for key in ("weight", "lm_weight"):
            if getattr(self, key) < 0:
                raise UserError(f"kl.{key}={getattr(self, key)} must not be below 0")
        positive(self.weight + self.lm_weight, "kl.weight + kl.lm_weight")


@dataclass(frozen=True)
class TeacherConfig:
    """Where the teacher's distribution comes from.

    Args:
        source: `online` (the frozen decoder itself reads context and input, without gradients)
            `| stored` (its most probable tokens were written down before).
        store: directory that `longctx teacher` wrote; for `stored`.
    """

    source: str = "online"
    store: str | None = None

    def __post_init__(self) -> None:
        choice(self.source, ("online", "stored"), "teacher.source")
        if self.source == "stored" and self.store is None:
            raise UserError("teacher.source=stored needs teacher.store=DIR")
