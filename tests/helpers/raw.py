"""A toy corpus in RedPajama's shape, and the filter run in this process, without a pool."""

import gzip
import json
from pathlib import Path
from typing import Any

import zstandard

from longctx.data.store import Store
from longctx.data_prep.encode import Encoder
from longctx.data_prep.filter_redpajama import plan
from longctx.data_prep.settings import ExecutorConfig, FilterConfig
from tests.conftest import ROOT

TOKENIZER = ROOT / "assets" / "lab-llama"
DEFAULTS: dict[str, Any] = {
    "tokenizer": str(TOKENIZER), "domains": [], "min_tokens": 0, "min_tokens_of": None,
    "min_bytes": 0, "deduplicate": True, "evaluation_files": [], "evaluation_titles": [],
    "evaluation_window": 100, "evaluation_fraction": 0.8, "max_bad_fraction": 1.0, "workers": 1,
    "split_mib": 1.0, "work": None, "executor": ExecutorConfig("local", {}),
}  # fmt: skip


def config(source: Path | str | list[str], output: Path, **changes: Any) -> FilterConfig:
    """Settings for tests; `changes` override them."""
    given = [str(x) for x in source] if isinstance(source, list) else str(source)
    return FilterConfig(input=given, output=str(output), **DEFAULTS | changes)


def line(text: Any, **meta: Any) -> bytes:
    """One JSONL record."""
    return json.dumps({"text": text, "meta": meta}).encode() + b"\n"


def write(path: Path, *records: bytes) -> Path:
    """A `.jsonl`, `.jsonl.gz` or `.jsonl.zst` file of records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b"".join(records)
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


def text_of(tokens: int, encoder: Encoder, word: str = " river") -> str:
    """A text of exactly so many tokens, BOS and EOS counted."""
    text = "x"
    while (missing := tokens - len(encoder.documents([text])[0])) > 0:
        text += word * max(1, missing // 4) if missing > 8 else " a"
    assert len(encoder.documents([text])[0]) == tokens
    return text


def run_here(settings: FilterConfig) -> list[int]:
    """Both stages in this process; returns the ranks that were not finished before."""
    job = plan(settings)
    job.work.prepare(job.plan)
    marks = job.work.logs("tokenize") / "completions"
    marks.mkdir(parents=True, exist_ok=True)
    left = [rank for rank in range(job.work.tasks) if not (marks / f"{rank:05d}").exists()]
    for rank in left:
        job.tokenize.run(rank=rank)
        (marks / f"{rank:05d}").touch()
    job.assemble.run()
    return left


def digests(output: Path) -> dict[str, str]:
    """The digest of each store in an output."""
    return {path.parent.name: Store(path.parent).meta["digest"] for path in
            sorted(output.glob("*/meta.json"))}  # fmt: skip


def summary(output: Path) -> dict[str, Any]:
    """The content of `summary.json`."""
    found: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return found
