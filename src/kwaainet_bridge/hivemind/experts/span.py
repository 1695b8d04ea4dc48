"""The blocks that this node serves under one DHT prefix: what all expert calls refer to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.engine import Engine
from kwaainet_bridge.errors import AllocationFailed, ConfigError, InvalidRequest, Refusal
from kwaainet_bridge.hivemind.experts.records import block_uid

_FLOAT_BYTES = 4
_UID_NUMBER_CHARACTERS = 200  # dot, number and space; with room for the name of a block that is not served
_NOT_OF_BFLOAT16 = (CompressionType.FLOAT16, CompressionType.MEANSTD_16BIT)


@dataclass(frozen=True, slots=True)
class ServedSpan:
    """A prefix, the engine behind it, and the compression that answers use unless the caller asks."""

    prefix: str
    engine: Engine
    compression: CompressionType = CompressionType.NONE

    def __post_init__(self) -> None:
        """Raise ConfigError for a compression that would refuse every answer."""
        dtype = self.engine.model.dtype
        if self.compression in _NOT_OF_BFLOAT16 and dtype is torch.bfloat16:
            raise ConfigError(
                f"model.compression {self.compression.name} cannot carry {dtype}: "
                "choose another, or set model.dtype to float32 or float16"
            )

    @property
    def uids(self) -> list[str]:
        return [block_uid(self.prefix, block) for block in self.engine.blocks]

    def block(self, uid: str) -> int | None:
        """The number of a served block, None for any other name."""
        head, _, tail = uid.rpartition(".")
        if head != self.prefix or not (tail.isascii() and tail.isdigit()) or len(tail) > 9:
            return None
        return int(tail) if int(tail) in self.engine.blocks else None

    def chain(self, uid: str) -> range:
        """The blocks that a request names, ``"p.0 p.1 p.2"``. Raises Refusal for one that is not served."""
        if len(uid) > len(self.engine.blocks) * (len(self.prefix) + _UID_NUMBER_CHARACTERS):
            raise Refusal("the request names more blocks than are served here")
        blocks: list[int] = []
        for name in uid.split(" "):
            block = self.block(name)
            if block is None:
                raise Refusal(f"Remote peer does not serve {name[:200]}")
            if blocks and block != blocks[-1] + 1:
                raise Refusal(f"blocks must follow each other, {name} does not follow {blocks[-1]}")
            blocks.append(block)
        return range(blocks[0], blocks[-1] + 1)

    @property
    def max_request_bytes(self) -> int:
        """Most tensor bytes of one request: inputs, gradients and prompts, with room to spare."""
        engine = self.engine
        return 4 * engine.max_batch_tokens * engine.model.hidden_size * _FLOAT_BYTES


def as_refusal(error: InvalidRequest | AllocationFailed) -> Refusal:
    """What a client is told when the engine refuses; other engine errors are the node's own trouble."""
    kind = "AllocationFailed" if isinstance(error, AllocationFailed) else "ValueError"
    return Refusal(str(error), kind=kind)
