"""Two orders of marker and length, and readers that are given the wrong one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_feeding import QUICK, cut, cuts, outcome

from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire import frames
from kwaainet_bridge.wire.frames import END_OR_ERROR, LENGTH_FIRST, MARKER_FIRST, MESSAGE, Frame, FrameDecoder

LIMIT = 1 << 20
ORDERS = pytest.mark.parametrize("order", [MARKER_FIRST, LENGTH_FIRST], ids=["marker-first", "length-first"])


def test_known_bytes():
    assert MARKER_FIRST.encode_message(b"\x08\xac\x02").hex() == "00" + "0000000000000003" + "08ac02"
    assert LENGTH_FIRST.encode_message(b"\x08\xac\x02").hex() == "0000000000000003" + "00" + "08ac02"
    assert LENGTH_FIRST.encode_end().hex() == "0000000000000000" + "01"
    assert LENGTH_FIRST.encode_error("boom").hex() == "0000000000000006" + "01" + "0a04626f6f6d"


def test_hivemind_order_unless_told_otherwise():
    assert frames.encode_message(b"abc") == MARKER_FIRST.encode_message(b"abc")
    assert FrameDecoder(LIMIT).feed(frames.encode_message(b"abc")) == [Frame(MESSAGE, b"abc")]


@ORDERS
def test_round_trip(order):
    sent = (
        order.encode_message(b"abc")
        + order.encode_message(b"")
        + order.encode_error("no")
        + order.encode_end()
    )
    decoder = FrameDecoder(LIMIT, order=order)
    got = decoder.feed(sent)
    assert [(f.marker, f.payload) for f in got] == [(0, b"abc"), (0, b""), (1, b"\x0a\x02no"), (1, b"")]
    assert got[2].error_text == "no"
    decoder.finish()


@ORDERS
def test_limits(order):
    longest = order.encode_message(bytes(LIMIT))
    assert len(FrameDecoder(LIMIT, order=order).feed(longest)[0].payload) == LIMIT
    with pytest.raises(RemoteError, match=f"{LIMIT + 7} bytes announced, at most {LIMIT}"):
        FrameDecoder(LIMIT, order=order).feed(order.encode_header(MESSAGE, LIMIT + 7))
    with pytest.raises(ValueError, match="a limit of"):
        FrameDecoder(1 << 56, order=order)


def test_a_length_that_nobody_has_is_refused_at_its_first_byte():
    with pytest.raises(RemoteError, match=r"begins with byte 2, 2\*\*56 or more"):
        FrameDecoder(LIMIT, order=LENGTH_FIRST).feed(b"\x02")


def test_an_unknown_marker_without_another_explanation():
    header = (LIMIT).to_bytes(8, "big") + b"\x05"
    with pytest.raises(RemoteError, match=r"marker 5 is neither 0 nor 1$"):
        FrameDecoder(LIMIT, order=LENGTH_FIRST).feed(header)


@pytest.mark.parametrize("text", ["", "boom", "x" * 300])
def test_hivemind_errors_and_ends_are_told_at_the_first_byte(text):
    sent = MARKER_FIRST.encode_error(text) if text else MARKER_FIRST.encode_end()
    with pytest.raises(RemoteError, match=r"does the peer write marker first, then length\?"):
        FrameDecoder(LIMIT, order=LENGTH_FIRST).feed(sent[:1])


@pytest.mark.parametrize("length", [2, 3, 255, 258, 4096 + 17, LIMIT - 1])
def test_hivemind_messages_are_told_within_the_header(length):
    decoder = FrameDecoder(LIMIT, order=LENGTH_FIRST)
    header = MARKER_FIRST.encode_header(MESSAGE, length)
    assert decoder.feed(header[:8]) == []
    with pytest.raises(RemoteError, match=f"as marker first, then length .* announces {length} bytes"):
        decoder.feed(header[8:])


@pytest.mark.parametrize("marker", [MESSAGE, END_OR_ERROR])
@pytest.mark.parametrize("length", [(LIMIT >> 8) + 1, LIMIT // 2, LIMIT])
def test_long_length_first_frames_are_told_within_the_header(marker, length):
    with pytest.raises(RemoteError, match=f"as length first, then marker .* announces {length} bytes"):
        FrameDecoder(LIMIT).feed(LENGTH_FIRST.encode_header(marker, length))


@pytest.mark.parametrize(
    ("written", "read", "sent"),
    [
        (LENGTH_FIRST, MARKER_FIRST, LENGTH_FIRST.encode_message(b"abc")),
        (LENGTH_FIRST, MARKER_FIRST, LENGTH_FIRST.encode_end()),
        (LENGTH_FIRST, MARKER_FIRST, LENGTH_FIRST.encode_error("boom")),
        (MARKER_FIRST, LENGTH_FIRST, MARKER_FIRST.encode_header(MESSAGE, 512) + b"x"),
    ],
)
def test_what_no_header_tells_is_told_at_the_end(written, read, sent):
    decoder = FrameDecoder(LIMIT, order=read)
    assert decoder.feed(sent) == []
    with pytest.raises(RemoteError, match=f"cut after .* as {written.name} the same header announces"):
        decoder.finish()


def test_an_empty_message_is_the_same_in_both():
    assert MARKER_FIRST.encode_message(b"") == LENGTH_FIRST.encode_message(b"") == bytes(9)


def good_header(order, header):
    marker, length = order.split_header(header)
    return marker in (MESSAGE, END_OR_ERROR) and length <= LIMIT


@QUICK
@given(
    st.sampled_from([MARKER_FIRST, LENGTH_FIRST]),
    st.sampled_from([MESSAGE, END_OR_ERROR]),
    st.one_of(st.integers(0, 2000), st.integers(0, LIMIT), st.integers(0, LIMIT >> 8).map(lambda n: n << 8)),
)
def test_the_rule(written, marker, length):
    """A header of one order is refused by the other's reader with the remedy, unless it is good in both."""
    read = LENGTH_FIRST if written is MARKER_FIRST else MARKER_FIRST
    header = written.encode_header(marker, length)
    decoder = FrameDecoder(LIMIT, order=read)
    if good_header(read, header):
        if written is MARKER_FIRST:
            assert marker == MESSAGE
            assert length % 256 < 2
        else:
            assert 256 * length + marker <= LIMIT
        decoder.feed(header)
    else:
        with pytest.raises(RemoteError, match="does the peer write"):
            decoder.feed(header)


frame = st.builds(Frame, st.sampled_from([MESSAGE, END_OR_ERROR]), st.binary(max_size=40))


def encoded(order, sent):
    return b"".join(order.encode_header(f.marker, len(f.payload)) + f.payload for f in sent)


@ORDERS
@QUICK
@given(sent=st.lists(frame, max_size=8), positions=cuts)
def test_any_cut_gives_the_same_frames(order, sent, positions):
    data = encoded(order, sent)
    assert outcome(FrameDecoder(64, order=order), cut(data, positions)) == (sent, None)


@ORDERS
@QUICK
@given(sent=st.lists(frame, max_size=3), junk=st.binary(max_size=30), other=st.booleans(), positions=cuts)
def test_any_bytes_end_the_same_however_cut(order, sent, junk, other, positions):
    written = LENGTH_FIRST if other else MARKER_FIRST
    data = encoded(written, sent) + junk
    whole = outcome(FrameDecoder(20, order=order), [data])
    assert outcome(FrameDecoder(20, order=order), cut(data, positions)) == whole
    assert outcome(FrameDecoder(20, order=order), [data[i : i + 1] for i in range(len(data))]) == whole
