"""What every task in `longctx/eval/tasks/` must do; each is found by its place."""

import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType

import pytest

from longctx.eval import config, tasks
from longctx.eval.config import found_tasks, help_of_tasks
from longctx.eval.evaluate import evaluate, settings_of
from longctx.eval.provenance import digest
from longctx.eval.report import headline_of, sections
from longctx.eval.task import Task
from tests.helpers.tasks import EXAMPLES, KINDS, compose, example, tiny, write_world

NAMES = sorted(KINDS)
ANYTHING = ["tasks=[]", "compare=[x]", "out=x"]  # composes whatever a task needs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def measured(world, tmp_path_factory):
    """The evaluation of each example, run when it is first asked for: cfg and results."""
    done = {}

    def of(name):
        if name not in done:
            cfg = tiny(name, world, tmp_path_factory.mktemp(name))
            done[name] = cfg, evaluate(cfg)[0]
        return done[name]

    return of


def records(cfg):
    return [json.loads(line) for line in (Path(cfg.out) / "samples.jsonl").open()]


def without_seed(cfg):
    return [{k: v for k, v in record.items() if k != "seed"} for record in records(cfg)]


def test_every_file_is_a_task_with_an_example():
    files = {p.stem for p in Path(tasks.__path__[0]).glob("*.py")} - {"__init__"}
    assert files == set(KINDS) and len(files) > 5
    for name in NAMES:
        assert example(name)
    assert {p.stem for p in EXAMPLES.iterdir()} == files, "an example of no task"


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_is(name):
    """A line for `--help`, and every setting with its meaning in the docstring."""
    first, *rest = (KINDS[name].__doc__ or "").splitlines()
    assert re.fullmatch(r"[A-Z].{10,75}\.", first), "the first line is its help"
    assert f"  {name} " in help_of_tasks() and first in help_of_tasks()
    for field in fields(KINDS[name]):
        assert any(re.match(rf"\s+{field.name}: \S", line) for line in rest), field.name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("effort", ["quick", "paper"])
def test_it_composes_and_quick_numbers_are_its_defaults(name, effort):
    own = compose(*ANYTHING, f"effort={effort}").task(name)
    assert isinstance(own, KINDS[name])
    if effort == "quick":
        assert own == KINDS[name]()


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_is_kept(name, measured, monkeypatch):
    cfg, results = measured(name)
    entry = results["tasks"][name]
    assert entry["settings"].keys() >= {field.name for field in fields(KINDS[name])}
    assert json.loads(json.dumps(entry)) == entry
    for record in records(cfg):
        assert record["task"] == name
    monkeypatch.setattr(KINDS[name], "run", None)  # nothing is measured twice
    again, _ = evaluate(cfg)
    assert again["tasks"][name] == entry


@pytest.mark.parametrize("name", NAMES)
def test_it_is_reported(name, measured, tmp_path):
    """A heading, a table with a row a model, its figures; silent where there is no result."""
    _, results = measured(name)
    models = [results | {"label": label} for label in ("first one", "second one")]
    lines = list(sections(models, tmp_path))
    assert lines[0].startswith("## ") and "" in lines
    for model in models:
        assert any(line.startswith(f"| {model['label']} |") for line in lines)
    drawn = {line.split("](")[1].rstrip(")") for line in lines if line.startswith("![")}
    assert drawn == {path.name for path in tmp_path.glob("*.png")}
    lacks = results | {"label": "lacks it", "tasks": {}}
    assert not any("lacks it" in line for line in sections([*models, lacks], tmp_path))
    assert list(sections([lacks], tmp_path)) == []


@pytest.mark.parametrize("name", NAMES)
def test_its_columns_have_a_value_a_model(name, measured):
    _, results = measured(name)
    lacks = results | {"label": "lacks it", "tasks": {}}
    columns = list(KINDS[name].columns([lacks, results, results]))
    assert columns, "the first table shows nothing of it"
    for column in columns:
        absent, *both = column.values
        assert absent is None and both[0] == both[1]
        for value in both:
            assert value is None or column.text(value[0])
    text = "\n".join(headline_of([results | {"label": "a"}, lacks]))
    assert text.count(" † ") == 0
    assert all(column.values == [None] for column in KINDS[name].columns([lacks]))


@pytest.mark.parametrize("name", NAMES)
def test_what_its_numbers_depend_on_changes_its_hash(name, world, measured, tmp_path):
    cfg, results = measured(name)
    whole = settings_of(cfg, name)
    assert digest(whole) == results["tasks"][name]["hash"]
    inputs = cfg.task(name).inputs(cfg)
    assert inputs, "something decides what is asked"
    assert inputs.items() <= whole.items()
    other_text = replace(cfg, held_out=str(world / "other_store"))
    if cfg.task(name).of_a_store:
        assert digest(settings_of(other_text, name)) != digest(whole)
    if cfg.task(name).by_length:
        longer = replace(cfg, lengths=[n + 1 for n in cfg.lengths])
        assert digest(settings_of(longer, name)) != digest(whole)
    seeded = replace(cfg, seed=cfg.seed + 1, out=str(tmp_path))
    evaluate(seeded)
    if without_seed(seeded) != without_seed(cfg):
        assert digest(settings_of(seeded, name)) != digest(whole), "the seed changes what is asked"


def test_a_file_holds_one_task_whose_settings_have_names_of_their_own(monkeypatch):
    def held(*kinds):
        module = ModuleType("longctx.eval.tasks.made")
        for number, kind in enumerate(kinds):
            kind.__module__ = module.__name__
            setattr(module, f"kind{number}", kind)
        monkeypatch.setattr(config, "import_module", lambda name: module)
        return found_tasks()

    class Fine(Task):
        pass

    assert set(held(Fine).values()) == {Fine}
    for kinds in ((), (Fine, type("Another", (Task,), {}))):
        with pytest.raises(TypeError, match=f"must hold one Task, not {len(kinds)}"):
            held(*kinds)

    @dataclass(frozen=True)
    class Taken(Task):
        longest: int = 0

    with pytest.raises(TypeError, match="a setting cannot be called longest"):
        held(Taken)
