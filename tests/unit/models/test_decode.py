"""Prefill in pieces and text as it comes: the tokens and the text of one plain generate()."""

import pytest
import torch

from longctx.models.decode import Stream, continue_tokens
from longctx.models.load import load_tokenizer
from tests.helpers.methods import FIRST
from tests.helpers.networks import network, tokens

DCA = {"name": "dca", "chunk_len": 8, "local_window": 2, "max_positions": 11}
SIZES = (1, 5, 7, 8, 9, 16, 36, 37, 100)  # within, at and beyond chunks of 8; the prompt has 37
GREEDY = {"do_sample": False, "max_new_tokens": 14, "pad_token_id": 0}


def without_cache(model, prompt, new):
    """Greedy decoding by the definition: a whole forward pass for each token."""
    for _ in range(new):
        following = model(prompt, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        prompt = torch.cat([prompt, following], dim=1)
    return prompt


@pytest.mark.parametrize("attention", [DCA, *FIRST.values()], ids=str)
@torch.no_grad()
def test_any_piece_gives_the_same_tokens(attention):
    model, prompt = network(attention=attention, num_hidden_layers=3), tokens(1, 37)
    expected = model.generate(prompt, **GREEDY)
    assert torch.equal(expected, without_cache(model, prompt, 14))
    for size in SIZES:
        counts = []
        assert torch.equal(
            continue_tokens(model, prompt, size, done=counts.append, **GREEDY), expected
        )
        assert all(count == size for count in counts) and 0 < 37 - sum(counts) <= size


@pytest.mark.parametrize("size", [5, 8, 100])
def test_the_logits_behind_the_tokens(size):
    """Equal tokens may come from wrong positions by luck; equal scores do not."""
    model, prompt = network(attention=DCA), tokens(1, 37)
    more = GREEDY | {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(prompt, **more)
    found = continue_tokens(model, prompt, size, **more)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # generate() keeps fp32


def test_angles_that_depend_on_the_length():
    model = network(rope={"name": "dynamic_ntk", "factor": 1.0})
    prompt = tokens(1, 37)
    assert torch.equal(
        continue_tokens(model, prompt, 5, **GREEDY), model.generate(prompt, **GREEDY)
    )


@pytest.mark.parametrize("attention", ["full", DCA])
def test_sampling_depends_on_the_seed_only(attention):
    model, prompt = network(attention=attention), tokens(1, 37)
    more = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "max_new_tokens": 14}
    found = []
    for size, seed in ((100, 0), (5, 0), (5, 1)):
        torch.manual_seed(seed)
        found.append(continue_tokens(model, prompt, size, pad_token_id=0, **more))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_tokens_that_equal_the_padding_token_are_read():
    model, prompt = network(), tokens(1, 37)
    prompt[0, [0, 5, 36]] = 0
    expected = without_cache(model, prompt, 14)
    assert torch.equal(continue_tokens(model, prompt, 8, **GREEDY), expected)


def test_stops_at_the_end_of_the_sequence():
    model, prompt = network(), tokens(1, 37)
    whole = model.generate(prompt, **GREEDY)
    end = int(whole[0, 40])
    stopped = continue_tokens(model, prompt, 8, eos_token_id=end, **GREEDY)
    first = 37 + whole[0, 37:].tolist().index(end)
    assert torch.equal(stopped, whole[:, : first + 1])


def test_each_token_is_handed_out_when_it_is_there():
    model, prompt, order = network(), tokens(1, 37), []
    layer = model.model.layers[0]
    layer.register_forward_hook(lambda *_: order.append("pass"))
    stream = Stream(lambda ids: "x" * len(ids), order.append, lambda: order.append("first"))
    out = continue_tokens(model, prompt, 16, stream, **(GREEDY | {"max_new_tokens": 3}))
    assert order == ["pass", "pass", "pass", "first", "x", "pass", "x", "pass", "x", ""]
    assert stream.tokens == out[0, 37:].tolist()


# --- text ----------------------------------------------------------------------------------------

TEXTS = [
    "The whale, he said.\n\n  Two spaces;\ttabs. And a line\nmore",
    " leading space",
    "naïve café … 漢字 и кириллица 🐋🐳 end",
    "\n",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(text, lab_model):
    tokenizer = load_tokenizer(str(lab_model))
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=True)

    written = []
    stream = Stream(decode, written.append, lambda: None)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(written) == decode(ids)
    assert not any("\ufffd" in piece for piece in written)
    assert sum(map(bool, written)) >= len(text.split()) // 2  # piece by piece, not at the end


def test_bytes_without_an_end_come_at_last(lab_model):
    tokenizer = load_tokenizer(str(lab_model))
    ids = tokenizer.encode("a 🐋", add_special_tokens=False)[:-1]
    written = []
    stream = Stream(tokenizer.decode, written.append, lambda: None)
    stream.put(torch.tensor([[1]]))
    for token in ids:
        stream.put(torch.tensor([token]))
    assert "".join(written).strip() == "a"
    stream.end()
    assert "".join(written) == tokenizer.decode(ids)
