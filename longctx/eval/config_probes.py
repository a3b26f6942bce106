"""Settings of the needle map, babi-style facts and short tasks; values stand in `conf/effort/`."""

from dataclasses import dataclass

from longctx.config.typed import choice, positive
from longctx.errors import UserError
from longctx.eval.config_contexts import counts

HAYSTACKS = ("held_out", "essays")
MODES = ("teacher_forced", "generate")
HOPS = (1, 2, 3)
LM_EVAL = ("boolq", "piqa", "race", "winogrande", "mmlu")
SHORT_TASKS = ("continuation", *LM_EVAL)


@dataclass(frozen=True)
class NeedleConfig:
    """One fact in real text, over length x depth; see `longctx/eval/needle.py`.

    Args:
        depths: places of the fact, 0 (start of the text) to 1 (end).
        samples: prompts per cell, each with its own fact and text.
        haystack: `held_out` (documents of that store) `| essays` (those of `ruler.data`).
        mode: `teacher_forced` (one forward a prompt) `| generate` (through the cache).
    """

    depths: list[float]
    samples: int
    haystack: str
    mode: str

    def __post_init__(self) -> None:
        positive(self.samples, "needle.samples")
        choice(self.haystack, HAYSTACKS, "needle.haystack")
        choice(self.mode, MODES, "needle.mode")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise UserError(f"needle.depths={list(self.depths)} must be numbers from 0 to 1")


@dataclass(frozen=True)
class BabiConfig:
    """Facts of a small story between sentences of real text; see `longctx/eval/babi.py`.

    Args:
        hops: supporting facts of a question, from 1 to 3; one or more.
        facts: in each story.
        samples: questions of each kind at each length.
        haystack: as in NeedleConfig.
        new_tokens: most tokens of an answer.
    """

    hops: list[int]
    facts: int
    samples: int
    haystack: str
    new_tokens: int

    def __post_init__(self) -> None:
        counts(self.hops, "babi.hops", 1)
        if max(self.hops) > max(HOPS):
            raise UserError(f"babi.hops={list(self.hops)} must be numbers from 1 to {max(HOPS)}")
        for key in ("samples", "new_tokens"):
            positive(getattr(self, key), f"babi.{key}")
        if self.facts < 6:
            raise UserError(f"babi.facts={self.facts} must be at least 6: three hops need as many")
        choice(self.haystack, HAYSTACKS, "babi.haystack")


@dataclass(frozen=True)
class ShortConfig:
    """Short contexts, which an extension may cost; see `longctx/eval/short.py`.

    Args:
        tasks: `continuation` (ours, of `held_out`) `| boolq | piqa | race | winogrande | mmlu`
            (lm-eval's) or a task in `include`, one or more.
        samples: questions of each. None: all of lm-eval's, and one a sentence of ours.
        context_tokens: before the sentence that is to be told, tokens.
        include: folder of task files (YAML) in lm-eval's format, of any data: multiple choice
            with the metric `acc`. None: nothing but the tasks above.
    """

    tasks: list[str]
    samples: int | None
    context_tokens: int
    include: str | None = None

    def __post_init__(self) -> None:
        for task in self.tasks if self.include is None else ():
            choice(task, SHORT_TASKS, "short.tasks")
        if not self.tasks:
            raise UserError(f"short.tasks=[] must name at least one of {', '.join(SHORT_TASKS)}")
        positive(self.context_tokens, "short.context_tokens")
        if self.samples is not None:
            positive(self.samples, "short.samples")

    @property
    def of_a_store(self) -> bool:
        """Whether they read `held_out`."""
        return "continuation" in self.tasks
