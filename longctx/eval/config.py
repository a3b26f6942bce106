"""The typed evaluation: every setting of `evaluate.py`, its unit and its meaning.

Values stand in `conf/evaluate.yaml` and `conf/effort/`, not here; the tasks that read contexts have
theirs in `config_contexts.py`.
"""

from dataclasses import dataclass, replace
from typing import Any

from longctx.config import ModelConfig, RopeConfig, choice, positive
from longctx.errors import UserError
from longctx.eval.config_contexts import ContextsConfig, QaConfig, RetrievalConfig
from longctx.eval.config_efficiency import EfficiencyConfig
from longctx.eval.config_probes import BabiConfig, NeedleConfig, ShortConfig
from longctx.eval.config_ruler import RulerConfig
from longctx.eval.config_template import TemplateConfig

TASKS = (
    "perplexity", "passkey", "k_max", "ruler", "needle", "babi", "short", "contexts",
    "retrieval_perplexity", "qa", "template", "efficiency",
)  # fmt: skip
# These need lengths=
BY_LENGTH = ("perplexity", "passkey", "k_max", "ruler", "needle", "babi", "efficiency")
OF_A_STORE = ("perplexity", "contexts", "retrieval_perplexity", "template")  # these need held_out=
PROTOCOLS = ("sliding_new_tokens", "whole_window", "single_pass_buckets", "token_matched")
MODES = ("teacher_forced", "generate")


@dataclass(frozen=True)
class PerplexityConfig:
    """Loss on held-out text; see `longctx/eval/perplexity.py` for the protocols.

    Args:
        protocols: `sliding_new_tokens | whole_window | single_pass_buckets | token_matched`, one
            or more; `cepe_tail` is one of the task `contexts`.
        stride: tokens that the window of the first two moves; the first scores just those.
        target_tokens: tokens scored at the end of each token-matched window.
        windows: token-matched windows per document, at most.
        max_documents: documents scored, evenly spaced over the store. None: all long enough.
        document_tokens: documents are cut to so many for the first two, but never below the
            longest of `lengths`. None: whole documents.
    """

    protocols: list[str]
    stride: int
    target_tokens: int
    windows: int
    max_documents: int | None
    document_tokens: int | None

    def __post_init__(self) -> None:
        for protocol in self.protocols:
            choice(protocol, PROTOCOLS, "perplexity.protocols")
        for key in ("stride", "target_tokens", "windows"):
            positive(getattr(self, key), f"perplexity.{key}")
        for key in ("max_documents", "document_tokens"):
            if (value := getattr(self, key)) is not None:
                positive(value, f"perplexity.{key}")


@dataclass(frozen=True)
class PasskeyConfig:
    """Key retrieval over length x depth.

    Args:
        depths: places of the key, 0 (start of the prompt) to 1 (end).
        mode: `teacher_forced` (one forward a prompt) `| generate` (through the cache).
    """

    depths: list[float]
    mode: str

    def __post_init__(self) -> None:
        choice(self.mode, MODES, "passkey.mode")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise UserError(f"passkey.depths={list(self.depths)} must be numbers from 0 to 1")


@dataclass(frozen=True)
class KMaxConfig:
    """Position Interpolation's effective window, for the longest of `lengths`.

    Args:
        points: distances tested, uniformly spaced up to the longest length.
        threshold: success rate that every shorter distance must reach, 0 to 1.
        mode: as in PasskeyConfig.
    """

    points: int
    threshold: float
    mode: str

    def __post_init__(self) -> None:
        positive(self.points, "k_max.points")
        choice(self.mode, MODES, "k_max.mode")
        if not 0 < self.threshold <= 1:
            raise UserError(f"k_max.threshold={self.threshold} must be above 0 and at most 1")


@dataclass(frozen=True)
class EvalConfig:
    """One evaluation of one model.

    Args:
        model: the model under test; it needs a path.
        label: its name in tables and figures. None: made of its name, attention and rope.
        attention: `name` of a method and its numbers. None: as recorded in the checkpoint.
        rope: rotary scaling. `none`: as recorded in the checkpoint. Its target is the longest
            input of the tasks where nothing else is given.
        dtype: `fp32 | bf16`. None: fp32 on a CPU, bf16 on a GPU.
        device: `cpu`, `cuda`, `cuda:1`. None: a GPU where there is one.
        tasks: `perplexity | passkey | k_max | ruler | needle | babi | short | contexts |
            retrieval_perplexity | qa | template | efficiency`, one or more.
        lengths: context lengths of the first six and of `efficiency`, tokens.
        held_out: token store to score, or to draw text from.
        out: directory for `results.json`, `samples.jsonl`, `report.md` and figures.
        compare: directories of earlier evaluations, added to table and figures. With no `lengths`
            and no task that does without, they are joined and nothing is measured.
        parallel_sp: processes that share a row, each with an equal part of its tokens; for tasks
            that decode nothing.
        samples: prompts per passkey cell and per k_max distance.
        batch_tokens: tokens in one forward pass, unless a single row is longer.
        seed: of keys and filler, and of which questions are asked.
        perplexity, passkey, k_max, ruler, needle, babi, short, contexts, retrieval_perplexity, qa,
            template, efficiency: see their classes.
    """

    model: ModelConfig
    label: str | None
    rope: RopeConfig
    dtype: str | None
    device: str | None
    tasks: list[str]
    lengths: list[int]
    held_out: str | None
    out: str
    compare: list[str]
    samples: int
    batch_tokens: int
    seed: int
    perplexity: PerplexityConfig
    passkey: PasskeyConfig
    k_max: KMaxConfig
    ruler: RulerConfig
    needle: NeedleConfig
    babi: BabiConfig
    short: ShortConfig
    contexts: ContextsConfig
    retrieval_perplexity: RetrievalConfig
    qa: QaConfig
    template: TemplateConfig
    efficiency: EfficiencyConfig
    attention: dict[str, Any] | None = None
    parallel_sp: int = 1

    def __post_init__(self) -> None:
        for task in self.tasks:
            choice(task, TASKS, "tasks")
        for key in ("samples", "batch_tokens", "parallel_sp"):
            positive(getattr(self, key), key)
        if self.joins:
            return
        if not self.tasks or (not self.lengths and set(BY_LENGTH) & set(self.tasks)):
            raise UserError("tasks=[..] and lengths=[..] must name at least one each")
        if min(self.lengths, default=2) < 2:
            raise UserError(f"lengths={list(self.lengths)} must be at least 2 tokens each")
        self._check_inputs()
        self._check_spread()
        if self.dtype is not None:
            choice(self.dtype, ("fp32", "bf16"), "dtype")
        if self.model.path is None:
            raise UserError(f"model={self.model.name} has no weights to evaluate: give model=PATH")

    @property
    def joins(self) -> bool:
        """Whether earlier results are joined and nothing is measured."""
        return bool(self.compare) and not self.lengths and set(self.tasks) <= set(BY_LENGTH)

    def _check_spread(self) -> None:
        if self.parallel_sp == 1:
            return
        for task in self.tasks:
            forced = getattr(getattr(self, task), "mode", "generate") == "teacher_forced"
            if task != "perplexity" and not forced:
                raise UserError(
                    f"parallel_sp={self.parallel_sp}: tasks=[{task}] decodes through a cache or an "
                    "encoder, which one process does; perplexity and teacher_forced keys can share"
                )

    def _check_inputs(self) -> None:
        reads = [*OF_A_STORE, *(["short"] if self.short.of_a_store else [])]
        reads += [t for t in ("needle", "babi") if getattr(self, t).haystack == "held_out"]
        for task in reads:
            if task in self.tasks and self.held_out is None:
                raise UserError(f"tasks=[{task}] needs held_out=DIR, a token store")
        if "qa" in self.tasks and self.qa.data is None:
            raise UserError(
                "tasks=[qa] needs qa.data=FILE, JSON (bash data_prep/qa_data.sh has some)"
            )
        if "perplexity" in self.tasks:
            self._check_perplexity()

    def _check_perplexity(self) -> None:
        scored = {"stride": "sliding_new_tokens", "target_tokens": "token_matched"}
        for key, protocol in scored.items():
            tokens = getattr(self.perplexity, key)
            if protocol in self.perplexity.protocols and tokens >= min(self.lengths):
                raise UserError(
                    f"perplexity.{key}={tokens} must be shorter than every window of "
                    f"lengths={list(self.lengths)}"
                )

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
        inputs = [*self.lengths]
        if "contexts" in self.tasks:
            inputs.append(self.contexts.longest)
        if "retrieval_perplexity" in self.tasks:
            inputs.append(self.retrieval_perplexity.longest)
        if "qa" in self.tasks and self.qa.window is not None:
            inputs.append(self.qa.window)
        return max(inputs, default=None)
