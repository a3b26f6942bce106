"""Runs the tasks of an evaluation, keeps what is done already, and writes the report.

Each task is stored under a hash of everything that its numbers depend on, as soon as it is done;
the same command again computes only what is missing. The model is loaded only if something is.
"""

import json
from collections.abc import Container
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longctx.eval.evaluation import Evaluation
from longctx.eval.journal import Journal
from longctx.eval.provenance import digest, facts, identity, label, made, trained
from longctx.eval.report import write_report
from longctx.eval.results import RESULTS, Results, read_results, write_atomically, write_results
from longctx.eval.subject import Subject, require_own_tokenizer
from longctx.eval.task import Sample
from longctx.models.device import device_for
from longctx.parallel.mesh import Mesh

SAMPLES = "samples.jsonl"


def settings_of(cfg: Evaluation, task: str) -> dict[str, Any]:
    """What a task's numbers depend on besides the model; equal settings compare fairly.

    Raises:
        UserError: if something that the task reads is missing or does not fit.
    """
    own = cfg.task(task)
    lengths = {"lengths": sorted(cfg.lengths)} if own.by_length else {}
    return {**lengths, **asdict(own), **own.inputs(cfg)}


def _write_samples(out: Path, task: str, samples: list[Sample], kept: Container[str]) -> None:
    """Replaces the task's lines of `samples.jsonl`; of the others stay those of `kept` tasks."""
    path = out / SAMPLES
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    tasks = [json.loads(line)["task"] for line in lines]
    lines = [x for x, own in zip(lines, tasks, strict=True) if own != task and own in kept]
    lines += [json.dumps(sample) for sample in samples]
    write_atomically(path, "".join(f"{line}\n" for line in lines))


def evaluate(cfg: Evaluation, ranks: Mesh | None = None) -> tuple[Results, str]:
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
    settings = {task: settings_of(cfg, task) for task in cfg.chosen}
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
        result, samples = cfg.task(task).run(cfg, subject)
        how = made(cfg.seed)
        done[task] = {"hash": key, "settings": own, "result": result, "made": how}
        results |= {"model": cfg.path, **facts(subject), **how, "label": label(cfg)}
        if journal.first:
            out.mkdir(parents=True, exist_ok=True)
            _write_samples(out, task, samples, done)
            write_results(results, out)
        journal.end()
    results["label"] = label(cfg)
    if (run := trained(cfg.path)) is not None:
        results["trained"] = run
    if not journal.first:
        return results, ""
    write_results(results, out)
    return results, write_report([results, *others], out)


def _join(cfg: Evaluation, first: bool) -> tuple[Results, str]:
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
