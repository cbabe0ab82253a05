"""Context parallelism: one sequence over the ranks of a process group, each of which holds a part of it.

`ring_attention` lets keys and values travel from rank to rank; `ulysses_attention` exchanges the sequence for the
heads and back. Both take the shards that `shard_sequence` cuts, and equal `attention` on the whole sequence.
"""

from .ring import ring_attention
from .sharding import sequence_positions, shard_sequence, unshard_sequence
from .ulysses import ulysses_attention

__all__ = ["ring_attention", "sequence_positions", "shard_sequence", "ulysses_attention", "unshard_sequence"]
