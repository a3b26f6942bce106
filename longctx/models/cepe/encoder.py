"""A small bidirectional encoder and its masked-language-model head: the stock Llama, not causal.

Every token of a chunk attends to every real token of it; positions start at 0 in each chunk, and
nothing reaches from one chunk to another. The state that is used is that of the last layer behind
the final norm. Costs one forward pass of a small model, keeps no cache and builds no s x s mask.
Source: CEPE (2402.16617) section 3.1; the head is RoBERTa's (1907.11692) with SiLU and RMSNorm.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from longctx import rope as scaling
from longctx.attention.method import Method
from longctx.batch import IGNORE
from longctx.errors import UserError
from longctx.models import attach
from longctx.models.files import FAILURES, as_dtype, cannot, load_checked, locate


@dataclass(frozen=True)
class Bidirectional(Method):
    """Attention in both directions; it has no numbers, and its own `attend` since it is not causal.

    It belongs to the encoder and is no choice for a decoder, so it is not in `longctx/attention/`.
    """

    @property
    def name(self) -> str:
        """What it is called in messages and by transformers."""
        return "bidirectional"

    def definition(self, i: Tensor, j: Tensor, layer: int, head: Tensor) -> tuple[Tensor, Tensor]:
        """Which pairs attend, and at which rotary distance: all, at their own."""
        return torch.ones_like(i - j, dtype=torch.bool), i - j

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention of whole chunks, with transformers' attention-interface signature.

        Args:
            module: the attention layer that calls.
            query: `[b hq l d]`, rotated.
            key: `[b hk l d]`, rotated.
            value: `[b hk l d]`.
            attention_mask: `[b l]`, True on real tokens, or None.
            scaling: factor on the scores; None: d ** -0.5.
            dropout: probability of dropping an attention weight.
            **kwargs: not looked at.

        Returns:
            `[b l hq d]`, and None for the weights.
        """
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        mask = None
        if attention_mask is not None:
            real = attention_mask.bool()
            # Nobody reads a chunk of padding, but it must not be NaN.
            mask = (real | ~real.any(1, keepdim=True))[:, None, None, :]
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
        )
        return out.transpose(1, 2), None


class EncoderConfig(LlamaConfig):
    """Fields of a Llama; the last entry of the vocabulary is the mask token."""

    model_type = "longctx_encoder"

    @property
    def mask_token_id(self) -> int:
        """The tokenizer's size: the entry behind its last one."""
        return int(self.vocab_size) - 1


def encoder_config(architecture: Mapping[str, Any]) -> EncoderConfig:
    """The configuration of an encoder from plain fields.

    Args:
        architecture: fields of transformers' LlamaConfig; `vocab_size` counts the mask token.

    Raises:
        UserError: if one is unknown or its value cannot be used.
    """
    fields = dict(architecture)
    kind = fields.pop("model_type", "llama")
    if kind not in ("llama", EncoderConfig.model_type):
        raise UserError(f"an encoder is a bidirectional llama, not model_type={kind!r}")
    known = LlamaConfig()
    for key in fields:
        if not hasattr(known, key) and key not in ("rope_theta", "rope_scaling"):
            raise UserError(f"encoder.{key} is not a field of 'llama'")
    try:
        return EncoderConfig(**{"bos_token_id": None, "eos_token_id": None, **fields})
    except FAILURES as error:
        raise cannot("build", "the encoder", error) from error


def bidirectional_llama(config: EncoderConfig) -> LlamaModel:
    """The stock model with attention in both directions, on the device of the context."""
    method = Bidirectional()
    config._attn_implementation = attach.register_attention(method, config)
    config.use_cache = False
    model = LlamaModel(config)
    guard(model)
    return model


def guard(model: LlamaModel) -> None:
    """Keeps the rotary frequencies in fp32 and asserts them; again after weights are loaded."""
    attach.guard_rotary(model, frequencies(model.config), Bidirectional())


def frequencies(config: PreTrainedConfig) -> tuple[Tensor, float] | None:
    """The rotary frequencies that a configuration asks for; None if not known here."""
    native = dict(config.rope_parameters)
    described = scaling.from_native(native)
    if described is None:
        return None
    window = int(native.get("original_max_position_embeddings") or config.max_position_embeddings)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return scaling.inv_freq(described, float(native["rope_theta"]), window, dim)


class EncoderForMaskedLM(PreTrainedModel):
    """The encoder with the head that its pre-training needs; CEPE keeps `encoder` alone.

    Args:
        config: of the encoder.
    """

    config_class = EncoderConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _tied_weights_keys = {"lm_head.weight": "encoder.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: EncoderConfig) -> None:
        config.tie_word_embeddings = True
        super().__init__(config)
        width = config.hidden_size
        self.encoder = bidirectional_llama(config)
        self.lm_dense = nn.Linear(width, width)
        self.lm_layer_norm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(width, config.vocab_size)
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def mask_token_id(self) -> int:
        """What stands for a token that is to be predicted."""
        return int(self.config.mask_token_id)

    def hidden_for_head(
        self, tokens: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """What goes into the last projection.

        Args:
            tokens: `[b s]`, each row a chunk.
            mask: `[b s]`, True on real tokens; None: all are real.
            positions: `[b s]`; None: from 0.

        Returns:
            `[b s h]`.

        Raises:
            UserError: if a row is longer than the encoder's positions.
        """
        window = self.config.max_position_embeddings
        if tokens.shape[1] > window:
            raise UserError(f"rows of {tokens.shape[1]} tokens, and the encoder reads {window}")
        states = self.encoder(
            input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        hidden: Tensor = self.lm_layer_norm(F.silu(self.lm_dense(states)))
        return hidden

    def get_input_embeddings(self) -> nn.Module:
        """The table of token vectors."""
        return cast(nn.Module, self.encoder.embed_tokens)

    def get_output_embeddings(self) -> nn.Linear:
        """The projection to the vocabulary: the table itself, and a bias."""
        return cast(nn.Linear, self.lm_head)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits of every position, and the mean loss over those with a label.

        Args:
            input_ids: `[b s]`.
            attention_mask: `[b s]`, True on real tokens.
            labels: `[b s]`, the true token where it is scored, else `IGNORE`.
            **kwargs: of transformers' interface, not looked at.

        Returns:
            logits `[b s v]`, and the loss.
        """
        logits = self.lm_head(self.hidden_for_head(input_ids, attention_mask))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE
            )
        return MaskedLMOutput(loss=loss, logits=logits)


def build_encoder(
    architecture: Mapping[str, Any] | EncoderConfig,
    dtype: str | torch.dtype = "fp32",
    seed: int = 0,
) -> EncoderForMaskedLM:
    """An encoder of random weights; the same seed gives the same ones in fp32 and bf16.

    Args:
        architecture: fields of transformers' LlamaConfig; `vocab_size` counts the mask token, so it
            is the tokenizer's size + 1. Or a configuration, as it is.
        dtype: `fp32 | bf16` or a torch dtype.
        seed: of the weights; the global generators are left as they were.

    Raises:
        UserError: if a field is unknown or its value cannot be used.
    """
    config = architecture
    if not isinstance(config, EncoderConfig):
        config = encoder_config(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = EncoderForMaskedLM(config)
        except FAILURES as error:
            raise cannot("build", "the encoder", error) from error
    model.config.dtype = as_dtype(dtype)
    nn.Module.to(model, as_dtype(dtype))
    return model


def load_encoder(path: str | Path, dtype: str | torch.dtype | None = None) -> EncoderForMaskedLM:
    """An encoder that `save_pretrained` or the reference code wrote; only tensors are read.

    Args:
        path: a directory, or a hub name.
        dtype: `fp32 | bf16` or a torch dtype. None: the checkpoint's own.

    Raises:
        UserError: if it cannot be read, or is no encoder with its head.
    """
    config, ours = stored_config(path)
    renamed = None if ours else {r"^model\.": "encoder.", r"^lm_bias$": "lm_head.bias"}
    model: EncoderForMaskedLM = load_checked(EncoderForMaskedLM, path, config, dtype, ours, renamed)
    guard(model.encoder)
    return model


def stored_config(path: str | Path) -> tuple[EncoderConfig, bool]:
    """The configuration of an encoder, and whether this project wrote it; no weight is read.

    Raises:
        UserError: if it cannot be read.
    """
    where = locate(str(path))[0]
    try:
        fields, _ = EncoderConfig.get_config_dict(where)
    except FAILURES as error:
        raise cannot("read the configuration of the encoder", str(path), error) from error
    if fields.get("model_type") == EncoderConfig.model_type:
        return EncoderConfig.from_dict(fields), True
    known = LlamaConfig()
    kept = {
        k: v for k, v in fields.items() if k in ("model_type", "rope_theta") or hasattr(known, k)
    }
    return encoder_config(kept), False
