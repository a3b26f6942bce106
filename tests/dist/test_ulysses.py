"""Rows that several ranks share train as whole rows do in one plain process, to rounding.

Three groups of processes run all cases: decoders of every method and rope in float64, and the first
step of every recipe on every ZeRO stage. Planted faults must be seen by the same comparison.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longctx import cli
from longctx.attention.method import Method
from longctx.batch import IGNORE
from longctx.config import RunConfig
from longctx.data.store import tokenizer_sha256
from longctx.parallel import mesh, ulysses
from longctx.recipe import Data
from longctx.recipes import causal_lm, cepe, cepe_mlm, ceped
from tests.helpers import sharded
from tests.helpers.cepe import cepe_run, make_decoder
from tests.helpers.methods import EVICTING, kind_of
from tests.helpers.methods import FIRST as METHODS
from tests.helpers.ropes import NAMES as NAMES_OF_ROPES
from tests.helpers.ropes import example
from tests.helpers.sharded import compare_decoder, plain_step, sharded_step
from tests.helpers.spawn import spawn
from tests.helpers.tiny import make_store, tiny_arguments

ROPES = {name: {"name": name, **example(name)["numbers"]} for name in NAMES_OF_ROPES}
# (method, rope, key heads of 4 heads, ranks that share a row); what turns queries or evicts refuses
# a rope whose angles follow the length. Fewer key heads than ranks, and as many, without rope.
DECODERS = [
    (method, rope, 2, 2)
    for method in METHODS
    for rope in ROPES
    if rope != "dynamic_ntk" or not (kind_of(method).turns_queries or method in EVICTING)
]
DECODERS += [(method, "none", heads, 2) for method in METHODS for heads in (1, 4)]
ALIKE = Method.expected_key_heads
BY_HEAD = [name for name in METHODS if kind_of(name).expected_key_heads is not ALIKE]
WIDE = [(method, "none", heads, 4) for method in ("full", *BY_HEAD) for heads in (1, 2, 4)]
EXACT = 1e-12  # float64

# fp32: rounding of sums in another order; a wrong factor, position or head is above 1e-3.
TOLERANCE = 1e-5
CAUSAL = {
    "pi": ("recipe=pi", "rope.factor=2", "data.mask_documents=true"),
    "longgen": (
        "recipe=longgen", "attention=longgen_blocks", "attention.block_size=2",
        "attention.local_blocks=2", "attention.stride=3", "attention.full_layers=[0]",
        "data.long_tokens=null", "data.packing=best_fit", "data.mask_documents=true",
    ),
    "dca_ft": ("recipe=dca_ft",),
    "dynamic": ("recipe=direct_ft", "rope=dynamic_ntk", "rope.factor=2", "data.seq_len=64"),
    "unscored": ("recipe=pi", "rope.factor=2"),
    "lora": ("recipe=pi", "rope.factor=2", "adapter=lora", "adapter.rank=4"),
}  # fmt: skip
CEPE = {
    "cepe_mlm": (),
    "cepe_warmup": ("cepe.init=copy",),
    "cepe": ("cepe.init=copy", "contexts.mask=0.5"),
    # Contexts and row are 31 tokens: the teacher's sequence cannot be cut evenly.
    "ceped": ("cepe.init=copy", "kl.top_k=5", "contexts.count=3", "contexts.size=5"),
}
RECIPES = {"cepe_mlm": cepe_mlm, "cepe_warmup": cepe, "cepe": cepe, "ceped": ceped}
# How the step of 8 rows is run on each ZeRO stage: rows a pass, and recomputing.
STAGES = {0: (8, False), 1: (2, False), 2: (4, True), 3: (4, True)}
STEPS = [(name, stage) for name in ("pi", "longgen", "dca_ft") for stage in STAGES]
STEPS += [("dynamic", 2), ("unscored", 3), ("lora", 2)]
CEPE_STEPS = [(name, stage) for name in CEPE for stage in STAGES]
# Two pairs, one row a pass: three contexts on two ranks, so that one of them is encoded twice.
GRID = [("pi", 0), ("dca_ft", 1), ("unscored", 3), ("cepe", 2), ("cepe", 3), ("ceped", 3)]


class FirstHalfUnscored:
    """A loader whose rows are scored in their second half: some ranks have nothing to score."""

    def __init__(self, loader):
        self.loader, self.identity, self.describe = loader, loader.identity, loader.describe

    def step(self, step, dp_rank, dp_size):
        batches = self.loader.step(step, dp_rank, dp_size)
        labels = [batch.labels.clone() for batch in batches]
        for each in labels:
            each[:, : each.shape[1] // 2] = IGNORE
        return [replace(b, labels=y) for b, y in zip(batches, labels, strict=True)]


def recipe_of(name):
    recipe = RECIPES[name].RECIPE if name in CEPE else causal_lm.RECIPE
    if name != "unscored":
        return recipe

    def half(run):
        return Data(FirstHalfUnscored(recipe.build_data(run).train), None)

    return replace(recipe, build_data=half)


def settings(place: Path, name: str, stage: int, sp: int, dp: int = 1) -> RunConfig:
    """The run of a case; `sp` 1 is the plain process."""
    rows, recompute = STAGES[stage] if dp == 1 else (1, True)
    given = (
        f"parallel.zero_stage={stage}", f"parallel.sp={sp}", "resume=none",
        f"parallel.activation_checkpointing={str(recompute and sp > 1).lower()}",
        f"train.micro_batch_rows={rows}", "train.dtype=fp32",
    )  # fmt: skip
    if name in CEPE:
        more = (*CEPE[name], *given)
        return cepe_run(name, place / "decoder", place / "store", place / "run", *more)
    first, *more = CAUSAL[name]
    arguments = tiny_arguments(place / "store", place / "run", "model=lab_scratch", *more, *given)
    return cli.compose([first, *arguments[1:]], RunConfig, "train", "run_schema")


def compare_steps(place: Path, ranks, runs) -> None:
    """Each case's first step against the plain one's, which is read from a file."""
    for (name, stage), run in runs.items():
        found = sharded_step(run, recipe_of(name), ranks)
        expected = torch.load(place / f"{name}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        errors = {n: sharded.error(found[n], x) for n, x in expected.items()}
        sharded.write(place, f"step-{name}-{stage}-{ranks.dp_size}", ranks, errors)


def compare_decoders(place: Path, ranks, cases) -> None:
    for method, rope, heads, sp in cases:
        assert sp == ranks.sp_size
        found = compare_decoder(ranks, METHODS[method], ROPES[rope], heads, heads == 1)
        sharded.write(place, f"decoder-{method}-{rope}-{heads}-{sp}", ranks, found)


def bf16_comes_back(place: Path, ranks) -> None:
    random = torch.Generator().manual_seed(ranks.rank)
    x = torch.randn(2, 4, 3, 5, generator=random).bfloat16()
    there = ulysses._exchanged(ranks.sp_group, 1, 2, [x, x[:, :2]])
    assert [list(y.shape) for y in there] == [[2, 2, 6, 5], [2, 1, 6, 5]]
    back = ulysses._exchanged(ranks.sp_group, 2, 1, there)
    assert torch.equal(back[0], x) and torch.equal(back[1], x[:, :2])
    sharded.write(place, "bf16", ranks, {"same": 0.0})


def planted(place: Path, ranks, run) -> None:
    """What the comparison must see: a gradient sp times too large, and documents that leak."""
    expected = torch.load(place / "pi.pt", weights_only=True)
    recipe, gather = recipe_of("pi"), ulysses.gather_tokens

    def one_document(part, group):
        whole = gather(part, group)
        return torch.arange(whole.shape[1]).expand_as(whole)

    for fault in ("factor", "leak"):
        ulysses.gather_tokens = one_document if fault == "leak" else gather
        try:
            found = sharded_step(run, recipe, ranks, factor=2 if fault == "factor" else 1)
        finally:
            ulysses.gather_tokens = gather
        errors = {n: sharded.error(found[n], x) for n, x in expected.items()}
        assert fault == "leak" or errors.pop("loss") < TOLERANCE  # nobody sees it in the loss
        sharded.write(place, f"planted-{fault}", ranks, errors)


def on_two(place: Path, runs) -> None:
    ranks = mesh.start(2)
    bf16_comes_back(place, ranks)
    compare_decoders(place, ranks, DECODERS)
    compare_steps(place, ranks, runs)
    planted(place, ranks, runs["pi", 1])


def on_two_with_contexts(place: Path, runs) -> None:
    compare_steps(place, mesh.start(2), runs)


def on_four(place: Path, runs) -> None:
    compare_decoders(place, mesh.start(4), WIDE)
    compare_steps(place, mesh.start(2), runs)


def prepare(place: Path, lab_model: Path, cases, dp: int = 1) -> dict:
    """A store, what one plain process gives, and the runs to compare with it."""
    make_decoder(place / "decoder", lab_model)
    make_store(place / "store", tokenizer=tokenizer_sha256(lab_model))
    for name in dict(cases):
        # As many rows a pass as in the comparison, for the longest of them sets a dynamic rope.
        run = settings(place, name, 2 if name == "dynamic" else 0, 1)
        torch.save(plain_step(run, recipe_of(name)), place / f"{name}.pt")
    return {case: settings(place, *case, sp=2, dp=dp) for case in cases}


def require_equal(place: Path, cases, dp: int) -> None:
    for name, stage in cases:
        assert sharded.worst(place, f"step-{name}-{stage}-{dp}") < TOLERANCE, (name, stage)


def require_exact(place: Path, cases) -> None:
    for case in cases:
        name = "-".join(map(str, case))
        assert sharded.worst(place, f"decoder-{name}") < EXACT, name


@pytest.mark.dist
def test_two_ranks_that_share_rows_equal_one_process(tmp_path, lab_model):
    runs = prepare(tmp_path, lab_model, STEPS)
    spawn(on_two, 2, tmp_path, runs)
    require_exact(tmp_path, DECODERS)
    require_equal(tmp_path, STEPS, 1)
    for fault in ("factor", "leak"):
        assert sharded.worst(tmp_path, f"planted-{fault}") > 0.1, fault


@pytest.mark.dist
def test_two_ranks_that_share_contexts_too(tmp_path, lab_model):
    runs = prepare(tmp_path, lab_model, CEPE_STEPS)
    spawn(on_two_with_contexts, 2, tmp_path, runs)
    require_equal(tmp_path, CEPE_STEPS, 1)


@pytest.mark.dist
def test_two_pairs_of_ranks_equal_one_process(tmp_path, lab_model):
    runs = prepare(tmp_path, lab_model, GRID, dp=2)
    spawn(on_four, 4, tmp_path, runs)
    require_exact(tmp_path, WIDE)
    require_equal(tmp_path, GRID, 2)
