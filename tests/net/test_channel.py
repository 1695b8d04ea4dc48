"""Framing of noise messages on a socket, with a cipher that only adds a tag."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from raw_sockets import take

from kwaainet_bridge.net.channel import ConnectionLost, SecureChannel
from kwaainet_bridge.wire.peer_id import PeerId

PEER = PeerId(b"\x12\x20" + bytes(32))
TAG = b"T" * 16
LARGEST = 65535 - len(TAG)


class TagOnly:
    """A cipher that leaves the text as it is."""

    def seal(self, plaintext: bytes | memoryview, into: memoryview) -> None:
        into[:] = bytes(plaintext) + TAG

    def open(self, ciphertext: memoryview) -> bytes:
        message = bytes(ciphertext)
        if not message.endswith(TAG):
            raise ValueError("no tag")
        return message[: -len(TAG)]


def message(data: bytes) -> bytes:
    return (len(data) + len(TAG)).to_bytes(2, "big") + data + TAG


async def sockets() -> tuple[trio.SocketStream, trio.SocketStream]:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        near = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        return near, await listener.accept()


def channel(stream: trio.SocketStream) -> SecureChannel:
    return SecureChannel(take(stream, initiator=True), PEER, outbound=TagOnly(), inbound=TagOnly())


async def receive(secure: SecureChannel, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunks = await secure.receive_chunks()
        assert chunks
        data += b"".join(chunks)
    return data


@pytest.mark.parametrize("cut", [1, 3, 17, 1000])
async def test_messages_cut_anywhere(cut: int) -> None:
    near, far = await sockets()
    async with near, far:
        secure = channel(near)
        sent = [b"first", b"", b"second" * 100]
        wire = b"".join(map(message, sent))
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                for start in range(0, len(wire), cut):
                    await far.send_all(wire[start : start + cut])
                    await trio.testing.wait_all_tasks_blocked()

            nursery.start_soon(send)
            assert await receive(secure, 605) == b"".join(sent)


async def test_connections_share_the_buffer_and_no_bytes() -> None:
    """Halves of messages of two connections arrive in turns."""
    pairs = [await sockets() for _ in range(2)]
    secured = [channel(near) for near, _ in pairs]
    payloads = [bytes([number]) * 40_000 for number in (1, 2)]
    async with pairs[0][0], pairs[0][1], pairs[1][0], pairs[1][1]:
        received = [b"", b""]

        async def read(number: int) -> None:
            received[number] = await receive(secured[number], 2 * 40_000)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, 0)
            nursery.start_soon(read, 1)
            for _ in range(2):
                for part in (slice(0, 20_000), slice(20_000, None)):
                    for number in (0, 1):
                        await pairs[number][1].send_all(message(payloads[number])[part])
                        await trio.testing.wait_all_tasks_blocked()
        assert received == [2 * payload for payload in payloads]


async def test_what_the_kernel_does_not_take_at_once() -> None:
    near, far = await sockets()
    async with near, far:
        payload = bytes(range(256)) * (40 << 10)  # 10 MiB
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel(near).send_all, payload)
            await trio.testing.wait_all_tasks_blocked()
            assert await receive(channel(far), len(payload)) == payload


async def test_messages_are_as_large_as_noise_allows() -> None:
    near, far = await sockets()
    async with near, far:
        await channel(near).send_all(b"x" * (LARGEST + 1))
        wire = b""
        while len(wire) < 2 + 65535 + 2 + 17:
            wire += await far.receive_some()
        assert wire == message(b"x" * LARGEST) + message(b"x")


async def test_the_end_between_messages_and_within_one() -> None:
    near, far = await sockets()
    async with near:
        secure = channel(near)
        async with far:
            await far.send_all(message(b"last"))
        assert await secure.receive_chunks() == [b"last"]
        assert await secure.receive_chunks() == []
    near, far = await sockets()
    async with near:
        secure = channel(near)
        async with far:
            await far.send_all(message(b"last")[:-1])
        with pytest.raises(ConnectionLost, match="within a noise message"):
            await secure.receive_chunks()


@pytest.mark.parametrize("wire", [b"\x00\x00", b"\x00\x05abcde", b"\x00\x14" + bytes(20)])
async def test_what_does_not_decrypt(wire: bytes) -> None:
    near, far = await sockets()
    async with near, far:
        await far.send_all(wire)
        with pytest.raises(ConnectionLost, match="does not decrypt"):
            await channel(near).receive_chunks()


async def test_closed_here_while_others_wait() -> None:
    near, far = await sockets()
    async with far:
        secure = channel(near)

        async def fails(call, *args) -> None:
            with pytest.raises(ConnectionLost, match="closed here"):
                await call(*args)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails, secure.receive_chunks)
            nursery.start_soon(fails, secure.send_all, bytes(10 << 20))
            await trio.testing.wait_all_tasks_blocked()
            secure.abort()
        await fails(secure.receive_chunks)
        await fails(secure.send_all, b"x")


async def test_a_peer_that_has_gone() -> None:
    near, far = await sockets()
    async with near:
        await far.aclose()
        secure = channel(near)

        async def send() -> None:
            while True:
                await secure.send_all(bytes(1 << 20))

        with pytest.raises(ConnectionLost, match="TCP"):
            await send()


async def test_a_cancelled_read_loses_nothing() -> None:
    near, far = await sockets()
    async with near, far:
        secure = channel(near)
        await far.send_all(message(b"whole")[:10])
        with trio.move_on_after(0.02):
            await secure.receive_chunks()
        await far.send_all(message(b"whole")[10:])
        assert await secure.receive_chunks() == [b"whole"]
