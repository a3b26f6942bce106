"""Runs the tasks of an evaluation, keeps what is done already, and writes the report.

Each task is stored under a hash of everything that its numbers depend on, as soon as it is done;
the same command again computes only what is missing. The model is loaded only if something is.
"""

import json
from collections.abc import Callable, Container
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longctx.data.store import Store
from longctx.eval import (
    babi,
    contexts,
    efficiency,
    needle,
    qa,
    retrieval_perplexity,
    ruler,
    short,
    template,
)
from longctx.eval import perplexity as ppl
from longctx.eval.config import BY_LENGTH, EvalConfig
from longctx.eval.figures import Results
from longctx.eval.journal import Journal
from longctx.eval.passkey import Quiz, effective_window, passkey
from longctx.eval.provenance import digest, facts, identity, label, made
from longctx.eval.report import (
    RESULTS,
    read_results,
    write_atomically,
    write_report,
    write_results,
)
from longctx.eval.subject import Sample, Subject, TaskResult, open_store, require_own_tokenizer
from longctx.eval.whole_window import whole_window
from longctx.models.device import device_for
from longctx.parallel.mesh import Mesh

SAMPLES = "samples.jsonl"


def _held_out(cfg: EvalConfig) -> tuple[Store, list[int], int]:
    """The store, the documents to score, and how many were too short."""
    store = open_store(cfg)
    limit = cfg.perplexity.max_documents
    return store, *ppl.choose_documents(store, max(cfg.lengths), limit, str(store.path))


def _perplexity(cfg: EvalConfig, subject: Subject) -> TaskResult:
    store, chosen, skipped = _held_out(cfg)
    own, lengths, model = cfg.perplexity, sorted(cfg.lengths), subject.model
    text = ppl.Text(store, chosen, cfg.batch_tokens, subject.journal)
    run: dict[str, Callable[[], dict[str, Any]]] = {
        "sliding_new_tokens": lambda: ppl.sliding_new_tokens(
            model, text, lengths, own.stride, own.document_tokens
        ),
        "whole_window": lambda: whole_window(model, text, lengths, own.stride, own.document_tokens),
        "single_pass_buckets": lambda: ppl.single_pass_buckets(model, text, lengths),
        "token_matched": lambda: ppl.token_matched(
            model, text, lengths, own.target_tokens, own.windows
        ),
    }
    common = {"bos": "document_start", "documents": len(chosen), "skipped": skipped}
    return {"protocols": {name: common | run[name]() for name in own.protocols}}, []


def _quiz(cfg: EvalConfig, subject: Subject, mode: str) -> Quiz:
    bos = subject.tokenizer.bos_token_id
    samples, seed, batch = cfg.samples, cfg.seed, cfg.batch_tokens
    return Quiz(subject.model, subject.encode, bos, samples, seed, mode, batch, subject.journal)


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
    "ruler": ruler.run,
    "needle": needle.run,
    "babi": babi.run,
    "short": short.run,
    "contexts": contexts.run,
    "retrieval_perplexity": retrieval_perplexity.run,
    "qa": qa.run,
    "template": template.run,
    "efficiency": efficiency.run,
}
# What a task's numbers depend on beside its own settings; looking for it finds what is missing.
INPUTS: dict[str, Callable[[EvalConfig], dict[str, Any]]] = {
    "perplexity": lambda cfg: {"held_out": _held_out(cfg)[0].meta["digest"][:16]},
    "passkey": _inputs,
    "k_max": _inputs,
    "ruler": ruler.inputs,
    "needle": needle.inputs,
    "babi": babi.inputs,
    "short": short.inputs,
    "contexts": contexts.inputs,
    "retrieval_perplexity": retrieval_perplexity.inputs,
    "qa": qa.inputs,
    "template": template.inputs,
    "efficiency": efficiency.inputs,
}


def settings_of(cfg: EvalConfig, task: str) -> dict[str, Any]:
    """What a task's numbers depend on beside the model; equal settings compare fairly.

    Raises:
        UserError: if something that the task reads is missing or does not fit.
    """
    lengths = {"lengths": sorted(cfg.lengths)} if task in BY_LENGTH else {}
    return {**lengths, **asdict(getattr(cfg, task)), **INPUTS[task](cfg)}


def _write_samples(out: Path, task: str, samples: list[Sample], kept: Container[str]) -> None:
    """Replaces the task's lines of `samples.jsonl`; of the others stay those of `kept` tasks."""
    path = out / SAMPLES
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    tasks = [json.loads(line)["task"] for line in lines]
    lines = [x for x, own in zip(lines, tasks, strict=True) if own != task and own in kept]
    lines += [json.dumps(sample) for sample in samples]
    write_atomically(path, "".join(f"{line}\n" for line in lines))


def evaluate(cfg: EvalConfig, ranks: Mesh | None = None) -> tuple[Results, str]:
    """Runs what is not in `out` already, then writes the report.

    Args:
        cfg: the evaluation.
        ranks: processes that share the samples of every task; None: this one alone.

    Returns:
        The content of `results.json`, and the text of `report.md` (empty but on the first rank).

    Raises:
        UserError: if a store, model or earlier result cannot be used as asked; before any task
            has started where that can be known.
    """
    out = Path(cfg.out)
    if cfg.joins:
        return _join(cfg, ranks is None or ranks.rank == 0)
    require_own_tokenizer(cfg)
    device = device_for(cfg.device)
    others = [read_results(Path(path)) for path in cfg.compare]
    settings = {task: settings_of(cfg, task) for task in dict.fromkeys(cfg.tasks)}
    own_identity = digest(identity(cfg))
    results = read_results(out) if (out / RESULTS).exists() else {}
    if results.get("identity") != own_identity:
        results = {"identity": own_identity, "tasks": {}}
    done: dict[str, Any] = results["tasks"]
    journal = _journal(out, ranks)
    subject = Subject(cfg, journal, ranks)
    for task, own in settings.items():
        key = digest(own)
        if done.get(task, {}).get("hash") == key:
            continue
        journal.begin(f"{task}-{digest(own_identity, own, cfg.batch_tokens, device.split(':')[0])}")
        result, samples = RUN[task](cfg, subject)
        how = made(cfg.seed)
        done[task] = {"hash": key, "settings": own, "result": result, "made": how}
        results |= {"model": cfg.path, **facts(subject), **how, "label": label(cfg)}
        if journal.first:
            out.mkdir(parents=True, exist_ok=True)
            _write_samples(out, task, samples, done)
            write_results(results, out)
        journal.end()
    results["label"] = label(cfg)
    if not journal.first:
        return results, ""
    write_results(results, out)
    return results, write_report([results, *others], out)


def _join(cfg: EvalConfig, first: bool) -> tuple[Results, str]:
    """The report of earlier results alone, those in `out` (if any) before those of `compare`."""
    out = Path(cfg.out)
    own = [read_results(out)] if (out / RESULTS).exists() else []
    found = [*own, *(read_results(Path(path)) for path in cfg.compare)]
    if not first:
        return found[0], ""
    out.mkdir(parents=True, exist_ok=True)
    said = f"Without lengths= nothing is measured: {len(found)} earlier results are joined.\n\n"
    return found[0], said + write_report(found, out)


def _journal(out: Path, ranks: Mesh | None) -> Journal:
    folder = out / "journal"
    if ranks is None:
        return Journal(folder)
    # Ranks that share a row do the same pieces; one of them writes them down.
    return Journal(folder, ranks.dp_rank, ranks.dp_size, ranks.barrier, writes=not ranks.sp_rank)
