"""Key/value caches, dense and paged, and the vocabulary of decoding: one call's tensors and its description."""

from .call import DecodeInputs, DecodeSpec
from .checks import Cache, check_step, describe
from .dense import KVCache
from .paged import PagedKVCache
from .pages import PagePool
from .storage import KV_DTYPES, LIMITS, bits, refuse, storable

__all__ = [
    "KV_DTYPES",
    "LIMITS",
    "Cache",
    "DecodeInputs",
    "DecodeSpec",
    "KVCache",
    "PagePool",
    "PagedKVCache",
    "bits",
    "check_step",
    "describe",
    "refuse",
    "storable",
]
