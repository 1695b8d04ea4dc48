"""Every error that crosses a module boundary.

Foreign exceptions (libp2p's, protobuf's, msgpack's, safetensors') are mapped to these at the one place that
calls the foreign library. Messages name the key, peer or block concerned and what to do next.
"""

from __future__ import annotations

from collections.abc import Sequence


class BridgeError(Exception):
    """Base of all errors of this package."""


class RemoteError(BridgeError):
    """The peer broke a protocol: bytes that do not decode, sizes that do not match, an answer out of turn."""


class ConfigError(BridgeError):
    """The operator's input is wrong. The message names the key or file and the remedy."""


class IdentityError(ConfigError):
    """An identity file that cannot be used: unreadable, too widely readable, or held by a running node."""


class NetworkError(BridgeError):
    """Something between two peers failed; neither of them is necessarily wrong."""


class PeerUnreachable(NetworkError):
    """No address of the peer could be connected.

    ``hop`` is the furthest step any attempt reached: ``address`` (none known), ``dns``, ``tcp``, ``noise``,
    ``yamux``, ``protocol``.
    """

    def __init__(self, message: str, *, hop: str) -> None:
        super().__init__(message)
        self.hop = hop


class ProtocolNotSupported(NetworkError):
    """The peer answered, and does not serve this protocol."""


class StreamReset(NetworkError):
    """The peer, or the connection below, ended the stream abruptly. What came before was delivered."""


class StreamClosed(NetworkError):
    """The stream was used after this side closed it, or ended before the answer was whole."""


class DeadlineExceeded(NetworkError):
    """The peer did not answer in time. The message names the call, the peer and the limit in seconds."""


class CompressionError(BridgeError, ValueError):
    """A tensor that the chosen compression cannot carry: its dtype, its shape or a value that is not finite."""


class HandlerError(NetworkError):
    """The peer ran our call and answered with an error. ``text`` is what it sent, unaltered."""

    def __init__(self, method: str, peer: object, text: str) -> None:
        super().__init__(f"{method} at {peer}: {text}")
        self.text = text


class NoRoute(NetworkError):
    """No chain of servers covers the blocks, or none that works. ``blocks`` are those without a server."""

    def __init__(self, message: str, *, blocks: Sequence[int]) -> None:
        super().__init__(message)
        self.blocks = tuple(blocks)


class ClockSkew(NetworkError):
    """A peer's clock and ours differ too much to exchange records that expire: set both by NTP.

    ``seconds`` is how far the peer is ahead of us, at least; negative if it is behind.
    """

    def __init__(self, message: str, *, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class CallBackFailed(NetworkError):
    """A peer answers us but cannot call us back: our announced addresses are not reachable from there."""


class WarmingUp(NetworkError):
    """A KwaaiNet server is well and still loads its model: ask again in a while, or another one now."""


class LeaseDenied(NetworkError):
    """A KwaaiNet peer gives no lease. It is alive: this counts as no failure of it. ``reason`` is its word for it."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class CapacityDenied(LeaseDenied):
    """A KwaaiNet peer has no place free now. ``retry_after`` is when it wants to be asked again, in seconds."""

    def __init__(self, message: str, *, reason: str, retry_after: int) -> None:
        super().__init__(message, reason=reason)
        self.retry_after = retry_after


class TensorRefused(NetworkError):
    """A peer did not take a tensor that was offered to it. ``tensor`` is its name, ``text`` what the peer says.

    ``code`` is the peer's reason: REFUSED, UNSUPPORTED, TOO_LARGE, BUSY, INVALID, FAILED or STOPPING; BUSY may be
    otherwise in a while. ``limit`` is the most memory that it spends on a tensor, in bytes, with TOO_LARGE, else 0.
    """

    def __init__(self, message: str, *, tensor: str, code: str, text: str, limit: int = 0) -> None:
        super().__init__(message)
        self.tensor = tensor
        self.code = code
        self.text = text
        self.limit = limit


class AveragingCancelled(BridgeError):
    """A step of averaging was cancelled on this side, or its averager has ended."""


class Refusal(BridgeError):
    """An answer to a caller that its request cannot be served.

    Stock peers send ``repr(exception)`` from unary handlers and ``str(exception)`` from streaming ones, and
    stock clients show that text. ``kind`` is the exception name that the stock server's text would carry.
    """

    def __init__(self, text: str, *, kind: str = "RuntimeError") -> None:
        super().__init__(text)
        self.text = text
        self.kind = kind

    @property
    def unary_text(self) -> str:
        return f"{self.kind}({self.text!r})" if self.text else f"{self.kind}()"

    @property
    def stream_text(self) -> str:
        # str() of a KeyError is the repr of its argument
        return repr(self.text) if self.kind == "KeyError" else self.text


class EngineError(BridgeError):
    """The engine cannot do what was asked."""


class EngineDied(EngineError):
    """The engine computes nothing any more, whatever it is asked: its blocks must be loaded anew."""


class CheckpointError(EngineError):
    """A model folder that cannot be served: files, tensors or settings missing or contradictory."""


class ModelUnreachable(CheckpointError, NetworkError):
    """The model is not on this machine and the hub does not answer; a later start may succeed."""


class InvalidRequest(EngineError):
    """Tensors or numbers that do not fit the served span or the session."""


class TreesNotTaken(InvalidRequest):
    """A server of the session takes no steps with so many candidates, or none at all: take steps of single tokens."""


class AllocationFailed(EngineError):
    """The KV cache has no room for the session."""
