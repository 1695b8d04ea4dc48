"""``/kwaai/inference-mux/1.0.0``, the serving side: HTTP requests and leases of a peer over one long-lived stream.

Source: KwaaiNet v0.6.2, ``kwaai-cli/src/inference_mux.rs``.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError, Refusal, RemoteError, StreamClosed
from kwaainet_bridge.kwaai.lease import Places
from kwaainet_bridge.kwaai.mux_endpoint import MuxEndpoint
from kwaainet_bridge.net.fair_pool import FairPool
from kwaainet_bridge.net.stream import Stream
from kwaainet_bridge.rpc.budget import Account, ReceiveBudget
from kwaainet_bridge.wire.kwaai_mux import (
    STALE_LEASE,
    MuxDecoder,
    MuxLeaseKeepalive,
    MuxLeaseRelease,
    MuxLeaseRequest,
    MuxLeaseResponse,
    MuxMessage,
    MuxRequest,
    MuxResponse,
    MuxUnknown,
    encode_frame,
)
from kwaainet_bridge.wire.peer_id import PeerId

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

READ_BYTES: Final = 256 * defaults.KIB
_AS_INTEGERS: Final = 2
"""Bytes in a frame for each byte of a body that comes as integers, at most."""


class MuxService:
    """Serves mux streams. The HTTP client is made for the first request, and closed by :meth:`aclose`."""

    def __init__(self, endpoint: MuxEndpoint, places: Places) -> None:
        self.endpoint = endpoint
        self.places = places
        self.running: Counter[PeerId] = Counter()
        self._streams = FairPool(defaults.KWAAI_MUX_STREAMS, per_peer=defaults.KWAAI_MUX_STREAMS_PER_PEER)
        self._budget = ReceiveBudget(per_peer=defaults.KWAAI_MUX_PEER_BYTES, in_all=defaults.KWAAI_MUX_BYTES)
        self._client: httpx.AsyncClient | None = None
        self._changed = trio.Event()

    def room(self) -> int:
        """How many more requests may run."""
        return self.endpoint.requests - self.running.total()

    def uses(self) -> Mapping[PeerId, int]:
        """How many requests of each peer run."""
        return self.running

    async def wait_idle(self) -> None:
        """Return once no request runs."""
        while self.running:
            await self._changed.wait()

    async def serve(self, stream: Stream) -> None:
        """Serve one stream until its peer ends it, breaks the protocol or is silent for too long.

        Its requests are cancelled and its leases ended with it. A stream beyond the limits is reset.
        """
        peer = stream.remote
        if not self._streams.reserve(peer, 1):
            log.debug("%s: too many mux streams", peer)
            await stream.reset()
            return
        try:
            with self._budget.account(peer) as account:
                await _MuxStream(self, stream, account).run()
        except (NetworkError, RemoteError) as e:
            log.debug("mux stream of %s: %.200s", peer, e)
            await stream.reset()
        finally:
            self._streams.release(peer, 1)

    async def ask(self, peer: PeerId, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """The endpoint's answer to a request that was checked, as status and body."""
        if self._client is None:
            self._client = self.endpoint.client()
        status, content = 504, b"the server behind this node took too long"
        with trio.move_on_after(self.endpoint.seconds):
            status, content = await self.endpoint.ask(self._client, method, path, body)
        log.debug("%s: %s %s: %d", peer, method, path, status)
        return status, content

    def begin(self, peer: PeerId) -> None:
        """Count a request of ``peer`` that runs from now on."""
        self.running[peer] += 1

    def end(self, peer: PeerId) -> None:
        """Note that it does not any more."""
        self.running[peer] -= 1
        if not self.running[peer]:
            del self.running[peer]
        self._changed.set()
        self._changed = trio.Event()

    async def aclose(self) -> None:
        """Close the HTTP client. Requests that still run fail."""
        if self._client is not None:
            with trio.CancelScope(shield=True):
                await self._client.aclose()
            self._client = None


class _MuxStream:
    """One stream of a peer."""

    def __init__(self, service: MuxService, stream: Stream, account: Account) -> None:
        self._service = service
        self._places = service.places
        self._stream = stream
        self._peer = stream.remote
        self._account = account
        self._writing = trio.Lock()
        self._under_way: set[int] = set()
        self._silence = trio.CancelScope()

    async def run(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                await self._read(nursery)
                nursery.cancel_scope.cancel()  # whoever left reads no answers
        except BaseExceptionGroup as e:
            # one error ends the stream, whichever task it came from; cancellation and surprises go on as they are
            expected, rest = e.split((NetworkError, RemoteError))
            if expected is None or rest is not None:
                raise
            raise StreamClosed(f"{self._peer}: the mux stream failed") from e
        finally:
            self._places.leases.end(self._peer, self)

    async def _read(self, nursery: trio.Nursery) -> None:
        # a body that comes as integers has up to two bytes for each; the other fields are texts and numbers
        longest = _AS_INTEGERS * self._service.endpoint.body_bytes + 2 * defaults.MAX_HTTP_PATH_BYTES
        decoder = MuxDecoder(min(longest, defaults.MAX_MUX_FRAME_BYTES))
        with self._silence:
            await self._read_frames(decoder, nursery)
        if self._silence.cancelled_caught:
            log.debug("mux stream of %s: silent for too long", self._peer)

    async def _read_frames(self, decoder: MuxDecoder, nursery: trio.Nursery) -> None:
        """Take frames until the peer closes the stream."""
        waiting = 0  # bytes of the frame that is not whole
        self._heard()
        while data := await self._stream.read(READ_BYTES):
            self._heard()
            self._account.add(len(data))
            waiting += len(data)
            if messages := decoder.feed(data):
                self._account.drop(waiting)
                waiting = 0  # but for what one read may hold of the next
            for message in messages:
                await self._take(message, nursery)
            decoder.feed(b"")  # raises what was wrong behind the last good frame
        decoder.finish()

    def _heard(self) -> None:
        limit = max(defaults.KWAAI_MUX_IDLE_SECONDS, self._service.endpoint.seconds + defaults.SEND_SECONDS)
        self._silence.deadline = trio.current_time() + limit

    async def _take(self, message: MuxMessage | MuxUnknown, nursery: trio.Nursery) -> None:
        match message:
            case MuxRequest():
                await self._begin(message, nursery)
            case MuxLeaseRequest():
                outcome = self._places.grant(self._peer, message.model, self)
                await self._send(MuxLeaseResponse(request_id=message.request_id, outcome=outcome))
            case MuxLeaseRelease():
                self._places.leases.release(self._peer, message.lease_id)
            case MuxLeaseKeepalive():
                self._places.keep(self._peer, message.lease_id)
            case MuxUnknown():
                log.debug("mux stream of %s: ignored a message %.40r", self._peer, message.name)
            case _:
                raise RemoteError(f"{type(message).__name__} from the side that asks")

    async def _begin(self, request: MuxRequest, nursery: trio.Nursery) -> None:
        """Start a request, or say at once why not."""
        if request.request_id in self._under_way:
            raise RemoteError(f"the request {request.request_id} is under way already")
        refusal = self._refusal(request)
        if refusal is None:
            try:
                self._account.add(len(request.body))
            except RemoteError as e:
                refusal = 503, str(e)
        if refusal is not None:
            status, text = refusal
            body = text.encode("utf-8", "backslashreplace")
            await self._send(MuxResponse(request_id=request.request_id, status=status, body=body))
            return
        self._under_way.add(request.request_id)
        self._service.begin(self._peer)
        # the frame that the body is a part of goes
        nursery.start_soon(self._answer, request.request_id, request.lease_id, self._asked(request))

    def _asked(self, request: MuxRequest) -> tuple[str, str, bytes]:
        return request.method, request.path, bytes(request.body)

    def _refusal(self, request: MuxRequest) -> tuple[int, str] | None:
        service, peer = self._service, self._peer
        if request.lease_id is not None and not self._places.keep(peer, request.lease_id):
            return STALE_LEASE, f"the lease {request.lease_id} is unknown or has ended: ask for another"
        if len(request.body) > service.endpoint.body_bytes:
            return (
                413,
                f"bodies may have {service.endpoint.body_bytes} bytes, this one has {len(request.body)}",
            )
        try:
            service.endpoint.check(request.method, request.path)
        except Refusal as e:
            return 403, e.text
        if service.running[peer] >= service.endpoint.requests_per_peer:
            return 429, f"{service.endpoint.requests_per_peer} of your requests run: wait for one of them"
        if not self._places.may_begin(peer, service):
            return 503, f"all places are taken or leased: try again in {self._places.retry_after} s"
        return None

    async def _answer(self, request_id: int, lease_id: int | None, asked: tuple[str, str, bytes]) -> None:
        try:
            status, content = await self._service.ask(self._peer, *asked)
        finally:
            self._service.end(self._peer)
            self._account.drop(len(asked[2]))
        if lease_id is not None:
            self._places.keep(self._peer, lease_id)
        try:
            self._account.add(len(content))  # a peer that reads no answers holds them in memory
            await self._send(MuxResponse(request_id=request_id, status=status, body=content))
            self._account.drop(len(content))
        finally:
            self._under_way.discard(request_id)
        self._heard()

    async def _send(self, message: MuxMessage) -> None:
        frame = encode_frame(message)
        async with self._writing:
            with trio.move_on_after(defaults.SEND_SECONDS) as limit:
                await self._stream.write(frame)
        if limit.cancelled_caught:
            raise StreamClosed(f"{self._peer} reads nothing of its answers")
