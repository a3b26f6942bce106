"""The part of a typed run that says how rotary frequencies are scaled.

It stands alone because models that are exported with their code need it, and nothing else of a run.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeConfig:
    """How the rotary frequencies are scaled; see `longctx/rope.py` for the formulas.

    Args:
        name: `none | pi | ntk | dynamic_ntk | yarn | abf`.
        factor: window extension s = L'/L. None: ceil(target / the model's own window).
        target: window to reach, tokens. Ignored where `factor` is given.
        beta_fast: YaRN only, rotations above which a dimension is left alone.
        beta_slow: YaRN only, rotations below which a dimension is fully interpolated.
        base: ABF only, the new rope base (theta).

    The defaults of YaRN are those of 2309.00071 for Llama, section 3.2.
    """

    name: str = "none"
    factor: float | None = None
    target: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    base: float | None = None

    def __post_init__(self) -> None:
        for key, value in (("beta_fast", self.beta_fast), ("beta_slow", self.beta_slow)):
            if value is None:  # as earlier versions wrote it for what is not YaRN
                object.__setattr__(self, key, getattr(type(self), key))
