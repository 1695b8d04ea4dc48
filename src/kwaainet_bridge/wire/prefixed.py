"""What both framings share: a short header that announces a length, then that many bytes."""

from __future__ import annotations

import abc
from typing import Generic, TypeVar

from kwaainet_bridge.errors import RemoteError

T = TypeVar("T")


class PrefixedDecoder(abc.ABC, Generic[T]):
    """Cuts a byte stream into messages, whatever the sizes in which its bytes arrive.

    Memory holds one unfinished message, at most ``max_bytes`` long and never more of it than has arrived: an
    announced length is checked before the first byte behind it is kept.
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
        self._body = bytearray()
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
        self._raise_failure()
        done: list[T] = []
        try:
            self._consume(memoryview(data), done)
        except RemoteError as e:
            self._failure = str(e)
            self._body.clear()
            if not done:
                raise
        return done

    def finish(self) -> None:
        """The stream has ended. Raises RemoteError if it ended within a message, or had gone wrong before."""
        self._raise_failure()
        if self._length is not None:
            raise RemoteError(
                f"{self._name}: cut after {len(self._body)} of {self._length} bytes"
                + self._suspicion(self._tag, self._length)
            )
        if self._header:
            raise RemoteError(f"{self._name}: cut after {len(self._header)} bytes of its header")

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise RemoteError(self._failure)

    def _consume(self, view: memoryview, done: list[T]) -> None:
        at = 0
        while True:
            if self._length is None:
                if at == len(view):
                    return
                at += self._take_header(view[at : at + self._longest_header])
                continue
            missing = self._length - len(self._body)
            if self._body or missing > len(view) - at:
                self._body += view[at : at + missing]
                if len(self._body) < self._length:
                    return
                body = bytes(self._body)
                self._body = bytearray()
            else:  # the usual case: the whole body is here, copy it once
                body = bytes(view[at : at + missing])
            at += missing
            self._length = None
            done.append(self._build(self._tag, body))

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
