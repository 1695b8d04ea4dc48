"""The network: one libp2p host behind a narrow interface. The only place that imports libp2p.

``open_host`` and ``HostConfig`` are loaded on first use, so that the interface and the in-memory network
do not pull in py-libp2p (0.6 s and 60 packages).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kwaainet_bridge.net.host import Host, StreamHandler
from kwaainet_bridge.net.stream import Stream

if TYPE_CHECKING:
    from kwaainet_bridge.net.libp2p_host import HostConfig, Libp2pHost, open_host

__all__ = ["Host", "HostConfig", "Libp2pHost", "Stream", "StreamHandler", "open_host"]

_LAZY = {"HostConfig", "Libp2pHost", "open_host"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from kwaainet_bridge.net import libp2p_host

        return getattr(libp2p_host, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
