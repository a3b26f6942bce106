"""The configuration of a CEPE model: its decoder's, its encoder's, and where they meet."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from longctx.models import attach
from longctx.models.cepe.encoder import EncoderConfig, encoder_config, frequencies
from longctx.models.configure import configure
from longctx.models.export.restore import recorded


class CepeConfig(PreTrainedConfig):
    """Decoder, encoder and cross-attention.

    What is asked of it and is not its own is the decoder's: window, rope, vocabulary, heads.

    Args:
        decoder_config: of a Llama-style decoder, as a mapping with `model_type` or a configuration.
        encoder_config: of the encoder, likewise.
        cross_layers: decoder layers with cross-attention, counted from the top. None: all.
        mask_token_id: the encoder's entry that no context may hold. None: it has none.
    """

    model_type = "longctx_cepe"

    decoder_config: Any = None
    encoder_config: Any = None
    cross_layers: int | None = None
    mask_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        decoder, self.decoder_config = self.decoder_config, None
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        decoder = {"model_type": "llama"} if decoder is None else decoder
        if not isinstance(decoder, PreTrainedConfig):
            fields = dict(decoder)
            decoder = AutoConfig.for_model(fields.pop("model_type"), **fields)
        self.decoder_config = decoder
        encoder = {} if self.encoder_config is None else self.encoder_config
        if not isinstance(encoder, EncoderConfig):
            encoder = encoder if isinstance(encoder, dict) else encoder.to_diff_dict()
            encoder = encoder_config({k: v for k, v in encoder.items() if k not in _NO_FIELDS})
        self.encoder_config = encoder

    def __getattr__(self, name: str) -> Any:
        decoder = self.__dict__.get("decoder_config")
        if decoder is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(decoder, name)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The decoder's, which is what generation asks for."""
        decoder = self.decoder_config
        assert isinstance(decoder, PreTrainedConfig)
        return decoder


_NO_FIELDS = ("architectures", "auto_map", "transformers_version", "torch_dtype", "_name_or_path")


def new_decoder(config: PreTrainedConfig) -> PreTrainedModel:
    """A decoder with its own attention and rope, on the device and in the type of the context.

    Args:
        config: of the decoder; gets the attention's name.

    Raises:
        UserError: if it is not a decoder that can be extended.
    """
    config, _, _, name = configure(config, None, None, config.model_type)
    decoder: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, attn_implementation=name, dtype=torch.get_default_dtype()
    )
    guard_decoder(decoder.model)
    return decoder


def guard_decoder(model: PreTrainedModel) -> None:
    """Asserts the rotary frequencies, and sets what the recorded attention needs beside its name.

    Args:
        model: the decoder without its head; again after weights are loaded.
    """
    attach.guard_rotary(model, frequencies(model.config), recorded(model.config))
