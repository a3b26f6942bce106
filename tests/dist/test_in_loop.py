"""Evaluation between steps: equal under every engine, and not a bit of training moved."""

import json
from math import exp

import pytest
import torch

from longctx.data.store import Store
from longctx.eval.in_loop import probe
from longctx.eval.score import token_nll
from longctx.parallel import mesh
from longctx.train.trainer import Trainer
from longctx.recipes.causal_lm import RECIPE
from tests.helpers.spawn import spawn
from tests.helpers.tiny import make_store, tiny_run

STEPS, LENGTHS, TARGETS, DOCUMENTS = 4, (16, 32), 6, 3
IN_LOOP = (
    f"in_loop={{every: 2, lengths: {list(LENGTHS)}, documents: {DOCUMENTS},"
    f" target_tokens: {TARGETS}, passkeys: 0}}"
)
CASES = [(0, 1), (1, 1), (3, 1), (1, 2)]  # ZeRO stage, ranks that share a row


def train_all(store, out):
    """On each rank: every case with and without questions between the steps."""
    for stage, sp in CASES:
        ranks = mesh.start(sp)
        for asks in (True, False):
            name = f"zero{stage}-sp{sp}-{asks}"
            more = [f"parallel.zero_stage={stage}", f"parallel.sp={sp}", f"train.max_steps={STEPS}"]
            more += ["train.eval_every=2"] + [IN_LOOP] * asks
            run = tiny_run(store, out / name, *more)
            trainer = Trainer(run, RECIPE, ranks, probe=probe(run))
            trainer.fit()
            weights = {n: v["weight"] for n, v in trainer.engine.state()}
            if ranks.main:
                torch.save(weights, out / f"{name}.pt")
            assert trainer.engine.engine.module.training
            trainer.engine.close()
            ranks.barrier()


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.dist
def test_questions_between_steps(tmp_path):
    store = make_store(tmp_path / "store")
    spawn(train_all, 2, store, tmp_path)
    for stage, sp in CASES:
        name = f"zero{stage}-sp{sp}"
        asked, plain = (lines(tmp_path / f"{name}-{asks}") for asks in (True, False))
        for a, b in zip(asked, plain, strict=True):
            for key in ("loss", "grad_norm", "lr", "tokens", "eval_loss"):
                assert a.get(key) == b.get(key), (name, key)
            assert ("eval_perplexity_16" in a) == (a["step"] % 2 == 0), name
            assert not any(key.startswith("eval_perplexity") for key in b)
        weights, same = (torch.load(tmp_path / f"{name}-{asks}.pt") for asks in (True, False))
        assert all(torch.equal(weights[n], same[n]) for n in same), name

        model = RECIPE.build_model(tiny_run(store, tmp_path / "plain"))
        model.load_state_dict(weights, strict=False)
        documents = Store(store)
        long = [i for i, n in enumerate(documents.lengths) if n >= max(LENGTHS)]
        chosen = [long[i * (len(long) - 1) // (DOCUMENTS - 1)] for i in range(DOCUMENTS)]
        for length in LENGTHS:
            rows = [documents.tokens(i, max(LENGTHS) - length, max(LENGTHS)) for i in chosen]
            tokens = torch.tensor([row.tolist() for row in rows])
            want = exp(float(token_nll(model, tokens, slice(length - TARGETS, None)).mean()))
            assert asked[-1][f"eval_perplexity_{length}"] == pytest.approx(want, rel=1e-5), name
