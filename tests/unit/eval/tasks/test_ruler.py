import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from longctx.errors import UserError
from longctx.eval.ruler import scores
from longctx.eval.tasks import ruler
from longctx.eval.tasks.ruler import NIAH, RULER_TASKS, Ruler
from tests.helpers.fakes import characters
from tests.helpers.material import write_material
from tests.helpers.reading import subject

LENGTHS = [9000, 4000]  # characters, of which the fixed texts of some tasks are two thousand


class Solver(nn.Module):
    """Answers every task of RULER it can read; `sees` so many of the last characters."""

    def __init__(self, sees: int = 10**6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.sees = sees
        self.config = SimpleNamespace(max_position_embeddings=10**6)
        self.read: list[str] = []

    def generate(self, input_ids, max_new_tokens, **settings):
        assert settings["do_sample"] is False and not torch.is_grad_enabled()
        prompt = "".join(map(chr, input_ids[0].tolist()))
        self.read.append(prompt)
        reply = self.answer(prompt[-self.sees :])[:max_new_tokens]
        return torch.cat([input_ids, torch.tensor([characters(reply)])], dim=1)

    def answer(self, seen: str) -> str:
        if "special magic" in seen:
            asked = re.findall(r"for (.*?) mentioned", seen)[-1]
            keys = re.split(r", and |, ", asked)
            found = [v for k in keys for v in re.findall(rf"for {re.escape(k)} is: (.*?)\.", seen)]
            return " " + ", ".join(found)
        if "variables are" in seen:
            value = re.findall(r"assigned the value (\d+)", seen)[-1]
            return " ".join(self.chain(seen.rsplit("Memorize", maxsplit=1)[-1], value))
        if "most often in the list" in seen:
            words = re.findall(r"\d+\. (\S+)", seen.rsplit("Below is", maxsplit=1)[-1])
            return self.common(words, 10)
        if "coded words" in seen:
            text = seen.rsplit("words. ", maxsplit=1)[-1].split("\n", maxsplit=1)[0] + "\n"
            words = re.findall(r" ([a-z]{6})(?=[ \n])", " " + text)
            return self.common(words, 3)
        asked = re.findall(r"article (\d) paragraph (\d)\?", seen)
        person = re.findall(r"person (\d) live", seen)
        if asked:
            a, p = asked[-1]
            return " ".join(re.findall(rf"article {a} paragraph {p} the code is (\d+)", seen))
        return f" TOWN {person[-1]}" if person else ""  # the case does not matter

    @staticmethod
    def chain(text: str, value: str) -> list[str]:
        names = re.findall(rf"VAR (\w+) = {value}", text)
        while names and (more := re.findall(rf"VAR (\w+) = VAR {names[-1]}", text)):
            names += more
        return names

    @staticmethod
    def common(words, count):
        order = sorted(set(words), key=lambda w: -words.count(w))
        return " " + " ".join(order[:count])


@pytest.fixture
def cfg(tmp_path):
    own = Ruler(list(RULER_TASKS), str(write_material(tmp_path)), 2, 85.6, False)
    return SimpleNamespace(ruler=own, lengths=LENGTHS, seed=0)


def asked(model):
    return subject(model, bos=65)


def test_a_solver_scores_all_and_who_sees_little_nothing(cfg, monkeypatch):
    """Acceptance 3, and lengths: no prompt passes them or is cut."""
    model = Solver()
    result, records = cfg.ruler.run(cfg, asked(model))
    assert {(c["task"], c["length"]) for c in result["cells"]} == {
        (task, length) for task in RULER_TASKS for length in LENGTHS
    }
    missed = {c["task"] for c in result["cells"] if c["score"] < 1}
    assert missed == set(), [r for r in records if r["score"] < 1][:1]
    assert [a["score"] for a in result["averages"]] == [1, 1] and result["averages"][0][
        "tasks"
    ] == 13
    assert result["effective_length"] is None and result["effective_range"] is None  # of 2 samples
    assert result["truncated_prompts"] == 0
    for cell in result["cells"]:
        low, high = cell["tokens"]
        assert high + cell["new_tokens"] <= cell["length"], cell
        if cell["task"] in NIAH:
            assert low + cell["new_tokens"] > cell["length"] - 200, cell
        assert cell["samples"] == 2 and cell["empty"] == 0
    assert {r["tokens"] for r in records} == set(map(len, model.read))
    monkeypatch.setattr(scores, "ENOUGH", 2)
    assert scores.effective(result).length == 9000
    few = replace(cfg.ruler, tasks=["niah_single_1", "niah_multiquery", "vt", "qa_1"])
    blind = SimpleNamespace(ruler=few, lengths=LENGTHS, seed=0)
    result, records = few.run(blind, asked(Solver(sees=300)))
    assert sum(r["score"] for r in records) <= 1
    assert result["effective_length"] == 0 and result["effective_range"] == [0, 0]


def test_needles_are_where_the_record_says(cfg):
    cfg.ruler = replace(cfg.ruler, tasks=["niah_multivalue", "vt", "qa_2"], samples=3)
    _, records = cfg.ruler.run(cfg, asked(Solver()))
    for record in records:
        if record["index"] == 0:
            pieces = [record["prompt"][start:stop] for start, stop in record["evidence"]]
            assert len(pieces) == {"niah_multivalue": 4, "vt": 5, "qa_2": 2}[record["kind"]]
            held = " ".join(pieces)
            assert all(answer in held for answer in record["answers"])
    assert len({tuple(r["answers"]) for r in records if r["kind"] == "vt"}) == 6


def test_the_seed_and_nothing_else_fixes_the_prompts(cfg):
    cfg.ruler = replace(cfg.ruler, tasks=["niah_single_2", "cwe"], samples=1)
    first, again = cfg.ruler.run(cfg, asked(Solver()))[1], cfg.ruler.run(cfg, asked(Solver()))[1]
    assert first == again
    cfg.ruler = replace(cfg.ruler, tasks=["cwe"], samples=2)
    assert cfg.ruler.run(cfg, asked(Solver()))[1][0] == first[1]
    cfg.seed = 1
    assert cfg.ruler.run(cfg, asked(Solver()))[1][0]["answers"] != first[1]["answers"]


def test_scores_are_nvidia_s():
    """`string_match_all` and `string_match_part` of its constants.py."""
    assert scores.match_all("The Cat, a dog", ["cat", "DOG", "hen"]) == pytest.approx(2 / 3)
    assert scores.match_all("12345", ["234"]) == 1  # within a word too
    assert scores.match_part("a dog", ["cat", "Dog"]) == 1 and scores.match_part("", ["x"]) == 0
    assert {task for task in RULER_TASKS if ruler.SCORES[task] is scores.match_part} == {
        "qa_1",
        "qa_2",
    }
    numbers = {128: 8, 30: 1, 120: 1, 50: 1, 32: 2}
    assert {n: list(ruler.NEW_TOKENS.values()).count(n) for n in numbers} == numbers


def test_weighted_means():
    averages = [{"length": n, "score": s} for n, s in ((8, 0.5), (4, 1.0), (16, 0.0))]
    assert scores.weighted(averages, rising=True) == pytest.approx((1 + 2 * 0.5) / 6)
    assert scores.weighted(averages, rising=False) == pytest.approx((3 + 2 * 0.5) / 6)


def test_intervals_of_an_average():
    one = scores.row(
        "vt", 4, [{"score": s, "tokens": 1, "prediction": "x"} for s in (0, 1, 0, 1)], 8
    )
    assert one["score"] == 0.5 and one["variance"] == pytest.approx(1 / 12)
    assert one["interval"] == pytest.approx([0.15, 0.85], abs=1e-3)  # Wilson, 2 of 4
    sure = {"length": 4, "score": 1.0, "variance": 0.0}
    both = scores.average([one, sure], 4)
    half = 1.959964 * (1 / 12) ** 0.5 / 2
    right = scores.row("vt", 4, [{"score": 1.0, "tokens": 1, "prediction": "x"}] * 5, 8)
    low, high = scores.average([right, right], 4)["interval"]  # five right ones are no certainty
    assert low == pytest.approx(1 - (1 - right["interval"][0]) / 2 / 2**0.5) and high == 1
    assert both["score"] == 0.75 and both["interval"] == pytest.approx([0.75 - half, 1.0])


def test_a_length_without_room_is_named_before_anything_is_asked(cfg):
    model = Solver()
    cfg.lengths = [9000, 800]
    with pytest.raises(UserError, match=r"ruler: vt, sample 0: its shortest prompt of .*=800: a l"):
        cfg.ruler.run(cfg, asked(model))
    assert model.read == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": []}, "at least one"),
        ({"tasks": ["vt", "vt"]}, "different tasks"),
        ({"tasks": ["niah"]}, "'niah' is not one of niah_single_1"),
        ({"samples": 0}, "ruler.samples=0"),
        ({"threshold": 101}, "ruler.threshold=101"),
    ],
)
def test_bad_settings(cfg, change, message):
    with pytest.raises(UserError, match=message):
        replace(cfg.ruler, **change)


def test_a_missing_file_is_told_by_what_needs_it(cfg):
    own = replace(cfg.ruler, data="no/such/place", tasks=["qa_1"])
    with pytest.raises(UserError, match=r"ruler.data=no/such/place has no squad.json"):
        own.inputs(cfg)
    nothing = replace(own, tasks=["vt", "fwe"])
    assert nothing.inputs(SimpleNamespace(seed=3))["seed"] == 3
