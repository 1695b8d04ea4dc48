"""Messages of relays and of hole punching, byte by byte."""

from __future__ import annotations

import pytest

from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.circuit import (
    CircuitLimit,
    HopMessage,
    HopType,
    PunchMessage,
    PunchType,
    Status,
    StopMessage,
    StopType,
    decode_hop,
    decode_punch,
    decode_stop,
    encode_hop,
    encode_punch,
    encode_stop,
    status_name,
)
from kwaainet_bridge.wire.peer_id import PeerId

PEER = PeerId(b"\x12\x20" + bytes(range(32)))
ADDRESS = bytes.fromhex("0405050505060fa1")

HOPS = [
    (HopMessage(HopType.RESERVE), "02 0800"),  # zero is written: go-libp2p writes it, too
    (HopMessage(HopType.CONNECT, peer=PEER), "28 0801 1224 0a22" + PEER.raw.hex()),
    (
        HopMessage(
            HopType.STATUS,
            status=Status.OK,
            expires=1_700_000_000,
            addresses=(ADDRESS,),
            limit=CircuitLimit(120, 131072),
        ),
        "1e 0802 1a10 0880e2cfaa06 1208" + ADDRESS.hex() + "2206 0878 10808008 2864",
    ),
    (HopMessage(HopType.STATUS, status=Status.NO_RESERVATION), "05 0802 28cc01"),
]
STOPS = [
    (
        StopMessage(StopType.CONNECT, peer=PEER, limit=CircuitLimit(1800, 1 << 32)),
        "33 0800 1224 0a22" + PEER.raw.hex() + "1a09 08880e 108080808010",
    ),
    (StopMessage(StopType.STATUS, status=Status.OK), "04 0801 2064"),
]
PUNCHES = [
    (PunchMessage(PunchType.CONNECT, (ADDRESS,)), "0c 0864 1208" + ADDRESS.hex()),
    (PunchMessage(PunchType.SYNC), "03 08ac02"),
]


@pytest.mark.parametrize(("message", "expected"), HOPS)
def test_hop(message: HopMessage, expected: str) -> None:
    wire = bytes.fromhex(expected)
    assert encode_hop(message) == wire
    assert decode_hop(wire[1:]) == message


@pytest.mark.parametrize(("message", "expected"), STOPS)
def test_stop(message: StopMessage, expected: str) -> None:
    wire = bytes.fromhex(expected)
    assert encode_stop(message) == wire
    assert decode_stop(wire[1:]) == message


@pytest.mark.parametrize(("message", "expected"), PUNCHES)
def test_punch(message: PunchMessage, expected: str) -> None:
    wire = bytes.fromhex(expected)
    assert encode_punch(PunchType(message.type), message.addresses) == wire
    assert decode_punch(wire[1:]) == message


@pytest.mark.parametrize("decode", [decode_hop, decode_stop, decode_punch])
@pytest.mark.parametrize("data", ["", "ff", "0a", "12020a00"])
def test_malformed(decode, data: str) -> None:
    """Cut, garbage, or without a type: hole punching has no default, and zero is a request."""
    with pytest.raises(RemoteError, match=r"relay|hole punch"):
        decode(bytes.fromhex(data))


def test_a_peer_that_is_none_is_refused() -> None:
    with pytest.raises(RemoteError):
        decode_hop(bytes.fromhex("0801 1202 0a00"))


def test_types_of_later_versions_are_read() -> None:
    assert decode_hop(bytes.fromhex("0807")).type == 7
    assert decode_hop(bytes.fromhex("0802 28e707")).status == 999


def test_statuses_are_told_in_words() -> None:
    assert [status_name(status) for status in (100, 999, None)] == ["OK", "status 999", "no status"]
