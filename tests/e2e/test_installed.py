"""The package as `pip install` leaves it: its command from any folder, with a user's choices."""

import os
import subprocess
import sys
import zipfile

import pytest
import yaml

from longctx.data.store import tokenizer_sha256
from tests.helpers.process import ROOT, torchrun
from tests.helpers.tiny import make_store

TINY = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 32, "tie_word_embeddings": True,
}  # fmt: skip
BUILDER = '''"""A recipe of a user's own, beside a conf folder of his own."""

import longctx
from longctx.recipes.causal_lm import RECIPE

print("longctx is", longctx.__file__)
'''


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the tree: building leaves traces in it."""
    place = tmp_path_factory.mktemp("wheel")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "longctx", "conf",
         "recipes", "data_prep", "hydra_plugins", "pyproject.toml", "LICENSE", "README.md"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listing.split("\0")):
        path = place / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            path.symlink_to((ROOT / name).readlink())
        elif (ROOT / name).exists():
            path.write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(place), str(place / "tree")], check=True)
    return next(place.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """Where the wheel is installed."""
    target = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    subprocess.run([*install, "--target", str(target), str(wheel)], check=True)
    return target


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, lab_model):
    """A user's folder: his data, his recipes and models, his module; no repository around it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    make_store(folder / "store", tokenizer=tokenizer_sha256(lab_model))
    (folder / "mine.py").write_text(BUILDER)
    train = {"max_steps": 2, "batch_rows": 2, "micro_batch_rows": 1, "eval_every": 0}
    tokenizer = str(lab_model)
    own = {
        "model/tiny": {"name": "tiny", "path": None, "architecture": TINY, "tokenizer": tokenizer},
        "model/base": {"name": "base", "path": "runs/first/hf", "architecture": {},
                       "tokenizer": None, "made_by": "recipe=first model=tiny"},
        "recipe/first": {"defaults": ["pretrain"], "name": "first", "builder": "mine",
                         "sized_for": None, "data": {"seq_len": 16}, "train": train},
        "recipe/second": {"defaults": ["first", {"override /rope": "pi"}], "name": "second",
                          "data": {"seq_len": 64}},
    }  # fmt: skip
    for name, settings in own.items():
        path = folder / "conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "# @package _global_\n" * name.startswith("recipe") + yaml.safe_dump(settings)
        )
    return folder


def start(command, site, folder):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = str(site)
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def longctx(site, folder, *arguments):
    return start([sys.executable, str(site / "bin" / "longctx"), *arguments], site, folder)


def test_what_is_installed(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"longctx", "hydra_plugins"}
    for folder in ("conf", "recipes", "data_prep"):
        ours = [p for p in (ROOT / folder).rglob("*") if p.suffix in (".yaml", ".py", ".css")]
        assert {f"longctx/{p.relative_to(ROOT)}" for p in ours} <= set(names)
    assert "longctx/py.typed" in names


def test_the_command_plans_from_any_folder(site, elsewhere):
    more = ["recipe=longgen", "model=llama2_7b", "seq_len=131072", "gpus=8"]
    done = longctx(site, elsewhere, "plan", *more)
    assert done.returncode == 0, done.stderr
    assert "131,072 tokens per rank x 8 ranks" in done.stdout and "FITS: " in done.stdout


def test_a_model_of_the_repository_is_missed_in_one_line(site, elsewhere):
    done = longctx(site, elsewhere, "train", "recipe=pi")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: model=lab needs assets/lab-llama of longctx's repository, which is not installed "
        "with the package: give model=PATH\n"
    )


def test_a_chain_of_runs_with_choices_of_ones_own(site, elsewhere):
    """A user's recipe, model and module; what the run starts from is trained first, and once."""
    asked = [
        "train", "--config-dir", "conf", "recipe=second", "model=base", "data=store",
        "data.store=[store]", "logger=none", "run_dir=runs/second",
    ]  # fmt: skip
    refused = longctx(site, elsewhere, *asked)
    assert refused.returncode == 2
    assert refused.stderr == (
        "error: model.path=runs/first/hf is not there: recipe=first model=tiny makes it. "
        "chain=true trains what is missing first, in this order: first\n"
    )
    chain = [*asked, "chain=true", "hydra.launcher.kind=python"]
    done = longctx(site, elsewhere, *chain)
    assert done.returncode == 0, done.stderr + done.stdout
    lines = done.stdout.splitlines()
    assert [x[:5] for x in lines if x.startswith("[")] == ["[1/2]", "[2/2]"]
    home = {x.removeprefix("longctx is ") for x in lines if x.startswith("longctx is ")}
    assert home == {str(site / "longctx" / "__init__.py")}
    for run in ("first", "second"):
        assert (elsewhere / "runs" / run / "hf" / "config.json").is_file()
    again = longctx(site, elsewhere, *chain, "dry_run=true")
    assert again.stdout.count("longctx train") == 1 and again.stdout.startswith("[1/1] ")


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_and_a_run_as_the_model(site, elsewhere):
    """`torchrun -m longctx train`; `model=RUN` finds the export of that run and its family."""
    asked = [
        "train", "--config-dir", "conf", "recipe=second", "model=runs/first", "data=store",
        "data.store=[store]", "logger=none", "run_dir=runs/third",
    ]  # fmt: skip
    done = start(torchrun(asked, ("-m", "longctx")), site, elsewhere)
    assert done.returncode == 0, done.stderr
    assert "x 2 ranks x 1 accumulation" in done.stderr
    assert done.stdout.count("note: ") + done.stderr.count("note: ") == 0
    recorded = yaml.safe_load((elsewhere / "runs/third/config.yaml").read_text())
    assert recorded["model"]["name"] == "first"
    assert recorded["model"]["path"] == str(elsewhere / "runs/first/hf")
