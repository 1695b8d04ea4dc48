"""Hivemind's unary envelope, written by hand for the simulator: varints, protobuf fields, one call, one answer.

Nothing here comes from the package's own encoders. Source: the messages of ``p2pd.proto`` (proto2, whose
required fields are encoded even when empty):

``PersistentConnectionRequest{callId=1, callUnary=3{peer=1, proto=2, data=3}, unaryResponse=4{response=1, error=2}}``

Each message is preceded by its length as a varint; requests and answers are the same message.
"""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal

import trio

MAX_MESSAGE = 4_194_304  # Hivemind's limit on one message, without its varint
_READ = 64 * 1024

Handler = Callable[[Any, bytes], Awaitable[bytes]]
"""Answers one call: (the caller's peer id, the body) to the body of the answer. CallError becomes its error text."""

StreamHandler = Callable[[Any], Awaitable[None]]


class CallError(Exception):
    """The error text of an answer, given or received."""


class BrokenRules(Exception):
    """The other side sent what the specification does not allow."""


# --- varints and protobuf fields


def uvarint(value: int) -> bytes:
    """Unsigned LEB128."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def take_uvarint(data: bytes, at: int) -> tuple[int, int]:
    """Read a varint at ``at``: the value and where it ends. IndexError if it is not complete."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise BrokenRules("a varint of more than ten bytes")


def bytes_field(number: int, value: bytes) -> bytes:
    """A field with a length: bytes, text, a message, or packed numbers."""
    return uvarint(number << 3 | 2) + uvarint(len(value)) + value


def varint_field(number: int, value: int) -> bytes:
    """A number or a flag."""
    return uvarint(number << 3) + uvarint(value)


def double_field(number: int, value: float) -> bytes:
    """A float64."""
    return uvarint(number << 3 | 1) + struct.pack("<d", value)


def read_fields(message: bytes) -> dict[int, list[Any]]:
    """All fields of a message by number, each with its values in order: bytes, int, or eight raw bytes."""
    fields: dict[int, list[Any]] = {}
    at = 0
    try:
        while at < len(message):
            tag, at = take_uvarint(message, at)
            value: Any
            match tag & 7:
                case 0:
                    value, at = take_uvarint(message, at)
                case 1:
                    value, at = _cut(message, at, 8)
                case 2:
                    length, at = take_uvarint(message, at)
                    value, at = _cut(message, at, length)
                case 5:
                    value, at = _cut(message, at, 4)
                case kind:
                    raise BrokenRules(f"protobuf wire type {kind}")
            fields.setdefault(tag >> 3, []).append(value)
    except IndexError as e:
        raise BrokenRules("a protobuf message that ends early") from e
    return fields


def _cut(data: bytes, at: int, length: int) -> tuple[bytes, int]:
    if at + length > len(data):
        raise BrokenRules("a protobuf field that is longer than its message")
    return data[at : at + length], at + length


def one(fields: dict[int, list[Any]], number: int, default: Any = None) -> Any:
    """The last value of a field, as protobuf has it."""
    return fields[number][-1] if number in fields else default


# --- the messages


def request_message(call_id: bytes, peer: bytes, protocol: str, body: bytes) -> bytes:
    """A request as it goes on the stream, with its length."""
    call = bytes_field(1, peer) + bytes_field(2, protocol.encode()) + bytes_field(3, body)
    return delimited(bytes_field(1, call_id) + bytes_field(3, call))


def response_message(call_id: bytes, body: bytes | None, error: str | None = None) -> bytes:
    """An answer as it goes on the stream: ``body``, or else ``error``."""
    answer = bytes_field(1, body) if body is not None else bytes_field(2, (error or "").encode())
    return delimited(bytes_field(1, call_id) + bytes_field(4, answer))


def delimited(message: bytes) -> bytes:
    return uvarint(len(message)) + message


def read_request(message: bytes) -> tuple[bytes, str, bytes]:
    """(call id, protocol, body) of a request without its length. BrokenRules if a required field is missing."""
    fields = read_fields(message)
    call_id = one(fields, 1)
    if call_id is None or len(call_id) != 16:
        raise BrokenRules(f"a call id that is not of 16 bytes: {call_id!r}")
    if 3 not in fields:
        raise BrokenRules("a request without callUnary")
    call = read_fields(one(fields, 3))
    for number, name in ((1, "peer"), (2, "proto"), (3, "data")):
        if number not in call:
            raise BrokenRules(f"a request without the required field {name}")
    return call_id, one(call, 2).decode(), one(call, 3)


def read_response(message: bytes) -> bytes:
    """The body of an answer without its length. CallError carries the text of an error."""
    fields = read_fields(message)
    if 1 not in fields:
        raise BrokenRules("an answer without a call id")
    if 4 not in fields:
        raise BrokenRules(f"an answer without unaryResponse: fields {sorted(fields)}")
    answer = read_fields(one(fields, 4))
    if 2 in answer:
        raise CallError(one(answer, 2).decode(errors="replace"))
    if 1 not in answer:
        raise BrokenRules("an answer with neither a response nor an error")
    return one(answer, 1)


# --- streams


class StreamReader:
    """Reads pieces of known length off a stream."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._buffer = b""

    async def exactly(self, count: int) -> bytes:
        """``count`` bytes. BrokenRules if the stream ends before."""
        while len(self._buffer) < count:
            if not await self._more():
                raise BrokenRules(f"the stream ended after {len(self._buffer)} of {count} bytes")
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    async def at_end(self) -> bool:
        """Wait for more bytes or the end; True at the end."""
        return not self._buffer and not await self._more()

    async def sized(self, order: Literal["big", "little"], limit: int) -> bytes:
        """What follows its length in four bytes. BrokenRules beyond ``limit`` bytes."""
        length = int.from_bytes(await self.exactly(4), order)
        if length > limit:
            raise BrokenRules(f"a frame of {length} bytes")
        return await self.exactly(length)

    async def message(self) -> bytes:
        """One message with a varint before it."""
        length = shift = 0
        while True:
            byte = (await self.exactly(1))[0]
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
            if shift > 35:
                raise BrokenRules("a message length of more than five bytes")
        if length > MAX_MESSAGE:
            raise BrokenRules(f"a message of {length} bytes")
        return await self.exactly(length)

    async def _more(self) -> bool:
        data = await self._stream.read(_READ)
        self._buffer += data
        return bool(data)


async def call_unary(host: Any, peer: Any, protocol: str, body: bytes, *, timeout: float = 10) -> bytes:
    """Call ``protocol`` at ``peer`` and return the answer's body: one message out, one back, on a new stream.

    The write side stays open until the answer has come, since peers take its end for the caller's leaving.
    Raises CallError, BrokenRules, trio.TooSlowError after ``timeout`` seconds, or what the host raises.
    """
    message = request_message(os.urandom(16), peer.raw, protocol, body)
    with trio.fail_after(timeout):
        stream = await host.open_stream(peer, protocol)
        try:
            await stream.write(message)
            return read_response(await StreamReader(stream).message())
        except trio.Cancelled:
            await stream.reset()
            raise
        finally:
            await stream.close()


def guarded(handler: StreamHandler, complain: Callable[[str], object]) -> StreamHandler:
    """``handler`` with a reset where the other side breaks the rules, which ``complain`` is told."""

    async def serve(stream: Any) -> None:
        try:
            await handler(stream)
        except BrokenRules as e:
            complain(f"{stream.protocol} from {stream.remote}: {e}")
            await stream.reset()

    return serve


def unary_handler(
    handler: Handler,
    complain: Callable[[str], object],
    send: Callable[[Any, bytes], Awaitable[None]] | None = None,
) -> StreamHandler:
    """A stream handler that reads one request, runs ``handler`` while the caller is there, and answers.

    An envelope that breaks the rules closes the stream without an answer, a body that does is answered with an error; either is
    told to ``complain``. ``send`` takes the place of writing the encoded answer.
    """

    async def answer(stream: Any) -> bytes:
        call_id, protocol, body = read_request(await StreamReader(stream).message())
        if protocol != stream.protocol:
            raise BrokenRules(f"a request for {protocol}")
        async with while_there(stream):
            try:
                message = response_message(call_id, await handler(stream.remote, body))
            except BrokenRules as e:
                complain(f"{stream.protocol} from {stream.remote}: {e}")
                return response_message(call_id, None, str(e))
            except CallError as e:
                return response_message(call_id, None, str(e))
            if len(message) > MAX_MESSAGE:
                return response_message(call_id, None, f"an answer of {len(message)} bytes")
            return message
        return b""

    async def serve(stream: Any) -> None:
        if message := await answer(stream):
            await (stream.write(message) if send is None else send(stream, message))

    return guarded(serve, complain)


@asynccontextmanager
async def while_there(stream: Any) -> AsyncIterator[None]:
    """Cancel the block when the other side ends the stream."""
    with trio.CancelScope() as scope:
        stream.watch(scope.cancel)
        try:
            yield
        finally:
            stream.watch(None)
