"""A `.gguf` file is de-quantised, computes what its weights say, and can be exported."""

import gguf
import numpy as np
import pytest
import torch

from longctx.config import RopeConfig
from longctx.models.configure import native_window
from longctx.models.export.directory import export
from longctx.models.load import build_model, load_model, load_tokenizer

HEADS, KV_HEADS, SIZE = 4, 2, 32
LLAMA = {
    "model_type": "llama", "vocab_size": 40, "hidden_size": SIZE, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 32, "tie_word_embeddings": False,
    "initializer_range": 0.3,
}  # fmt: skip
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "model.layers": "blk",
    "model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm",
}  # fmt: skip


def interleaved(weight, heads):
    """llama.cpp keeps the two halves of a rotary pair side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(file, the model whose weights it holds), Q8_0 where the format has it."""
    model = build_model(LLAMA).eval()
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(SIZE)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(SIZE // HEADS)
    writer.add_vocab_size(40)
    writer.add_tokenizer_model("gpt2")
    letters = [chr(ord("a") + i) for i in range(26)]
    merges = [f"{x} b" for x in letters[2:14]]
    tokens = [*letters, *(m.replace(" ", "") for m in merges), "<s>", "</s>"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 38 + [3, 3])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(38)
    writer.add_eos_token_id(39)
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            weight = interleaved(weight, HEADS if "q_proj" in name else KV_HEADS)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)  # noqa: PLW2901
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.ndim == 2 else None
        if kind is None:
            writer.add_tensor(name, weight)
        else:
            writer.add_tensor(
                name, gguf.quants.quantize(np.ascontiguousarray(weight), kind), raw_dtype=kind
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


def test_logits_tokenizer_and_export(written, tmp_path):
    path, original = written
    model = load_model(str(path), rope=RopeConfig("pi", factor=2)).eval()
    assert native_window(model.config) == 64
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids = torch.arange(20)[None]
    with torch.no_grad():
        spread = model(ids, position_ids=2 * torch.arange(20)[None]).logits
        error = (spread - original(ids).logits).norm() / spread.norm()
        assert error < 0.1
        assert load_tokenizer(str(path))("cb")["input_ids"] == [26]
        out = export(model, str(path), tmp_path / "hf")
        assert torch.equal(load_model(str(out))(ids).logits, model(ids).logits)
    assert load_tokenizer(str(out))("cb")["input_ids"] == [26]
