"""Settings that all evaluation tasks share: the model, the lengths, the text, the seed.

The numbers of one task are the fields of its class in `longctx/eval/tasks/`; `config.py` puts both
together.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any

from longctx.config import ModelConfig, RopeConfig, choice, positive
from longctx.errors import UserError


def distinct(values: list[int], key: str, least: int) -> None:
    """Raises UserError unless `values` are distinct numbers of at least `least`."""
    if not values or min(values) < least or len(set(values)) < len(values):
        raise UserError(f"{key}={list(values)} must be distinct numbers, each at least {least}")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one model, without the settings of its tasks.

    Args:
        model: the model under test; it needs a path.
        rope: rotary scaling. `none`: as recorded in the checkpoint. Its target is the longest
            input of the tasks where neither a factor nor a target is given.
        out: directory for `results.json`, `samples.jsonl`, `report.md` and figures.
        label: the model's name in tables and figures. None: made of its name, attention and rope.
        attention: `name` of a method and its numbers. None: as recorded in the checkpoint.
        dtype: `fp32 | bf16`. None: fp32 on a CPU, bf16 on a GPU.
        device: `cpu`, `cuda`, `cuda:1`. None: a GPU where there is one.
        tasks: names of files in `longctx/eval/tasks/`, one or more.
        lengths: context lengths, tokens, of the tasks that are measured by length.
        held_out: directory of the token store to score, or to draw text from.
        compare: directories of earlier evaluations, added to tables and figures. With no `lengths`
            and only tasks that need them, nothing is measured and the earlier results are joined.
        parallel_sp: processes that share a row, each with an equal part of its tokens; for tasks
            that score whole rows in one forward pass.
        samples: prompts per passkey cell and per k_max distance.
        batch_tokens: tokens in one forward pass, unless a single row is longer.
        seed: of keys and filler, and of which questions are asked.
    """

    model: ModelConfig
    rope: RopeConfig
    out: str
    label: str | None = None
    attention: dict[str, Any] | None = None
    dtype: str | None = None
    device: str | None = None
    tasks: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    held_out: str | None = None
    compare: list[str] = field(default_factory=list)
    parallel_sp: int = 1
    samples: int = 5
    batch_tokens: int = 16384
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.tasks:
            choice(name, self.known, "tasks")
        for key in ("samples", "batch_tokens", "parallel_sp"):
            positive(getattr(self, key), key)
        if self.joins:
            return
        if not self.tasks or (not self.lengths and any(t.by_length for t in self.chosen.values())):
            raise UserError("tasks=[..] and lengths=[..] must name at least one each")
        if min(self.lengths, default=2) < 2:
            raise UserError(f"lengths={list(self.lengths)} must be at least 2 tokens each")
        for name, task in self.chosen.items():
            if task.of_a_store and self.held_out is None:
                raise UserError(f"tasks=[{name}] needs held_out=DIR, a token store")
            task.check(self)
            self._check_ranks(name, task)
        if self.dtype is not None:
            choice(self.dtype, ("fp32", "bf16"), "dtype")
        if self.model.path is None:
            raise UserError(f"model={self.model.name} has no weights to evaluate: give model=PATH")

    def _check_ranks(self, name: str, task: Any) -> None:
        if self.parallel_sp > 1 and not task.one_pass:
            raise UserError(
                f"parallel_sp={self.parallel_sp}: tasks=[{name}] decodes through a cache or reads "
                "an encoder's contexts, which one process does alone; perplexity and "
                "teacher_forced keys can share rows"
            )

    def task(self, name: str) -> Any:
        """The settings of a task; see `longctx.eval.task.Task`."""
        return getattr(self, name)

    @property
    def known(self) -> tuple[str, ...]:
        """Names of all tasks there are."""
        shared = {f.name for f in fields(Evaluation)}
        return tuple(f.name for f in fields(self) if f.name not in shared)

    @property
    def chosen(self) -> dict[str, Any]:
        """The tasks to run, each once."""
        return {name: self.task(name) for name in self.tasks}

    @property
    def joins(self) -> bool:
        """Whether earlier results are joined and nothing is measured."""
        by_length = all(task.by_length for task in self.chosen.values())
        return bool(self.compare) and not self.lengths and by_length

    @property
    def tokenizer(self) -> str:
        """Where the tokenizer is."""
        return self.model.tokenizer or self.path

    @property
    def path(self) -> str:
        """Where the model is."""
        return self.model.path or ""

    @property
    def scaling(self) -> RopeConfig | None:
        """The rotary scaling to load with; None: as recorded in the checkpoint."""
        if self.rope.name == "none":
            return None
        if self.rope.factor is None and self.rope.target is None:
            return replace(self.rope, target=self.longest)
        return self.rope

    @property
    def longest(self) -> int | None:
        """The longest input that the tasks name, tokens; None if they name none."""
        named = [task.longest for task in self.chosen.values()]
        return max([*self.lengths, *(n for n in named if n is not None)], default=None)
