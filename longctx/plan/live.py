"""Bytes alive while code runs on the meta device, by where they were made and when they peak.

Nothing is computed and nothing allocated: a training step of a 7B model at 128K tokens takes a
second or two. What it sees is what the code does: any architecture, checkpointing, tiles.
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class Live(TorchDispatchMode):
    """Counts while it is on.

    Args:
        known: tensors that are not counted, nor are views of them (weights).

    Attributes:
        place: what is running; new bytes are booked there until they are freed.
        moment: what the run is at; each moment has a peak of its own.
        peaks: per moment, bytes by place when their sum was largest.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.place, self.moment = "", ""
        self.held: Counter[str] = Counter()
        self.total = 0
        self.peaks: dict[str, dict[str, int]] = {}
        self._highest: Counter[str] = Counter()
        self._seen = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Books what an operation made."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._book(leaf)
        if self.total > self._highest[self.moment]:
            self._highest[self.moment] = self.total
            self.peaks[self.moment] = {k: v for k, v in self.held.items() if v}
        return out

    def _book(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen[storage] = True
        size = storage.nbytes()
        self.held[self.place] += size
        self.total += size
        weakref.finalize(storage, self._free, self.place, size)

    def _free(self, place: str, size: int) -> None:
        self.held[place] -= size
        self.total -= size
