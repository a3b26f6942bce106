"""Which layers of a hybrid model see everything: the middle third, or those that are listed.

Source: Ge et al. 2410.01485, the hourglass.
"""

from collections.abc import Sequence
from typing import Any

from longctx.errors import UserError

HOURGLASS = "hourglass"


def plan(layers: int) -> list[int]:
    """The full layers of an hourglass: all but the first and the last third, rounded down.

    Fewer than three layers have no third: all of them are full.

    >>> plan(32) == list(range(10, 22)), plan(3), plan(2)
    (True, [1], [0, 1])
    """
    third = layers // 3
    return list(range(third, layers - third))


def resolved(full_layers: str | Sequence[int], layers: int) -> list[int]:
    """The full layers of a model as indices.

    Args:
        full_layers: `hourglass`, or indices from 0.
        layers: of the model.

    Raises:
        UserError: if an index is none of the model's, or stands twice.
    """
    if isinstance(full_layers, str):
        return plan(layers)
    for layer in full_layers:
        if not 0 <= layer < layers:
            raise UserError(
                f"attention.full_layers has {layer}, and the model's layers are 0 to {layers - 1}"
            )
    return sorted(full_layers)


def check(full_layers: Any) -> None:
    """Raises UserError unless it is `hourglass` or a list of different layer indices."""
    if isinstance(full_layers, str):
        if full_layers != HOURGLASS:
            raise UserError(
                f"attention.full_layers={full_layers!r} is neither {HOURGLASS!r} nor a list of "
                "layer indices"
            )
        return
    indices: list[Any] = list(full_layers) if isinstance(full_layers, Sequence) else [None]
    if any(isinstance(layer, bool) or not isinstance(layer, int) for layer in indices):
        raise UserError(f"attention.full_layers={full_layers} is not a list of layer indices")
    twice = sorted({layer for layer in indices if indices.count(layer) > 1})
    if twice:
        raise UserError(f"attention.full_layers has layer {twice[0]} more than once")


def scaled(full_layers: str | Sequence[int], layers: int, of_layers: int) -> str | list[int]:
    """The full layers at the same places of a model with fewer layers.

    Args:
        full_layers: `hourglass`, or indices from 0.
        layers: of the smaller model.
        of_layers: of the model that the indices are for.

    >>> scaled([0, 16, 31], 3, 32), scaled("hourglass", 3, 32)
    ([0, 1, 2], 'hourglass')
    """
    if isinstance(full_layers, str):
        return full_layers
    return sorted({layer * layers // of_layers for layer in full_layers})
