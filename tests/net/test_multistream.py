# ruff: noqa: ARG002 - pretend classes keep the arguments of what they stand for
"""Protocol negotiation over streams in memory."""

from __future__ import annotations

import pytest
import trio

from kwaainet_bridge.errors import ProtocolNotSupported, RemoteError, StreamReset
from kwaainet_bridge.net import multistream

HEADER = b"\x13/multistream/1.0.0\n"


class Channel:
    """One end of a conversation; ``pieces`` is what the peer sends, ``sent`` what we did."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = list(pieces)
        self.sent: list[bytes] = []

    async def receive_some(self, max_bytes: int) -> bytes:
        await trio.lowlevel.checkpoint()
        return self.pieces.pop(0) if self.pieces else b""

    async def send_all(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.sent.append(data)

    def unread(self, data: bytes) -> None:
        self.pieces.insert(0, data)


def serve(*protocols: str):
    return {protocol: protocol.upper() for protocol in protocols}.get


async def test_a_proposal_is_one_write() -> None:
    channel = Channel(HEADER + b"\x04a.b\nrest")
    await multistream.propose(channel, "a.b")
    assert channel.sent == [HEADER + b"\x04a.b\n"]
    assert channel.pieces == [b"rest"]


async def test_answers_that_come_one_by_one() -> None:
    pieces = [bytes([b]) for b in HEADER + b"\x04a.b\n"]
    await multistream.propose(Channel(*pieces), "a.b")


async def test_refused() -> None:
    with pytest.raises(ProtocolNotSupported, match=r"a\.b"):
        await multistream.propose(Channel(HEADER, b"\x03na\n"), "a.b")


@pytest.mark.parametrize("answer", [b"\x04x.y\n", b"\x00", b"\x04a.bX", b"\xff\xff\xff\x01"])
async def test_malformed_answers(answer: bytes) -> None:
    with pytest.raises(RemoteError, match=r"multistream|varint"):
        await multistream.propose(Channel(HEADER + answer), "a.b")


async def test_the_peer_leaves() -> None:
    for pieces in ([], [HEADER], [HEADER[:5]], [HEADER, b"\x04a"]):
        with pytest.raises(StreamReset, match="before a protocol was agreed"):
            await multistream.propose(Channel(*pieces), "a.b")


async def test_header_proposal_and_payload_in_one_packet() -> None:
    """As go-libp2p's lazy negotiation sends them."""
    channel = Channel(HEADER + b"\x04a.b\npayload")
    assert await multistream.answer(channel, serve("a.b")) == ("a.b", "A.B")
    assert channel.sent == [HEADER + b"\x04a.b\n"]
    assert channel.pieces == [b"payload"]


async def test_a_peer_that_waits_for_each_answer() -> None:
    channel = Channel(HEADER, b"\x04x.y\n", b"\x04a.b\n")
    assert await multistream.answer(channel, serve("a.b")) == ("a.b", "A.B")
    assert channel.sent == [HEADER, b"\x03na\n", b"\x04a.b\n"]


async def test_unknown_proposals_get_na() -> None:
    channel = Channel(HEADER + b"\x03ls\n\x04\xff\xfe\xfd\n\x04x.y\n\x04a.b\n")
    await multistream.answer(channel, serve("a.b"))
    assert b"".join(channel.sent) == HEADER + b"\x03na\n" * 3 + b"\x04a.b\n"


async def test_na_is_sent_before_a_payload_that_is_no_proposal() -> None:
    channel = Channel(HEADER + b"\x04x.y\n\xff\xff\xff\x7f")
    with pytest.raises(RemoteError):
        await multistream.answer(channel, serve("a.b"))
    assert channel.sent == [HEADER + b"\x03na\n"]


async def test_too_many_proposals() -> None:
    with pytest.raises(RemoteError, match="proposals"):
        await multistream.answer(Channel(HEADER + b"\x04x.y\n" * 100), serve("a.b"))


@pytest.mark.parametrize("start", [b"GET / HTTP/1.1\r\n", b"\x16\x03\x01", b"\x13/multistream/2.0.0\n"])
async def test_another_protocol_altogether_is_refused_at_once(start: bytes) -> None:
    with pytest.raises(RemoteError, match="something else"):
        await multistream.answer(Channel(start), serve("a.b"))
