"""Trains one recipe: `deepspeed train.py recipe=pi`. See `python train.py --help`."""

import importlib
import sys
from dataclasses import asdict
from pathlib import Path

from longctx import cli
from longctx.config import RunConfig
from longctx.errors import UserError


def main(run: RunConfig) -> float | None:
    """Prints the plan, or trains, saves, exports, and returns what a sweep minimises."""
    from longctx import plan
    from longctx.parallel import mesh, watch

    try:
        recipe = importlib.import_module(run.builder).RECIPE
    except ModuleNotFoundError as error:
        if error.name != run.builder:
            raise
        raise UserError(f"builder={run.builder}: there is no such module") from None
    if run.dry_run:
        print(plan.report(run, recipe))
        return None

    watch.end_with_launcher()
    ranks = mesh.start()
    from torch import nn

    from longctx.recipe import Data
    from longctx.train.export import export_checkpoint
    from longctx.train.log import held_out_loss, say, write_config
    from longctx.train.stop import EXIT_CODE, Stopped
    from longctx.train.trainer import Trainer

    def announce(model: nn.Module, data: Data) -> None:
        write_config(Path(run.run_dir), asdict(run))
        say(plan.header(run, model, data, ranks.dp_size))

    trainer = Trainer(run, recipe, ranks, announce)
    try:
        last = trainer.fit()
    except Stopped as stopped:
        if ranks.main:
            say(str(stopped))
        sys.exit(EXIT_CODE)
    if ranks.main:
        exported = export_checkpoint(last, recipe.build_model, Path(run.run_dir) / "hf")
        say(f"exported {exported}")
    ranks.barrier()
    return held_out_loss(Path(run.run_dir))


if __name__ == "__main__":
    cli.run(main, RunConfig, "train", "run_schema")
