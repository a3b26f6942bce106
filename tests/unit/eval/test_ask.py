from dataclasses import replace
from random import Random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.errors import UserError
from longctx.eval.ask import Cell, Prompt, Reader, divide, largest
from tests.helpers.reading import Pupil, subject


@given(least=st.integers(0, 20), more=st.integers(0, 300), limit=st.integers(-1, 400))
def test_the_largest_size_that_fits(least, more, limit):
    most = least + more
    want = max((n for n in range(least, most + 1) if n <= limit), default=None)
    assert largest(lambda n: n <= limit, least, most) == want


class Lines:
    """`size` lines and a drawn number; some samples are longer than others."""

    least, most = 1, 1000

    def write(self, size: int, index: int, draw: Random) -> Prompt:
        code = str(draw.randint(100, 999))
        fact = f"code of {'X' * (1 + index)} is {code}"
        lines = [f"line number {i:04}" for i in range(size)]
        asked = f"What is the code of {'X' * (1 + index)}?"
        text = "\n".join([fact, *lines, asked])
        return Prompt(text, "\nAnswer:", (code,), (fact,), {"lines": size})


def cell(model=None, **changes):
    reader = Reader(subject(model or Pupil(2000), bos=65))
    return replace(Cell("task", "kind", Lines(), reader, 400, 12, 0), **changes)


def test_prompts_fill_their_length_and_never_pass_it():
    own = cell()
    size = own.size(5)
    lengths = [len(own.reader.tokens(own.prompt(size, i))) + 12 for i in range(5)]
    assert all(400 - 2 * 16 < n <= 400 for n in lengths)
    assert lengths[0] + 17 > 400  # one more line would not fit
    assert own.prompt(size, 1) == own.prompt(size, 1) != own.prompt(size, 2)
    assert replace(own, seed=1).prompt(size, 1).answers != own.prompt(size, 1).answers


def test_what_does_not_fit_is_named_before_it_is_asked():
    own = cell(length=85)
    assert own.size(1) == 1
    message = r"task: kind, sample \d+: its shortest prompt of \d+ tokens and 12 for the answer exc"
    with pytest.raises(UserError, match=message):
        own.size(20)
    with pytest.raises(UserError, match=r"sample 0: .* exceed lengths=40: a larger length"):
        cell(length=40).size(1)


def test_a_record_says_what_was_read_and_answered():
    model = Pupil(2000)
    own = cell(model)
    record = own.ask(own.size(2), 1, lambda found, answers: float(answers[0] in found))
    [(prompt, contexts)] = model.calls
    assert prompt[0] == "A" and contexts == [] and record["tokens"] == len(prompt)
    [(start, stop)] = record["evidence"]
    assert prompt[1:][start:stop] == f"code of XX is {record['answers'][0]}"
    assert record["prompt"] is None and record["starts"] == prompt[1:241]
    assert record["ends"] == prompt[-240:] and record["score"] == 1
    assert record["prediction"] == f"{record['answers'][0]}\n\nDocume"  # as long as it was let
    assert own.ask(1, 0, lambda *_: 0)["prompt"] == model.calls[-1][0][1:]
    assert record["lines"] > 1


def test_a_foreign_tokenizer_is_refused():
    model = Pupil(2000)
    model.config.vocab_size = 90
    with pytest.raises(
        UserError, match=r"gives token \d+, and the model knows 90: .*another model"
    ):
        cell(model).size(1)


def test_the_chat_template():
    reader = Reader(subject(Pupil(2000), bos=65), chat=True, key="ruler.chat")
    prompt = Prompt("Text?", " It is", ("x",))
    with pytest.raises(UserError, match=r"ruler.chat=true: the tokenizer has no chat template"):
        reader.tokens(prompt)

    def apply(turns, tokenize, add_generation_prompt):
        assert turns == [{"role": "user", "content": "Text?"}]
        assert add_generation_prompt and not tokenize
        return "A<user>Text?<bot>"

    reader.subject.tokenizer = SimpleNamespace(
        bos_token_id=65, chat_template="..", apply_chat_template=apply
    )
    assert "".join(map(chr, reader.tokens(prompt))) == "A<user>Text?<bot> It is"  # one BOS


def test_an_encoder_reads_what_the_decoder_has_no_room_for():
    tokens = list(range(250))
    assert divide(Pupil(100), tokens, 10) == ([], tokens)
    contexts, rest = divide(Pupil(100, encoder_window=60), tokens, 10)
    assert [len(c) for c in contexts] == [60, 60, 40] and len(rest) == 90
    assert [t for c in contexts for t in c] + rest == tokens
    assert divide(Pupil(100, encoder_window=60), tokens[:90], 10) == ([], tokens[:90])
    with pytest.raises(UserError, match="decoder's window of 10"):
        divide(Pupil(10, encoder_window=60), tokens, 10)


class Shown(Lines):
    """What holds the answer stands in a solved example too."""

    def write(self, size: int, index: int, draw: Random) -> Prompt:
        prompt = super().write(size, index, draw)
        return replace(prompt, text=f"{prompt.evidence[0]}, said the example.\n{prompt.text}")


def test_evidence_is_what_comes_last():
    record = cell(source=Shown()).ask(1, 0, lambda *_: 0)
    [(start, stop)] = record["evidence"]
    found = record["prompt"][start:stop]
    assert start > 0 and found == f"code of X is {record['answers'][0]}"
