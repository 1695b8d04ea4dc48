"""A simulated KwaaiNet node that generates text with the blocks of others."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import trio
from sim_dht import Entry, unpack
from sim_envelope import BrokenRules, CallError, StreamReader
from sim_messages import (
    HIDDEN_STATES,
    INFERENCE,
    LEASE,
    LOGITS,
    MUX,
    TENSOR,
    Granted,
    InferenceAnswer,
    InferenceRequest,
    LeaseOutcome,
    MuxFrame,
    lease_request,
    read_mux_frame,
    read_outcome,
    unpack_message,
)
from sim_model import Model
from sim_peer import SimulatedPeer
from sim_records import MODELS_KEY, NODES_KEY, ServerRecord, Unusable, block_key, read_server
from sim_tensor import ACK, DATA, MAX_FRAME, QuantisedTensor, TensorFrame

from kwaainet_bridge.errors import NetworkError, ProtocolNotSupported, RemoteError

REFUSED = "protocols not supported"  # how the refusal of a protocol reads to a KwaaiNet client


class NoChain(Exception):
    """The usable servers do not cover the model."""


class ServerFailed(Exception):
    """A server of the chain failed: ``peer_id`` and why."""

    def __init__(self, peer_id: str, reason: str) -> None:
        super().__init__(f"{peer_id}: {reason}")
        self.peer_id = peer_id
        self.reason = reason


@dataclass(frozen=True)
class Skipped:
    """A record that the reader's rules left out, and which rule."""

    key: str
    subkey: Any
    reason: str


def find_chain(servers: Iterable[ServerRecord], num_blocks: int) -> list[ServerRecord]:
    """Spans that follow each other from block 0 to the last, as few as possible; the faster of two equal ones.

    A request names no blocks: a server runs all that it has, so each span must start where the last one ends.
    Raises NoChain, which names the blocks that nobody has if there are any.
    """
    held = sorted(servers, key=lambda s: (-s.throughput, s.peer_id))
    chains: dict[int, list[ServerRecord]] = {num_blocks: []}
    for block in reversed(range(num_blocks)):
        for server in held:
            rest = chains.get(server.blocks.stop) if server.blocks.start == block else None
            if rest is not None and (block not in chains or len(rest) + 1 < len(chains[block])):
                chains[block] = [server, *rest]
    if 0 not in chains:
        missing = set(range(num_blocks)).difference(*(s.blocks for s in held))
        raise NoChain(f"blocks without a server: {sorted(missing)}" if missing else "no spans fit together")
    return chains[0]


class SimulatedClient(SimulatedPeer):
    """Reads the DHT, greets, leases and generates.

    ``blacklist``: peers that refused the inference protocol, left alone for good. ``failures``: servers of a chain
    that failed, with the reason. ``skipped``: what the last reading of the DHT left out. ``denials``: peers that were
    at capacity or had another reason for no lease; they are alive, and count as no failure.
    """

    def __init__(
        self, model: Model, *, session_ids: Callable[[], int] = lambda: secrets.randbits(63), **peer: Any
    ) -> None:
        super().__init__(**peer)
        self.model = model
        self.blacklist: set[str] = set()
        self.failures: list[ServerFailed] = []
        self.denials: list[tuple[str, LeaseOutcome]] = []
        self.skipped: list[Skipped] = []
        self._session_ids = session_ids
        self._config = json.loads((model.folder / "config.json").read_text())

    # --- reading the DHT

    async def models(self) -> dict[str, dict[str, Any]]:
        """The announced models by prefix: ``{repository, num_blocks}``."""
        [entries] = await self._find([MODELS_KEY])
        return {entry.subkey: unpack(entry.value) for entry in entries}

    async def nodes(self) -> list[ServerRecord]:
        """The usable nodes in the list of all nodes, whatever their model."""
        self.skipped = []
        [entries] = await self._find([NODES_KEY])
        return list(self._usable(NODES_KEY, entries))

    async def num_blocks(self) -> int:
        """How many blocks the model has, as announced. NoChain if it is not."""
        about = (await self.models()).get(self.model.prefix)
        if about is None:
            raise NoChain(f"model {self.model.prefix} is not announced")
        return about["num_blocks"]

    async def servers(self) -> list[ServerRecord]:
        """The usable servers of the model's blocks, by the readers' rules. NoChain if the model is not announced."""
        self.skipped = []
        keys = [block_key(self.model.prefix, block) for block in range(await self.num_blocks())]
        found: dict[str, ServerRecord] = {}
        for block, entries in enumerate(await self._find(keys)):
            for record in self._usable(keys[block], entries):
                if block in record.blocks:
                    found[record.peer_id] = record
                else:
                    self.skipped.append(Skipped(keys[block], record.peer_id, f"serves {record.blocks}"))
        return list(found.values())

    async def _find(self, keys: Sequence[str]) -> list[list[Entry]]:
        """Everything under ``keys`` at all bootstrap peers; of each subkey what expires last."""
        merged: list[dict[Any, Entry]] = [{} for _ in keys]
        for peer in self.bootstrap_peers:
            for known, entries in zip(merged, await self.dht.find(peer, keys), strict=True):
                for entry in entries:
                    if entry.subkey not in known or known[entry.subkey].expiration < entry.expiration:
                        known[entry.subkey] = entry
        now = self.clock()
        return [[e for e in known.values() if e.expiration > now] for known in merged]

    def _usable(self, key: str, entries: Sequence[Entry]) -> Iterable[ServerRecord]:
        for entry in entries:
            try:
                yield read_server(entry.subkey, entry.value)
            except Unusable as e:
                self.skipped.append(Skipped(key, entry.subkey, str(e)))

    # --- single calls

    async def lease(self, peer: Any, model: str | None = None) -> LeaseOutcome:
        """Ask for a lease; None as the model asks for any."""
        return read_outcome(unpack_message(await self.call(peer, LEASE, lease_request(model))))

    async def infer(self, peer: Any, request: InferenceRequest) -> InferenceAnswer:
        """One inference call, its answer unchecked."""
        return InferenceAnswer.decode(await self.call(peer, INFERENCE, request.encode()))

    async def send_tensor(self, peer: Any, name: str, values: np.ndarray, metadata: str = "") -> TensorFrame:
        """Send a quantised tensor; returns the acknowledgement."""
        frame = TensorFrame(DATA, name, QuantisedTensor.of(values), values.shape, metadata)
        with trio.fail_after(self.timeout):
            stream = await self.host.open_stream(self.peer(peer), TENSOR)
            try:
                await stream.write(frame.encode())
                answer = TensorFrame.decode(await StreamReader(stream).sized("big", MAX_FRAME))
            finally:
                await stream.close()
        if answer.kind != ACK or answer.name != name:
            raise BrokenRules(f"not the acknowledgement of {name!r}: {answer}")
        return answer

    @asynccontextmanager
    async def mux(self, peer: Any) -> AsyncIterator[MuxClient]:
        """A mux stream to ``peer`` for the block."""
        stream = await self.host.open_stream(self.peer(peer), MUX)
        try:
            yield MuxClient(stream)
        finally:
            await stream.close()

    # --- generating

    async def generate(self, ids: Sequence[int], count: int, *, attempts: int = 4) -> list[int]:
        """Generate ``count`` tokens greedily after ``ids``.

        A server that fails is left out and all tokens so far are sent again through another chain, at most
        ``attempts`` chains in all. Raises NoChain, or the last ServerFailed.
        """
        tokens: list[int] = []
        avoided: set[str] = set()
        last: ServerFailed | None = None
        for _ in range(attempts):
            chain = await self._lease_chain(avoided)
            session_id, position, given = self._session_ids(), 0, [*ids, *tokens]
            try:
                while len(tokens) < count:
                    logits = await self._through(chain, session_id, position, given)
                    position += len(given)
                    given = [int(logits.argmax())]
                    tokens += given
            except ServerFailed as e:
                last = e
                self.failures.append(e)
                avoided.add(e.peer_id)
            else:
                return tokens
        assert last is not None
        raise last

    async def _lease_chain(self, avoided: set[str]) -> list[ServerRecord]:
        """A chain of greeted servers that gave leases, as far as they know leases."""
        num_blocks = await self.num_blocks()
        servers = await self.servers()
        ready: set[str] = set()
        while True:
            left = [s for s in servers if s.peer_id not in self.blacklist | avoided | {self.peer_id}]
            chain = find_chain(left, num_blocks)
            asked = next((s for s in chain if s.peer_id not in ready), None)
            if asked is None:
                return chain
            try:
                outcome = await self._greet_and_lease(asked)
            except ServerFailed as e:
                self.failures.append(e)
                avoided.add(e.peer_id)
                continue
            if outcome is None or isinstance(outcome, Granted):
                ready.add(asked.peer_id)
            else:
                self.denials.append((asked.peer_id, outcome))
                avoided.add(asked.peer_id)

    async def _greet_and_lease(self, server: ServerRecord) -> LeaseOutcome | None:
        try:
            await self._checked(server.peer_id, lambda: self.hello(server.peer_id))
            if not server.leases:
                return None
            return await self._checked(server.peer_id, lambda: self.lease(server.peer_id, self.model.prefix))
        except ServerFailed as e:
            if REFUSED in e.reason:  # older nodes know neither; what counts is inference
                return None
            raise

    async def _through(
        self, chain: Sequence[ServerRecord], session_id: int, position: int, ids: list[int]
    ) -> np.ndarray:
        request = InferenceRequest.of_ids(session_id, position, ids)
        for server in chain:
            values = await self._step(server, request, last=server is chain[-1])
            request = InferenceRequest.of_hidden(session_id, position, values)
        return values[0, 0]

    async def _step(self, server: ServerRecord, request: InferenceRequest, *, last: bool) -> np.ndarray:
        peer_id = server.peer_id
        try:
            answer = await self._checked(peer_id, lambda: self.infer(peer_id, request))
        except ServerFailed as e:
            if REFUSED in e.reason:
                self.blacklist.add(peer_id)
            raise
        if answer.error is not None:
            raise ServerFailed(peer_id, answer.error)
        try:
            values = answer.values()
        except BrokenRules as e:
            raise ServerFailed(peer_id, str(e)) from e
        length = 1 if last else request.shape[0] if len(request.shape) == 1 else request.shape[1]
        expected = (1, length, self._config["vocab_size" if last else "hidden_size"])
        if answer.session_id != request.session_id or answer.response_type != (
            LOGITS if last else HIDDEN_STATES
        ):
            raise ServerFailed(peer_id, f"{answer.response_type} of session {answer.session_id}")
        if values.shape != expected:
            raise ServerFailed(peer_id, f"shape {values.shape}, not {expected}")
        if not np.isfinite(values).all():
            raise ServerFailed(peer_id, "values that are not finite")
        return values

    async def _checked(self, peer_id: str, call: Callable[[], Any]) -> Any:
        """Make a call; however it fails becomes ServerFailed, a refused protocol with its well-known text."""
        try:
            return await call()
        except ProtocolNotSupported as e:
            raise ServerFailed(peer_id, f"{REFUSED}: {e}") from e
        except trio.TooSlowError as e:
            raise ServerFailed(peer_id, f"no answer within {self.timeout} s") from e
        except (NetworkError, RemoteError, BrokenRules, CallError) as e:
            raise ServerFailed(peer_id, f"{type(e).__name__}: {e}") from e


class MuxClient:
    """One mux stream: frames out, frames in, in whatever order they come."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._reader = StreamReader(stream)

    async def send(self, tag: str, **fields: Any) -> None:
        """Send one frame with its fields in the given order, which should be the documented one."""
        await self._stream.write(MuxFrame(tag, fields).encode())

    async def receive(self) -> MuxFrame:
        """The next frame. BrokenRules if the stream ends instead."""
        frame = await read_mux_frame(self._reader)
        if frame is None:
            raise BrokenRules("the mux stream ended")
        return frame

    async def request(
        self, request_id: int, path: str, body: bytes, *, method: str = "POST", lease_id: int | None = None
    ) -> None:
        """Send a request without waiting for its response."""
        await self.send(
            "Request", request_id=request_id, method=method, path=path, body=body, lease_id=lease_id
        )
