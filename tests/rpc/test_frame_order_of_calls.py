"""A streaming method says in which order its frames have marker and length; both ends keep to it."""

from __future__ import annotations

import pytest
import trio
from rpc_pairs import memory_pair

from kwaainet_bridge.errors import HandlerError, Refusal, RemoteError, StreamReset
from kwaainet_bridge.rpc import streaming
from kwaainet_bridge.wire.frames import LENGTH_FIRST, MARKER_FIRST
from kwaainet_bridge.wire.pb.expert_pb2 import ExpertRequest, ExpertResponse

TALK = streaming("/kwaai/test/1.0.0", ExpertRequest, ExpertResponse, order=LENGTH_FIRST)
HIVEMINDS = streaming(TALK.name, ExpertRequest, ExpertResponse)


async def echo_all(call):
    async for each in call:
        if each.uid == "fail":
            raise Refusal("no such block")
        await call.send(ExpertResponse(metadata=each.uid.encode()))


def test_the_order_is_hiveminds_unless_told_otherwise():
    assert HIVEMINDS.order is MARKER_FIRST
    assert TALK.under("run").order is LENGTH_FIRST


async def test_messages_ends_and_errors_of_a_length_first_method(pair):
    pair.server.mount_stream(TALK, echo_all)
    async with pair.client.stream(pair.peer, TALK, open_timeout=10) as call:
        # of 200, 256 and 257 bytes: headers of each kind, as a reader of the other order sees them
        for length in (197, 253, 254):
            await call.send(ExpertRequest(uid="x" * length))
            assert len((await call.receive()).metadata) == length
        await call.end()
        assert [each async for each in call] == []
    async with pair.client.stream(pair.peer, TALK, open_timeout=10) as call:
        await call.send(ExpertRequest(uid="fail"))
        with pytest.raises(HandlerError, match="no such block"):
            await call.receive()


async def test_the_bytes_on_the_stream():
    async with memory_pair() as pair:
        pair.server.mount_stream(TALK, echo_all)
        stream = await pair.client_host.open_stream(pair.peer, TALK.name)
        await stream.write(bytes.fromhex("0000000000000003" + "00" + "0a0161" + "0000000000000000" + "01"))
        received = b""
        while data := await stream.read(100):
            received += data
        assert received.hex() == "0000000000000003" + "00" + "1a0161"
        await stream.close()


# The other way round nothing tells: a frame of n bytes passes for one of 256 * n, see wire/frames.py.


async def test_a_caller_in_hiveminds_order_is_reset(pair):
    pair.server.mount_stream(TALK, echo_all)
    with trio.fail_after(10):
        async with pair.client.stream(pair.peer, HIVEMINDS, open_timeout=10) as call:
            await call.send(ExpertRequest(uid="some text"))
            with pytest.raises(trio.EndOfChannel):  # a reset between frames
                await call.receive()


async def test_an_answer_in_hiveminds_order_is_refused(pair):
    async def answer(stream):
        message = ExpertResponse(metadata=b"some text").SerializeToString()
        await stream.write(MARKER_FIRST.encode_message(message))
        await trio.sleep_forever()

    pair.server_host.serve(TALK.name, answer)
    async with pair.client.stream(pair.peer, TALK, open_timeout=10) as call:
        with pytest.raises(RemoteError, match="does the peer write that order"):
            await call.receive(timeout=10)


async def test_answers_longer_than_the_caller_allows_are_refused(pair):
    pair.server.mount_stream(TALK, echo_all)
    async with pair.client.stream(pair.peer, TALK, open_timeout=10, max_message_bytes=100) as call:
        await call.send(ExpertRequest(uid="x" * 98))
        assert len((await call.receive(timeout=10)).metadata) == 98
        await call.send(ExpertRequest(uid="x" * 99))
        with pytest.raises(RemoteError, match="101 bytes announced, at most 100"):
            await call.receive(timeout=10)


async def test_requests_longer_than_the_server_allows_are_reset(pair):
    pair.server.mount_stream(TALK, echo_all, max_message_bytes=100)
    stream = await pair.client_host.open_stream(pair.peer, TALK.name)
    await stream.write(LENGTH_FIRST.encode_header(0, 101))
    with trio.fail_after(10), pytest.raises(StreamReset):
        await stream.read(10)
