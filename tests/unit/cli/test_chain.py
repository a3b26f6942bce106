"""A chain holds what is missing before a run, deepest first, each stage with the run's decoder."""

from pathlib import Path

import pytest

from longctx.cli import chain, families
from longctx.errors import UserError

ORDER = ["cepe_mlm", "cepe_warmup_short", "cepe_warmup", "cepe"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def recipes(*arguments):
    return [stage.recipe for stage in chain.stages(list(arguments))]


def test_cepe_on_the_lab_model():
    asked = ["recipe=cepe", "model=lab", "seed=3", "train.max_steps=5", "run_dir=x", "optim.lr=1"]
    *before, last = chain.stages(asked)
    assert [stage.recipe for stage in (*before, last)] == ORDER
    assert last.arguments == asked and last.makes is None
    for stage in before:
        place = f"outputs/{stage.recipe}-lab"
        assert stage.makes == f"{place}/{families.EXPORT}"
        assert stage.arguments == [
            f"recipe={stage.recipe}", "model=lab", "seed=3", f"run_dir='{place}'",
        ]  # fmt: skip


def test_a_chat_model_is_made_first_and_a_stage_may_have_another_model():
    found = chain.stages(["recipe=ceped", "model=lab_chat", "attention=dca"])
    assert [stage.recipe for stage in found] == ["chat_sft", *ORDER[:3], "ceped"]
    arguments = {stage.recipe: stage.arguments for stage in found}
    for name, model in (("chat_sft", "lab"), ("cepe_mlm", "lab"), ("cepe_warmup", "lab_chat")):
        assert f"model={model}" in arguments[name]
        assert ("attention=dca" in arguments[name]) == (model == "lab_chat")


def test_a_large_model_takes_the_published_encoder():
    assert recipes("recipe=cepe", "model=llama2_7b") == ["cepe_warmup", "cepe"]


def test_what_is_there_is_not_made_again():
    Path("outputs/cepe_warmup_short-lab/hf").mkdir(parents=True)
    assert recipes("recipe=cepe", "model=lab") == ["cepe_warmup", "cepe"]
    Path("outputs/cepe_warmup-lab/hf").mkdir(parents=True)
    assert recipes("recipe=cepe", "model=lab") == ["cepe"]
    assert recipes("recipe=cepe", "model=lab", "cepe.start=null") == ["cepe_mlm", "cepe"]


def test_a_run_that_starts_from_nothing_is_a_chain_of_one():
    assert recipes("recipe=pi", "model=lab") == ["pi"]
    assert recipes("recipe=cepe", "model=lab", "encoder.path=a/b", "cepe.start=null") == ["cepe"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["recipe=cepe", "cepe.start=/no/model"], "cepe.start=/no/model is not there; recipe=cepe"),
        (["-m", "recipe=cepe", "seed=1,2"], "chain=true is for one run"),
    ],
)
def test_what_a_chain_cannot_make_is_refused(arguments, line):
    with pytest.raises(UserError, match=f"^{line}"):
        chain.stages(arguments)


def test_a_chain_below_a_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"chain=true starts the processes .* without torchrun"):
        chain.stages(["recipe=cepe"])


def test_the_flag_is_taken_off():
    given = ["recipe=cepe", "chain=True"]
    assert chain.take_flag(given) and given == ["recipe=cepe"]
    assert not chain.take_flag(["recipe=cepe"]) and not chain.take_flag(["chain=false"])
    with pytest.raises(UserError, match=r"^chain=yes is neither true nor false$"):
        chain.take_flag(["chain=yes"])


def test_every_made_by_is_a_run_that_exists():
    """A choice that another run makes names a recipe and, where it says one, a model."""
    from longctx.cli import places

    said = [places.says(g, x, "made_by") for g in ("model", "encoder") for x in places.choices(g)]
    said += [
        (places.says(home, x, "cepe") or {}).get("made_by")
        for home in ("recipe", "recipe_model")
        for x in places.choices(home)
    ]
    found = [dict(part.split("=") for part in words.split()) for words in said if words]
    assert len(found) > 3
    for words in found:
        assert words["recipe"] in places.choices("recipe")
        assert words.get("model", "lab") in places.choices("model")
