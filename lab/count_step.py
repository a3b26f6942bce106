"""Counts the project's own files that execute during one training step, the second of a run.

    python lab/count_step.py [ROOT] [KEY=VALUE ...]   default: this repository, recipe=pi model=lab

The run is a tiny one in a temporary folder. A file counts if one of its functions is called between
the start of `Trainer.train_step` and a second after its end, in any thread: data is read ahead.
"""

import sys
import tempfile
import threading
import time
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]


def main() -> None:
    """Prints the files and how many they are."""
    given = sys.argv[1:]
    root = Path(given.pop(0)).resolve() if given and "=" not in given[0] else HERE
    sys.path.insert(0, str(root))

    from longctx import cli
    from longctx.config import RunConfig
    from longctx.parallel import mesh
    from longctx.train.trainer import Trainer
    from tests.helpers.tiny import make_store

    seen: set[str] = set()
    counting = threading.Event()

    def watch(frame: Any, event: str, _: Any) -> None:
        if counting.is_set() and event == "call" and frame.f_code.co_name != "<module>":
            seen.add(frame.f_code.co_filename)

    threading.setprofile(watch)  # of threads to come
    sys.setprofile(watch)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = (root / "assets/lab-llama/tokenizer.model").read_bytes()
        store = make_store(folder / "store", tokenizer=sha256(tokenizer).hexdigest())
        arguments = [
            f"data.store=[{store}]", "data.weights=[1]", "data.held_out=[]",
            "data.seq_len=64", "train.batch_rows=4", "train.micro_batch_rows=2", "logger=none",
            "train.eval_rows=0",
            f"run_dir={folder / 'run'}",
        ]  # fmt: skip
        arguments += given or ["recipe=pi", "model=lab"]
        run = cli.compose(arguments, RunConfig, "train", "run_schema")
        trainer = Trainer(run, import_module(run.builder).RECIPE, mesh.start(run.parallel.sp))
        trainer.train_step(0)
        counting.set()
        trainer.train_step(1)
        time.sleep(1)
        counting.clear()
    folders = ("longctx", "recipes", "data_prep")
    places = [Path(file).resolve() for file in seen]
    own = sorted({str(p.relative_to(root)) for p in places if p.is_relative_to(root)})
    own = [path for path in own if path.startswith(folders)]
    print(*own, f"{len(own)} files", sep="\n")


if __name__ == "__main__":
    main()
