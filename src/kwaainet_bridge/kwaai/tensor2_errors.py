"""What a sender of ``/kwaai/tensor/2.0.0`` raises for what the receiver says."""

from __future__ import annotations

from typing import Final

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import (
    DeadlineExceeded,
    ProtocolNotSupported,
    RemoteError,
    StreamClosed,
    TensorRefused,
)
from kwaainet_bridge.wire.kwaai_tensor import PROTOCOL as FIRST_VERSION
from kwaainet_bridge.wire.kwaai_tensor2 import PROTOCOL, REFUSALS, Ack, Code, End
from kwaainet_bridge.wire.peer_id import PeerId

_PLAIN: Final = (ProtocolNotSupported, StreamClosed, RemoteError, DeadlineExceeded)
"""Errors that are made of a text alone."""


def over(error: Exception) -> Exception:
    """A new error of the same kind, for each who waits for a stream that ended in ``error``."""
    return (type(error) if type(error) in _PLAIN else StreamClosed)(str(error))


def not_supported(peer: PeerId) -> ProtocolNotSupported:
    return ProtocolNotSupported(
        f"{peer} does not serve {PROTOCOL}: if it serves {FIRST_VERSION}, kwaai.tensor.send_tensor sends "
        "tensors to it one at a time in 8 bits"
    )


def end_error(peer: PeerId, end: End) -> Exception:
    """RemoteError if the peer says that we broke the protocol, DeadlineExceeded if too slow, else StreamClosed."""
    text = f"{PROTOCOL} at {peer}: the peer ended the stream"
    if end.text:
        text += f": {end.text[: defaults.MAX_ERROR_CHARACTERS]}"
    if end.code == Code.PROTOCOL:
        return RemoteError(text)
    return DeadlineExceeded(text) if end.code == Code.TIMEOUT else StreamClosed(text)


def refusal(peer: PeerId, name: str, answer: Ack) -> TensorRefused:
    """For an answer of any code but ACCEPTED and RECEIVED."""
    code = Code(answer.code).name if answer.code in REFUSALS else f"code {answer.code}"
    text = answer.text[: defaults.MAX_ERROR_CHARACTERS]
    return TensorRefused(
        f"{peer} did not take tensor {name!r:.100}: {code}: {text}",
        tensor=name,
        code=code,
        text=text,
        limit=answer.bytes if answer.code == Code.TOO_LARGE else 0,
    )
