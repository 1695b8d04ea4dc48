"""A simulated KwaaiNet node that serves blocks, and what can be made to go wrong with it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import trio
from sim_envelope import BrokenRules, StreamReader, guarded
from sim_messages import (
    HIDDEN_STATES,
    INFERENCE,
    LEASE,
    LOGITS,
    MUX,
    TENSOR,
    TOKEN_IDS,
    WARMING_UP,
    WRONG_MODEL,
    DeniedAtCapacity,
    Granted,
    InferenceAnswer,
    InferenceRequest,
    LeaseOutcome,
    MuxFrame,
    outcome_value,
    pack_message,
    read_lease_request,
    read_mux_frame,
)
from sim_model import Model, OutOfPlace, Span, load_span
from sim_peer import SimulatedPeer
from sim_records import (
    JOINING,
    LIFE_SECONDS,
    MODELS_KEY,
    NODES_KEY,
    OFFLINE,
    READY,
    block_key,
    server_value,
)
from sim_tensor import MAX_FRAME, TensorFrame, acknowledge

LEASE_SECONDS = 30
RETRY_SECONDS = 5


@dataclass
class Faults:
    """What goes wrong with a server's inference; may be changed while it runs.

    ``silent``: no answer ever. ``slow``: seconds before each answer. ``dies_after``: so many answers are whole; the next is
    cut in the middle and the node dies. ``wrong_shape``: one value less per token, in shape and data. ``short_data``: the
    shape is right and a value is missing. ``nan``: one value is not a number. ``error``: this text in place of an answer.
    ``at_capacity``: no lease for anybody.
    """

    silent: bool = False
    slow: float = 0
    dies_after: int | None = None
    wrong_shape: bool = False
    short_data: bool = False
    nan: bool = False
    error: str | None = None
    at_capacity: bool = False


@dataclass(frozen=True)
class Announcement:
    """One round: the state, and what each bootstrap peer accepted of it, None where it did not answer."""

    state: int
    accepted: dict[str, list[bool] | None]

    @property
    def succeeded(self) -> bool:
        return any(ok is not None and all(ok) for ok in self.accepted.values())


class SimulatedServer(SimulatedPeer):
    """Serves ``blocks`` of ``model`` on the inference, lease, mux and tensor protocols, and announces them.

    ``requests`` are the inference requests that could be read, with the peer ids of who sent them; ``tensors`` the
    received tensor frames; ``announcements`` the rounds so far.
    """

    def __init__(
        self,
        blocks: range,
        model: Model,
        *,
        faults: Faults,
        refuses: Sequence[str],
        version: str,
        throughput: float,
        warming_up: bool,
        leases: int,
        period: float,
        **peer: Any,
    ) -> None:
        super().__init__(**peer)
        self.model = model
        self.span = Span(model, blocks, self.clock)
        self.faults = faults
        self.version = version
        self.throughput = throughput
        self.warming_up = warming_up
        self.max_leases = leases
        self.period = period
        self.requests: list[tuple[str, InferenceRequest]] = []
        self.tensors: list[tuple[str, TensorFrame]] = []
        self.announcements: list[Announcement] = []
        self.answers = 0
        self._refuses = refuses
        self._leases: dict[str, tuple[int, float]] = {}  # by peer: number, end
        self._lease_ids = itertools.count(1)
        self._computing = trio.Lock()
        self._announcing = trio.Lock()
        self._expiration = 0.0
        self._round = trio.Event()

    @property
    def blocks(self) -> range:
        return self.span.blocks

    def mount(self) -> None:
        self.serve(INFERENCE, self._inference, self._send_answer)
        self.serve(LEASE, self._lease)
        self.serve_stream(MUX, guarded(self._mux, self.complaints.append))
        self.serve_stream(TENSOR, guarded(self._tensor, self.complaints.append))
        for protocol in self._refuses:
            self.refuse(protocol)

    async def start(self, nursery: trio.Nursery) -> None:
        await trio.to_thread.run_sync(load_span, self.model, self.blocks.start, self.blocks.stop)
        await self.announce()
        nursery.start_soon(self._keep_announcing)

    async def leave(self) -> None:
        await self.announce(OFFLINE)

    async def finish_warming_up(self) -> None:
        """Be ready, and announce it."""
        self.warming_up = False
        await self.announce()

    # --- announcing

    async def announce(self, state: int | None = None) -> Announcement:
        """Store this node's records at every bootstrap peer, all with one expiration."""
        async with self._announcing:
            if state is None:
                state = JOINING if self.warming_up else READY
            # A later record must expire later, however soon it follows.
            self._expiration = max(self.clock() + LIFE_SECONDS, self._expiration + 0.001)
            items = self.records(state, self._expiration)
            accepted: dict[str, list[bool] | None] = {}
            for address in self.bootstrap:
                try:
                    with trio.fail_after(self.timeout):
                        peer = await self.host.connect(address)
                    accepted[str(peer)] = await self.dht.store(peer, items)
                except Exception:  # one dead bootstrap peer is no reason to leave out the next
                    accepted[address] = None
            round_ = Announcement(state, accepted)
            self.announcements.append(round_)
            self._round.set()
            self._round = trio.Event()
            return round_

    async def next_announcement(self) -> Announcement:
        """Wait for the next round."""
        await self._round.wait()
        return self.announcements[-1]

    def records(self, state: int, expiration: float) -> list[tuple[str, str, Any, float]]:
        """(key, subkey, value, expiration) of everything that it stores in one round."""
        value = server_value(
            state=state, throughput=self.throughput, blocks=self.blocks, peer_id=self.peer_id,
            public_name="simulator", version=self.version, cache_tokens_left=4096,
        )  # fmt: skip
        about = {"repository": self.model.repository, "num_blocks": self.model.num_blocks}
        prefix = self.model.prefix
        return [
            *((block_key(prefix, block), self.peer_id, value, expiration) for block in self.blocks),
            (MODELS_KEY, prefix, about, expiration),
            (NODES_KEY, self.peer_id, value, expiration),
        ]

    async def _keep_announcing(self) -> None:
        while True:
            await trio.sleep(self.period)
            await self.announce()

    # --- inference

    async def _inference(self, remote: Any, body: bytes) -> bytes:
        request = InferenceRequest.decode(body)
        self.requests.append((str(remote), request))
        if self.faults.silent:
            await trio.sleep_forever()
        await trio.sleep(self.faults.slow)
        return (await self._answer(request)).encode()

    async def _answer(self, request: InferenceRequest) -> InferenceAnswer:
        kind = LOGITS if self.span.last else HIDDEN_STATES
        if self.warming_up:
            return InferenceAnswer(0, kind, [], b"", WARMING_UP)
        try:
            values = await self._compute(request)
        except (ValueError, OutOfPlace) as e:
            return InferenceAnswer(request.session_id, kind, [], b"", str(e))
        if self.faults.wrong_shape:
            values = values[..., :-1]
        if self.faults.nan:
            values = values.copy()
            values.flat[-1] = np.nan
        data = values.tobytes()[:-2] if self.faults.short_data else values.tobytes()
        return InferenceAnswer(request.session_id, kind, list(values.shape), data)

    async def _compute(self, request: InferenceRequest) -> np.ndarray:
        if self.faults.error is not None:
            raise ValueError(self.faults.error)
        if (request.payload_type == TOKEN_IDS) != self.span.first:
            raise ValueError(f"{request.payload_type} for the span from block {self.blocks.start}")
        given = request.ids() if request.payload_type == TOKEN_IDS else request.hidden()
        async with self._computing:
            return await trio.to_thread.run_sync(self.span.step, request.session_id, request.seq_pos, given)

    async def _send_answer(self, stream: Any, message: bytes) -> None:
        if self.answers == self.faults.dies_after:
            await stream.write(message[: len(message) // 2])
            await self.kill()
        await stream.write(message)
        self.answers += 1

    # --- leases

    async def _lease(self, remote: Any, body: bytes) -> bytes:
        return pack_message(outcome_value(self._grant(str(remote), read_lease_request(body))))

    def _grant(self, remote: str, model: str | None) -> LeaseOutcome:
        if model is not None and model not in (self.model.prefix, self.model.repository):
            return WRONG_MODEL
        held = self._held_leases()
        if self.faults.at_capacity or (remote not in held and len(held) >= self.max_leases):
            return DeniedAtCapacity(RETRY_SECONDS)
        number = held[remote][0] if remote in held else next(self._lease_ids)
        self._leases[remote] = (number, self.clock() + LEASE_SECONDS)
        return Granted(number, LEASE_SECONDS)

    def _held_leases(self) -> dict[str, tuple[int, float]]:
        now = self.clock()
        self._leases = {peer: lease for peer, lease in self._leases.items() if lease[1] > now}
        return self._leases

    # --- mux

    async def _mux(self, stream: Any) -> None:
        """``/echo`` answers with the body of the request; ``/echo/late`` does once a later request was answered."""
        reader, late = StreamReader(stream), list[MuxFrame]()
        remote = str(stream.remote)
        while (frame := await read_mux_frame(reader)) is not None:
            fields = frame.fields
            match frame.tag:
                case "Request" if fields["path"] == "/echo/late":
                    late.append(self._mux_answer(remote, fields))
                case "Request":
                    for answer in (self._mux_answer(remote, fields), *late):
                        await stream.write(answer.encode())
                    late.clear()
                case "LeaseRequest":
                    outcome = outcome_value(self._grant(remote, fields["model"]))
                    response = {"request_id": fields["request_id"], "outcome": outcome}
                    await stream.write(MuxFrame("LeaseResponse", response).encode())
                case "LeaseRelease":
                    if self._holds(remote, fields["lease_id"]):
                        del self._leases[remote]
                case "LeaseKeepalive":
                    if self._holds(remote, fields["lease_id"]):
                        self._leases[remote] = (fields["lease_id"], self.clock() + LEASE_SECONDS)
                case tag:
                    raise BrokenRules(f"{tag} from a client")

    def _holds(self, remote: str, lease_id: int) -> bool:
        return self._held_leases().get(remote, (None, 0.0))[0] == lease_id

    def _mux_answer(self, remote: str, fields: dict[str, Any]) -> MuxFrame:
        lease_id = fields["lease_id"]
        if lease_id is not None and not self._holds(remote, lease_id):
            status, body = 409, b"stale lease"
        elif fields["path"] in ("/echo", "/echo/late"):
            status, body = 200, fields["body"]
        else:
            status, body = 404, b"not found"
        return MuxFrame("Response", {"request_id": fields["request_id"], "status": status, "body": body})

    # --- tensors

    async def _tensor(self, stream: Any) -> None:
        frame = TensorFrame.decode(await StreamReader(stream).sized("big", MAX_FRAME))
        self.tensors.append((str(stream.remote), frame))
        await stream.write(acknowledge(frame.name).encode())
