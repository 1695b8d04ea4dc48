from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_feeding import QUICK, cut, cuts, outcome
from wire_golden import FRAMES

from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire import frames
from kwaainet_bridge.wire.frames import END_OR_ERROR, MESSAGE, Frame, FrameDecoder


def test_golden_encode():
    assert frames.encode_message(bytes.fromhex("08ac02")) == FRAMES["stream_message"]
    assert frames.encode_error("boom") == FRAMES["stream_error"]
    assert frames.encode_end() == FRAMES["stream_end"]


def test_golden_decode():
    decoder = FrameDecoder(1024)
    got = decoder.feed(FRAMES["stream_message"] + FRAMES["stream_end"] + FRAMES["stream_error"])
    assert got == [
        Frame(MESSAGE, bytes.fromhex("08ac02")),
        Frame(END_OR_ERROR, b""),
        Frame(END_OR_ERROR, bytes.fromhex("0a04626f6f6d")),
    ]
    assert got[1].error_text == ""
    assert got[2].error_text == "boom"
    decoder.finish()


def test_captured_request_stream():
    """Three numbers (1, 300, 0) and the end, as a stock client writes them; proto3 zero is an empty payload."""
    stream = bytes.fromhex(
        "00 0000000000000002 0801  00 0000000000000003 08ac02  00 0000000000000000  01 0000000000000000"
    )
    got = FrameDecoder(16).feed(stream)
    assert [(f.marker, f.payload.hex()) for f in got] == [(0, "0801"), (0, "08ac02"), (0, ""), (1, "")]


def test_empty_message_completes_without_more_bytes():
    assert FrameDecoder(0).feed(bytes(9)) == [Frame(MESSAGE, b"")]


def test_surrogates_do_not_break_the_answer():
    frame = FrameDecoder(1024).feed(frames.encode_error("bad \udc80 name"))[0]
    assert frame.error_text == "bad \\udc80 name"


@pytest.mark.parametrize("payload", [b"\xff\xff", b"\x0a\x02\xff\xfe", b"\x0a\x7fshort"])
def test_error_payload_that_does_not_decode(payload):
    with pytest.raises(RemoteError, match=r"stream error frame: (message|payload)"):
        Frame(END_OR_ERROR, payload).error_text  # noqa: B018 - it raises


def test_unknown_marker_is_refused_at_once():
    with pytest.raises(RemoteError, match="marker 2"):
        FrameDecoder(1024).feed(b"\x02")


def test_length_is_refused_before_the_payload():
    decoder = FrameDecoder(1024)
    with pytest.raises(RemoteError, match="1025 bytes announced, at most 1024"):
        decoder.feed(b"\x00" + (1025).to_bytes(8, "big"))
    with pytest.raises(RemoteError, match="1025 bytes announced"):
        decoder.feed(b"")
    with pytest.raises(RemoteError, match="1025 bytes announced"):
        decoder.finish()
    with pytest.raises(RemoteError, match="announced"):
        FrameDecoder(2**40).feed(b"\x00" + b"\xff" * 8)


def test_longest_allowed():
    payload = bytes(1024)
    assert FrameDecoder(1024).feed(frames.encode_message(payload)) == [Frame(MESSAGE, payload)]


def test_messages_before_bad_bytes_are_not_lost():
    decoder = FrameDecoder(1024)
    assert decoder.feed(frames.encode_message(b"a") + b"\x07") == [Frame(MESSAGE, b"a")]
    with pytest.raises(RemoteError, match="marker 7"):
        decoder.feed(b"")


@pytest.mark.parametrize(
    ("sent", "complaint"),
    [
        (b"\x00", "1 bytes of its header"),
        (bytes(8), "8 bytes of its header"),
        (b"\x00" * 8 + b"\x05ab", "2 of 5"),
    ],
)
def test_cut_within_a_frame(sent, complaint):
    decoder = FrameDecoder(1024)
    assert decoder.feed(sent) == []
    with pytest.raises(RemoteError, match=complaint):
        decoder.finish()


def test_keeps_only_what_has_arrived():
    decoder = FrameDecoder(1 << 30)
    decoder.feed(b"\x00" + (1 << 30).to_bytes(8, "big") + b"x" * 100)
    assert decoder._arrived == 100


frame = st.builds(Frame, st.sampled_from([MESSAGE, END_OR_ERROR]), st.binary(max_size=40))


@QUICK
@given(st.lists(frame, max_size=8), cuts)
def test_any_cut_gives_the_same_frames(sent, positions):
    data = b"".join(bytes([f.marker]) + len(f.payload).to_bytes(8, "big") + f.payload for f in sent)
    assert outcome(FrameDecoder(64), cut(data, positions)) == (sent, None)


@QUICK
@given(st.lists(frame, max_size=3), st.binary(max_size=30), cuts)
def test_any_bytes_end_the_same_however_cut(sent, junk, positions):
    data = b"".join(bytes([f.marker]) + len(f.payload).to_bytes(8, "big") + f.payload for f in sent) + junk
    whole = outcome(FrameDecoder(20), [data])
    assert outcome(FrameDecoder(20), cut(data, positions)) == whole
    assert outcome(FrameDecoder(20), [data[i : i + 1] for i in range(len(data))]) == whole
