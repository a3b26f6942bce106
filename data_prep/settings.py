"""The settings of `filter_redpajama.py`: meaning and unit. Values stand in `conf/data_prep/`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longctx.errors import UserError


@dataclass(frozen=True)
class ExecutorConfig:
    """Where the work is done.

    Args:
        name: `local | slurm | ray`.
        options: passed to datatrove's executor of that name, whose documentation explains them.
    """

    name: str
    options: dict[str, Any]


@dataclass(frozen=True)
class FilterConfig:
    """One run of the filter.

    Args:
        input: files, folders (searched to any depth for `.jsonl`, `.jsonl.gz`, `.jsonl.zst`), or
            `hf:NAME_OR_PATH` for the training split of a Hugging Face dataset; one or a list.
        output: directory to create, a token store per domain in it.
        tokenizer: folder with `tokenizer.model` or `tokenizer.json`, or a `.gguf` file.
        domains: which to keep; empty: all.
        min_tokens: shortest document kept, tokens, its BOS and EOS counted.
        min_tokens_of: the same for single domains, `{book:32768}`. None: for none.
        min_bytes: documents with fewer bytes of UTF-8 are not even tokenised; 0: all are. Saves
            the most where short documents abound, but their lengths are then not in the summary.
        deduplicate: keep only the first of documents with the same text.
        evaluation_files: texts that must not be trained on, `.jsonl` or `.txt`.
        evaluation_titles: titles or Project Gutenberg numbers of such, `.csv` or one a line.
        evaluation_window: words in which common 13-grams are counted.
        evaluation_fraction: share of a window's 13-grams that makes a document one of these.
        max_bad_fraction: share of records that may be unreadable; more, and nothing is written.
        workers: tasks at a time. None: one a core (local), no limit (slurm, ray).
        split_mib: plain files above this are cut, smaller ones joined, for one task, MiB.
        work: where tokenised shards stay for the next run. None: `output` + ".work".
        executor: where the work is done.
    """

    input: Any
    output: str
    tokenizer: str
    domains: list[str]
    min_tokens: int
    min_tokens_of: Any
    min_bytes: int
    deduplicate: bool
    evaluation_files: list[str]
    evaluation_titles: list[str]
    evaluation_window: int
    evaluation_fraction: float
    max_bad_fraction: float
    workers: int | None
    split_mib: float
    work: str | None
    executor: ExecutorConfig

    def __post_init__(self) -> None:
        of = self.min_tokens_of or {}
        if not isinstance(of, dict) or not all(type(n) is int for n in of.values()):
            raise UserError(f"min_tokens_of={of} must be like {{book:32768}}, in quotes")
        at_least = {
            "min_tokens": (self.min_tokens, 0), "min_bytes": (self.min_bytes, 0),
            "workers": (1 if self.workers is None else self.workers, 1),
        } | {f"min_tokens_of.{name}": (n, 0) for name, n in of.items()}  # fmt: skip
        for key, (value, least) in at_least.items():
            if value < least:
                raise UserError(f"{key}={value} must be at least {least}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"max_bad_fraction={self.max_bad_fraction} must be from 0 to 1")
        if not self.split_mib > 0:
            raise UserError(f"split_mib={self.split_mib} must be above 0")
        if not self.inputs or not all(isinstance(x, str) and x for x in self.inputs):
            raise UserError(
                f"input={self.input} must be a path, hf:NAME_OR_PATH, or a list of these"
            )

    @property
    def inputs(self) -> list[Any]:
        """The inputs, as a list."""
        return self.input if isinstance(self.input, list) else [self.input]

    @property
    def output_path(self) -> Path:
        """The directory to create."""
        return Path(os.path.abspath(self.output))  # noqa: PTH100 - resolve() would follow a link

    @property
    def work_path(self) -> Path:
        """Where tokenised shards stay."""
        path = self.work or f"{self.output_path}.work"
        return Path(os.path.abspath(path))  # noqa: PTH100

    @property
    def split_bytes(self) -> int:
        """Size of a task's input, bytes."""
        return max(1, int(self.split_mib * (1 << 20)))
