"""Measuring a connection: the numbers are of the bytes asked for, and nobody can ask for more than the limit."""

import struct

import pytest
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import ProtocolNotSupported, RemoteError, StreamReset
from kwaainet_bridge.net.perf import PERF, answer_measurement, measure

MEGABYTE = 10**6


async def test_both_ways(server, client):
    server.serve(PERF, answer_measurement)
    peer = await client.connect(server.addresses()[0])
    speed = await measure(client, peer, MEGABYTE + 1)
    assert speed.up > 0
    assert speed.down > 0


async def test_nobody_is_measured_without_asking_for_it(server, client):
    peer = await client.connect(server.addresses()[0])
    with pytest.raises(ProtocolNotSupported):
        await measure(client, peer, MEGABYTE)


async def test_more_than_the_limit_is_refused(server, client):
    server.serve(PERF, answer_measurement)
    peer = await client.connect(server.addresses()[0])
    stream = await client.open_stream(peer, PERF)
    await stream.write(struct.pack(">QQ", 0, defaults.MAX_MEASURED_BYTES + 1))
    with trio.fail_after(5), pytest.raises(StreamReset):
        await stream.read(8)


async def test_another_count_is_no_measurement(server, client):
    async def lie(stream):
        await stream.read(16)
        await stream.write(struct.pack(">Q", 7))
        await stream.wait_ended()

    server.serve(PERF, lie)
    peer = await client.connect(server.addresses()[0])
    with trio.fail_after(5), pytest.raises(RemoteError, match="says that 7 of 1000 bytes came"):
        await measure(client, peer, 1000)
