"""A shrunk run is the same recipe: what the method says stays, what the size says goes."""

import math
from pathlib import Path

import pytest
import torch

from longctx import cli
from longctx.config import RunConfig
from longctx.parity import measure, shrink
from longctx.parity.certificate import failures, table
from longctx.parity.measure import Cell, Error


def composed(*arguments: str) -> RunConfig:
    return cli.compose(list(arguments), RunConfig, "train", "run_schema")


@pytest.mark.parametrize(
    ("arguments", "window", "factor"),
    [
        (("recipe=pi", "model=llama2_7b"), 32, 2.0),
        (("recipe=pi", "model=lab"), 16, None),  # 8 would be below the least window
        (("recipe=ceped", "model=llama2_7b_chat"), 128, None),
    ],
)
def test_the_window_shrinks_with_the_row(tmp_path, arguments, window, factor):
    small = shrink.tiny(composed(*arguments), tmp_path)
    assert small.model.architecture["max_position_embeddings"] == window
    model = measure.recipe_of(small).sketch(small)
    assert model.config.max_position_embeddings >= shrink.ROW or small.contexts.count
    if factor is not None:
        assert model.config.rope_parameters["factor"] == factor


def test_full_layers_keep_their_places(tmp_path):
    run = composed("recipe=longgen", "model=llama2_7b", "attention.full_layers=[0,16,31]")
    assert shrink.tiny(run, tmp_path).attention["full_layers"] == [0, 1, 2]


def test_grouped_key_heads_stay_grouped(tmp_path):
    grouped = shrink.tiny(composed("recipe=longgen", "model=llama2_70b"), tmp_path)
    plain = shrink.tiny(composed("recipe=longgen", "model=llama2_7b"), tmp_path)
    assert grouped.model.architecture["num_key_value_heads"] == shrink.HEADS // 2
    assert plain.model.architecture["num_key_value_heads"] == shrink.HEADS


def test_rows_hold_several_documents_and_padding(tmp_path):
    small = shrink.tiny(composed("recipe=pi", "model=llama2_7b"), tmp_path)
    shrink.write_store(tmp_path / "store")
    recipe = measure.recipe_of(small)
    assert measure.kinds_of(small, recipe) == ["packed", "padded"]
    batches = {}
    for kind in ("packed", "padded"):
        run = Cell(kind, 1, 1, 0, 1).run(small)
        (batches[kind],) = recipe.build_data(run).train.step(0, 0, 1)
    starts = (batches["packed"].positions == 0).sum(1)
    assert int((starts > 1).sum()) >= shrink.ROWS // 2
    assert batches["padded"].scored < batches["packed"].scored


def test_a_gradient_that_is_off_is_named():
    expected = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([1e-9])}
    right = {name: g.clone() for name, g in expected.items()}
    assert measure.compare(right, expected)[0] == 0
    off = {**right, "a": torch.tensor([1.0, 2.2])}
    error, name = measure.compare(off, expected)
    assert name == "a" and error == pytest.approx(0.1)
    nothing = {**right, "b": torch.tensor([float("nan")])}
    error, name = measure.compare(nothing, expected)
    assert name == "b" and math.isnan(error)
    # A thousandth of the largest still counts by its own size.
    small = expected | {"c": torch.tensor([2e-3])}
    error, name = measure.compare(small | {"c": torch.tensor([2.02e-3])}, small)
    assert name == "c" and error == pytest.approx(0.01, rel=1e-3)
    # Rounding noise where there is no gradient counts against the others' size.
    assert measure.compare({**right, "b": torch.tensor([2e-9])}, expected)[0] < 1e-5


def test_the_table_has_a_cell_for_each_topology_and_failures_are_words():
    cells = list(measure.cells(["packed", "padded"], short=False))
    assert len(cells) == len(set(cells)) == 4 * 4 * 2 * 2
    assert {c.world for c in cells} == {1, 2, 4}
    good, bad = Error(1e-7, 2e-6, "x"), Error(1e-7, 0.5, "w")
    found = [(c, bad if c == cells[-1] else good) for c in cells]
    lines = table(found)
    assert len(lines) == 2 + 8 and all(line.count("|") == 2 + 1 + 8 for line in lines)
    assert "5e-01" in lines[-1] and "2e-06" in lines[2]
    (line,) = failures(found)
    assert line.startswith("dp2 x sp2, ZeRO 3, accumulation 4, padded rows") and "of w by" in line
    assert failures([(cells[0], Error(float("nan"), 0.0, "x"))])
    short = list(measure.cells(["packed"], short=True))
    assert {(c.dp, c.sp, c.zero) for c in short} == {
        (d, s, z) for d, s in ((2, 1), (1, 2)) for z in (1, 3)
    }


def test_the_place_is_the_only_one_written_to(tmp_path):
    small = shrink.tiny(composed("recipe=cepe", "model=lab"), tmp_path)
    places = [small.run_dir, *small.data.store]
    assert all(Path(p).is_relative_to(tmp_path) for p in places)
    assert small.model.path is small.encoder.path is small.cepe.start is None
