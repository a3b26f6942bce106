"""The passkey prompt: exact lengths, distances and answers, in the lab tokenizer's tokens."""

from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece as spm

from longctx.data.passkey_text import FILLER, Passkey, build, build_at_distance
from longctx.errors import UserError

LAB = Path(__file__).parents[3] / "assets" / "lab-llama" / "tokenizer.model"
SENTENCE = 7  # tokens of the longest filler sentence, in the lab tokenizer
LENGTHS = [89, 90, 96, 97, 128, 250, 256, 1000, 4096]
DEPTHS = [0.0, 0.1, 0.5, 0.77, 1.0]


@pytest.fixture(scope="module")
def model() -> spm.SentencePieceProcessor:
    return spm.SentencePieceProcessor(model_file=str(LAB))


@pytest.fixture(scope="module")
def encode(model: spm.SentencePieceProcessor) -> Callable[[str], list[int]]:
    return lambda text: list(model.encode(text))


def span(made: Passkey) -> list[int]:
    return made.tokens[slice(*made.answer)]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_pieces_are_the_tokens_of_the_whole_text(
    model: spm.SentencePieceProcessor,
    encode: Callable[[str], list[int]],
    length: int,
    depth: float,
) -> None:
    made = build(encode, model.bos_id(), length, depth, seed=3, index=1)
    text = model.decode(made.tokens[1:])
    assert made.tokens == [model.bos_id(), *encode(text)]
    assert text.count(made.key) == 3
    assert text.endswith("What is the pass key? The pass key is " + made.key)
    assert model.decode(span(made)) == " " + made.key
    prompt = text.removesuffix(" " + made.key)
    assert encode(prompt) + encode(" " + made.key) == encode(text)
    assert made.answer == (len(made.tokens) - 6, len(made.tokens))
    assert length - SENTENCE - 2 < len(made.tokens) <= length


def test_no_further_sentence_would_fit(
    model: spm.SentencePieceProcessor, encode: Callable[[str], list[int]]
) -> None:
    for length in range(97, 180):
        made = build(encode, 1, length, 0.0, 0, 0)
        count = len(model.decode(made.tokens).split("\n")[-2].split(". "))
        following = encode("." + " " + FILLER[count % len(FILLER)])
        if length >= 100 and "grass" in model.decode(made.tokens):
            assert len(made.tokens) + len(following) - 1 > length


@pytest.mark.parametrize("length", [250, 1000, 4096])
@pytest.mark.parametrize("depth", DEPTHS)
def test_depth_is_the_share_of_filler_before_the_key(
    encode: Callable[[str], list[int]], length: int, depth: float
) -> None:
    made = build(encode, 1, length, depth, seed=0, index=0)
    end = made.answer[0]
    nearest, farthest = 38, end - 44  # no filler after the key; none before it
    wanted = farthest - depth * (farthest - nearest)
    assert abs(made.distance - wanted) <= SENTENCE + 1


@pytest.mark.parametrize("distance", [1, 38, 60, 128, 250, 999, 1500, 2000, 5000])
def test_distance(
    model: spm.SentencePieceProcessor, encode: Callable[[str], list[int]], distance: int
) -> None:
    made = build_at_distance(encode, 1, 2048, distance, seed=0, index=0)
    prompt = made.tokens[: made.answer[0]]
    seen = model.decode(prompt[-made.distance :])
    assert seen.startswith(f"The pass key is {made.key}. Remember it.")
    assert 2048 - SENTENCE - 2 < len(made.tokens) <= 2048
    assert abs(made.distance - min(max(distance, 38), len(prompt) - 44)) <= SENTENCE


def test_filler_is_whole_sentences(
    model: spm.SentencePieceProcessor, encode: Callable[[str], list[int]]
) -> None:
    lines = model.decode(build(encode, None, 700, 0.4, 0, 0).tokens).split("\n")
    assert len(lines) == 5
    for line in (lines[1], lines[3]):
        sentences = [sentence + "." for sentence in line[:-1].split(". ")]
        assert sentences == [FILLER[i % len(FILLER)] for i in range(len(sentences))]


def test_key_is_fixed_by_its_place_alone(encode: Callable[[str], list[int]]) -> None:
    def key(length: int, depth: float, seed: int, index: int) -> str:
        return build(encode, 1, length, depth, seed, index).key

    assert key(256, 0.5, 0, 0) == "10849"  # on every machine and version
    places = [(256, 0.5, 0, 0), (257, 0.5, 0, 0), (256, 0.25, 0, 0), (256, 0.5, 1, 0)]
    places += [(256, 0.5, 0, index) for index in range(1, 30)]
    keys = [key(*place) for place in places]
    assert len(set(keys)) == len(keys)
    assert all(len(k) == 5 and k.isdigit() and k[0] != "0" for k in keys)
    assert keys[0] == key(*places[0])


def test_dummy_prefix_stays_out(encode: Callable[[str], list[int]]) -> None:
    """A tokenizer that puts a mark before every text (as Llama-2's) gives the same pieces."""
    mark = 4_000_000

    def marked(text: str) -> list[int]:
        return [mark, *encode(text)]

    plain = build(encode, 1, 300, 0.5, 0, 0)
    made = build(marked, 1, 301, 0.5, 0, 0)
    assert made.tokens.count(mark) == 1
    assert made.tokens[1] == mark
    assert len(made.tokens) == len(plain.tokens) + 1


def test_bad_arguments(encode: Callable[[str], list[int]]) -> None:
    with pytest.raises(UserError, match="length 88 is too short: the template has 89"):
        build(encode, 1, 88, 0.5, 0, 0)
    with pytest.raises(UserError, match="too short"):
        build_at_distance(encode, 1, 88, 10, 0, 0)
    with pytest.raises(UserError, match=r"depth 1\.5"):
        build(encode, 1, 256, 1.5, 0, 0)
