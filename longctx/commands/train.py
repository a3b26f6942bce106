"""Trains one recipe on one model, saves checkpoints, and exports the last one."""

import sys
from dataclasses import asdict
from pathlib import Path

from longctx import cli
from longctx.cli import chain, places
from longctx.config import RunConfig


def train(run: RunConfig) -> float | None:
    """Prints the plan, or trains, saves and exports.

    Args:
        run: the run.

    Returns:
        The last held-out loss, which a sweep minimises; None without held-out data.
    """
    from longctx.parallel import heartbeat, mesh, orphans
    from longctx.plan import describe
    from longctx.plan.check import require_fit
    from longctx.recipe import find_recipe

    recipe = find_recipe(run.builder)
    chain.require_made(run)
    if run.dry_run:
        print(describe.report(run, recipe))
        return None

    places.require_data(run.data.store)
    orphans.end_with_launcher()
    ranks = mesh.start(run.parallel.sp)
    require_fit(run, recipe, ranks.ranks, ranks.least)
    from torch import nn

    from longctx.eval.in_loop import probe
    from longctx.recipe import Data
    from longctx.train.checkpoint.export_checkpoint import export_checkpoint
    from longctx.train.log import held_out_loss, say, write_config
    from longctx.train.signals import EXIT_CODE, Stopped
    from longctx.train.trainer import Trainer

    def announce(model: nn.Module, data: Data) -> None:
        write_config(Path(run.run_dir), asdict(run))
        say(describe.header(run, model, data, ranks.ranks))

    with heartbeat.Heartbeat(ranks, run.parallel.lost_after):
        trainer = Trainer(run, recipe, ranks, announce, probe(run))
        try:
            last = trainer.fit()
        except Stopped as stopped:
            if ranks.main:
                say(str(stopped))
            sys.exit(EXIT_CODE)
        if ranks.main:
            say(f"exported {export_checkpoint(last, recipe.build_model, Path(run.run_dir, 'hf'))}")
        ranks.barrier()
    return held_out_loss(Path(run.run_dir))


def main() -> None:
    """The command line."""
    with cli.mistakes_in_one_line():
        if chain.take_flag(sys.argv):
            chain.train(chain.stages(sys.argv[1:]), sys.argv[1:])
            return
    cli.run(train, RunConfig, "train", "run_schema")
