"""`python generate.py ...`: the text on stdout, the rest on stderr, mistakes in one line."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from longctx.models.load import load_model, load_tokenizer
from tests.helpers.entry import run_entry
from tests.helpers.process import ROOT

TEXT = "The pass key is 31415. Remember it. 31415 is the pass key.\n" * 12
SHORT = ["max_new_tokens=12", "device=cpu"]


def run(tmp_path, *arguments):
    return run_entry([*arguments, *SHORT], tmp_path / "log", script="generate.py")


def reference(text, lab_model, attention):
    """What transformers' own generate() writes, the whole prompt in one pass."""
    model, tokenizer = (
        load_model(lab_model, attention, dtype="fp32"),
        load_tokenizer(str(lab_model)),
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]  # with BOS
    out = model.generate(ids, do_sample=False, max_new_tokens=12)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("attention", ["full", "dca"])
def test_a_file_and_a_question(attention, lab_model, tmp_path):
    file = tmp_path / "book, the first.txt"
    file.write_text(TEXT, encoding="utf-8")
    question = "What's the pass key? The pass key is"
    done = run(
        tmp_path,
        f"attention={attention}",
        f"prompt_file={file}",
        f"question={question}",
        "prefill_tokens=50",
    )
    assert done.code == 0, done
    assert done.out == reference(f"{TEXT}\n{question}", lab_model, attention) + "\n"
    told = done.err.splitlines()[-3:]
    assert [line.split(":")[0] for line in told] == ["prefill", "decoding", "peak memory"]
    assert told[0].endswith("tokens/s (the model's window: 256)")


MISTAKES = {
    "no text": ([], "give the text to continue as either prompt=TEXT or prompt_file=FILE"),
    "two texts": (
        ["prompt=a", "prompt_file=b"],
        "give the text to continue as either prompt=TEXT or prompt_file=FILE",
    ),
    "no file": (
        ["prompt_file=/no/book.txt"],
        "prompt_file=/no/book.txt: No such file or directory",
    ),
    "a directory": ([f"prompt_file={ROOT}"], f"prompt_file={ROOT}: Is a directory"),
    "no text file": (
        [f"prompt_file={ROOT}/assets/lab-llama/model.safetensors"],
        f"prompt_file={ROOT}/assets/lab-llama/model.safetensors is not UTF-8 text: "
        "invalid start byte at byte ",
    ),
    "empty": (["prompt="], "prompt= is empty: there is nothing to continue"),
    "blank": (["prompt=  "], "prompt= is empty: there is nothing to continue"),
    "empty file": (["prompt_file=/dev/null"], "prompt_file=/dev/null is empty: there is nothing"),
    "no new token": (["prompt=a", "max_new_tokens=0"], "max_new_tokens=0 must be above 0"),
    "no weights": (
        ["prompt=a", "model=lab_scratch"],
        "model=lab_scratch has no weights to use: give model=PATH",
    ),
    "no model": (["prompt=a", "model=/no/model"], "model=/no/model is neither a path nor one of "),
    "unknown attention": (["prompt=a", "attention=nope"], "attention=nope is not one of "),
    "unknown key": (["prompt=a", "tokens=3"], "tokens is not a setting: there has "),
    "chunk beyond the window": (
        ["prompt=a", "attention=dca", "attention.chunk_len=256"],
        "attention.chunk_len=256 must be below attention.max_positions=256",
    ),
    "chunk of zero": (
        ["prompt=a", "attention=dca", "attention.chunk_len=0"],
        "attention.chunk_len=0 must be at least 1",
    ),
    "no device": (["prompt=a", "device=nope"], "device=nope: "),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake(case, tmp_path):
    arguments, line = MISTAKES[case]
    done = run_entry(arguments, tmp_path / "log", script="generate.py")
    assert done.error.startswith(line)
    assert done.out == ""


def test_on_a_terminal(lab_model, tmp_path):
    """A bar for the prefill, and text before the end."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, "generate.py", "prompt=" + TEXT, "prefill_tokens=100"]
    with subprocess.Popen(
        [*command, "max_new_tokens=12"], cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs
    ) as process:
        os.close(theirs)
        assert process.stdout is not None
        pieces = []
        while piece := os.read(process.stdout.fileno(), 4096):
            pieces.append(piece)
        shown = b""
        try:
            while more := os.read(ours, 4096):
                shown += more
        except OSError:  # the other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0, shown
    assert b"".join(pieces).decode() == reference(TEXT, lab_model, "full") + "\n"
    assert len(pieces) > 2
    assert b"prefill: 100%" in shown and b"peak memory: " in shown
    assert b"[transformers]" not in shown  # a window that DCA extends is no reason to warn
