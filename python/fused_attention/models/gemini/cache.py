"""transformers' `Cache` over our key/value caches, dense or in pages, exact or quantised.

Each layer's keys and values lie in a `KVCache` or `PagedKVCache`, and attention reads them there (`decode_attention`).
Padding is never stored: what arrives is moved to the front of its sequence, its padding behind, and the padding is cut
off again. So the sequences of a batch have lengths of their own, and windows and causality count real tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ...cache import KVCache, PagedKVCache
from ...decode import decode_attention

KINDS = ("dense", "paged")
_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_FIRST = 64  # tokens for which a dense cache has room before it grows


class Arrival(NamedTuple):
    """Where the real tokens of a padded [B, M] stand.

    order: [B, M], their columns first, then the padding's. back: [B, M], its inverse. counts: [B].
    """

    order: Tensor
    back: Tensor
    counts: Tensor

    @staticmethod
    def of(visible: Tensor) -> Arrival | None:
        """visible: bool [B, M]; None where nothing is padding."""
        if bool(visible.all()):
            return None
        order = (~visible).byte().argsort(dim=1, stable=True)
        return Arrival(order, order.argsort(dim=1), visible.sum(1))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, M, D] with its rows in another order, index [B, M]."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


class FusedLayer(CacheLayerMixin):
    """One layer's keys and values. `seen` counts columns, padding too, as transformers does."""

    is_croppable = True

    def __init__(self, kind: str, kv_dtype: torch.dtype | None, max_length: int, page_size: int) -> None:
        super().__init__()
        self.kind, self.kv_dtype, self.max_length, self.page_size = kind, kv_dtype, max_length, page_size
        self.kv: KVCache | PagedKVCache | None = None
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, head_dim = key_states.shape
        stored: dict[str, Any] = {
            "value_dim": value_states.shape[3],
            "dtype": key_states.dtype,
            "kv_dtype": self.kv_dtype,
            "device": key_states.device,
        }
        if self.kind == "dense":
            self.kv = KVCache.allocate(batch, heads, _FIRST, head_dim, **stored)
        else:
            pages = batch * -(-self.max_length // self.page_size)
            self.kv = PagedKVCache.managed(self.max_length, pages, heads, self.page_size, head_dim, **stored)
            self.kv.add(batch)
        self.is_initialized = True

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, arrival: Arrival | None = None, **options: Any
    ) -> Tensor:
        """Append M tokens of each sequence and attend from them to all that is held, causally.

        query [B, H, M, D], key [B, HK, M, D], value [B, HK, M, DV]; arrival: where they are padded, None: nowhere.
        options: window, softcap and scale of `decode_attention`. Returns [B, H, M, DV]; at padding it means nothing.
        """
        if self.kv is None:
            self.lazy_initialization(key, value)
        kv, rows = self.kv, query.shape[2]
        assert kv is not None
        if isinstance(kv, KVCache) and self.seen + rows > kv.capacity:
            kv.reserve(self.seen + rows)
        self.seen += rows
        if arrival is None:
            output = decode_attention(query, kv, key, value, **options)
            assert isinstance(output, Tensor)
            return output
        kept = kv.lengths.long() + arrival.counts
        query, key, value = (_rows(t, arrival.order) for t in (query, key, value))
        output = decode_attention(query, kv, key, value, **options)
        assert isinstance(output, Tensor)
        self._truncate(kept)
        return _rows(output, arrival.back)

    def _truncate(self, tokens: Tensor) -> None:
        if isinstance(self.kv, KVCache):
            self.kv.truncate(tokens)
        elif self.kv is not None:
            self.kv.truncate(tokens.tolist())

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError(
            "this cache hands out no keys and values: decode_attention reads them where they lie. Use it with a "
            "GeminiModel, or transformers' DynamicCache with another model"
        )

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1 if self.kind == "dense" else self.max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens of every sequence, as transformers' caches do."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: got {tokens_to_remove}, expected 0 or less")
        if tokens_to_remove and self.kv is not None:
            self._truncate((self.kv.lengths.long() + tokens_to_remove).clamp(min=0))
            self.seen += tokens_to_remove

    def reset(self) -> None:
        if self.kv is not None:
            self.kv.reset()
        self.seen = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.kv is not None:
            self.kv.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Sequence i becomes what indices[i] was; as many as there are indices."""
        if isinstance(self.kv, KVCache):
            self.kv.reorder(indices)
        elif self.kv is not None:
            before, chosen = self.kv.sequences, []
            for i in indices.tolist():
                sequence = before[i]
                chosen.append(self.kv.fork(sequence) if sequence in chosen else sequence)
            for sequence in set(before) - set(chosen):
                self.kv.free(sequence)
            self.kv = self.kv.select(chosen)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.kv is not None:
            self.batch_select_indices(torch.arange(self.kv.batch).repeat_interleave(repeats))

    def offload(self) -> None:
        raise TypeError("this cache stays on its device; transformers' DynamicCache(offloading=True) does not")

    prefetch = offload


class GeminiCache(Cache):
    """A cache for every layer of a `GeminiModel`; empty until the first tokens arrive.

    Args:
        layers: how many.
        kind: "dense" (grows as needed) or "paged" (pages of a pool, which beams share).
        kv_dtype: what is stored: None for the model's own dtype, torch.int8 or "int8", torch.float8_e4m3fn or "fp8",
            or a floating dtype that is exact in the model's.
        max_length: tokens for which a paged cache has room, in each sequence.
        page_size: tokens of a page.

    Raises:
        ValueError: an unknown kind or dtype.
    """

    layers: list[Any]  # FusedLayer; transformers declares it wider

    def __init__(
        self,
        layers: int,
        kind: str = "dense",
        kv_dtype: torch.dtype | str | None = None,
        max_length: int = 512,
        page_size: int = 16,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(map(repr, KINDS))}")
        if isinstance(kv_dtype, str):
            if kv_dtype not in _DTYPES:
                raise ValueError(f"kv_dtype: got {kv_dtype!r}, expected a torch.dtype, None, 'int8' or 'fp8'")
            kv_dtype = _DTYPES[kv_dtype]
        super().__init__(layers=[FusedLayer(kind, kv_dtype, max_length, page_size) for _ in range(layers)])
