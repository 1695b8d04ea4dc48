"""HTTP requests of peers through a mux stream, to a real HTTP server on this machine."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from functools import partial

import msgpack
import pytest
import trio
import trio.testing
from kwaai_http import http_server
from kwaai_world import World, bare_server, peer

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import (
    CapacityDenied,
    DeadlineExceeded,
    ProtocolNotSupported,
    StreamClosed,
    StreamReset,
)
from kwaainet_bridge.kwaai.mux_client import open_mux
from kwaainet_bridge.kwaai.mux_endpoint import MuxEndpoint
from kwaainet_bridge.kwaai.server import KwaaiProtocols
from kwaainet_bridge.wire.kwaai_mux import (
    PROTOCOL,
    MuxDecoder,
    MuxLeaseResponse,
    MuxRequest,
    MuxResponse,
    encode_frame,
)

CHAT, MODELS = "/v1/chat/completions", "/v1/models"
PATHS = [CHAT, MODELS, "/v1/models/*"]


async def echo(asked):
    return 200, b"echo " + asked.body


@asynccontextmanager
async def tunnel(answer=echo, *, headers=None, **settings):
    """(world, KwaaiServer, its peer id, the HTTP server)."""
    async with http_server(answer, **(headers or {})) as http:
        endpoint = MuxEndpoint(url=http.url, paths=PATHS, **settings)
        async with bare_server(KwaaiProtocols(mux=endpoint)) as (world, server, address):
            yield world, server, address, http


def mux_to(world: World, address, number=100):
    return open_mux(world.host(number), address, open_timeout=5)


async def test_a_request_and_its_answer():
    async with tunnel() as (world, _server, address, http):
        async with mux_to(world, address) as mux:
            assert await mux.request("POST", CHAT, b'{"x":1}', timeout=5) == (200, b'echo {"x":1}')
            assert await mux.request("GET", MODELS, timeout=5) == (200, b"echo ")
        asked = http.asked[0]
        assert (asked.method, asked.path, asked.body) == ("POST", CHAT, b'{"x":1}')
        assert asked.headers["content-type"] == "application/json"
        assert asked.headers["host"] == http.url.removeprefix("http://")
        assert not {"cookie", "authorization", "x-forwarded-for"} & asked.headers.keys()
        assert "content-type" not in http.asked[1].headers


async def test_answers_come_in_the_order_in_which_they_are_ready():
    gates = {name: trio.Event() for name in "abc"}

    async def wait(asked):
        await gates[asked.body.decode()].wait()
        return 200, asked.body

    order = []
    async with tunnel(wait) as (world, _, address, _), mux_to(world, address) as mux:

        async def ask(name):
            assert await mux.request("POST", CHAT, name.encode(), timeout=10) == (200, name.encode())
            order.append(name)
            if name != "a":
                gates[chr(ord(name) - 1)].set()

        async with trio.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(ask, name)
            gates["c"].set()
    assert order == ["c", "b", "a"]


async def test_status_and_redirections_are_passed_on_and_not_followed():
    async def moved(asked):
        return 302, b"elsewhere"

    async with tunnel(moved, headers={"location": "http://127.0.0.1:1/secret"}) as (world, _, address, http):
        async with mux_to(world, address) as mux:
            assert await mux.request("GET", MODELS, timeout=5) == (302, b"elsewhere")
        assert len(http.asked) == 1


async def test_what_is_not_offered_never_leaves_this_node():
    async with tunnel() as (world, _, address, http):
        async with mux_to(world, address) as mux:
            status, text = await mux.request("GET", "/admin", timeout=5)
            assert (status, text) == (403, b"'/admin' is not offered here")
            for path in ("/v1/models/../../admin", "http://10.0.0.1/v1/models", "/v1/models?key=1"):
                assert (await mux.request("GET", path, timeout=5))[0] == 403
            assert (await mux.request("DELETE", MODELS, timeout=5))[0] == 403
        assert http.asked == []


async def test_bodies_are_bounded_both_ways():
    async def long(asked):
        return 200, bytes(2000)

    limits = {"body_bytes": 1000, "answer_bytes": 1999}
    async with tunnel(long, **limits) as (world, _, address, _), mux_to(world, address) as mux:
        assert await mux.request("POST", CHAT, bytes(1000), timeout=5) == (
            502,
            b"the answer is too long to be passed on",
        )
        status, text = await mux.request("POST", CHAT, bytes(1001), timeout=5)
        assert (status, text) == (413, b"bodies may have 1000 bytes, this one has 1001")
        with pytest.raises(StreamClosed):
            await mux.request("POST", CHAT, bytes(2000 + 16 * 1024 + 200), timeout=5)


async def test_an_endpoint_that_is_not_there_or_silent():
    endpoint = MuxEndpoint(url="http://127.0.0.1:1", paths=PATHS)
    async with (
        bare_server(KwaaiProtocols(mux=endpoint)) as (world, _, address),
        mux_to(world, address) as mux,
    ):
        status, text = await mux.request("GET", MODELS, timeout=5)
        assert (status, text) == (502, b"the server behind this node cannot be reached")

    async def silent(asked):
        await trio.sleep_forever()

    async with tunnel(silent, seconds=0.1) as (world, server, address, _):
        async with mux_to(world, address) as mux:
            assert (await mux.request("GET", MODELS, timeout=5))[0] == 504
        assert not server._mux.running


async def test_too_many_at_a_time():
    gate = trio.Event()

    async def wait(asked):
        await gate.wait()
        return 200, b""

    async with (
        tunnel(wait, requests=3, requests_per_peer=2) as (world, server, address, http),
        mux_to(world, address) as one,
        mux_to(world, address, 101) as two,
    ):
        async with trio.open_nursery() as nursery:
            for mux in (one, one, two):
                nursery.start_soon(partial(mux.request, "GET", MODELS, timeout=10))
            await http.wait_asked(3)
            status, text = await one.request("GET", MODELS, timeout=5)
            assert (status, text) == (429, b"2 of your requests run: wait for one of them")
            status, text = await two.request("GET", MODELS, timeout=5)
            assert (status, text) == (503, b"all places are taken or leased: try again in 5 s")
            gate.set()
        assert (await two.request("GET", MODELS, timeout=5))[0] == 200
        assert not server._mux.running


async def test_a_peer_that_leaves_takes_its_requests_and_leases_with_it():
    async def silent(asked):
        await trio.sleep_forever()

    async with tunnel(silent) as (world, server, address, http):
        with trio.move_on_after(0.2):
            async with mux_to(world, address) as mux:
                await mux.lease(timeout=5)
                assert len(server._places.leases) == 1
                await mux.request("GET", MODELS, timeout=10)
        with trio.fail_after(5):
            await http.dropped.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert not server._mux.running
        assert len(server._places.leases) == 0


async def test_a_request_that_is_given_up_harms_no_other():
    gate = trio.Event()

    async def wait(asked):
        if asked.body == b"slow":
            await gate.wait()
        return 200, asked.body

    async with tunnel(wait) as (world, _, address, _), mux_to(world, address) as mux:
        with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.1 s"):
            await mux.request("POST", CHAT, b"slow", timeout=0.1)
        gate.set()
        for number in range(20):
            body = b"%d" % number
            assert await mux.request("POST", CHAT, body, timeout=5) == (200, body)


# --- leases


async def test_leases_on_a_stream():
    async with tunnel(requests=2) as (world, _server, address, _), mux_to(world, address) as mux:
        lease = await mux.lease("any-name", timeout=5)
        assert lease.ttl_secs == 30
        assert (await mux.request("GET", MODELS, lease_id=lease.lease_id, timeout=5))[0] == 200
        with pytest.raises(CapacityDenied, match="ask again in 5 s"):
            await mux.lease(timeout=5)  # the other place is for others
        async with mux_to(world, address, 101) as other:
            theirs = await other.lease(timeout=5)
            status, text = await mux.request("GET", MODELS, lease_id=theirs.lease_id, timeout=5)
            assert status == 409
            assert text.decode() == f"the lease {theirs.lease_id} is unknown or has ended: ask for another"
        await mux.release(lease.lease_id)
        assert (await mux.request("GET", MODELS, lease_id=lease.lease_id, timeout=5))[0] == 409
        assert (await mux.request("GET", MODELS, timeout=5))[0] == 200  # none is needed


async def test_leases_end_and_are_kept(autojump_clock):
    endpoint = MuxEndpoint(url="http://127.0.0.1:1", paths=PATHS)
    async with (
        bare_server(KwaaiProtocols(mux=endpoint)) as (world, server, address),
        mux_to(world, address) as mux,
    ):
        lease = await mux.lease(timeout=5)
        for _ in range(5):
            await trio.sleep(20)
            await mux.keep(lease.lease_id)
        await trio.sleep(29)
        assert len(server._places.leases) == 1
        await trio.sleep(2)
        # the path is refused only after the lease was looked at
        assert (await mux.request("GET", "/no", lease_id=lease.lease_id, timeout=5))[0] == 409


async def test_a_lease_of_the_unary_protocol_is_as_good():
    async with tunnel() as (world, _, address, _), mux_to(world, address) as mux:
        lease = await world.client().lease(address)
        assert (await mux.request("GET", MODELS, lease_id=lease.lease_id, timeout=5))[0] == 200


# --- streams


async def test_no_peer_has_more_than_its_streams():
    async with tunnel() as (world, _server, address, _):
        limit = defaults.KWAAI_MUX_STREAMS_PER_PEER
        streams = [await world.host().open_stream(address, PROTOCOL) for _ in range(limit + 1)]
        with pytest.raises(StreamReset):
            await streams[-1].read(1)
        async with mux_to(world, address, 101) as mux:
            assert (await mux.request("GET", MODELS, timeout=5))[0] == 200
        await streams[0].close()
        await trio.testing.wait_all_tasks_blocked()
        async with mux_to(world, address) as mux:
            assert (await mux.request("GET", MODELS, timeout=5))[0] == 200


async def test_a_silent_stream_is_closed(autojump_clock):
    endpoint = MuxEndpoint(url="http://127.0.0.1:1", paths=PATHS)
    async with bare_server(KwaaiProtocols(mux=endpoint)) as (world, server, address):
        stream = await world.host().open_stream(address, PROTOCOL)
        start = trio.current_time()
        assert await stream.read(1) == b""
        assert trio.current_time() - start == pytest.approx(defaults.KWAAI_MUX_IDLE_SECONDS)
        assert server._mux._streams.used == 0


@pytest.mark.parametrize(
    "frame",
    [
        b"\xff\xff\xff\xff",
        b"\x01\x00\x00\x00\xc1",
        b"\x08\x00\x00\x00\xa7Request",
        encode_frame(MuxResponse(request_id=1, status=200)),
    ],
    ids=["length", "byte", "content", "response"],
)
async def test_what_is_no_request_ends_its_stream_alone(frame):
    async with tunnel() as (world, _server, address, _), mux_to(world, address, 101) as other:
        stream = await world.host().open_stream(address, PROTOCOL)
        await stream.write(frame)
        with pytest.raises(StreamReset), trio.fail_after(5):
            await stream.read(1)
        assert (await other.request("GET", MODELS, timeout=5))[0] == 200


async def test_the_same_number_twice_at_a_time_ends_the_stream():
    async def silent(asked):
        await trio.sleep_forever()

    async with tunnel(silent) as (world, server, address, _):
        stream = await world.host().open_stream(address, PROTOCOL)
        await stream.write(2 * encode_frame(MuxRequest(request_id=1, method="GET", path=MODELS)))
        with pytest.raises(StreamReset), trio.fail_after(5):
            await stream.read(1)
        assert not server._mux.running


async def test_rust_bytes_and_later_messages():
    async with tunnel() as (world, _, address, _):
        stream = await world.host().open_stream(address, PROTOCOL)

        async def send(message):
            packed = msgpack.packb(message)
            await stream.write(len(packed).to_bytes(4, "little") + packed)

        await send({"Farewell": {"why": "later versions"}})
        await send("Nudge")
        body = list(json.dumps({"model": "m"}).encode())
        fields = {"request_id": 2**63, "method": "POST", "path": CHAT, "body": body, "lease_id": None}
        await send({"Request": fields})
        await send({"LeaseRequest": {"request_id": 9, "model": None}})
        decoder, found = MuxDecoder(), []
        with trio.fail_after(5):
            while len(found) < 2:
                found += decoder.feed(await stream.read(1000))
        [lease] = [m for m in found if isinstance(m, MuxLeaseResponse)]
        [answer] = [m for m in found if isinstance(m, MuxResponse)]
        assert lease.request_id == 9
        assert (answer.request_id, answer.status) == (2**63, 200)
        assert bytes(answer.body) == b'echo {"model": "m"}'


async def test_memory_of_unfinished_frames_is_bounded(monkeypatch):
    monkeypatch.setattr(defaults, "KWAAI_MUX_PEER_BYTES", 300_000)
    monkeypatch.setattr(defaults, "KWAAI_MUX_BYTES", 600_000)
    async with tunnel() as (world, server, address, _):
        header = (4 << 20).to_bytes(4, "little")
        stream = await world.host().open_stream(address, PROTOCOL)
        with pytest.raises(StreamReset), trio.fail_after(5):
            await stream.write(header + bytes(2 << 20))
        assert server._mux._budget.held == 0


# --- the node


async def test_off_unless_configured():
    async with bare_server(KwaaiProtocols()) as (world, _, address):
        with pytest.raises(ProtocolNotSupported):
            async with mux_to(world, address):
                pass


async def test_draining_lets_requests_end():
    gate = trio.Event()

    async def wait(asked):
        await gate.wait()
        return 200, b"late"

    async with tunnel(wait) as (world, server, address, http), mux_to(world, address) as mux:
        answers = []

        async def ask():
            answers.append(await mux.request("GET", MODELS, timeout=10))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await http.wait_asked(1)
            with trio.move_on_after(0.05) as first:
                await server.drain()
            assert first.cancelled_caught
            assert (await mux.request("GET", MODELS, timeout=5))[0] == 503
            with pytest.raises(CapacityDenied):
                await mux.lease(timeout=5)
            gate.set()
            with trio.fail_after(5):
                assert await server.drain() == 0
        assert answers == [(200, b"late")]


async def test_a_server_that_breaks_the_protocol_fails_all_who_wait():
    async with trio.open_nursery() as nursery:
        from kwaainet_bridge.net.memory import MemoryNetwork

        world = World(MemoryNetwork(nursery))

        async def bad(stream):
            await stream.read(1000)
            await stream.write(b"\x01\x00\x00\x00\xc1")
            await trio.sleep_forever()

        world.network.host(peer(1)).serve(PROTOCOL, bad)
        async with mux_to(world, peer(1)) as mux:
            with pytest.raises(StreamClosed, match="the message is"):
                await mux.request("GET", MODELS, timeout=5)
            with pytest.raises(StreamClosed, match="the message is"):
                await mux.lease(timeout=5)
        nursery.cancel_scope.cancel()
