"""Where numbers come from: which model, how it was loaded, which program computed them.

Costs a look at the model's files, and one `git describe`.
"""

import hashlib
import json
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from longctx.eval.evaluation import Evaluation
from longctx.eval.results import Results
from longctx.eval.subject import Subject, device_name, tokenizer_hash
from longctx.models.device import device_for, dtype_for
from longctx.models.export.restore import RECORD
from longctx.models.load import describe

WEIGHTS = (".safetensors", ".bin", ".gguf", ".json", ".model")


def identity(cfg: Evaluation) -> dict[str, Any]:
    """The model under test: its settings, and size and time of its files."""
    path = Path(cfg.path).expanduser()
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
        "dtype": dtype_for(cfg.dtype, device_for(cfg.device)),
    }


def digest(*parts: Any) -> str:
    """A short hash of anything JSON can hold."""
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


def label(cfg: Evaluation) -> str:
    """The model's name in tables and figures."""
    path = Path(cfg.path)
    name = path.resolve().parent.name if path.name == "hf" else cfg.model.name
    parts = [name]
    if cfg.attention is not None:
        parts.append(str(cfg.attention["name"]))
    if cfg.scaling is not None:
        parts.append(cfg.scaling.name)
    return cfg.label or " + ".join(parts)


def facts(subject: Subject) -> Results:
    """What a report says of the loaded model."""
    model = subject.model
    known = describe(model)
    rope = model.config.rope_parameters
    native = rope.get("original_max_position_embeddings") or known["window"] / known["rope_factor"]
    return {
        "parameters": known["parameters"],
        "attention": getattr(model.config, RECORD, {"name": "full"}),
        "rope": {
            "name": known["rope_type"],
            "factor": known["rope_factor"],
            "base": known["rope_base"],
        },
        "dtype": known["dtype"],
        "device": str(model.device),
        "device_name": device_name(model.device),
        "tokenizer_sha256": tokenizer_hash(subject.cfg),
        "native_window": round(native),
        "window": known["window"],
    }


def trained(path: str) -> dict[str, Any] | None:
    """On how many tokens the model was trained, as far as training runs recorded it.

    Args:
        path: of the model. `RUN/hf` is what the run in `RUN` wrote.

    Returns:
        `tokens` of that run and of those before it, and `start`, the model that the first of them
        started from. None without a record.
    """
    run = Path(path).expanduser().resolve().parent
    if Path(path).name != "hf":
        return None
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        tokens, start = int(json.loads(lines[-1])["tokens"]), settings["model"]["path"]
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return None
    before = trained(start) if start else None
    if before is None:
        return {"tokens": tokens, "start": start}
    return {"tokens": tokens + before["tokens"], "start": before["start"]}


def made(seed: int) -> Results:
    """How the numbers were made: program, versions, command, seed."""
    command = shlex.join(sys.orig_argv)
    return {"seed": seed, "versions": _versions(), "commit": _commit(), "command": command}
