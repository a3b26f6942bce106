"""The contract of an attention method: one class holds its numbers, its definition, its fast path.

`longctx/attention/NAME.py` holds one subclass of `Method`, a frozen dataclass whose fields are its
numbers (`attention.NUMBER=VALUE`), and nothing else has to know it. Here stands all that
methods share: the one `attend` with transformers' attention-interface signature (which masks are
honoured, documents packed in a row, padding, calls that continue a cache) and what is counted
(pairs that attend, bytes of a cache). docs/how-to/attention-method.md adds a method step by step.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from longctx.attention.ops import causal, evicted, segments
from longctx.errors import UserError

FLAT = "longctx_attention_"  # before the file's name, where code lies beside a checkpoint


@dataclass(frozen=True)
class LayerCall:
    """What a layer's call says beside its tensors, the same for all documents in it.

    Args:
        layer: index of the layer, from 0.
        key_heads: `[hk]`, the numbers in the model of the key heads that are here: all of them,
            unless ranks share the heads of a row.
        scaling: factor on the scores; None: d ** -0.5.
        inv_freq: `[d/2]`, radians per position, for a method that turns queries; else None.
    """

    layer: int
    key_heads: list[int]
    scaling: float | None
    inv_freq: Tensor | None


@dataclass(frozen=True)
class Method(ABC):
    """An attention method; its numbers are the fields of the subclass, a frozen dataclass.

    A subclass gives `definition`, and `document` for the layers that are not `is_full`. The rest
    has defaults: every key is kept and seen, at its true position, by heads that are all alike.
    Whether what it gives agrees with the definition is tested for every method that is found.
    """

    turns_queries: ClassVar[bool] = False
    """Whether `document` rotates queries or keys further: `call.inv_freq` is then given."""
    from_beginning: ClassVar[bool] = False
    """Whether a document must be given from position 0 on, since its first tokens are special."""
    plain: ClassVar[bool] = False
    """Whether transformers' own attention computes the same: a checkpoint then records nothing."""

    @property
    def name(self) -> str:
        """The name of its file, which is what `attention=NAME` calls it."""
        return type(self).__module__.rpartition(".")[2].removeprefix(FLAT)

    # --- its numbers, for the model at hand ---

    def for_window(self, window: int) -> Self:
        """The same with every number given that follows from the model's window.

        Args:
            window: L, the positions that the model was trained on or scaled to, tokens.

        Raises:
            UserError: if the numbers do not fit into the window.
        """
        return self

    def for_layers(self, layers: int, heads: int, key_heads: int) -> Self:
        """The same with every number given that follows from the model's layers and heads.

        Args:
            layers: of the model.
            heads: hq, query heads of a layer.
            key_heads: hk, key heads of a layer.

        Raises:
            UserError: if the numbers do not fit the layers or heads.
        """
        return self

    def shrunk(self, layers: int, of_layers: int) -> Self:
        """The same at tiny size, for a model with a window of at least 16 tokens and rows of 64.

        Sizes (tokens, blocks, layers) become small enough for the method to differ from full
        attention within a row; what says how it works stays. Tests and the parity certificate
        shrink a user's run with it.

        Args:
            layers: of the tiny model.
            of_layers: of the model that the numbers are for.
        """
        return self

    # --- which pairs attend ---

    @abstractmethod
    def definition(self, i: Tensor, j: Tensor, layer: int, head: Tensor) -> tuple[Tensor, Tensor]:
        """Which pairs attend, and at which rotary distance: what everything else is tested against.

        Args:
            i: query positions in their document.
            j: key positions in their document; broadcasts with `i`.
            layer: index of the layer.
            head: numbers of the query heads; broadcasts with `i` and `j`.

        Returns:
            (live bool, distance int64), broadcast over the three. Pairs with j > i are not live.
        """

    def is_full(self, layer: int) -> bool:
        """Whether a layer is plain causal attention: every earlier key, at its true distance."""
        return False

    def kind(self, layer: int) -> Hashable:
        """What tells layers apart: those of one kind attend alike. Two kinds: full, and not."""
        return self.is_full(layer)

    def expected_key_heads(self) -> int | None:
        """Key heads of the model, for a method whose heads differ; None: all heads are alike."""
        return None

    # --- the fast path ---

    def document(self, q: Tensor, k: Tensor, v: Tensor, first: int, call: LayerCall) -> Tensor:
        """Attention of the last m tokens of a document of n, in a layer that is not full.

        All n tokens are given when the document is read at once (m = n), the new ones and those
        before when a call continues a cache.

        Args:
            q: `[r hq m d]`, rotated; several rows that are cut alike come together.
            k: `[r hk n d]`, rotated to `key_positions`.
            v: `[r hk n d]`.
            first: position of the first of the n tokens; 0 where `from_beginning`.
            call: layer, heads, scaling, frequencies.

        Returns:
            `[r hq m d]`, differentiable.
        """
        raise NotImplementedError(f"attention {self.name!r}: layer {call.layer} is not full")

    def key_positions(self, positions: Tensor) -> Tensor:
        """Positions that keys (and queries, before a method turns them) are rotated to, `[b s]`.

        Keys are rotated once, where they stay in the cache. The true positions travel on to
        `attend`, since they tell where documents start.

        Args:
            positions: `[b s]`, in their documents.
        """
        return positions

    @property
    def moves_keys(self) -> bool:
        """Whether keys are rotated to other positions than their true ones."""
        return type(self).key_positions is not Method.key_positions

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
        """What transformers calls in each layer: its attention-interface signature.

        Args:
            module: the attention layer that calls.
            query: `[b hq s d]`, rotated to `key_positions`.
            key: `[b hk n d]`, rotated likewise, cached keys first.
            value: `[b hk n d]`.
            attention_mask: `[b n]`, True on real tokens, or None; counts evicted keys too.
            scaling: factor on the scores; None: d ** -0.5.
            dropout: probability of dropping an attention weight; full layers only.
            **kwargs: `position_ids` `[b s]` or `[1 s]`, whose zeros start documents; `rotary`, the
                model's rotary module, for a method that turns queries; `key_heads` `[hk]`, the
                numbers in the model of the key heads that are here, where these are only some.

        Returns:
            `[b s hq d]`, zero on padding, and None for the weights.

        Raises:
            UserError: if a mask or an argument asks for something that would not be honoured.
        """
        heads = self._heads(key.shape[1], kwargs.get("key_heads"))
        positions = causal.check_interface(self.name, module, attention_mask, kwargs)
        padding = None if attention_mask is None else attention_mask.bool()
        layer = getattr(module, "layer_idx", None) or 0
        if self.is_full(layer):
            return causal.causal_in_segments(
                query, key, value, positions, padding, scaling, dropout, layer == 0
            ), None
        if dropout:
            raise UserError(
                f"attention {self.name!r} has no attention dropout, and the model asks for it"
            )
        inv_freq = self._frequencies(kwargs.get("rotary")) if self.turns_queries else None
        call = LayerCall(layer, heads, scaling, inv_freq)
        return self._in_documents(query, key, value, positions, padding, call), None

    def _in_documents(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        padding: Tensor | None,
        call: LayerCall,
    ) -> Tensor:
        """`document` for each document of each row, `[b s hq d]`."""

        def document(q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
            if self.from_beginning:
                segments.require_beginning(self.name, first)
            return self.document(q, k, v, first, call)

        first_layer = call.layer == 0
        return segments.in_documents(query, key, value, positions, padding, document, first_layer)

    def _heads(self, count: int, given: Tensor | None) -> list[int]:
        """Numbers in the model of the key heads of a call."""
        if given is not None:
            return [int(head) for head in given.tolist()]
        expected = self.expected_key_heads()
        if expected not in (None, count):
            raise UserError(
                f"attention {self.name!r} of {expected} key heads got {count}: which ones?"
            )
        return list(range(count))

    def _frequencies(self, rotary: Any) -> Tensor:
        if rotary is None:
            raise UserError(
                f"attention {self.name!r} turns queries, and this architecture does not hand "
                "keyword arguments to its attention"
            )
        inv_freq: Tensor = rotary.inv_freq
        return inv_freq

    # --- what it costs ---

    def seen(self, past: Tensor, layer: int) -> Tensor:
        """Keys that a query sees, its own included; the mean over the heads of a layer.

        Args:
            past: tokens of the document before the query, of any shape.
            layer: index of the layer.

        Returns:
            As `past`, integers or float64.
        """
        return past + 1

    def pairs(self, positions: Tensor, layers: int) -> float:
        """Pairs of a query and a key that attend in a model, of one head; the mean over heads.

        The FLOPs of attention are this, times query heads x head size, times 4 forward.

        Args:
            positions: of the queries in their documents, of any shape.
            layers: of the model.
        """
        alike: dict[Hashable, list[int]] = {}
        for layer in range(layers):
            alike.setdefault(self.kind(layer), []).append(layer)
        counts = [
            self.seen(positions, same[0]).double().sum() * len(same) for same in alike.values()
        ]
        return float(torch.stack(counts).sum())

    def cache_tokens(self, past: int, layer: int) -> int:
        """Entries that a layer's cache holds per row and key head after `past` tokens."""
        return past

    def cache_bytes(
        self,
        layers: int,
        key_heads: int,
        head_dim: int,
        tokens: int,
        element: int = 2,
        rows: int = 1,
    ) -> int:
        """Bytes of the keys and values that a model holds after a document of some length.

        Args:
            layers: of the model.
            key_heads: hk.
            head_dim: d.
            tokens: length of the document.
            element: bytes of a number.
            rows: b.
        """
        held = sum(self.cache_tokens(tokens, layer) for layer in range(layers))
        return 2 * rows * key_heads * head_dim * element * held


@dataclass(frozen=True)
class EvictingMethod(Method):
    """A method whose sparse layers forget: what they never need again leaves their cache.

    Layers are full or sparse, and the sparse ones are all alike. Which keys a query of a sparse
    layer sees depends on positions in the document and on the key head alone, and a key that is not
    seen once is never seen again. `longctx/models/evicting_cache.py` keeps what `kept_positions`
    says, and `attend` works out from positions which keys a call got. Keys stand at their true
    positions.
    """

    from_beginning: ClassVar[bool] = True

    @abstractmethod
    def is_full(self, layer: int) -> bool:
        """Whether a layer sees and keeps everything; the others are sparse and evict."""

    @abstractmethod
    def sees(self, i: Tensor, j: Tensor, key_heads: Tensor) -> Tensor:
        """Which pairs attend in a sparse layer: `definition`, with the numbers of key heads.

        Args:
            i: query positions in their document.
            j: key positions in their document; broadcasts with `i`.
            key_heads: numbers of the key heads in the model; broadcasts with `i` and `j`.
        """

    @property
    @abstractmethod
    def whole(self) -> int:
        """Cached keys, a single query's own included, up to which that query sees all of them."""

    @abstractmethod
    def kept_tokens(self, past: int) -> int:
        """Entries that a sparse layer holds per row and key head after `past` tokens.

        As many as the head with the most; never falls as `past` grows.
        """

    @abstractmethod
    def kept_positions(self, past: Tensor, key_heads: Tensor) -> Tensor:
        """Positions of those entries, ascending: all that a later query can see.

        Args:
            past: `[b]`, tokens of each row so far.
            key_heads: `[h]`, their numbers in the model.

        Returns:
            `[b h|1 kept_tokens(past.max())]`, with -1 in front where a row or head has less.
        """

    def ring(self) -> tuple[int, int] | None:
        """(sinks, window) where a new token takes the place of the window's oldest; else None."""
        return None

    def cache_tokens(self, past: int, layer: int) -> int:
        """Entries that a layer's cache holds per row and key head after `past` tokens."""
        return past if self.is_full(layer) else self.kept_tokens(past)

    def _in_documents(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        padding: Tensor | None,
        call: LayerCall,
    ) -> Tensor:
        if key.shape[2] != query.shape[2]:
            tensors, heads, first_layer = (query, key, value), call.key_heads, call.layer == 0
            return evicted.attend(
                self, tensors, positions, padding, heads, call.scaling, first_layer
            )
        # A row may continue a cache that holds nothing of it: all was padding.
        padding = padding if padding is None else padding[:, -key.shape[2] :]
        return super()._in_documents(query, key, value, positions, padding, call)
