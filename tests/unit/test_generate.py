"""The settings of generate.py, and what reaches the model."""

import dataclasses

import pytest
import torch

from longctx import cli
from longctx.commands import generate as entry
from longctx.errors import UserError
from longctx.generate import GenerateConfig, Spent, generate, read_contexts, read_prompt
from longctx.models.cepe.encoder import build_encoder
from longctx.models.cepe.model import CepeForCausalLM
from longctx.models.export.directory import export
from longctx.models.load import load_model, load_tokenizer
from tests.helpers.methods import NAMES, complete

TEXT = "The pass key is 31415. Remember it. 31415 is the pass key.\n" * 3


def config(*arguments):
    given = [entry.literal(argument) for argument in arguments]
    return cli.compose(["model=lab", *given], GenerateConfig, "generate", "generate_schema")


def written(*arguments):
    pieces = []
    spent = generate(config(*arguments), pieces.append)
    return "".join(pieces), spent


@pytest.mark.parametrize(
    "text",
    [
        "Who is he, and why? {a: [b=c]}",
        "it's",
        '"Well," he said, \'so it "is"\'.',
        "ends in \\",
        '"Come in," he said. "Sit down."',
        "a\\'b\\\\'",
        "${model.path} $HOME \\${x} $${y}",
        "two\nlines\n",
        " spaces ",
        "12",
        "null and true",
        "é 漢 🐋",
        "\\",
        "*?(x)~@|;<>%#!&",
    ],
)
def test_free_text_stays_as_it_is(text):
    assert config(f"prompt={text}").prompt == text
    assert config("prompt=x", f"question={text}").question == text


def test_text_may_be_quoted_as_hydra_allows():
    assert config("prompt='a, b'").prompt == "a, b"
    assert config('prompt="a, b"').prompt == "a, b"
    assert config("prompt=x", "question=null").question is None


def test_the_question_follows_on_a_line_of_its_own(tmp_path):
    file = tmp_path / "a book, long.txt"
    file.write_text("Once.\n\nTwice é", encoding="utf-8")
    assert read_prompt(config(f"prompt_file={file}")) == "Once.\n\nTwice é"
    assert read_prompt(config(f"prompt_file={file}", "question=Why?")) == "Once.\n\nTwice é\nWhy?"
    assert read_prompt(config("prompt=Once.", "question=Why?")) == "Once.\nWhy?"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "give the text to continue as either prompt=TEXT or prompt_file=FILE"),
        (["prompt=a", "prompt_file=b"], "give the text to continue as either prompt=TEXT or"),
        (["prompt=a", "max_new_tokens=0"], "max_new_tokens=0 must be above 0"),
        (["prompt=a", "prefill_tokens=0"], "prefill_tokens=0 must be above 0"),
        (["prompt=a", "temperature=-1"], r"temperature=-1\.0 must be 0 or above"),
        (["prompt=a", "temperature=nan"], "temperature=nan must be 0 or above"),
        (["prompt=a", "temperature=1", "top_p=0"], r"top_p=0\.0 must be above 0 and at most 1"),
        (["prompt=a", "top_p=0.5"], r"top_p=0\.5 without temperature above 0 samples nothing"),
        (["prompt=a", "dtype=int8"], "dtype='int8' is not one of fp32, bf16"),
        (["prompt=a", "model=lab_scratch"], "model=lab_scratch has no weights to use"),
    ],
)
def test_settings_that_do_not_fit(arguments, line):
    with pytest.raises(UserError, match=line):
        config(*arguments)


@pytest.mark.parametrize("attention", [*filter(complete, NAMES)])
def test_the_text_of_one_plain_generate_call(attention, lab_model):
    model, tokenizer = (
        load_model(str(lab_model), attention, dtype="fp32"),
        load_tokenizer(lab_model),
    )
    text = TEXT * 8 + "The pass"  # beyond the window of 256
    ids = [1, *tokenizer.encode(text, add_special_tokens=False)]
    out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=20, pad_token_id=3)
    expected = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    for size in (100, 10_000):
        found, spent = written(
            f"attention={attention}",
            f"prompt={text}",
            "max_new_tokens=20",
            f"prefill_tokens={size}",
        )
        assert found == expected
        assert (spent.prompt_tokens, spent.new_tokens) == (len(ids), out.shape[1] - len(ids))
        assert spent.window == 256 and spent.peak_bytes > 1e7


def test_sampling_is_repeatable():
    sampled = ["prompt=" + TEXT, "max_new_tokens=20", "temperature=1.5", "top_p=0.99"]
    assert written(*sampled, "seed=1")[0] == written(*sampled, "seed=1")[0]
    assert written(*sampled, "seed=1")[0] != written(*sampled, "seed=2")[0]
    cold = [*sampled[:2], "temperature=1e-4"]
    assert written(*cold)[0] == written(*sampled[:2])[0]


def test_rope_reaches_as_far_as_prompt_and_answer():
    prompt = ["prompt=" + TEXT * 8, "max_new_tokens=20", "rope=pi"]
    assert written(*prompt)[1].window == 768  # 693 tokens, in windows of 256
    assert written(*prompt, "rope.factor=8")[1].window == 2048


def test_what_it_took_in_words():
    spent = Spent(256, 1_000, 5, 2.0, 0.5, 3 * 2**29)
    assert spent.lines() == [
        "prefill: 1,000 tokens in 2.00 s, 500.0 tokens/s (the model's window: 256)",
        "decoding: 4 tokens after the first in 0.50 s, 8.0 tokens/s",
        "peak memory: 1.50 GiB",
    ]
    assert dataclasses.replace(spent, new_tokens=1).lines()[1] == "decoding: one token"
    first, *others = dataclasses.replace(spent, context_tokens=2_000, context_seconds=0.25).lines()
    assert first == "contexts: 2,000 tokens in 0.25 s" and others == spent.lines()


def test_context_files_are_cut_and_padded(tmp_path):
    long, short = tmp_path / "long.txt", tmp_path / "short.txt"
    long.write_text(TEXT)
    short.write_text("Once.")
    cfg = config("prompt=x", f"context_files=[{long},{short}]", "context_tokens=40")
    tokenizer = load_tokenizer(cfg.model.path)
    ids, real = read_contexts(cfg, tokenizer)
    assert ids.shape == real.shape and ids.shape[0] == 1 and ids.shape[2] == 40
    texts = [tokenizer.decode(row[keep]) for row, keep in zip(ids[0], real[0], strict=True)]
    assert "".join(texts[:-1]) == TEXT and texts[-1] == "Once."
    assert read_contexts(config("prompt=x"), tokenizer) is None


@pytest.mark.parametrize(
    ("content", "line"),
    [(None, "No such file"), ("", "is empty: there is nothing to read")],
)
def test_context_files_that_cannot_be_read(tmp_path, content, line):
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=line):
        generate(config("prompt=x", f"context_files=[{path}]"), print)


def test_a_decoder_alone_reads_no_context_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("Once.")
    with pytest.raises(UserError, match="has no encoder for context_files"):
        generate(config("prompt=x", f"context_files=[{path}]"), print)


def test_a_cepe_model_reads_context_files(tmp_path):
    """The text of transformers' generate with the same contexts; and the contexts matter."""
    decoder = load_model(config("prompt=x").model.path)
    architecture = {
        "vocab_size": decoder.config.vocab_size + 1, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }  # fmt: skip
    model = CepeForCausalLM.from_parts(decoder, build_encoder(architecture), init="copy")
    export(model, config("prompt=x").model.path, tmp_path / "cepe")
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    files[0].write_text(TEXT)
    files[1].write_text("It was a dark and stormy night.")
    more = ["prompt=Once upon a time", "max_new_tokens=12", "prefill_tokens=3"]
    pieces: list[str] = []
    given = [f"model={tmp_path / 'cepe'}", *map(entry.literal, more), "context_tokens=40"]
    both = [*given, f"context_files=[{files[0]},{files[1]}]"]
    cfg = cli.compose(both, GenerateConfig, "generate", "generate_schema")
    spent = generate(cfg, pieces.append)
    tokenizer = load_tokenizer(str(tmp_path / "cepe"))
    ids, real = read_contexts(cfg, tokenizer)
    prompt = [tokenizer.bos_token_id, *tokenizer.encode(more[0][7:], add_special_tokens=False)]
    expected = model.eval().generate(
        torch.tensor([prompt]), context_ids=ids, context_mask=real, do_sample=False,
        max_new_tokens=12, pad_token_id=0,
    )[0, len(prompt):]  # fmt: skip
    assert "".join(pieces) == tokenizer.decode(expected, skip_special_tokens=True)
    assert spent.context_tokens == int(real.sum()) and spent.context_seconds > 0
    with pytest.raises(UserError, match=r"context_tokens=65, and the encoder of .* reads 64 at a"):
        generate(dataclasses.replace(cfg, context_tokens=65), pieces.append)
    alone = []
    generate(cli.compose(given, GenerateConfig, "generate", "generate_schema"), alone.append)
    assert "".join(alone) != "".join(pieces)
