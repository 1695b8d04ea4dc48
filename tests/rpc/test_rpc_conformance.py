"""What every pair of peers must agree on; runs over memory and over two real hosts.

The same behaviour is checked against a stock Hivemind peer in tests/interop.
"""

from __future__ import annotations

import pytest
import trio
import trio.testing
from rpc_pairs import memory_pair

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import (
    DeadlineExceeded,
    HandlerError,
    NetworkError,
    ProtocolNotSupported,
    Refusal,
    RemoteError,
    StreamClosed,
    StreamReset,
)
from kwaainet_bridge.net.memory import MemoryHost
from kwaainet_bridge.rpc import RpcClient, RpcServer, streaming, unary
from kwaainet_bridge.rpc.budget import ReceiveBudget
from kwaainet_bridge.wire import envelope, frames
from kwaainet_bridge.wire.pb.expert_pb2 import ExpertRequest, ExpertResponse
from kwaainet_bridge.wire.peer_id import PeerId

CALL = unary("Test.unary", ExpertRequest, ExpertResponse)
TALK = streaming("Test.stream", ExpertRequest, ExpertResponse)


def request(text: str) -> ExpertRequest:
    return ExpertRequest(uid=text)


def answer(data: bytes) -> ExpertResponse:
    return ExpertResponse(metadata=data)


async def echo(request, context):
    return answer(request.uid.encode())


async def echo_all(call):
    async for item in call:
        await call.send(answer(item.uid.encode()))


async def read_all(stream):
    while await stream.read(defaults.MIB):
        pass


class Watched:
    """A handler that waits for ever and tells when it starts and is cancelled."""

    def __init__(self):
        self.started = trio.Event()
        self.cancelled = trio.Event()

    async def __call__(self, *_args):
        self.started.set()
        try:
            await trio.sleep_forever()
        finally:
            self.cancelled.set()


# --- unary ---------------------------------------------------------------------------------------------------


async def test_unary_answers(pair):
    pair.server.mount(CALL, echo)
    for text in ("", "a", "x" * 100_000):
        response = await pair.client.call(pair.peer, CALL, request(text), timeout=10)
        assert response.metadata == text.encode()


async def test_handler_sees_the_authenticated_peer(pair):
    async def who(request, context):
        return answer(str(context.peer).encode())

    pair.server.mount(CALL, who)
    response = await pair.client.call(pair.peer, CALL, request(""), timeout=10)
    assert response.metadata.decode() == str(pair.client_host.peer_id)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (Refusal("no such block", kind="KeyError"), "KeyError('no such block')"),
        (Refusal("Remote peer does not serve x.0"), "RuntimeError('Remote peer does not serve x.0')"),
        (ValueError("boom"), "ValueError('boom')"),
    ],
)
async def test_unary_errors_carry_the_stock_text(pair, error, text):
    async def fail(request, context):
        raise error

    pair.server.mount(CALL, fail)
    with pytest.raises(HandlerError) as caught:
        await pair.client.call(pair.peer, CALL, request(""), timeout=10)
    assert caught.value.text == text


async def test_unknown_method_is_told_apart(pair):
    with pytest.raises(ProtocolNotSupported, match=r"Test\.unary"):
        await pair.client.call(pair.peer, CALL, request(""), timeout=10)


async def test_deadline_cancels_the_handler(pair):
    handler = Watched()
    pair.server.mount(CALL, handler)
    with pytest.raises(DeadlineExceeded, match=r"Test\.unary"):
        await pair.client.call(pair.peer, CALL, request(""), timeout=0.3)
    with trio.fail_after(5):
        await handler.cancelled.wait()


async def test_caller_that_leaves_cancels_the_handler(pair):
    handler = Watched()
    pair.server.mount(CALL, handler)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: pair.client.call(pair.peer, CALL, request(""), timeout=60))
        await handler.started.wait()
        nursery.cancel_scope.cancel()
    with trio.fail_after(5):
        await handler.cancelled.wait()


async def test_oversized_request_is_refused_before_sending(pair):
    pair.server.mount(CALL, echo)
    with pytest.raises(ValueError, match="streaming"):
        await pair.client.call(
            pair.peer, CALL, ExpertRequest(metadata=bytes(defaults.MAX_UNARY_BYTES)), timeout=10
        )


async def test_oversized_response_becomes_an_error(pair):
    async def large(request, context):
        return answer(bytes(defaults.MAX_UNARY_BYTES))

    pair.server.mount(CALL, large)
    with pytest.raises(HandlerError, match="exceeds the message size limit"):
        await pair.client.call(pair.peer, CALL, request(""), timeout=10)


async def test_many_calls_at_once(pair):
    pair.server.mount(CALL, echo)
    seen = []

    async def one(i):
        response = await pair.client.call(pair.peer, CALL, request(str(i)), timeout=30)
        seen.append((i, response.metadata.decode()))

    async with trio.open_nursery() as nursery:
        for i in range(100):
            nursery.start_soon(one, i)
    assert sorted(seen) == [(i, str(i)) for i in range(100)]


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 11,  # an endless length
        b"\xff\xff\xff\x7f",  # 256 MiB announced
        b"\x03abc",  # no envelope
        envelope.encode_call(bytes(16), b"", "Other.method", b""),
        b"\x23\x0a\x0f" + bytes(15) + b"\x1a\x10\x0a\x00\x12\x0aTest.unary\x1a\x00",  # a call id of 15 bytes
        envelope.encode_answer(bytes(16), b""),
    ],
)
async def test_bad_unary_bytes_end_their_own_stream_only(pair, data):
    pair.server.mount(CALL, echo)
    stream = await pair.client_host.open_stream(pair.peer, CALL.name)
    with trio.fail_after(10):
        try:
            await stream.write(data)
            assert await stream.read(100) == b""
        except StreamReset:
            pass
    await stream.reset()
    assert (await pair.client.call(pair.peer, CALL, request("on"), timeout=10)).metadata == b"on"


async def test_undecodable_request_is_answered(pair):
    pair.server.mount(CALL, echo)
    stream = await pair.client_host.open_stream(pair.peer, CALL.name)
    await stream.write(envelope.encode_call(bytes(16), b"", CALL.name, b"\xff\xff"))
    body = envelope.DelimitedDecoder(1000).feed(await stream.read(1000))[0]
    assert "ExpertRequest" in envelope.decode_answer(body).error
    await stream.close()


@pytest.mark.parametrize("data", [b"", b"\x05ab"])
async def test_answer_that_never_comes_whole(pair, data):
    async def rude(stream):
        await stream.read(1000)
        await stream.write(data)

    pair.server_host.serve(CALL.name, rude)
    with pytest.raises((StreamClosed, RemoteError)):
        await pair.client.call(pair.peer, CALL, request(""), timeout=10)


async def test_answer_without_content(pair):
    async def hollow(stream):
        await stream.read(1000)
        await stream.write(b"\x14\x0a\x10" + bytes(16) + b"\x22\x00")

    pair.server_host.serve(CALL.name, hollow)
    with pytest.raises(RemoteError, match="neither"):
        await pair.client.call(pair.peer, CALL, request(""), timeout=10)


# --- streaming -----------------------------------------------------------------------------------------------


async def test_stream_echoes_in_both_directions(pair):
    pair.server.mount_stream(TALK, echo_all)
    async with pair.client.stream(pair.peer, TALK, open_timeout=10) as call:
        for i in range(50):
            await call.send(request(str(i)))
            assert (await call.receive()).metadata == str(i).encode()
        await call.end()
        with pytest.raises(trio.EndOfChannel):
            await call.receive()


async def test_large_frames_pass(pair):
    pair.server.mount_stream(TALK, echo_all)
    text = "x" * (6 * defaults.MIB)
    async with pair.client.stream(pair.peer, TALK, open_timeout=10) as call:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call.send, request(text))
            assert len((await call.receive(timeout=60)).metadata) == len(text)
        await call.end()
        assert [r async for r in call] == []


async def test_stream_error_after_one_item(pair):
    async def fail(call):
        await call.send(answer(b"first"))
        raise Refusal("adapter zzz not found", kind="KeyError")

    pair.server.mount_stream(TALK, fail)
    async with pair.client.stream(pair.peer, TALK, open_timeout=10) as call:
        assert (await call.receive()).metadata == b"first"
        with pytest.raises(HandlerError) as caught:
            await call.receive()
    assert caught.value.text == "'adapter zzz not found'"


async def test_server_reads_on_until_the_end_of_stream(pair):
    """Stock clients deadlock when the server closes while they still write."""
    done = trio.Event()

    async def one_and_done(call):
        await call.receive()
        done.set()

    pair.server.mount_stream(TALK, one_and_done)
    stream = await pair.client_host.open_stream(pair.peer, TALK.name)
    await stream.write(frames.encode_message(b""))
    await done.wait()
    with trio.move_on_after(0.2) as waiting:
        await stream.read(10)
    assert waiting.cancelled_caught  # the server has not closed
    await stream.write(frames.encode_end())
    with trio.fail_after(5):
        assert await stream.read(10) == b""
    await stream.close()


async def test_grace_for_a_silent_caller_is_limited(autojump_clock):
    async def done(call):
        pass

    async with memory_pair() as pair:
        pair.server.mount_stream(TALK, done)
        stream = await pair.client_host.open_stream(pair.peer, TALK.name)
        began = trio.current_time()
        assert await stream.read(10) == b""
        assert trio.current_time() - began == pytest.approx(defaults.CLOSE_GRACE_SECONDS)


async def test_silent_opener_of_a_unary_call_is_dropped(autojump_clock):
    async with memory_pair() as pair:
        pair.server.mount(CALL, echo)
        stream = await pair.client_host.open_stream(pair.peer, CALL.name)
        with pytest.raises(StreamReset):
            await stream.read(10)
        assert trio.current_time() >= defaults.FIRST_REQUEST_SECONDS


@pytest.mark.parametrize("leave", ["close", "reset"])
async def test_caller_that_closes_cancels_the_stream_handler(pair, leave):
    handler = Watched()
    pair.server.mount_stream(TALK, handler)
    stream = await pair.client_host.open_stream(pair.peer, TALK.name)
    await stream.write(frames.encode_message(b"") + frames.encode_end())
    await handler.started.wait()
    await getattr(stream, leave)()
    with trio.fail_after(5):
        await handler.cancelled.wait()


@pytest.mark.parametrize(
    "data", [b"\x07" + bytes(8), b"\x00" + b"\xff" * 8, b"\x00" + bytes(7) + b"\x02\xff\xff"]
)
async def test_bad_frames_cancel_their_handler_only(pair, data):
    handler = Watched()
    pair.server.mount_stream(TALK, handler)
    pair.server.mount(CALL, echo)
    stream = await pair.client_host.open_stream(pair.peer, TALK.name)
    await stream.write(frames.encode_message(b""))
    await handler.started.wait()
    await stream.write(data)
    with trio.fail_after(5):
        await handler.cancelled.wait()
    await stream.reset()
    assert (await pair.client.call(pair.peer, CALL, request("on"), timeout=10)).metadata == b"on"


async def test_frames_after_the_end_are_ignored(pair):
    pair.server.mount_stream(TALK, echo_all)
    stream = await pair.client_host.open_stream(pair.peer, TALK.name)
    await stream.write(frames.encode_end() + frames.encode_message(b"\x0a\x01a"))
    with trio.fail_after(5):
        assert await stream.read(10) == b""
    await stream.close()


async def test_answer_cut_inside_a_frame_is_no_end(pair):
    async def cut(stream):
        await stream.write(frames.encode_message(b"abc")[:-1])

    pair.server_host.serve(TALK.name, cut)
    async with pair.client.stream(pair.peer, TALK, open_timeout=10) as call:
        with pytest.raises(RemoteError):
            await call.receive(timeout=10)


async def test_reset_between_frames_counts_as_the_end(pair):
    """The Go daemon ends some finished streams by a reset."""

    async def abrupt(stream):
        await stream.write(frames.encode_message(answer(b"all").SerializeToString()))
        await stream.reset()

    pair.server_host.serve(TALK.name, abrupt)
    async with pair.client.stream(pair.peer, TALK, open_timeout=10) as call:
        received = [r.metadata async for r in call]
    assert received in ([b"all"], [])  # a reset may overtake the data, but it never truncates a message


async def test_receive_deadline(pair):
    pair.server.mount_stream(TALK, Watched())
    with pytest.raises(DeadlineExceeded, match=r"Test\.stream"):
        async with pair.client.stream(pair.peer, TALK, open_timeout=10) as call:
            await call.receive(timeout=0.1)


async def test_read_ahead_is_bounded(pair):
    """A handler that does not read makes the caller wait; nothing is buffered without limit."""
    handler = Watched()
    pair.server.mount_stream(TALK, handler)
    sent = 0
    async with trio.open_nursery() as nursery:

        async def flood():
            nonlocal sent
            async with pair.client.stream(pair.peer, TALK, open_timeout=10) as call:
                while True:
                    await call.send(request("x" * defaults.MIB))
                    sent += 1

        nursery.start_soon(flood)
        await handler.started.wait()
        with trio.move_on_after(1):
            await trio.sleep_forever()
        nursery.cancel_scope.cancel()
    # read-ahead, one frame in the decoder, and what both muxers' windows hold
    assert sent < defaults.READ_AHEAD_MESSAGES + 40


async def test_offered_requests_join_the_line(pair):
    calls = []
    ready = trio.Event()

    async def collect(call):
        calls.append(call)
        ready.set()
        await echo_all(call)

    pair.server.mount_stream(TALK, collect)
    async with pair.client.stream(pair.peer, TALK, open_timeout=10) as call:
        await ready.wait()
        assert calls[0].offer(request("pushed"))
        assert (await call.receive()).metadata == b"pushed"
        await call.end()
        assert [r async for r in call] == []
    assert not calls[0].offer(request("late"))


async def test_unmounted_method_is_refused(pair):
    pair.server.mount(CALL, echo)
    pair.server.unmount(CALL)
    with pytest.raises(ProtocolNotSupported):
        await pair.client.call(pair.peer, CALL, request(""), timeout=10)


async def test_no_answer_from_a_peer_that_is_gone(pair):
    nobody = PeerId(bytes([0x12, 0x20]) + bytes([9] * 32))
    with pytest.raises(NetworkError):
        await pair.client.call(nobody, CALL, request(""), timeout=10)


async def test_caller_that_does_not_read_is_dropped(autojump_clock):
    async def large(request, context):
        return answer(bytes(defaults.MIB))

    async def endless(call):
        while True:
            await call.send(answer(bytes(defaults.MIB)))

    async with memory_pair() as pair:
        pair.server.mount(CALL, large)
        pair.server.mount_stream(TALK, endless)
        for method, data in (
            (CALL, envelope.encode_call(bytes(16), b"", CALL.name, b"")),
            (TALK, frames.encode_message(b"")),
        ):
            stream = await pair.client_host.open_stream(pair.peer, method.name)
            await stream.write(data)
            await trio.sleep(defaults.SEND_SECONDS + 1)
            with pytest.raises(StreamReset):
                await read_all(stream)


async def test_departure_is_noticed_while_the_queue_is_full(pair):
    handler = Watched()
    pair.server.mount_stream(TALK, handler)
    stream = await pair.client_host.open_stream(pair.peer, TALK.name)
    await stream.write(frames.encode_message(b"") * (defaults.READ_AHEAD_MESSAGES + 3))
    await handler.started.wait()
    await stream.reset()
    with trio.fail_after(5):
        await handler.cancelled.wait()


async def test_long_messages_are_refused_by_their_header(pair):
    handler = Watched()
    pair.server.mount_stream(TALK, handler, max_message_bytes=1000)
    stream = await pair.client_host.open_stream(pair.peer, TALK.name)
    await handler.started.wait()
    await stream.write(b"\x00" + (1001).to_bytes(8, "big"))
    with trio.fail_after(5):
        await handler.cancelled.wait()
    await stream.reset()


async def test_error_text_has_a_limit(pair):
    async def fail(request, context):
        raise Refusal("x" * 10_000_000)

    pair.server.mount(CALL, fail)
    with pytest.raises(HandlerError) as caught:
        await pair.client.call(pair.peer, CALL, request(""), timeout=10)
    assert len(caught.value.text) == defaults.MAX_ERROR_CHARACTERS


async def test_a_peer_has_a_budget_of_waiting_bytes():
    """Its calls beyond that are cut off; other peers, and itself later, are served."""
    async with memory_pair() as pair:
        budget = ReceiveBudget(per_peer=3_000_000, in_all=10_000_000)
        server = RpcServer(pair.server_host, budget=budget)
        handler = Watched()
        server.mount_stream(TALK, handler)
        server.mount(CALL, echo)
        streams = [await pair.client_host.open_stream(pair.peer, TALK.name) for _ in range(4)]
        message = frames.encode_message(ExpertRequest(metadata=bytes(1_000_000)).SerializeToString())
        cut = 0
        for stream in streams:
            with trio.move_on_after(1):
                try:
                    await stream.write(message)
                    await trio.testing.wait_all_tasks_blocked()
                    await stream.write(b"")
                except StreamReset:
                    cut += 1
        assert cut == 2
        assert 0 < budget.held <= 3_000_000
        with pytest.raises(NetworkError):
            await pair.client.call(pair.peer, CALL, request("x" * 1_000_000), timeout=5)
        other = RpcClient(
            MemoryHost(pair.server_host._network, PeerId(bytes([0x12, 0x20]) + bytes([7] * 32)))
        )
        assert (
            len((await other.call(pair.peer, CALL, request("x" * 1_000_000), timeout=5)).metadata)
            == 1_000_000
        )
        for stream in streams:
            await stream.reset()
        await trio.testing.wait_all_tasks_blocked()
        assert budget.held == 0
        await pair.client.call(pair.peer, CALL, request("x" * 1_000_000), timeout=5)
        assert budget.held == 0


async def test_offered_requests_are_on_the_budget_of_their_call():
    async with memory_pair() as pair:
        budget = ReceiveBudget(per_peer=3_000_000, in_all=10_000_000)
        server = RpcServer(pair.server_host, budget=budget)
        calls = []

        async def wait_then_read(call):
            calls.append(call)
            await read.wait()
            await call.receive()
            await call.receive()
            await trio.sleep_forever()

        read = trio.Event()
        server.mount_stream(TALK, wait_then_read)
        async with pair.client.stream(pair.peer, TALK, open_timeout=10):
            await trio.testing.wait_all_tasks_blocked()
            offers = [calls[0].offer(request("x" * 900_000)) for _ in range(4)]
            assert offers == [True, True, True, False]
            assert 2_000_000 < budget.held < 3_000_000
            read.set()
            await trio.testing.wait_all_tasks_blocked()
            assert 1_800_000 < budget.held < 2_000_000  # what the handler has and what waits
        await trio.testing.wait_all_tasks_blocked()
        assert budget.held == 0
