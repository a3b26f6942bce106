"""Settings of the task that asks instructions of one template; values stand in `conf/effort/`."""

from dataclasses import dataclass

from longctx.config.typed import choice, positive
from longctx.data.instructions import KINDS
from longctx.errors import UserError
from longctx.eval.config_contexts import counts


@dataclass(frozen=True)
class TemplateConfig:
    """Held-out instructions; see `longctx/eval/template.py`.

    Args:
        kinds: `key | repeat | list`, one or more; see `longctx/data/instructions.py`.
        counts: numbers of contexts of held-out text before them; 0: none.
        size: tokens in a context.
        questions: asked of each kind with each number.
        new_tokens: most tokens of a reply.
    """

    kinds: list[str]
    counts: list[int]
    size: int
    questions: int
    new_tokens: int

    def __post_init__(self) -> None:
        for kind in self.kinds:
            choice(kind, tuple(KINDS), "template.kinds")
        if not self.kinds:
            raise UserError(f"template.kinds=[] must name at least one of {', '.join(KINDS)}")
        counts(self.counts, "template.counts", 0)
        for key in ("size", "questions", "new_tokens"):
            positive(getattr(self, key), f"template.{key}")
