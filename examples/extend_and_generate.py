"""A model beyond its window, in Python: the loss of far tokens, then a few tokens generated.

    python examples/extend_and_generate.py [MODEL] [TEXT_FILE]

Default: the lab model, whose window is 256 tokens, and this repository's licence as the long text.
The text is read at four windows, with plain attention, with Dual Chunk Attention and with
YaRN; neither needs training.
"""

import sys
from pathlib import Path
from typing import Any

import torch

import longctx

ROOT = Path(__file__).resolve().parents[1]
WINDOWS = 4  # how far beyond the window the text goes
CHOICES: dict[str, dict[str, Any]] = {
    "plain attention": {},
    "attention=dca": {"attention": "dca"},
    "rope=yarn": {"rope": {"name": "yarn", "factor": WINDOWS}},
}


def perplexity(model: Any, ids: torch.Tensor, last: int) -> float:
    """Of the `last` tokens of `ids` [1 s], each with all tokens before it."""
    with torch.no_grad():
        logits = model(ids).logits[0, -last - 1 : -1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, -last:]).exp())


def main(path: str, text_file: str) -> dict[str, float]:
    """Prints perplexity and a continuation for each choice.

    Args:
        path: a checkpoint directory or a name on the hub.
        text_file: UTF-8 text, at least `WINDOWS` windows long.

    Returns:
        The perplexities by choice.
    """
    from transformers import AutoConfig, AutoTokenizer  # after longctx, which registers its own

    window = AutoConfig.from_pretrained(path).max_position_embeddings
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = Path(text_file).read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : WINDOWS * window]
    print(f"{path}: window {window}, text {ids.shape[1]} tokens\n")
    found = {}
    for name, choice in CHOICES.items():
        model = longctx.load_model(path, dtype="fp32", **choice).eval()
        found[name] = perplexity(model, ids, last=window)
        new = model.generate(
            ids, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )[0, ids.shape[1] :]
        print(f"{name:17} perplexity of the last {window} tokens {found[name]:8.1f}  "
              f"goes on: {tokenizer.decode(new)!r}")  # fmt: skip
    return found


if __name__ == "__main__":
    given = dict(enumerate(sys.argv[1:]))
    main(given.get(0, str(ROOT / "assets/lab-llama")), given.get(1, str(ROOT / "LICENSE")))
