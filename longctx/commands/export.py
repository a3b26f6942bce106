"""Exports a checkpoint as a directory that `AutoModelForCausalLM.from_pretrained` loads."""

import argparse
import sys
from pathlib import Path

from longctx import cli


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="longctx export", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="RUN/checkpoints/step_XXXXXXXX")
    parser.add_argument("directory", type=Path, help="where to write; an older export is replaced")
    given = parser.parse_args(sys.argv[1:])

    from longctx.recipe import find_recipe
    from longctx.train.checkpoint.export_checkpoint import export_checkpoint
    from longctx.train.checkpoint.reader import open_checkpoint

    with cli.mistakes_in_one_line():
        recipe = find_recipe(open_checkpoint(given.checkpoint).meta["run"]["builder"])
        print(
            f"exported {export_checkpoint(given.checkpoint, recipe.build_model, given.directory)}"
        )
