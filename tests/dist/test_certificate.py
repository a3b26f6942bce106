"""`python -m longctx.parity`: every recipe in some topologies, and a fault that is planted."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from longctx import cli
from longctx.config import RunConfig
from longctx.parallel import ulysses, zero
from longctx.parity import certificate, measure
from longctx.parity.measure import Cell
from longctx.parity.shrink import tiny, write_store
from tests.helpers.methods import NAMES, complete, kind_of

RUNS = {
    "pi": "recipe=pi model=llama2_7b",
    "yarn": "recipe=pi model=llama2_7b rope=yarn",
    "lora": "recipe=pi adapter=lora",
    "window": "recipe=longgen model=llama2_70b",
    "blocks": "recipe=longgen model=llama2_7b attention=longgen_blocks",
    "dca": "recipe=dca_ft model=llama2_7b",
    "cepe_mlm": "recipe=cepe_mlm",
    "cepe_warmup": "recipe=cepe_warmup",
    "cepe": "recipe=cepe model=llama2_7b",
    "ceped": "recipe=ceped model=llama2_7b_chat",
}
RUNS |= {
    f"attention_{name}": f"recipe=pi model=llama2_7b attention={name}"
    for name in NAMES
    if complete(name) and not kind_of(name).plain
}
FAULTS = ("gradients", "documents")


def prepare(name: str, place: Path) -> tuple[RunConfig, list[str]]:
    """A run, shrunk, with what a plain process makes of it beside its store."""
    place.mkdir()
    write_store(place / "store")
    small = tiny(cli.compose(RUNS[name].split(), RunConfig, "train", "run_schema"), place)
    recipe = measure.recipe_of(small)
    kinds = measure.kinds_of(small, recipe)
    measure.keep_plain(small, recipe, kinds, place)
    return small, kinds


def plant(fault: str) -> None:
    """Breaks this process: gradients sp times too big, or shards that forget their documents."""
    if fault == "gradients":
        right = zero.Engine.backward
        zero.Engine.backward = lambda self, loss, scored: right(self, loss * 2, scored)
    else:
        gather = ulysses.gather_tokens
        ulysses.gather_tokens = lambda part, group: one_document(gather(part, group))


def one_document(positions: torch.Tensor) -> torch.Tensor:
    """Positions of rows that hold one document each."""
    return torch.arange(positions.shape[1]).expand_as(positions).contiguous()


def every(todo: list[tuple[RunConfig, list[str], Path]], fault: str | None) -> None:
    """On each rank: the cells of every run."""
    if fault:
        plant(fault)
    for small, kinds, place in todo:
        cells = [
            Cell(kinds[-1], 2, 1, 3, 4),
            Cell(kinds[0], 1, 2, 3, 4),
            Cell(kinds[-1], 1, 2, 1, 1),
        ]
        certificate.work(
            small, place, [c for c in cells if not fault or (c.sp == 2 and c.zero == 1)]
        )


def errors(place: Path) -> list[dict]:
    """What was measured there."""
    lines = (place / "errors.jsonl").read_text().splitlines()
    return [json.loads(line)[1] for line in lines]


@pytest.mark.dist
def test_every_recipe_trains_alike_in_every_topology(tmp_path):
    todo = [(*prepare(name, tmp_path / name), tmp_path / name) for name in RUNS]
    measure.on_ranks(2, partial(every, todo, None))
    for name in RUNS:
        found = errors(tmp_path / name)
        assert len(found) == 3
        for error in found:
            assert error["loss"] <= certificate.LIMIT, (name, error)
            assert error["gradient"] <= certificate.LIMIT, (name, error)


@pytest.mark.dist
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(tmp_path, fault):
    todo = [(*prepare("pi", tmp_path / "pi"), tmp_path / "pi")]
    measure.on_ranks(2, partial(every, todo, fault))
    (error,) = errors(tmp_path / "pi")
    assert max(error["loss"], error["gradient"]) > 100 * certificate.LIMIT, error
