"""Giving one's state to peers that join a run, and getting it from others.

Source: hivemind 1.1.12, ``averaging/averager.py``.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.errors import NetworkError, RemoteError
from kwaainet_bridge.hivemind.averaging.coding import coded
from kwaainet_bridge.hivemind.averaging.dialect import Dialect
from kwaainet_bridge.hivemind.averaging.group_keys import entries_of, state_key
from kwaainet_bridge.hivemind.averaging.methods import first_request
from kwaainet_bridge.hivemind.dht import DhtNode
from kwaainet_bridge.hivemind.peer import Peer
from kwaainet_bridge.rpc import RpcClient, ServerStream, StreamMethod
from kwaainet_bridge.wire.averaging import DownloadData
from kwaainet_bridge.wire.fields import total
from kwaainet_bridge.wire.msgpack import pack, unpack
from kwaainet_bridge.wire.pb import averaging_pb2 as pb
from kwaainet_bridge.wire.peer_id import PeerId
from kwaainet_bridge.wire.tensors import (
    TensorJoiner,
    TensorMessage,
    decode_tensor,
    encode_tensor,
    split_tensor,
)

log = logging.getLogger(__name__)

_GROUP_KEY: Final = "group_key"
"""All metadata of a state that is the tensors and nothing else. Source: hivemind 1.1.12, ``averaging/averager.py``."""

DownloadMethod = StreamMethod[pb.DownloadRequest, DownloadData]

_DOWNLOADS = 4  # at one time, each with a copy of the state


@dataclass(frozen=True, slots=True)
class State:
    """``metadata`` is a map that msgpack carries; it says what the tensors are."""

    metadata: dict[str, Any]
    tensors: Sequence[torch.Tensor]


def state_of_tensors(tensors: Sequence[torch.Tensor], bits: str) -> State:
    """A state that is the tensors that are averaged and nothing else; ``bits`` are those of the peer's group key."""
    return State({_GROUP_KEY: bits}, tensors)


def check_tensors(state: State, own: Sequence[torch.Tensor]) -> None:
    """Raise RemoteError if ``state`` is said to be just the tensors that are averaged, but has others than ``own``.

    A peer that dies after a whole tensor seems to have given everything.
    """
    if set(state.metadata) != {_GROUP_KEY}:
        return
    shapes, expected = ([tuple(t.shape) for t in tensors] for tensors in (state.tensors, own))
    if shapes != expected:
        raise RemoteError(f"state: tensors of shapes {shapes!r:.200}, not {expected!r:.200}")


class StateSharing:
    """Offers a state in the DHT, and serves it; ``lock`` is held while it is copied."""

    def __init__(
        self,
        dht: DhtNode,
        record_prefix: str,
        state: Callable[[], State],
        lock: trio.Lock,
        *,
        compression: CompressionType = CompressionType.NONE,
        allowed_peers: Collection[PeerId] | None = None,
        clock: Callable[[], float],
    ) -> None:
        self.allowed = False
        self._dht = dht
        self._key = state_key(record_prefix)
        self._state = state
        self._lock = lock
        self._compression = compression
        self._allowed_peers = allowed_peers
        self._clock = clock
        self._priority = 0.0
        self._changed = trio.Event()
        self._downloads = trio.CapacityLimiter(_DOWNLOADS)

    def set(self, *, allowed: bool, priority: float) -> None:
        """From now on; others hear of it at once."""
        self.allowed, self._priority = allowed, priority
        self._changed.set()
        self._changed = trio.Event()

    async def announce(self) -> None:
        """Keep the record. Cancelled: it expires by itself."""
        announced = False
        expiration = -math.inf
        while True:
            changed = self._changed
            if self.allowed or announced:
                announced = self.allowed
                # of two records that expire at once the first one stays
                expiration = max(
                    self._clock() + defaults.AVERAGING_STATE_SECONDS, math.nextafter(expiration, math.inf)
                )
                value = float(self._priority) if self.allowed else None
                await self._dht.store(self._key, value, expiration, subkey=self._dht.peer_id.raw)
            with trio.move_on_after(defaults.AVERAGING_STATE_SECONDS * 2 / 3):
                await changed.wait()

    async def serve(self, stream: ServerStream[pb.DownloadRequest, DownloadData]) -> None:
        """Send the state, or nothing if it is not shared: then peers ask somebody else."""
        await first_request(stream)
        known = self._allowed_peers is None or stream.context.peer in self._allowed_peers
        if not self.allowed or not known or not self._downloads.available_tokens:
            return
        async with self._downloads:
            async with self._lock:
                state = self._state()
                tensors = [tensor.detach().cpu().clone() for tensor in state.tensors]
            metadata = pack(state.metadata)
            for tensor in tensors:
                whole = await coded(partial(self._encode, tensor), tensor.nbytes, self._compression)
                for part in split_tensor(whole):
                    await stream.send(DownloadData(metadata=metadata, tensor_part=part))
                    metadata = b""

    def _encode(self, tensor: torch.Tensor) -> TensorMessage:
        return encode_tensor(tensor, self._compression, legacy_bfloat16=True)


async def download_state(
    peer: Peer,
    dialect: Dialect,
    *,
    max_bytes: int,
    allowed_peers: Collection[PeerId] | None = None,
    check: Callable[[State], object] | None = None,
    rng: random.Random | None = None,
) -> State | None:
    """The state of the first of a run that gives it, of at most ``max_bytes``; None if nobody does.

    Peers are asked by falling priority, those with the same one in any order; the next one, too, if ``check``
    raises RemoteError. Raises nothing for peers that fail. Cancelled: nothing remains.
    """
    rng = rng or random.SystemRandom()
    offers = [
        (float(entry.value), rng.random(), other)
        for other, entry in entries_of(await peer.dht.get(state_key(dialect.record_prefix)))
        if isinstance(entry.value, float | int) and not isinstance(entry.value, bool)
        if other != peer.peer_id and not math.isnan(entry.value)
        if allowed_peers is None or other in allowed_peers
    ]
    for _, _, other in sorted(offers, reverse=True):
        try:
            state = await _download(peer.client, dialect.methods.download_state, other, max_bytes)
            if state is not None and check is not None:
                await coded(partial(check, state), sum(t.nbytes for t in state.tensors), CompressionType.NONE)
        except (NetworkError, RemoteError) as e:
            log.info("averaging: no state from %s: %.200s", other, e)
            continue
        if state is not None:
            return state
        log.info("averaging: %s does not share its state", other)
    return None


async def _download(client: RpcClient, method: DownloadMethod, peer: PeerId, max_bytes: int) -> State | None:
    joiner = TensorJoiner(max_bytes)
    metadata = None
    messages: list[TensorMessage] = []
    async with client.stream(peer, method, open_timeout=defaults.CONNECT_SECONDS) as stream:
        await stream.send(pb.DownloadRequest())
        await stream.end()
        try:
            while True:
                message = await stream.receive(timeout=defaults.AVERAGING_STATE_SECONDS)
                if message.metadata:
                    metadata = unpack(message.metadata)
                part = message.tensor_part
                if not part.dtype and not total(part.values):
                    raise RemoteError("state: an empty piece, of which any number could follow")
                messages += joiner.feed(part)
        except trio.EndOfChannel:
            messages += joiner.finish()
    if metadata is None:
        return None
    if not isinstance(metadata, dict):
        raise RemoteError("state: its metadata are no map")
    tensors = [
        await coded(partial(decode_tensor, message), len(message.buffer), message.compression)
        for message in messages
    ]
    return State(metadata, [tensor.detach() for tensor in tensors])
