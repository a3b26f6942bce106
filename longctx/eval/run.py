"""Runs the tasks of an evaluation, keeps what is done already, and writes the report.

Each task is stored under a hash of everything that its numbers depend on, as soon as it is done;
the same command again computes only what is missing. The model is loaded only if something is.
"""

import hashlib
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from longctx.data.store import Store
from longctx.eval import contexts, qa, retrieval_perplexity, template
from longctx.eval import perplexity as ppl
from longctx.eval.config import BY_LENGTH, EvalConfig
from longctx.eval.figures import Results
from longctx.eval.passkey import Quiz, effective_window, passkey
from longctx.eval.report import (
    RESULTS,
    read_results,
    write_atomically,
    write_report,
    write_results,
)
from longctx.eval.subject import Sample, Subject, TaskResult, open_store
from longctx.models.load import RECORD, describe
from longctx.models.place import device_for

SAMPLES = "samples.jsonl"
WEIGHTS = (".safetensors", ".bin", ".gguf", ".json", ".model")


def _held_out(cfg: EvalConfig) -> tuple[Store, list[int], int]:
    """The store, the documents to score, and how many were too short."""
    store = open_store(cfg)
    limit = cfg.perplexity.max_documents
    return store, *ppl.choose_documents(store, max(cfg.lengths), limit, str(store.path))


def _perplexity(cfg: EvalConfig, subject: Subject) -> TaskResult:
    store, chosen, skipped = _held_out(cfg)
    own, lengths, model = cfg.perplexity, sorted(cfg.lengths), subject.model
    text = ppl.Text(store, chosen, cfg.batch_tokens)
    run: dict[str, Callable[[], dict[str, Any]]] = {
        "sliding_new_tokens": lambda: ppl.sliding_new_tokens(
            model, text, lengths, own.stride, own.document_tokens
        ),
        "single_pass_buckets": lambda: ppl.single_pass_buckets(model, text, lengths),
        "token_matched": lambda: ppl.token_matched(
            model, text, lengths, own.target_tokens, own.windows
        ),
    }
    common = {"bos": "document_start", "documents": len(chosen), "skipped": skipped}
    return {"protocols": {name: common | run[name]() for name in own.protocols}}, []


def _quiz(cfg: EvalConfig, subject: Subject, mode: str) -> Quiz:
    bos = subject.tokenizer.bos_token_id
    samples, seed = cfg.samples, cfg.seed
    return Quiz(subject.model, subject.encode, bos, samples, seed, mode, cfg.batch_tokens)


def _passkey(cfg: EvalConfig, subject: Subject) -> TaskResult:
    quiz = _quiz(cfg, subject, cfg.passkey.mode)
    return passkey(quiz, sorted(cfg.lengths), cfg.passkey.depths)


def _k_max(cfg: EvalConfig, subject: Subject) -> TaskResult:
    own = cfg.k_max
    quiz = _quiz(cfg, subject, own.mode)
    return effective_window(quiz, max(cfg.lengths), own.points, own.threshold)


def _inputs(cfg: EvalConfig) -> dict[str, Any]:
    return {"samples": cfg.samples, "seed": cfg.seed}


RUN: dict[str, Callable[[EvalConfig, Subject], TaskResult]] = {
    "perplexity": _perplexity,
    "passkey": _passkey,
    "k_max": _k_max,
    "contexts": contexts.run,
    "retrieval_perplexity": retrieval_perplexity.run,
    "qa": qa.run,
    "template": template.run,
}
# What a task's numbers depend on beside its own settings; looking for it finds what is missing.
INPUTS: dict[str, Callable[[EvalConfig], dict[str, Any]]] = {
    "perplexity": lambda cfg: {"held_out": _held_out(cfg)[0].meta["digest"][:16]},
    "passkey": _inputs,
    "k_max": _inputs,
    "contexts": contexts.inputs,
    "retrieval_perplexity": retrieval_perplexity.inputs,
    "qa": qa.inputs,
    "template": template.inputs,
}


def settings_of(cfg: EvalConfig, task: str) -> dict[str, Any]:
    """What a task's numbers depend on beside the model; equal settings compare fairly.

    Raises:
        UserError: if something that the task reads is missing or does not fit.
    """
    lengths = {"lengths": sorted(cfg.lengths)} if task in BY_LENGTH else {}
    return {**lengths, **asdict(getattr(cfg, task)), **INPUTS[task](cfg)}


def _identity(cfg: EvalConfig) -> dict[str, Any]:
    """The model under test: its settings, and size and time of its files."""
    path = Path(cfg.path)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    stamps = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in files
        if file.suffix in WEIGHTS
    ]
    return {
        "model": cfg.path,
        "files": stamps,
        "attention": cfg.attention,
        "rope": None if cfg.scaling is None else asdict(cfg.scaling),
        "tokenizer": cfg.tokenizer,
        "dtype": cfg.dtype,
    }


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("longctx", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The commit of the source tree, `+` where it is changed; None outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40"]
    try:
        git = subprocess.run([*command, "--dirty=+"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return git.stdout.strip() or None


def _label(cfg: EvalConfig) -> str:
    path = Path(cfg.path)
    name = path.resolve().parent.name if path.name == "hf" else cfg.model.name
    parts = [name]
    if cfg.attention is not None:
        parts.append(str(cfg.attention["name"]))
    if cfg.scaling is not None:
        parts.append(cfg.scaling.name)
    return cfg.label or " + ".join(parts)


def _facts(subject: Subject) -> Results:
    """What a report says of the loaded model."""
    model = subject.model
    told = describe(model)
    rope = model.config.rope_parameters
    native = rope.get("original_max_position_embeddings") or told["window"] / told["rope_factor"]
    return {
        "parameters": told["parameters"],
        "attention": getattr(model.config, RECORD, {"name": "full"}),
        "rope": {
            "name": told["rope_type"],
            "factor": told["rope_factor"],
            "base": told["rope_base"],
        },
        "dtype": told["dtype"],
        "device": str(model.device),
        "native_window": round(native),
        "window": told["window"],
    }


def _write_samples(out: Path, task: str, samples: list[Sample]) -> None:
    """Replaces the task's lines of `samples.jsonl`."""
    path = out / SAMPLES
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = [line for line in lines if json.loads(line)["task"] != task]
    lines += [json.dumps(sample) for sample in samples]
    write_atomically(path, "".join(f"{line}\n" for line in lines))


def evaluate(cfg: EvalConfig) -> tuple[Results, str]:
    """Runs what is not in `out` already, then writes the report.

    Args:
        cfg: the evaluation.

    Returns:
        The content of `results.json`, and the text of `report.md`.

    Raises:
        UserError: if a store, model or earlier result cannot be used as asked; before any task
            has started where that can be known.
    """
    out = Path(cfg.out)
    device_for(cfg.device)
    others = [read_results(Path(path)) for path in cfg.compare]
    settings = {task: settings_of(cfg, task) for task in dict.fromkeys(cfg.tasks)}
    identity = _hash(_identity(cfg))
    results = read_results(out) if (out / RESULTS).exists() else {}
    if results.get("identity") != identity:
        results = {"identity": identity, "tasks": {}}
    done: dict[str, Any] = results["tasks"]
    subject = Subject(cfg)
    for task, own in settings.items():
        key = _hash(own)
        if done.get(task, {}).get("hash") == key:
            continue
        result, samples = RUN[task](cfg, subject)
        facts = _facts(subject)
        done[task] = {"hash": key, "settings": own, "result": result}
        results |= {"model": cfg.path, "seed": cfg.seed, **facts, "versions": _versions()}
        results |= {"commit": _commit(), "command": shlex.join(sys.orig_argv)}
        out.mkdir(parents=True, exist_ok=True)
        _write_samples(out, task, samples)
        write_results(results | {"label": _label(cfg)}, out)
    results["label"] = _label(cfg)
    write_results(results, out)
    return results, write_report([results, *others], out)
