"""Settings of the efficiency task; values stand in `conf/effort/`."""

from dataclasses import dataclass

from longctx.config.typed import positive


@dataclass(frozen=True)
class EfficiencyConfig:
    """Time and memory at each of `lengths`; see `longctx/eval/efficiency.py`.

    Args:
        batch: rows of a prompt.
        new_tokens: tokens decoded, and timed, behind each prompt.
        repetitions: timed passes a length, after one that is not; medians are told.
        decoder_tokens: of a model with an encoder, tokens that its decoder reads; it reads the rest
            of a length as contexts. None: the decoder's window.
        context_tokens: of each context. None: the encoder's window.
    """

    batch: int
    new_tokens: int
    repetitions: int
    decoder_tokens: int | None
    context_tokens: int | None

    def __post_init__(self) -> None:
        for key in ("batch", "new_tokens", "repetitions"):
            positive(getattr(self, key), f"efficiency.{key}")
        for key in ("decoder_tokens", "context_tokens"):
            if (value := getattr(self, key)) is not None:
                positive(value, f"efficiency.{key}")
