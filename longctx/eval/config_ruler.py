"""Settings of RULER; values stand in `conf/effort/`, not here."""

from dataclasses import dataclass

from longctx.config.typed import choice, positive
from longctx.errors import UserError

NEEDLES = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
)
RULER_TASKS = (*NEEDLES, "vt", "cwe", "fwe", "qa_1", "qa_2")


@dataclass(frozen=True)
class RulerConfig:
    """RULER at every one of `lengths`; see `longctx/eval/ruler.py`.

    Args:
        tasks: `niah_single_1 .. 3 | niah_multikey_1 .. 3 | niah_multivalue | niah_multiquery |
            vt | cwe | fwe | qa_1 | qa_2`, one or more.
        data: directory with the essays, questions and words (`data_prep/ruler_data.sh`).
        samples: prompts of each task at each length; NVIDIA takes 500.
        threshold: average, per cent, that an effective length reaches; NVIDIA's is 85.6, that of
            Llama-2-7B-chat at 4,096 tokens.
        chat: the text in the tokenizer's chat template, for instructed models.
    """

    tasks: list[str]
    data: str
    samples: int
    threshold: float
    chat: bool

    def __post_init__(self) -> None:
        for task in self.tasks:
            choice(task, RULER_TASKS, "ruler.tasks")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise UserError(f"ruler.tasks={list(self.tasks)} must be different tasks, at least one")
        positive(self.samples, "ruler.samples")
        if not 0 < self.threshold <= 100:
            raise UserError(f"ruler.threshold={self.threshold} must be per cent, above 0 to 100")
