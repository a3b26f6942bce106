"""The certificate: every topology measured, as a table, and what in it is too far off."""

import json
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tqdm import tqdm

from longctx.config import RunConfig
from longctx.parity.measure import (
    Cell,
    Error,
    cells,
    keep_plain,
    kinds_of,
    measure,
    on_ranks,
    rank,
    recipe_of,
)
from longctx.parity.shrink import tiny, write_store

LIMIT = 1e-5  # relative, fp32


def work(run: RunConfig, place: Path, todo: list[Cell]) -> None:
    """On each rank: all cells of one number of processes; rank 0 writes a line for each."""
    recipe = recipe_of(run)
    for cell in tqdm(
        todo, f"{run.name}, {todo[0].world} processes", disable=rank() > 0, unit="cell"
    ):
        error = measure(cell, run, recipe, place / f"{cell.kind}.safetensors")
        if error is not None:
            with (place / "errors.jsonl").open("a") as file:
                file.write(json.dumps([asdict(cell), asdict(error)]) + "\n")


def certify(run: RunConfig, short: bool) -> list[tuple[Cell, Error]]:
    """Measures a run's recipe in every topology.

    Args:
        run: what the user would train, full size.
        short: only a few topologies, of two processes.

    Raises:
        UserError: if the recipe does not take the settings.
    """
    recipe = recipe_of(run)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_store(place / "store")
        small = tiny(run, place)
        kinds = kinds_of(small, recipe)
        keep_plain(small, recipe, kinds, place)
        todo = list(cells(kinds, short))
        for world in sorted({cell.world for cell in todo}):
            on_ranks(world, partial(work, small, place, [c for c in todo if c.world == world]))
        lines = [json.loads(x) for x in (place / "errors.jsonl").read_text().splitlines()]
    return [(Cell(**cell), Error(**error)) for cell, error in lines]


def title(cell: Cell) -> str:
    """`dp2 x sp2` and the like."""
    parts = [f"{n}{size}" for n, size in (("dp", cell.dp), ("sp", cell.sp)) if size > 1]
    return " x ".join(parts) or "1 process"


def table(found: Iterable[tuple[Cell, Error]]) -> list[str]:
    """A Markdown table: a row per topology and accumulation, a column per stage and rows."""
    found = list(found)
    columns = sorted({(c.zero, c.kind) for c, _ in found}, key=lambda x: (x[1], x[0]))
    rows = dict.fromkeys((title(c), c.accumulation) for c, _ in found)
    worst = {((title(c), c.accumulation), (c.zero, c.kind)): max(e.loss, e.gradient)
             for c, e in found}  # fmt: skip
    lines = ["| processes | accumulation | " + " | ".join(f"{k}, ZeRO {z}" for z, k in columns)]
    lines += ["|---" * (len(columns) + 2)]
    for name, accumulation in rows:
        numbers = (worst.get(((name, accumulation), column)) for column in columns)
        shown = " | ".join("" if x is None else f"{x:.0e}" for x in numbers)
        lines.append(f"| {name} | {accumulation} | {shown}")
    return [line + " |" for line in lines]


def failures(found: Iterable[tuple[Cell, Error]]) -> list[str]:
    """One line for each cell above the limit, or not a number."""
    return [
        f"{title(c)}, ZeRO {c.zero}, accumulation {c.accumulation}, {c.kind} rows: loss off by "
        f"{e.loss:.1e}, gradient of {e.parameter} by {e.gradient:.1e}"
        for c, e in found
        if not (e.loss <= LIMIT and e.gradient <= LIMIT)
    ]
