"""Counts the project's own files whose code runs in one training step: what a reader must open.

    python lab/step_files.py [KEY=VALUE ...]      arguments of train.py, recipe=pi if none names one

A step of the run is taken at tiny size (as the parity certificate does it) in one process, its
second one; every file of `longctx/` and `recipes/` in which a function is
called is counted.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from longctx import cli  # noqa: E402
from longctx.config import RunConfig  # noqa: E402
from longctx.parallel import mesh  # noqa: E402
from longctx.parity import measure, shrink  # noqa: E402
from longctx.recipe import find_recipe  # noqa: E402
from longctx.train.trainer import Trainer  # noqa: E402


def step_files(arguments: Sequence[str]) -> list[str]:
    """The files of one training step, as paths from the root.

    Args:
        arguments: of train.py.
    """
    seen: set[str] = set()

    def look(frame: FrameType, event: str, argument: Any) -> None:
        seen.add(frame.f_code.co_filename)

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        run = shrink.tiny(cli.compose(list(arguments), RunConfig, "train", "run_schema"), place)
        shrink.write_store(place / "store")
        recipe = find_recipe(run.builder)
        run = measure.of_kind(run, measure.kinds_of(run, recipe)[0])
        trainer = Trainer(run, recipe, mesh.start())
        trainer.train_step(0)
        sys.settrace(look)
        trainer.train_step(1)
        sys.settrace(None)
        trainer.rows.close()
        trainer.engine.close()
    inside = [Path(name).resolve() for name in seen if Path(name).is_file()]
    paths = {str(path.relative_to(ROOT)) for path in inside if path.is_relative_to(ROOT)}
    return sorted(path for path in paths if path.startswith(("longctx/", "recipes/")))


def main(arguments: list[str]) -> None:
    """Prints the files and how many there are."""
    if not any(argument.startswith("recipe=") for argument in arguments):
        arguments = ["recipe=pi", *arguments]
    if not any(argument.startswith("data=") for argument in arguments):
        arguments = [*arguments, "data=store", "data.store=[x]"]
    found = step_files(arguments)
    print("\n".join(found) + f"\n{len(found)} files")


if __name__ == "__main__":
    main(sys.argv[1:])
