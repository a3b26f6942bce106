"""The optional launcher and sweeper, if installed: `pip install -e '.[slurm,optuna]'`."""

import hydra
import pytest

from longctx import cli
from longctx.config import RunConfig


def composed(*overrides: str):
    """Hydra's own part of a configuration."""
    cli.compose(["recipe=pi"], RunConfig, "train", "run_schema")  # registers the schema
    with hydra.initialize_config_dir(str(cli.CONF), version_base=None):
        found = hydra.compose("train", ["recipe=pi", *overrides], return_hydra_config=True)
    return found.hydra


def test_without_them_jobs_are_our_own():
    found = composed("hydra.launcher.nproc=4")
    assert found.launcher._target_ == "hydra_plugins.longctx_jobs.launcher.JobsLauncher"
    assert (found.launcher.nproc, found.launcher.parallel) == (4, 1)
    assert found.sweep.dir == "outputs/sweep" and not found.job.chdir


def test_submitit():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    found = composed("hydra/launcher=submitit_slurm", "hydra.launcher.tasks_per_node=8")
    assert found.launcher._target_.endswith("submitit_launcher.SlurmLauncher")
    assert found.launcher.submitit_folder == "outputs/sweep/.submitit/%j"


def test_optuna():
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    found = composed("hydra/sweeper=optuna", "hydra.launcher.parallel=2")
    assert found.sweeper.direction.name == "minimize"
    assert found.launcher._target_.endswith("JobsLauncher")
