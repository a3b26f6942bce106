"""srun's numbers become ranks; the shell of a job is no rank."""

from longctx.parallel.slurm import first_host, ranks

TASK = {
    "SLURM_JOB_ID": "71",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}


def test_a_task_of_srun_is_a_rank():
    found = ranks(TASK)
    port = int(found.pop("MASTER_PORT"))
    assert found == {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "gpu03"}
    assert 20000 <= port < 32000  # below the ports that Linux gives to clients
    assert int(ranks(TASK | {"SLURM_PROCID": "0"})["MASTER_PORT"]) == port
    assert int(ranks(TASK | {"SLURM_JOB_ID": "72"})["MASTER_PORT"]) != port
    assert int(ranks(TASK | {"SLURM_STEP_ID": "1"})["MASTER_PORT"]) != port


def test_a_given_address_stands():
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    assert ranks(TASK | given).items() >= given.items()


def test_other_launchers_and_shells_are_left_alone():
    assert ranks({}) == {}
    assert ranks(TASK | {"RANK": "3"}) == {}  # torchrun below srun
    shell = {key: value for key, value in TASK.items() if "STEP" not in key}
    assert ranks(shell | {"SLURM_NTASKS": "16"}) == {}  # the script of sbatch
    assert ranks(TASK | {"SLURM_STEP_NUM_TASKS": "1"}) == {}  # salloc's interactive step


def test_first_host():
    assert first_host("vm") == "vm"
    assert first_host("a1,a2") == "a1"
    assert first_host("a[1,3-5],b7") == "a1"
