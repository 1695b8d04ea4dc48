"""By which protocols peers of each network are known."""

from __future__ import annotations

from typing import Final

from kwaainet_bridge.config import NetworksConfig

_KWAAI: Final = "/kwaai/"
_PETALS_ALONE: Final = frozenset({"TransformerConnectionHandler.", "ReachabilityProtocol."})

_PROTOCOLS: Final = {
    # its nodes speak Hivemind's DHT as well, so it comes first
    "kwaainet": (_KWAAI,),
    "petals": ("DHTProtocol.", *sorted(_PETALS_ALONE)),
}


def network_protocols(networks: NetworksConfig) -> dict[str, tuple[str, ...]]:
    """How the protocols begin of the networks that are on, as ``HostConfig.networks``."""
    return {name: begin for name, begin in _PROTOCOLS.items() if getattr(networks, name) is not None}


def is_of_kwaainet_alone(spoken: frozenset[str]) -> bool:
    """Whether a peer that speaks protocols with these beginnings is in KwaaiNet, and in no Petals swarm."""
    return _KWAAI in spoken and spoken.isdisjoint(_PETALS_ALONE)
