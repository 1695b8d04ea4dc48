"""What both framings share: a short header that announces a length, then that many bytes."""

from __future__ import annotations

import abc
from collections.abc import Iterable
from typing import Final, Generic, TypeVar

from kwaainet_bridge.errors import RemoteError

T = TypeVar("T")

_PIECE_BYTES: Final = 4096
"""Shorter pieces of a body are put together as they come: a byte in a piece of its own takes forty."""

_SPARED_BYTES: Final = 1024
"""Bytes before a body that are kept with it rather than copying the body: of a header, or of a short message."""


class PrefixedDecoder(abc.ABC, Generic[T]):
    """Cuts a byte stream into messages, whatever the sizes in which its bytes arrive.

    Memory holds one unfinished message, at most ``max_bytes`` long and never more of it than has arrived, in the pieces
    that it came in: a view keeps alive what it is of. An announced length is checked before the first byte behind it is
    kept.
    """

    _name: str
    """What a message is called in errors."""

    _longest_header: int
    """After this many bytes ``_parse_header`` returns a header or raises."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._header = bytearray()
        self._tag = 0
        self._length: int | None = None  # of the body in progress; None while the header is
        self._pieces: list[bytes | bytearray | memoryview] = []  # of the body in progress
        self._arrived = 0  # bytes in them
        self._failure: str | None = None

    @abc.abstractmethod
    def _parse_header(self, header: bytearray) -> tuple[int, int, int] | None:
        """The tag, the body's length and the header's own length, or None if more bytes are needed."""

    @abc.abstractmethod
    def _build(self, tag: int, body: bytes) -> T:
        """A message from its header's tag and its body."""

    def _suspicion(self, tag: int, length: int) -> str:  # noqa: ARG002 - for those who have one
        """What else may be wrong with a message of that header, to be added to the error; mostly nothing."""
        return ""

    def feed(self, data: bytes | bytearray | memoryview) -> list[T]:
        """Take the next bytes of the stream and return the messages that they complete, in order.

        Raises RemoteError once the bytes cannot be a message. Messages that are whole before the bad bytes
        are returned first and the error is raised by the call after, so the outcome does not depend on how
        the stream was cut. After an error every call raises it again.
        """
        return self.feed_pieces([data])

    def feed_pieces(self, pieces: Iterable[bytes | bytearray | memoryview]) -> list[T]:
        """:meth:`feed` for several pieces that follow each other. Nobody may change them afterwards."""
        self._raise_failure()
        done: list[T] = []
        try:
            for piece in pieces:
                self._consume(piece, done)
        except RemoteError as e:
            self._failure = str(e)
            self._pieces.clear()
            if not done:
                raise
        return done

    def finish(self) -> None:
        """The stream has ended. Raises RemoteError if it ended within a message, or had gone wrong before."""
        self._raise_failure()
        if self._length is not None:
            raise RemoteError(
                f"{self._name}: cut after {self._arrived} of {self._length} bytes"
                + self._suspicion(self._tag, self._length)
            )
        if self._header:
            raise RemoteError(f"{self._name}: cut after {len(self._header)} bytes of its header")

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise RemoteError(self._failure)

    def _consume(self, data: bytes | bytearray | memoryview, done: list[T]) -> None:
        view = memoryview(data)
        at = 0
        while True:
            if self._length is None:
                if at == len(view):
                    return
                at += self._take_header(view[at : at + self._longest_header])
                continue
            missing = self._length - self._arrived
            if missing > len(view) - at:
                # a piece that is nearly all body is kept as it came; memory is dearer than the rest of the work
                self._keep(
                    view[at:] if at <= _SPARED_BYTES and not isinstance(data, bytearray) else bytes(view[at:])
                )
                return
            if self._arrived:
                body = b"".join((*self._pieces, view[at : at + missing]))
                self._pieces, self._arrived = [], 0
            else:
                body = bytes(view[at : at + missing])
            at += missing
            self._length = None
            done.append(self._build(self._tag, body))

    def _keep(self, piece: bytes | memoryview) -> None:
        self._arrived += len(piece)
        if len(piece) >= _PIECE_BYTES:
            self._pieces.append(piece)
        elif self._pieces and isinstance(last := self._pieces[-1], bytearray):
            last += piece
        elif piece:
            self._pieces.append(bytearray(piece))

    def _take_header(self, view: memoryview) -> int:
        """Take header bytes from the start of ``view``; return how many of them belong to the header."""
        before = len(self._header)
        self._header += view[: self._longest_header - before]
        parsed = self._parse_header(self._header)
        if parsed is None:
            return len(self._header) - before
        self._tag, length, used = parsed
        self._header.clear()
        if length > self._max_bytes:
            raise RemoteError(
                f"{self._name}: {length} bytes announced, at most {self._max_bytes} are accepted"
                + self._suspicion(self._tag, length)
            )
        self._length = length
        return used - before
