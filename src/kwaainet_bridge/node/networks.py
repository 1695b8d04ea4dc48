"""By which protocols peers of each network are known."""

from __future__ import annotations

from typing import Final

from kwaainet_bridge.config import NetworksConfig

_PROTOCOLS: Final = {
    # its nodes speak Hivemind's DHT as well, so it comes first
    "kwaainet": ("/kwaai/",),
    "petals": ("DHTProtocol.", "TransformerConnectionHandler.", "ReachabilityProtocol."),
}


def network_protocols(networks: NetworksConfig) -> dict[str, tuple[str, ...]]:
    """How the protocols begin of the networks that are on, as ``HostConfig.networks``."""
    return {name: begin for name, begin in _PROTOCOLS.items() if getattr(networks, name) is not None}
