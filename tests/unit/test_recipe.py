"""The recipe contract: own settings are typed, rows are changed through the loader."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from longctx.batch import IGNORE
from longctx.data.loader import in_turn, packed
from longctx.data.store import Store
from longctx.errors import UserError
from longctx.parallel import mesh
from longctx.recipe import find_recipe, settings_of
from longctx.recipes.causal_lm import RECIPE
from longctx.train.trainer import Trainer
from tests.helpers.tiny import make_store, tiny_run


@dataclass(frozen=True)
class Mine:
    word: str
    share: float
    times: int = 3
    strict: bool = True
    ids: tuple[int, ...] = ()


def run_with(tmp_path, **settings):
    return replace(tiny_run(tmp_path / "store", tmp_path / "run"), settings=settings)


def test_settings_are_typed_and_have_defaults(tmp_path):
    assert settings_of(run_with(tmp_path, word="x", share=1), Mine) == Mine("x", 1)
    given = {"word": "x", "share": 0.5, "times": 4, "strict": False, "ids": [1, 2]}
    assert settings_of(run_with(tmp_path, **given), Mine) == Mine("x", 0.5, 4, False, [1, 2])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"wrod": "x"},
            "settings.wrod is no setting of recipe pretrain: it has word, share, times",
        ),
        ({"word": 3}, "settings.word=3 must be text"),
        ({"share": "much"}, "settings.share='much' must be a number"),
        ({"share": True}, "settings.share=True must be a number"),
        ({"times": 1.5}, "settings.times=1.5 must be a whole number"),
        ({"strict": 1}, "settings.strict=1 must be true or false"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, change, line):
    with pytest.raises(UserError, match=line):
        settings_of(run_with(tmp_path, **({"word": "x", "share": 1.0} | change)), Mine)


def test_a_missing_setting_is_named(tmp_path):
    with pytest.raises(UserError, match=r"recipe pretrain needs settings\.share"):
        settings_of(run_with(tmp_path, word="x"), Mine)


def test_a_recipe_without_settings_takes_none(tmp_path):
    make_store(tmp_path / "store")
    line = r"settings\.word is no setting of recipe pretrain: it has no settings of its own"
    with pytest.raises(UserError, match=line):
        Trainer(run_with(tmp_path, word="x"), RECIPE, mesh.start())


def test_the_loss_is_told_the_run(tmp_path):
    run, told = tiny_run(make_store(tmp_path / "store"), tmp_path / "run"), []

    def loss(run, model, batch):
        told.append(run)
        return RECIPE.loss(run, model, batch)

    trainer = Trainer(run, replace(RECIPE, loss=loss), mesh.start())
    trainer.train_step(0)
    trainer.rows.close()
    trainer.engine.close()
    assert told and all(each is run for each in told)


def test_rows_are_changed_one_change_after_another(tmp_path):
    stores = [Store(make_store(tmp_path / "store"))]
    data = tiny_run(tmp_path / "store", tmp_path / "run").data
    about = {"batch_rows": 4, "micro_batch_rows": 2, "seed": 0}
    seen = []

    def add_one(row, sample):
        seen.append(sample)
        return {**row, "tokens": row["tokens"] + 1}

    def score_even(row, sample):
        return {**row, "labels": np.where(row["tokens"] % 2, IGNORE, row["labels"])}

    plain = packed(stores, data, **about)
    changed = packed(stores, data, **about, change=in_turn(None, add_one, score_even))
    for step in (0, 3):
        for before, after in zip(plain.step(step, 0, 1), changed.step(step, 0, 1), strict=True):
            assert (after.tokens == before.tokens + 1).all()
            odd = after.tokens % 2 == 1
            assert (after.labels[odd] == IGNORE).all() and odd.any()
            assert (after.labels[~odd] == before.labels[~odd]).all()
    assert seen == [0, 1, 2, 3, 12, 13, 14, 15]
    assert in_turn(None) is None and changed.identity == plain.identity


def test_a_module_anywhere_is_a_builder(tmp_path, monkeypatch):
    (tmp_path / "my_recipe.py").write_text("from longctx.recipes.causal_lm import RECIPE\n")
    (tmp_path / "empty_recipe.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_recipe("my_recipe") is RECIPE is find_recipe("recipes.causal_lm")
    for builder, line in (
        ("empty_recipe", "builder=empty_recipe: the module holds no RECIPE"),
        ("recipes.nothing", "builder=recipes.nothing: there is no such module"),
    ):
        with pytest.raises(UserError, match=line):
            find_recipe(builder)
