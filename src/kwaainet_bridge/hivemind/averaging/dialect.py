"""What differs between averagers of Hivemind and of KwaaiNet; all else is the same code.

Nothing of one dialect is understood in the other, so that peers of both never get into one group: the calls have other
names and frames, the records other keys, and a leader refuses the other's schema.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.hivemind.averaging import group_keys, kwaai
from kwaainet_bridge.hivemind.averaging.balance import balanced_scores
from kwaainet_bridge.hivemind.averaging.methods import Methods, kwaai_methods, methods
from kwaainet_bridge.wire.kwaai_avg import run_name

Protocol: TypeAlias = Literal["hivemind", "kwaai"]


@dataclass(frozen=True, slots=True)
class Dialect:
    """How the averagers of one run meet, call each other and split the work.

    ``record_prefix`` is what their keys in the DHT begin with; the functions are explained where they are defined.
    """

    methods: Methods
    record_prefix: str
    schema: Callable[[Sequence[torch.Tensor], CompressionType, int], bytes]
    scores: Callable[[Sequence[float | None]], list[float]]
    numbers: group_keys.Numbers


def dialect_of(protocol: Protocol, prefix: str, kind: str) -> Dialect:
    """``kind`` is the class that Hivemind's peers run; KwaaiNet's know none.

    Raises ValueError for a prefix that cannot be.
    """
    if protocol == "kwaai":
        name = run_name(prefix)
        return Dialect(kwaai_methods(name), name, kwaai.schema_hash, kwaai.scores, kwaai.numbers)
    if protocol != "hivemind":
        raise ValueError(f"averaging protocol {protocol!r}: must be hivemind or kwaai")
    group_keys.check_prefix(prefix)
    return Dialect(methods(prefix, kind), prefix, _stock_schema, balanced_scores, group_keys.stock_numbers)


def _stock_schema(tensors: Sequence[torch.Tensor], _compression: CompressionType, _part_bytes: int) -> bytes:
    return group_keys.schema_hash(tensors)
