"""A run that cannot fit ends before it starts: one line, exit code 2; `force=true` starts it."""

from longctx.plan import check
from longctx.plan.machine import Machine
from tests.helpers.entry import run_entry
from tests.helpers.tiny import make_store, tiny_arguments

LONG = ("train.micro_batch_rows=8", "data.seq_len=256", "train.max_steps=1", "data.held_out=[]")


def little_memory() -> None:
    machine = Machine(gpu_memory=0.005, reserve=0, is_gpu=False)  # GiB
    check.here = lambda ranks: machine


def test_what_cannot_fit_does_not_start(tmp_path):
    store = make_store(tmp_path / "store")
    arguments = tiny_arguments(store, tmp_path / "run", *LONG)
    done = run_entry(arguments, tmp_path / "log", little_memory)
    assert done.error.startswith("this run needs about 0.00628 GiB a rank at loss, and 0.005 GiB")
    assert "parallel.activation_checkpointing=true would make it fit" in done.error
    assert not (tmp_path / "run").exists()
    done = run_entry([*arguments, "force=true"], tmp_path / "log", little_memory)
    assert done.code == 0, done
    assert (tmp_path / "run" / "hf").is_dir()
