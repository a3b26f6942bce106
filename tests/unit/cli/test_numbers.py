"""Every recipe with every model composes, or is refused in one line that says what to give."""

import pytest
import yaml

from longctx import cli
from longctx.cli import families, numbers, places
from longctx.cli.mistakes import one_line
from longctx.config import RunConfig
from longctx.config.generate import GenerateConfig
from longctx.errors import UserError
from longctx.eval.config import EvalConfig
from longctx.models.choose import attention_method

RECIPES, MODELS = places.choices("recipe"), sorted({*places.choices("model")} - {"path"})
FIRST = {families.of_model(model): model for model in reversed(MODELS)}  # a model of each family


def compose(*arguments):
    return cli.compose(list(arguments), RunConfig, "train", "run_schema")


def tokens(run):
    return run.data.seq_len * run.train.batch_rows


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_composes_with_a_family_or_is_refused_in_one_line(recipe):
    """A lab model never gets the numbers of a paper, whatever the recipe."""
    for family, model in FIRST.items():
        try:
            run = compose(f"recipe={recipe}", f"model={model}")
        except Exception as error:
            line = one_line(error)
            assert "\n" not in line and line.startswith(("recipe=", "encoder=")), line
            if line.startswith("recipe="):
                assert recipe not in numbers.with_numbers(family)
                sized = ["data.seq_len=256", "train.batch_rows=16", "train.micro_batch_rows=1"]
                assert tokens(compose(f"recipe={recipe}", f"model={model}", *sized)) == 4096
        else:
            assert run.model.family == family
            if family == "lab":
                assert recipe in numbers.with_numbers("lab")
                assert run.train.dtype == "fp32" and tokens(run) <= 65_536


@pytest.mark.parametrize("model", MODELS)
def test_a_model_takes_the_numbers_of_its_family(model):
    first = compose("recipe=pi", f"model={FIRST[families.of_model(model)]}")
    run = compose("recipe=pi", f"model={model}")
    assert run.model.name == model
    for part in ("data", "train", "optim", "rope", "attention"):
        assert getattr(run, part) == getattr(first, part)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_says_for_which_models_its_numbers_are(recipe):
    assert places.says("recipe", recipe, "sized_for") in {families.of_model(m) for m in MODELS}


def test_a_refusal_says_what_to_give():
    with pytest.raises(UserError) as caught:
        compose("recipe=pi_32k", "model=lab_chat", "data.seq_len=512")
    assert str(caught.value) == (
        "recipe=pi_32k has numbers for llama2_7b, 128 rows of 512 tokens a step, and none for "
        "model=lab_chat (family lab): give data.seq_len=N and train.batch_rows=N, or one of "
        f"recipe={','.join(numbers.with_numbers('lab'))}"
    )


@pytest.fixture
def exported(tmp_path):
    """A run of a lab model with its export."""
    (tmp_path / "run" / "hf").mkdir(parents=True)
    (tmp_path / "run" / "hf" / "config.json").write_text("{}")
    run = {"model": {"name": "mine", "family": "lab"}}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(run))
    return tmp_path / "run"


@pytest.mark.parametrize("given", ["", "/hf"])
def test_a_model_that_a_run_exported_has_the_family_of_that_run(exported, given):
    run = compose("recipe=pi", f"model={exported}{given}")
    assert (run.model.path, run.model.name) == (f"{exported}/hf", "run")
    assert (run.model.family, run.data.seq_len) == ("lab", compose("recipe=pi").data.seq_len)
    other = compose("recipe=pi", f"model={exported}{given}", "family=llama2_7b")
    assert (other.model.family, other.data.seq_len) == ("llama2_7b", 8192)


def test_a_run_is_evaluated_and_continued_by_its_directory(exported):
    asked = (["tasks=[passkey]", "lengths=[256]", "out=x"], EvalConfig, "evaluate", "eval_schema")
    asked_too = (["prompt=a"], GenerateConfig, "generate", "generate_schema")
    for arguments, *rest in (asked, asked_too):
        found = cli.compose([f"model={exported}", *arguments], *rest).model
        assert (found.path, found.name) == (f"{exported}/hf", "run")


def test_an_old_run_is_known_by_the_name_of_its_model(exported):
    (exported / "config.yaml").write_text("model: {name: lab_scratch}")
    assert compose("recipe=pi", f"model={exported}").model.family == "lab"


def test_a_run_without_an_export_is_said_to_be_one(exported):
    (exported / "hf" / "config.json").unlink()
    with pytest.raises(
        UserError, match=r"is a run without an export: .* longctx export CHECKPOINT"
    ):
        compose("recipe=pi", f"model={exported}")


def told(*arguments):
    """The line about the numbers of a run."""
    given = list(arguments)
    run = compose(*given)
    choices = dict(a.split("=", 1) for a in cli.prepare(given, "train"))
    return numbers.require_sized(numbers.Composing("llama2_7b"), run, choices, given)


def test_an_unknown_model_takes_the_papers_numbers_visibly(tmp_path):
    line = told("recipe=pi", f"model={tmp_path}")
    assert line == (
        "note: recipe=pi has numbers for llama2_7b, 64 rows of 8,192 tokens a step, and takes them "
        f"for {tmp_path.name}, a model of an unknown family: family=NAME takes those of another, "
        "data.seq_len=N and train.batch_rows=N your own"
    )
    sized = ("data.seq_len=64", "train.batch_rows=1", "train.micro_batch_rows=1")
    assert told("recipe=pi", f"model={tmp_path}", *sized) is None


# --- numbers for what is chosen -------------------------------------------------------------------

ATTENTIONS, ROPES = places.choices("attention"), places.choices("rope")
# Recipes that are made for a method meet every method, the others one each.
CHOOSES = "override /attention"
MADE_FOR = [
    name
    for name in RECIPES
    if places.says("recipe", name, "chosen")
    or any(CHOOSES in entry for entry in places.says("recipe", name, "defaults") or [])
]
PAIRS = {(x, a) for x in MADE_FOR for a in ATTENTIONS}
PAIRS |= {(x, ATTENTIONS[i % len(ATTENTIONS)]) for i, x in enumerate(RECIPES)}


@pytest.mark.parametrize(("recipe", "attention"), sorted(PAIRS))
def test_another_attention_or_rope_needs_no_deletions(recipe, attention):
    """Only numbers that the method itself has are there, whatever the recipe is made for."""
    model = FIRST["lab" if recipe in numbers.with_numbers("lab") else "llama2_7b"]
    rope = ROPES[ATTENTIONS.index(attention) % len(ROPES)]
    more = ["rope.base=1e6"] if rope == "abf" else []
    asked = [f"model={model}", f"attention={attention}", f"rope={rope}"]
    run = compose(f"recipe={recipe}", *asked, *more)
    assert (run.attention["name"], run.rope.name) == (attention, rope)
    attention_method(run.attention)


def test_chosen_numbers_are_of_choices_that_exist():
    found = [
        (name, group, choice)
        for home in ("recipe", "recipe_model")
        for name in places.choices(home)
        for group, choices in (places.says(home, name, "chosen") or {}).items()
        for choice in choices
    ]
    assert found
    assert [x for x in found if x[2] not in places.choices(x[1])] == []


def test_what_the_user_types_counts_more_than_chosen_numbers():
    lab = compose("recipe=longgen", "model=lab")
    assert (lab.attention["sink_tokens"], lab.attention["window_tokens"]) == (16, 112)
    own = compose("recipe=longgen", "model=lab", "attention.sink_tokens=8", "rope.base=3")
    assert (own.attention["sink_tokens"], own.attention["window_tokens"]) == (8, 112)
    assert (own.rope.name, own.rope.base, lab.rope.base) == ("abf", 3.0, 9.2e4)
    same = compose("recipe=longgen", "model=lab", "attention=longgen_window")
    assert same.attention == lab.attention
    assert compose("recipe=longgen", "model=lab", "rope={name: abf, base: 5}").rope.base == 5
