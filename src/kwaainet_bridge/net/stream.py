"""The byte stream that everything above ``net`` speaks over, whatever carries it."""

from __future__ import annotations

import abc
from collections.abc import Callable

from kwaainet_bridge.wire.peer_id import PeerId


class Stream(abc.ABC):
    """One bidirectional stream of bytes to an authenticated peer.

    A stream has one reader and one writer task at most. Reading and writing may go on at the same time.
    """

    remote: PeerId
    protocol: str

    @abc.abstractmethod
    async def read(self, max_bytes: int) -> bytes:
        """Return 1 to ``max_bytes`` bytes, or ``b""`` once the peer has finished and all its data was read.

        Raises StreamReset once everything that came before the peer's reset was returned, StreamClosed after
        ``close``. Cancelled: nothing is lost, the next read returns the data.
        """

    async def read_pieces(self, max_bytes: int) -> list[bytes | memoryview]:
        """:meth:`read`, in the pieces that came: for whoever puts them together himself. None at the end."""
        data = await self.read(max_bytes)
        return [data] if data else []

    @abc.abstractmethod
    async def write(self, data: bytes) -> None:
        """Send ``data``; returns when it is queued within the peer's window, not when it was received.

        Waits as long as the peer is slow to read: the caller brings the deadline. Raises StreamReset or
        StreamClosed. Cancelled: an unknown part of ``data`` was sent, so the stream must then be reset; other
        streams of the connection are unharmed.
        """

    @abc.abstractmethod
    async def wait_ended(self) -> None:
        """Return once the peer has finished or reset the stream, whatever is still unread."""

    @abc.abstractmethod
    def watch(self, notify: Callable[[], object] | None) -> None:
        """Call ``notify`` once, as soon as there is anything to read: data, the end or a reset; at once if there
        is. It takes the place of the last one; None withdraws that.

        For whoever would otherwise keep a task in :meth:`read` just to notice that the peer has left.
        """

    @abc.abstractmethod
    async def close(self) -> None:
        """Finish writing and stop reading; what was written still arrives. Never raises, may be repeated.

        Stock daemons take the end of either direction for the end of both, so there is no half-close here.
        """

    @abc.abstractmethod
    async def reset(self) -> None:
        """Drop both directions at once. Never raises, may be repeated."""
