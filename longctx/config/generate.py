"""Settings of `longctx generate`."""

from dataclasses import dataclass, field
from typing import Any

from longctx.config.rope import RopeConfig
from longctx.config.run import ModelConfig
from longctx.config.typed import choice, positive
from longctx.errors import UserError


@dataclass(frozen=True)
class GenerateConfig:
    """One continuation of one text.

    Args:
        model: the model; it needs a path.
        rope: rotary scaling. `none`: as recorded in the checkpoint. Its target is the length of
            prompt and answer where nothing else is given.
        prompt: the text to continue.
        prompt_file: UTF-8 file that holds it. One of both must be given.
        question: put on a line of its own behind the text. None: nothing.
        max_new_tokens: tokens written at most; an end-of-sequence token ends it earlier.
        prefill_tokens: tokens of the prompt in one forward pass.
        temperature: of sampling; 0: the most likely token each time.
        top_p: sample from the smallest set of tokens with this probability; 1: from all.
        seed: of sampling.
        dtype: `fp32 | bf16`. None: fp32 on a CPU, bf16 on a GPU.
        device: `cpu`, `cuda`, `cuda:1`. None: a GPU where there is one.
        attention: `name` of a method and its numbers. None: as recorded in the checkpoint.
        context_files: UTF-8 files that the encoder of a CEPE model reads beside the prompt.
        context_tokens: tokens of them that the encoder reads at a time.
    """

    model: ModelConfig
    rope: RopeConfig
    prompt: str | None
    prompt_file: str | None
    question: str | None
    max_new_tokens: int
    prefill_tokens: int
    temperature: float
    top_p: float
    seed: int
    dtype: str | None
    device: str | None
    attention: dict[str, Any] | None = None
    context_files: list[str] = field(default_factory=list)
    context_tokens: int = 256

    def __post_init__(self) -> None:
        if self.model.path is None:
            raise UserError(f"model={self.model.name} has no weights to use: give model=PATH")
        if (self.prompt is None) == (self.prompt_file is None):
            raise UserError("give the text to continue as either prompt=TEXT or prompt_file=FILE")
        for key in ("max_new_tokens", "prefill_tokens", "context_tokens"):
            positive(getattr(self, key), key)
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature} must be 0 or above")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.top_p < 1 and not self.temperature:
            raise UserError(f"top_p={self.top_p} without temperature above 0 samples nothing")
        if self.dtype is not None:
            choice(self.dtype, ("fp32", "bf16"), "dtype")
