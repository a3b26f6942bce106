"""A point is named by what the sweep varies; what a sweep cannot mean is refused."""

import pytest

from hydra_plugins.longctx_jobs._names import LONGEST, name_points, point_name
from longctx import cli
from longctx.errors import UserError

EXCLUDE = "hydra.job.config.override_dirname.exclude_keys"


@pytest.fixture(autouse=True)
def no_rank(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


def test_what_is_fixed_stays_out_of_the_names():
    given = ["-m", "recipe=pi,direct_ft", "+model.x='a,b'", "optim.lr=choice(1,2)", "seed=3"]
    assert name_points([*given, "hydra.launcher.nproc=2"]) == [f"{EXCLUDE}=['model.x','seed']"]
    assert name_points(["-m"]) == [f"{EXCLUDE}=[]"]


def test_names_are_plain_short_and_different():
    assert point_name("optim.lr-1e-05+recipe-pi") == "optim.lr-1e-05+recipe-pi"
    assert point_name("") == "point"
    paths = [point_name(f"model.path-'{x}'") for x in ("/a/b", "/a_b", "a/b")]
    assert len(set(paths)) == 3 and all(set("/'=,") & set(x) == set() for x in paths)
    long = [point_name("x" * LONGEST + end) for end in "ab"]
    assert long[0] != long[1] and max(map(len, long)) <= LONGEST + 9


def test_one_run_directory_for_many_points_is_refused():
    with pytest.raises(UserError, match=r"^run_dir= is the directory of one run: .*sweep\.dir=DIR"):
        name_points(["-m", "seed=1,2", "run_dir=x"])


@pytest.mark.parametrize("given", ["dry_run=true", "++dry_run=1", "dry_run=true,false"])
def test_a_sweep_has_no_dry_run(given):
    with pytest.raises(UserError, match=r"^a sweep has no dry run: give one point without -m$"):
        cli.prepare(["-m", "seed=1,2", given], "train")
    assert cli.prepare([given], "train") == [given]
    assert cli.prepare(["-m", "seed=1,2", "dry_run=false"], "train")


def test_a_sweep_below_a_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"python train\.py -m \.\.\. hydra\.launcher\.nproc=N"):
        cli.prepare(["--local_rank=0", "-m", "seed=1,2"], "train")
    assert cli.prepare(["--local_rank=0", "seed=1"], "train") == ["seed=1"]


def test_a_sweep_over_models(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.prepare([f"model={one}"], "train") == ["model=path", f"model.path='{one}'"]
    found = cli.prepare(["-m", f"model={one},{two}"], "train")
    assert found == ["-m", "model=path", f"model.path='{one}','{two}'", f"{EXCLUDE}=['model']"]
    assert cli.prepare(["-m", "model=lab,llama2_7b"], "train")[1] == "model=lab,llama2_7b"
    assert (
        cli.prepare(["-m", "model=choice(lab,llama2_7b)"], "train")[1]
        == "model=choice(lab,llama2_7b)"
    )
    with pytest.raises(UserError, match="names of conf/model or paths, not both; lab has a path"):
        cli.prepare(["-m", f"model=lab,{one}"], "train")
    with pytest.raises(UserError, match="model=nowhere is neither a path nor one of"):
        cli.prepare(["-m", f"model={one},nowhere"], "train")
    assert cli.prepare(["model=lab,llama2_7b"], "train") == [
        "model=lab,llama2_7b"
    ]  # Hydra explains it


def test_a_model_by_path_is_named_after_it(tmp_path):
    from longctx.config import RunConfig

    (tmp_path / "mine").mkdir()
    run = cli.compose([f"model={tmp_path}/mine", "recipe=pi"], RunConfig, "train", "run_schema")
    assert (run.model.name, run.model.path) == ("mine", f"{tmp_path}/mine")
    assert run.run_dir == "outputs/pi-mine"
