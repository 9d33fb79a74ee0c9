"""Room in a cache of transformers for the kernels to write into, one token after the other."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache


def room(layer: Any, position: int) -> tuple[Tensor, Tensor]:
    """The buffers behind a cache layer's keys and values, with room for one token more.

    The cache of transformers grows by copying itself at every token. Here it becomes a view of a larger buffer that is
    written in place; whatever else replaces its tensors (beam search, a restored copy, ...) is noticed and copied once.
    """
    buffers = layer.__dict__.get("_lte_buffers")
    if buffers is not None and buffers.continues(layer, position):
        return buffers.keys, buffers.values
    grown = []
    for old in (layer.keys, layer.values):
        batch, heads, length, dim = old.shape
        new = old.new_empty(batch, heads, length + max(256, length // 2), dim)
        new[:, :, :length] = old
        grown.append(new)
    layer._lte_buffers = Buffers(grown[0], grown[1], id(layer), position)
    return grown[0], grown[1]


@dataclass
class Buffers:
    """What a cache layer's tensors are views of.

    Attributes:
        keys, values: [B, heads, capacity, head_dim].
        owner: id of the layer; a shallow copy of it must not write here.
        filled: tokens written. Another view may hold them, so that a shorter cache must not write over them.
        given: the views that the layer was given last.
    """

    keys: Tensor
    values: Tensor
    owner: int
    filled: int
    given: tuple[Tensor, Tensor] | None = None

    def grow(self, layer: Any) -> None:
        """One token more in the layer's view."""
        self.filled += 1
        layer.keys, layer.values = self.keys.narrow(2, 0, self.filled), self.values.narrow(2, 0, self.filled)
        self.given = layer.keys, layer.values

    def continues(self, layer: Any, position: int) -> bool:
        """Whether the layer holds all that was written, and one token more fits."""
        if not self._has_room(layer, position):
            return False
        same = layer.keys.data_ptr() == self.keys.data_ptr() and layer.values.data_ptr() == self.values.data_ptr()
        return same and layer.keys.stride() == self.keys.stride()

    def is_untouched(self, layer: Any, position: int) -> bool:
        """The same, seen at a glance: the layer still has the very tensors it was given."""
        given = self.given
        return (
            given is not None
            and layer.keys is given[0]
            and layer.values is given[1]
            and self._has_room(layer, position)
        )

    def _has_room(self, layer: Any, position: int) -> bool:
        return self.owner == id(layer) and self.filled == position and position < self.keys.shape[2]


@dataclass
class LastCache:
    """The cache of the last step, and structs that serve for the next one too where nobody has touched it since."""

    cache: weakref.ref[DynamicCache]
    batch: int
    structs: Any

    def goes_on(self, cache: DynamicCache, batch: int, position: int) -> bool:
        """Whether it is this cache, as it was left, with room for a token in every layer."""
        if id(self.cache()) != id(cache) or self.batch != batch or len(cache.layers) != len(self.structs):
            return False
        buffers = [layer.__dict__.get("_lte_buffers") for layer in cache.layers]
        held = zip(buffers, cache.layers, strict=True)
        return all(of is not None and of.is_untouched(layer, position) for of, layer in held)

    def grow(self) -> Any:
        """The structs, one token more in every layer."""
        cache: Any = self.cache()
        for layer in cache.layers:
            layer._lte_buffers.grow(layer)
        return self.structs
