"""The settings of `filter_redpajama.py`: meanings and units. Values are in `conf/data_prep/`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longctx.errors import UserError


@dataclass(frozen=True)
class ExecutorConfig:
    """Where the work runs.

    Args:
        name: `local | slurm | ray`.
        options: options of datatrove's executor of that name; see its documentation.
    """

    name: str
    options: dict[str, Any]


@dataclass(frozen=True)
class FilterConfig:
    """One run of the filter.

    Args:
        input: files, folders (searched to any depth for `.jsonl`, `.jsonl.gz`, `.jsonl.zst`), or
            `hf:NAME_OR_PATH` for the training split of a Hugging Face dataset; one or a list.
        output: directory to create; it gets one token store per domain.
        tokenizer: folder with `tokenizer.model` or `tokenizer.json`, or a `.gguf` file.
        domains: domains to keep; empty: all.
        min_tokens: shortest document kept, tokens including BOS and EOS.
        min_tokens_of: the same limit for single domains, `{book:32768}`. None: no such limits.
        min_bytes: documents with fewer bytes of UTF-8 are dropped before tokenising; 0: none. This
            saves most where short documents are frequent, but omits their lengths from the summary.
        deduplicate: keep only the first of several documents with the same text.
        evaluation_files: texts that must not be trained on, `.jsonl` or `.txt`.
        evaluation_titles: files with titles or Project Gutenberg numbers of texts that must not be
            trained on: `.csv`, or one per line.
        evaluation_window: length of the window in which shared 13-grams are counted, words.
        evaluation_fraction: share of a window's 13-grams from which on a document is dropped.
        max_bad_fraction: largest share of unreadable records; with more, nothing is written.
        workers: tasks that run at a time. None: one per core (local), no limit (slurm, ray).
        split_mib: input per task, MiB: larger plain files are split, smaller ones grouped.
        work: folder that keeps tokenised shards for the next run. None: `output` + ".work".
        executor: where the work runs.
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
            raise UserError(
                f"min_tokens_of={of} must be a mapping like '{{book:32768}}', in quotes"
            )
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
        """The folder that keeps tokenised shards."""
        path = self.work or f"{self.output_path}.work"
        return Path(os.path.abspath(path))  # noqa: PTH100

    @property
    def split_bytes(self) -> int:
        """Input per task, bytes."""
        return max(1, int(self.split_mib * (1 << 20)))
