"""Patterns of kept tokens written out as lists, and a cache whose keys say where they are from."""

import torch
from transformers import DynamicCache

from longctx.attention.method import EvictingMethod
from longctx.models.evicting_cache import Call, announce, fit_layers

HEADS = 2
DROPPED = -9.0  # the key of padding


class Pattern(EvictingMethod):
    """A method's side of the cache, from the positions that `kept(past, head)` writes out."""

    whole = definition = sees = None  # nobody asks here

    def is_full(self, layer):
        return layer == 1

    def kept_tokens(self, past):
        return max(len(self.kept(past, head)) for head in range(HEADS))

    def kept_positions(self, past, key_heads):
        width = max(self.kept_tokens(int(n)) for n in past)
        rows = [[self.kept(int(n), int(h)) for h in key_heads] for n in past]
        front = [[[-1] * (width - len(kept)) + kept for kept in row] for row in rows]
        return torch.tensor(front, dtype=torch.int64).reshape(len(past), len(key_heads), width)


class Window(Pattern):
    def __init__(self, sinks, window):
        self.__dict__.update(sinks=sinks, window=window)

    def ring(self):
        return self.sinks, self.window

    def kept(self, past, head):
        return [j for j in range(past) if j < self.sinks or j >= past - self.window]


class Blocks(Pattern):
    """Blocks of 3; the last two, and every third one, another for each head."""

    def kept(self, past, head):
        last = past // 3
        return [j for j in range(past) if last - j // 3 < 2 or (j // 3 + head) % 3 == 0]


class Text:
    """Rows of real tokens and padding, and a cache of two sparse layers and a full one.

    The key of a token is its place in its row, plus 1000 a row and 100 a head.
    """

    def __init__(self, method, real, cache=None):
        self.method, self.real, self.columns = method, real, 0
        self.cache = cache or DynamicCache()
        fit_layers(self.cache, method, 3)

    def codes(self):
        place = self.real.cumsum(1) - 1
        rows = torch.arange(len(place))[:, None, None] * 1000 + torch.arange(HEADS)[:, None] * 100
        keys = (place[:, None] + rows).double()
        return keys.masked_fill(~self.real[:, None], DROPPED)[..., None].repeat(1, 1, 1, 3)

    def feed(self, s, mask=True):
        """The returned keys and values `[b h n]` of the first layer."""
        stop = self.columns + s
        new = self.codes()[:, :, self.columns : stop]
        padding = self.real[:, :stop] if mask and not bool(self.real.all()) else None
        announce(self.cache, Call(self.method, self.columns, s, padding))
        out = [self.cache.update(new, -new, layer) for layer in range(3)]
        assert torch.equal(out[0][0], out[2][0])
        assert torch.equal(out[0][0], -out[0][1])
        self.columns = stop
        return out[0][0][..., 0]

    def held(self):
        return self.cache.layers[0].keys[..., 0]

    def check_held(self):
        """Each row and head holds exactly the pattern's positions, in any order."""
        past = self.real[:, : self.columns].sum(1)
        held = self.held()
        assert held.shape[2] == max(self.method.kept_tokens(int(n)) for n in past)
        for row, head in ((r, h) for r in range(len(past)) for h in range(HEADS)):
            kept = self.method.kept(int(past[row]), head)
            found = held[row, head, held.shape[2] - len(kept) :] - 1000 * row - 100 * head
            assert sorted(found.tolist()) == kept
        assert self.cache.get_seq_length() == self.cache.get_seq_length(1) == self.columns
        assert self.cache.get_mask_sizes(4, 0) == (self.columns + 4, 0)
