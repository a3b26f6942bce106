"""RoPE scaling: Position Interpolation, NTK-aware, dynamic NTK, YaRN, and a base of choice.

Each method stands here twice: as transformers' own rope parameters, which are what a model is
built and exported with, and as a float64 formula, against which the built model is asserted.
Costs nothing at run time: the frequencies change, not the attention. Dynamic NTK is the exception
in kind: its base depends on the longest position of the call, so every angle changes with the
length. `models/late_rotary.py` therefore caches keys unrotated and rotates them in each call.
"""

import math
from typing import Any

import torch
from torch import Tensor

from longctx.config.rope import RopeConfig
from longctx.config.typed import choice
from longctx.errors import UserError

NAMES = ("none", "pi", "ntk", "dynamic_ntk", "yarn", "abf")
_OURS = {"default": "none", "linear": "pi", "dynamic": "dynamic_ntk", "yarn": "yarn"}


def resolve(rope: RopeConfig, window: int) -> float:
    """The extension factor s = L'/L.

    Args:
        rope: its `factor`, or else its `target`, decides.
        window: the model's own window L, tokens.

    Returns:
        `rope.factor`, or ceil(target / window) as LongLoRA does; 1 for `none`.

    Raises:
        UserError: if the name is unknown, neither number is given, or the factor is below 1.

    Source: Position Interpolation (2306.15595) section 2.3; LongLoRA (2309.12307) for the ceil.
    """
    choice(rope.name, NAMES, "rope.name")
    if rope.name == "none":
        return 1.0
    if rope.factor is None and rope.target is None:
        raise UserError(f"rope.name={rope.name} needs rope.factor or rope.target")
    factor = rope.factor
    if factor is None:
        assert rope.target is not None
        factor = float(math.ceil(rope.target / window))
    if not factor >= 1:
        raise UserError(f"rope.factor={factor} must be at least 1: the window only grows")
    return float(factor)


def extended_window(rope: RopeConfig, window: int) -> int:
    """What `max_position_embeddings` becomes, tokens.

    Dynamic NTK keeps the model's own: transformers reads L from it, and scales beyond it.

    Args:
        rope: the scaling.
        window: the model's own window L, tokens.
    """
    if rope.name == "dynamic_ntk":
        return window
    return round(window * resolve(rope, window))


def from_native(native: dict[str, Any]) -> RopeConfig | None:
    """The scaling that a model's own rope parameters describe; None for those not known here.

    Args:
        native: transformers' `rope_parameters` of one model.
    """
    name = _OURS.get(native.get("rope_type", "default"))
    partial = native.get("partial_rotary_factor") or 1.0
    if name is None or partial != 1.0 or native.keys() & {"attention_factor", "mscale", "truncate"}:
        return None
    if name == "none":
        return RopeConfig()
    if name == "yarn" and not (native.get("beta_fast") and native.get("beta_slow")):
        return None
    betas = {key: native[key] for key in ("beta_fast", "beta_slow") if native.get(key)}
    return RopeConfig(name=name, factor=native["factor"], **betas)


def rope_parameters(
    rope: RopeConfig, native: dict[str, Any], window: int, head_dim: int
) -> dict[str, Any]:
    """Transformers' rope parameters for a model that is to be scaled.

    Args:
        rope: the scaling.
        native: the model's own rope parameters, with `rope_theta`.
        window: the model's own window L, tokens.
        head_dim: d.

    Returns:
        A new dict; `native` unchanged for `none`.

    Raises:
        UserError: if the model is scaled already, or `native` has no flat `rope_theta`.

    Source: NTK-aware base, YaRN (2309.00071) eq. 16; adjusted base frequency (2309.16039) section
    4.1: another base, nothing else; the other formulas are in `inv_freq`.
    """
    factor = resolve(rope, window)
    if rope.name == "none":
        return dict(native)
    if not isinstance(native.get("rope_theta"), int | float):
        raise UserError(
            f"rope.name={rope.name} needs a model with one rope_theta for all layers; "
            f"this one has rope parameters {sorted(native)}"
        )
    kind = native.get("rope_type", "default")
    if kind != "default":
        raise UserError(
            f"the model already has scaled rope ({kind}), rope.name={rope.name} would scale it "
            "twice; use rope.name=none or the unscaled model"
        )
    base = float(native["rope_theta"])
    if rope.name == "pi":
        return {"rope_type": "linear", "factor": factor, "rope_theta": base}
    if rope.name == "ntk":
        return {"rope_type": "default", "rope_theta": _ntk_base(base, factor, head_dim)}
    if rope.name == "abf":
        return {"rope_type": "default", "rope_theta": _given_base(rope)}
    if rope.name == "dynamic_ntk":
        return {"rope_type": "dynamic", "factor": factor, "rope_theta": base}
    beta_fast, beta_slow = _betas(rope)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "rope_theta": base,
        "beta_fast": beta_fast,
        "beta_slow": beta_slow,
        "original_max_position_embeddings": window,
    }


def inv_freq(
    rope: RopeConfig, base: float, window: int, head_dim: int, seq_len: int | Tensor | None = None
) -> tuple[Tensor, float]:
    """Inverse frequencies in float64, and the factor on cos and sin.

    Args:
        rope: the scaling.
        base: the model's own rope_theta b.
        window: the model's own window L, tokens.
        head_dim: d.
        seq_len: dynamic NTK only, longest position + 1 of the call; None: within the window. As a
            `[]` tensor it costs no host-device round trip, and the result is on its device.

    Returns:
        (`[d/2]` radians per position, attention factor).

    Source: RoPE (2104.09864) b^(-2k/d); PI (2306.15595) eq. 4, all divided by s; NTK-aware
    b' = b s^(d/(d-2)), YaRN (2309.00071) eq. 16; dynamic NTK, its section 3.3 with transformers'
    factor f: s = f n/L - (f - 1) beyond L; YaRN in the form of its code, where the ramp is linear
    in the dimension index and not in the rotations of eq. 18, because checkpoints are made with it.
    """
    factor = resolve(rope, window)
    if rope.name == "ntk":
        base = _ntk_base(base, factor, head_dim)
    if rope.name == "abf":
        base = _given_base(rope)
    if rope.name == "dynamic_ntk":
        length = torch.as_tensor(window if seq_len is None else seq_len).double().clamp(min=window)
        scale = factor * length / window - (factor - 1)
        return _inverse(base * scale ** (head_dim / (head_dim - 2)), head_dim), 1.0
    plain = _inverse(torch.tensor(base, dtype=torch.float64), head_dim)
    if rope.name == "pi":
        return plain / factor, 1.0
    if rope.name != "yarn":
        return plain, 1.0
    beta_fast, beta_slow = _betas(rope)
    low = max(math.floor(_dimension_of(beta_fast, base, window, head_dim)), 0)
    high = min(math.ceil(_dimension_of(beta_slow, base, window, head_dim)), head_dim - 1)
    index = torch.arange(head_dim // 2, dtype=torch.float64)
    scaled = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    attention_factor = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return plain * (1 - scaled) + plain / factor * scaled, attention_factor


def _ntk_base(base: float, factor: float, head_dim: int) -> float:
    """Base b s^(d/(d-2)): the highest frequency stays, the lowest is divided by s."""
    return float(base * factor ** (head_dim / (head_dim - 2)))


def _given_base(rope: RopeConfig) -> float:
    if rope.base is None or not 1 < rope.base < math.inf:
        raise UserError(f"rope.name=abf needs a finite rope.base above 1, not {rope.base}")
    return float(rope.base)


def _inverse(base: Tensor, head_dim: int) -> Tensor:
    """b^(-2k/d) `[d/2]` of a base `[]`, in float64."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=base.device) / head_dim
    return base**-exponent


def _dimension_of(rotations: float, base: float, window: int, head_dim: int) -> float:
    """The pair index (a real number) that turns `rotations` times within the window."""
    return head_dim * math.log(window / (2 * math.pi * rotations)) / (2 * math.log(base))


def _betas(rope: RopeConfig) -> tuple[float, float]:
    """YaRN's two thresholds, rotations per window."""
    if not rope.beta_fast > rope.beta_slow > 0:
        raise UserError(
            f"rope.beta_fast={rope.beta_fast} must be above rope.beta_slow={rope.beta_slow}, "
            "and both above 0"
        )
    return rope.beta_fast, rope.beta_slow
