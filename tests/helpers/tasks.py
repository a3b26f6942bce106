"""Every evaluation task that is found, at the tiny settings of its example: for the shared tests.

A task is a file in `longctx/eval/tasks/`; its example is `tests/examples/tasks/NAME.yaml`: settings
of `evaluate.py` with which it takes seconds on a random model with a window of 512 tokens. In them
`{folder}` is the folder that `write_world` fills.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from longctx import cli
from longctx.data.store import StoreWriter, tokenizer_sha256
from longctx.eval.config import EvalConfig, found_tasks
from longctx.models.load import build_model, load_tokenizer
from tests.helpers.material import ESSAY, write_material
from tests.helpers.process import ROOT

EXAMPLES = ROOT / "tests" / "examples" / "tasks"
KINDS = found_tasks()
TOKENIZER = ROOT / "assets" / "lab-llama"
ARCHITECTURE = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}  # fmt: skip


def example(name: str) -> dict[str, Any]:
    """The settings of a task's example; fails if it has none."""
    path = EXAMPLES / f"{name}.yaml"
    assert path.is_file(), f"task {name!r} has no example tests/examples/tasks/{name}.yaml"
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def write_world(folder: Path) -> Path:
    """A tiny random model, two stores of its tokenizer, RULER's material and some questions."""
    build_model(ARCHITECTURE, seed=0).save_pretrained(folder / "model")
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, folder / "model")
    encode = load_tokenizer(str(folder / "model")).encode
    sha = tokenizer_sha256(folder / "model")
    for store, letters in (("store", "abcd"), ("other_store", "efgh")):
        with StoreWriter(folder / store, sha, 4096, 1, 2, {}) as writer:
            for i, letter in enumerate(letters):
                text = ESSAY.replace("about", f"about {letter}")[: 2400 + 100 * i]
                writer.add([1, *encode(text, add_special_tokens=False), 2])
    write_material(folder / "material")
    questions = [
        {
            "_id": word,
            "question": f"What is {word}?",
            "answer": word,
            "supporting_facts": [[word, 0]],
            "context": [[word, [f"It is a {word}."]]],
        }
        for word in ("cat", "dog", "hen", "cow")
    ]
    (folder / "qa.json").write_text(json.dumps(questions))
    return folder


def compose(*arguments: str) -> EvalConfig:
    """The settings of a command line of `evaluate.py`."""
    return cli.compose(list(arguments), EvalConfig, "evaluate", "eval_schema")


def tiny(name: str, folder: Path, out: Path, *more: str) -> EvalConfig:
    """The evaluation of a task's example.

    Args:
        name: of the task.
        folder: what `write_world` filled.
        out: directory of results.
        more: overrides.
    """
    given = {"tasks": [name], "model": f"{folder}/model", "out": str(out), "device": "cpu"}
    given |= {"held_out": f"{folder}/store"} | example(name)
    return compose(*overrides(given, folder), *more)


def overrides(values: dict[str, Any], folder: Path, prefix: str = "") -> list[str]:
    """Nested settings as arguments of a command line, with `{folder}` filled in."""
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += overrides(value, folder, f"{prefix}{key}.")
            continue
        text = json.dumps(value).replace('"', "") if not isinstance(value, str) else value
        found.append(f"{prefix}{key}={text.replace('{folder}', str(folder))}")
    return found
