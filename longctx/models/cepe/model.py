"""CEPE: a decoder that reads long context through a small encoder and cross-attention.

The context is cut into chunks, each of which the encoder reads on its own; decoder layers attend to
the states of all of them, in addition to the decoder's own tokens. Contexts consume no decoder
positions. The decoder is the stock transformers class with its own attention and rope.
A context token costs one state `[e]`, kept once for all layers; see `cross_attention.py` for what
a call adds to it. Source: CEPE (2402.16617) section 3.
"""

from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaModel, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import CausalLMOutputWithPast

from longctx.batch import IGNORE
from longctx.errors import UserError
from longctx.models.cepe import cross_attention
from longctx.models.cepe import encoded_contexts as encoded
from longctx.models.cepe.configuration import CepeConfig as CepeConfig  # noqa: PLC0414 - belongs to it
from longctx.models.cepe.configuration import new_decoder
from longctx.models.cepe.encoded_contexts import Contexts as Contexts  # noqa: PLC0414 - what `encode` gives
from longctx.models.cepe.encoder import EncoderForMaskedLM, bidirectional_llama
from longctx.models.export.classes import make_stock


class ContextGeneration(GenerationMixin):
    """Transformers' `generate` for a model that reads contexts: they are encoded once and reused.

    A beam or a sample takes a copy of its row's states.
    """

    read: Any

    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        context_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        contexts: Contexts | None = None,
        **settings: Any,
    ) -> Any:
        """Transformers' `generate`, with contexts that are encoded once.

        Args:
            inputs: `[b s]`, the prompt; also as `input_ids`.
            context_ids: `[b c l]`.
            context_mask: `[b c l]`, True on real tokens.
            contexts: instead of both, encoded already.
            **settings: of transformers' `generate`.

        Raises:
            UserError: if the contexts do not fit, or there is no prompt.
        """
        if inputs is None:
            inputs = settings.pop("input_ids", None)
        if context_ids is not None or contexts is not None:
            if inputs is None:
                raise UserError("generate with contexts needs the tokens of a prompt: input_ids")
            with torch.no_grad():
                contexts = self.read(inputs, context_ids, context_mask, contexts)
        return super().generate(inputs, contexts=contexts, **settings)  # type: ignore[misc]

    def _expand_inputs_for_generation(  # type: ignore[override]
        self, expand_size: int = 1, **named: Any
    ) -> Any:
        """Beams and samples read the contexts of the row that they come from."""
        if expand_size > 1 and named.get("contexts") is not None:
            named["contexts"] = named["contexts"].repeated(expand_size)
        expand: Any = super()._expand_inputs_for_generation  # type: ignore[misc]
        return expand(expand_size=expand_size, **named)


class CepeForCausalLM(PreTrainedModel, ContextGeneration, GenerationMixin):
    """Decoder, encoder and cross-attention; `from_parts` joins loaded ones.

    Parameter names are those of the decoder and of the released checkpoints.

    Args:
        config: of all three.
        decoder: a Llama-style causal language model, changed in place. None: one of random weights.
        encoder: a bidirectional Llama. None: one of random weights.
    """

    config_class = CepeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    row_ranks: encoded.EncodingRanks | None = None  # the ranks that share a row, if there are any

    def __init__(
        self, config: CepeConfig, decoder: Any = None, encoder: LlamaModel | None = None
    ) -> None:
        super().__init__(config)
        decoder = new_decoder(config.decoder_config) if decoder is None else decoder
        cross_attention.require_llama_style(decoder)
        self.model, self.lm_head = decoder.model, decoder.lm_head
        self.encoder = bidirectional_llama(config.encoder_config) if encoder is None else encoder
        self.generation_config = decoder.generation_config
        layers = self.model.layers
        many = len(layers) if config.cross_layers is None else config.cross_layers
        if not 1 <= many <= len(layers):
            raise UserError(f"cross_layers={many} must be 1 to {len(layers)}, the decoder's layers")
        for layer in layers[len(layers) - many :]:
            cross_attention.insert(layer, config.encoder_config.hidden_size)
        with no_init_weights():
            self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_parts(
        cls,
        decoder: PreTrainedModel,
        encoder: EncoderForMaskedLM | LlamaModel,
        cross_layers: int | None = None,
        init: str = "zero",
        seed: int = 0,
    ) -> Self:
        """A model to train, from a decoder and an encoder.

        Args:
            decoder: from `load_model` or `build_model`; changed in place.
            encoder: takes the decoder's type and device. Its mask token is the last entry of its
                vocabulary; a plain `LlamaModel` as large as the decoder's vocabulary has none.
            cross_layers: decoder layers with cross-attention, counted from the top. None: all.
            init: of the output projection, `zero | copy | normal`; see `initialise`.
            seed: of `normal`.

        Raises:
            UserError: if the decoder is not Llama-style, or a value does not fit.
        """
        inner: Any = encoder.encoder if isinstance(encoder, EncoderForMaskedLM) else encoder
        if inner.config._attn_implementation != "longctx_bidirectional":
            raise UserError(
                "the encoder must come from build_encoder or load_encoder: it is causal"
            )
        entries = inner.config.vocab_size
        has_mask = isinstance(encoder, EncoderForMaskedLM) or entries != decoder.config.vocab_size
        config = CepeConfig(
            decoder_config=decoder.config,
            encoder_config=inner.config,
            cross_layers=cross_layers,
            mask_token_id=entries - 1 if has_mask else None,
            dtype=decoder.dtype,
        )
        make_stock(config.decoder_config)
        inner.config.dtype = decoder.dtype
        nn.Module.to(inner, decoder.device, decoder.dtype)
        model = cls(config, decoder, inner)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for layer in model.cross_attending():
                cross_attention.initialise(layer, init)
        return model

    def cross_attending(self) -> list[Any]:
        """The decoder layers with cross-attention, from the bottom up."""
        return [layer for layer in self.model.layers if hasattr(layer, "cross_attn")]

    def added_parameters(self, train_encoder: bool = True) -> dict[str, nn.Parameter]:
        """What CEPE trains, by name; all others are the decoder's.

        Args:
            train_encoder: with the encoder's, else cross-attention alone.
        """
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if ".cross_attn." in name or (train_encoder and name.startswith("encoder."))
        }

    def encode(
        self,
        context_ids: Tensor,
        context_mask: Tensor | None = None,
        batch_chunks: int | None = None,
    ) -> Contexts:
        """Encodes contexts, each chunk on its own from position 0.

        Gradients flow: call it under `torch.no_grad()` where none are wanted.

        Args:
            context_ids: `[b c l]`.
            context_mask: `[b c l]`, True on real tokens; None: all are real.
            batch_chunks: chunks in one pass of the encoder. None: `BATCH_TOKENS` tokens of them.

        Returns:
            States `[b c*l e]` and their mask.

        Raises:
            UserError: if shapes differ, a chunk is too long or an id is not the encoder's.
        """
        config, mask_id = self.config.encoder_config, self.config.mask_token_id
        limit = config.vocab_size if mask_id is None else mask_id
        encoded.check(context_ids, context_mask, config.max_position_embeddings, limit)
        return encoded.encode(self.encoder, context_ids, context_mask, batch_chunks, self.row_ranks)

    def append(
        self, contexts: Contexts, more_ids: Tensor, more_mask: Tensor | None = None
    ) -> Contexts:
        """Appends new contexts; only the new ones are encoded.

        Tokens that the decoder has read already do not change.

        Args:
            contexts: from `encode`.
            more_ids: `[b c l]`, of any c and l.
            more_mask: `[b c l]`, True on real tokens; None: all are real.

        Raises:
            UserError: if the new ones do not fit.
        """
        if more_ids.shape[:1] != contexts.states.shape[:1]:
            rows = contexts.states.shape[0]
            raise UserError(f"{rows} rows of contexts cannot take {list(more_ids.shape)}")
        return encoded.joined(contexts, self.encode(more_ids, more_mask))

    def hidden_states(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        context_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        contexts: Contexts | None = None,
    ) -> Tensor:
        """The decoder's last states, for a loss that makes logits piece by piece.

        Args:
            tokens: `[b s]`.
            positions: `[b s]`; None: from 0. Documents that share a row see the row's contexts.
            context_ids: `[b c l]`.
            context_mask: `[b c l]`, True on real tokens.
            contexts: instead of both, encoded already.

        Returns:
            `[b s h]`.
        """
        read = self.read(tokens, context_ids, context_mask, contexts)
        named = {} if read is None else read.named()
        out = self.model(input_ids=tokens, position_ids=positions, use_cache=False, **named)
        return cast(Tensor, out.last_hidden_state)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        context_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        contexts: Contexts | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the decoder's tokens, given contexts; without any, those of the decoder alone.

        Args:
            input_ids: `[b s]`.
            attention_mask: `[b n]`, True on real tokens, cached ones first.
            position_ids: `[b s]`.
            context_ids: `[b c l]`.
            context_mask: `[b c l]`, True on real tokens.
            labels: `[b s]`, the tokens themselves (they are shifted here), `IGNORE` = not scored.
            past_key_values: cache of the decoder's earlier tokens.
            use_cache: return one.
            contexts: instead of `context_ids`, encoded already.
            logits_to_keep: number of last tokens to compute logits of; 0: all.
            **kwargs: of the decoder.

        Returns:
            logits `[b s v]`, mean loss where labels are given, and the cache.
        """
        if labels is not None and logits_to_keep:
            raise UserError("give labels or logits_to_keep: the loss needs logits of all tokens")
        read = self.read(input_ids, context_ids, context_mask, contexts)
        named = {} if read is None else read.named()
        kwargs.pop("return_dict", None)
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **named,
            **kwargs,
        )
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            scored = logits[:, :-1].float().flatten(0, 1)
            loss = F.cross_entropy(scored, labels[:, 1:].flatten(), ignore_index=IGNORE)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    def read(
        self,
        tokens: Tensor,
        context_ids: Tensor | None,
        context_mask: Tensor | None,
        contexts: Contexts | None,
    ) -> Contexts | None:
        """The contexts of a call, encoded; None where there are none.

        Raises:
            UserError: if they are given twice, or for another number of rows.
        """
        if context_ids is not None:
            if contexts is not None:
                raise UserError("give contexts once: as context_ids, or encoded as contexts")
            contexts = self.encode(context_ids, context_mask)
        if contexts is None or not contexts.states.shape[1]:
            return None
        if contexts.states.shape[0] != tokens.shape[0]:
            raise UserError(
                f"{tokens.shape[0]} rows of tokens have {contexts.states.shape[0]} rows of contexts"
            )
        return contexts

    def get_decoder(self) -> nn.Module:
        """The decoder without its head; it takes encoded contexts as `**contexts.named()`."""
        return cast(nn.Module, self.model)

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **named: Any) -> None:
        """Changes the decoder's attention; the encoder's has two directions and stays."""
        self.model.set_attn_implementation(attn_implementation, *args, **named)
        self.config._attn_implementation_internal = self.model.config._attn_implementation
