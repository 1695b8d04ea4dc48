"""``/kwaai/p2p/hello/1.0.0``: a text for the people who run a node, and its receipt.

Unary calls in Hivemind's envelope; the body is the text itself, in UTF-8, and that of the reply is ``ok``.
Source: KwaaiNet v0.6.2, ``kwaai-p2p-daemon/src/hello.rs``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.fields import Buffer, BytesMessage

PROTOCOL: Final = "/kwaai/p2p/hello/1.0.0"

RECEIVED: Final = "ok"
"""The reply."""


@dataclass(frozen=True, slots=True)
class Hello(BytesMessage):
    """A text of a peer's choice, at most ``defaults.MAX_HELLO_BYTES`` of UTF-8.

    It may hold control characters: escape them before it gets to a terminal. Raises ValueError if it is too long,
    or has no UTF-8 form.
    """

    text: str

    def __post_init__(self) -> None:
        if len(self.text.encode()) > defaults.MAX_HELLO_BYTES:
            raise ValueError(f"a text of more than {defaults.MAX_HELLO_BYTES} bytes")

    def parts(self) -> list[Buffer]:
        return [self.text.encode()]

    @classmethod
    def read(cls, data: Buffer) -> Self:
        if len(data) > defaults.MAX_HELLO_BYTES:
            raise RemoteError(
                f"the text has {len(data)} bytes, at most {defaults.MAX_HELLO_BYTES} are accepted"
            )
        try:
            return cls(str(data, "utf-8"))
        except UnicodeDecodeError as e:
            raise RemoteError("the text is not UTF-8") from e
