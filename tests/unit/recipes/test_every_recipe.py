"""Whatever is in conf/recipe builds at full size on the meta device and takes two tiny steps.

A recipe needs no entry here. What it trains on is its own `Recipe.tiny` (see longctx/recipe.py),
which the parity certificate trains on too.
"""

import math
from dataclasses import replace

import pytest
import torch

from longctx.config import RunConfig
from longctx.errors import UserError
from longctx.parallel import mesh
from longctx.parity import measure, shrink
from longctx.recipe import find_recipe
from longctx.train.trainer import Trainer
from tests.helpers import sized
from tests.helpers.process import ROOT

pytestmark = pytest.mark.long

RECIPES = sorted(path.stem for path in (ROOT / "conf" / "recipe").glob("*.yaml"))
MODELS = ["llama2_7b", "lab_scratch"]  # paper and lab; their weights are not read


def composed(recipe: str, model: str) -> RunConfig:
    return sized.compose([f"recipe={recipe}", f"model={model}", "data=store", "data.store=[x]"])


def tiny_of(recipe: str, place) -> RunConfig:
    """The recipe's run on rows of 64 tokens.

    Raises:
        AssertionError: naming the recipe, if its RECIPE does not say how it is made small.
    """
    small = shrink.tiny(composed(recipe, "lab_scratch"), place)
    shrink.write_store(place / "store")
    try:
        (kind, *_) = measure.kinds_of(small, find_recipe(small.builder))
    except UserError as error:
        raise AssertionError(
            f"conf/recipe/{recipe}.yaml: {small.builder}.RECIPE needs a `tiny` that makes it small "
            f"({error})"
        ) from error
    run = measure.of_kind(small, kind)
    return replace(run, train=replace(run.train, micro_batch_rows=2))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_it_builds_without_a_weight(recipe, model):
    run = composed(recipe, model)
    contract = find_recipe(run.builder)
    sketch = contract.sketch(run)
    assert {p.device.type for p in sketch.parameters()} == {"meta"}
    trained = contract.trainable(sketch)
    assert trained and trained.items() <= dict(sketch.named_parameters()).items()


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_takes_two_tiny_steps(recipe, tmp_path):
    run = tiny_of(recipe, tmp_path)
    trainer = Trainer(run, find_recipe(run.builder), mesh.start())
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    results = [trainer.train_step(step) for step in (0, 1)]
    trainer.rows.close()
    trainer.engine.close()
    assert all(math.isfinite(r.loss) and r.grad_norm > 0 and r.taken for r in results)
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and changed <= set(trainer.engine.trainable)


def test_recipes_are_found():
    assert RECIPES


def test_a_recipe_that_is_not_made_small_fails_by_name(tmp_path, monkeypatch):
    contract = find_recipe("recipes.cepe")
    large = replace(contract, tiny=lambda run, seq_len, vocab_size: {})
    monkeypatch.setattr("longctx.recipes.cepe.RECIPE", large)
    with pytest.raises(AssertionError, match=r"conf/recipe/cepe.yaml: recipes.cepe.RECIPE needs"):
        tiny_of("cepe", tmp_path)
