"""The sections of a configuration but for the model and averaging. Every key is documented here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from kwaainet_bridge import defaults
from kwaainet_bridge.admin_address import TcpAddress, parse_admin_address
from kwaainet_bridge.config.values import PRESETS, Bootstrap, Positive, Relays, Section, checked
from kwaainet_bridge.hivemind.experts.records import check_prefix
from kwaainet_bridge.net.bootstrap import parse_bootstrap_addresses
from kwaainet_bridge.net.kademlia import KAD, check_protocol
from kwaainet_bridge.wire.peer_id import PeerId


class IdentityConfig(Section):
    """The key that makes the peer id."""

    path: Path = Path("identity.key")
    """Key file, relative to the configuration file; created on first use, readable by its owner only."""
    kind: Literal["rsa", "ed25519"] = "rsa"
    """Kind of a key that is created. Stock Hivemind peers write RSA."""


class PetalsNetwork(Section):
    """The Petals swarm to take part in."""

    bootstrap: Bootstrap = ()
    """Addresses (``/ip4/…/tcp/…/p2p/<id>``) or the preset ``petals-public``. Empty: a new private swarm."""
    dht: Literal["auto", "server", "client"] = "auto"
    """Whether this node holds records for others. ``auto``: unless nobody can dial it without a relay."""


class KwaaiNetwork(Section):
    """The KwaaiNet swarm to keep in touch with."""

    bootstrap: Bootstrap = PRESETS["kwaainet-public"]
    """Addresses or the preset ``kwaainet-public``."""
    dht_prefix: Annotated[str, checked(check_prefix)] | None = None
    """Name of the blocks there. Left out: the last part of the repository's name, dots as dashes."""

    @property
    def peers(self) -> frozenset[PeerId]:
        """The bootstrap peers."""
        return frozenset(peer for peer, _ in parse_bootstrap_addresses(self.bootstrap))


class NetworksConfig(Section):
    """Which networks this node is part of; one that is left out costs nothing."""

    petals: PetalsNetwork | None = PetalsNetwork()
    kwaainet: KwaaiNetwork | None = None


class MuxConfig(Section):
    """A local HTTP server that KwaaiNet peers may use through this node."""

    endpoint: Annotated[str, Field(pattern=r"^https?://[^/?#]+/?$")]
    """Its address: ``http://127.0.0.1:8080``."""
    paths: Annotated[tuple[Annotated[str, Field(pattern=r"^/")], ...], Field(min_length=1)]
    """What they may ask for: whole paths, or beginnings that end in ``*``."""
    remote: bool = False
    """Whether ``endpoint`` may be on another machine."""


class ProtocolsConfig(Section):
    """Protocols that serve others, each of a network that is on. One that is off is not mounted and costs nothing."""

    petals_inference: bool = True
    """Petals' expert calls. Off: blocks are not announced to the Petals swarm."""
    kwaai_inference: bool = True
    """``/kwaai/inference/1.0.0``. Off: blocks are not announced to KwaaiNet."""
    kwaai_hello: bool = True
    """``/kwaai/p2p/hello/1.0.0``."""
    kwaai_lease: bool = True
    """``/kwaai/capacity-lease/1.0.0``."""
    kwaai_mux: MuxConfig | None = None
    """``/kwaai/inference-mux/1.0.0``; off unless an endpoint is given."""


class KademliaConfig(Section):
    """libp2p's Kademlia network, in which a peer without a known address is looked up by its id."""

    protocol: Annotated[str, checked(check_protocol)] = KAD
    """The network's protocol id. Networks with different ids do not know of each other."""
    mode: Literal["server", "client"] = "server"
    """Whether others may ask this node and keep it in their tables. ``client`` asks only."""


class ReachabilityConfig(Section):
    """What the node does about being dialled by others; see docs/operating.md."""

    relays: Relays = ()
    """Full addresses of relays that are tried first while nobody can dial this node. Left out: peers that offer it."""
    relay_service: bool = True
    """Whether to relay for others that cannot be dialled, unless this node turns out to be one of them."""


class NetworkQuotas(Section):
    """Connections of each network beyond which its idle ones are closed before those of others."""

    petals: Positive | None = None
    kwaainet: Positive | None = None


class LimitsConfig(Section):
    """How much the node takes on; see :class:`kwaainet_bridge.net.limits.Limits`."""

    connections: Positive = defaults.MAX_CONNECTIONS
    """Connections at one time. Beyond it an idle one makes room, or the new one is refused."""
    connections_high: Positive | None = None
    """Above this many, idle connections are closed. Left out: 80 % of ``connections``."""
    connections_low: Positive | None = None
    """How many are left then. Left out: 60 % of ``connections``."""
    connections_per_address: Positive = defaults.MAX_CONNECTIONS_PER_ADDRESS
    """Inbound connections from one public IPv4 address or IPv6 /64."""
    connections_per_network: NetworkQuotas = NetworkQuotas()
    strangers: Annotated[int, Field(ge=0)] | None = None
    """Connections kept of peers that show no sign of being in a network of this node. Left out: 10 % of
    ``connections``."""

    streams: Positive = defaults.MAX_STREAMS
    """Streams opened by peers that are served at one time."""
    streams_per_peer: Positive = defaults.MAX_STREAMS_PER_PEER
    """The same of one peer."""
    stream_buffers_mib: Positive = defaults.STREAM_BUFFER_BYTES // defaults.MIB
    """MiB that peers may have on its way to streams that are not read, 256 KiB for each stream included."""

    @model_validator(mode="after")
    def _check_watermarks(self) -> LimitsConfig:
        low, high = self.connections_low, self.connections_high
        if high is not None and high > self.connections:
            raise ValueError(f"connections_high ({high}) exceeds connections ({self.connections}): lower it")
        if low is not None and high is not None and low > high:
            raise ValueError(f"connections_low ({low}) exceeds connections_high ({high}): lower it")
        if low is not None and low > self.connections:
            raise ValueError(f"connections_low ({low}) exceeds connections ({self.connections}): lower it")
        return self


class AdminConfig(Section):
    """HTTP for the operator: is the node well, what does it do; see docs/monitoring.md."""

    listen: Annotated[str, checked(parse_admin_address)] = "unix"
    """``unix``: a socket beside the identity file, for its owner only; ``unix:<path>``: one there;
    ``<IP address>:<port>``; or ``off``."""
    token_file: Path | None = None
    """File with a token that HTTP clients must send. Required to listen on an address that is not loopback."""

    @field_validator("listen", mode="before")
    @classmethod
    def _check_listen(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML 1.1 reads off so

    @model_validator(mode="after")
    def _check_strangers_need_a_token(self) -> AdminConfig:
        address = parse_admin_address(self.listen)
        if isinstance(address, TcpAddress) and not address.is_loopback and self.token_file is None:
            raise ValueError(
                f"listen: others can reach {self.listen}, so it needs token_file: name a file that holds a long random "
                "text, or listen on 127.0.0.1 or unix"
            )
        return self


class OpenAIConfig(Section):
    """An HTTP endpoint as OpenAI's, whose text the swarms generate; see docs/openai.md."""

    listen: Annotated[str, checked(parse_admin_address)] = "off"
    """``<IP address>:<port>``, ``unix:<path>``, or ``off``."""
    token_file: Path | None = None
    """File with a token that clients must send. Required to listen on an address that is not loopback."""
    models: tuple[str, ...] = ()
    """Folders or hub repositories that clients may ask for. Left out: the model whose blocks are served."""
    at_once: Positive = defaults.OPENAI_REQUESTS
    """Requests that are answered at one time; further ones are refused."""
    requests_per_minute: Positive | None = None
    """Most requests that begin in a minute. Left out: any number on a loopback address or a socket, 60 elsewhere."""

    @field_validator("listen", mode="before")
    @classmethod
    def _check_listen(cls, value: Any) -> Any:
        if value == "unix":
            raise ValueError("name the socket: unix:<path>")
        return "off" if value is False else value  # YAML 1.1 reads off so

    @model_validator(mode="after")
    def _check_strangers_need_a_token(self) -> OpenAIConfig:
        if self._is_exposed and self.token_file is None:
            raise ValueError(
                f"listen: others can reach {self.listen}, so it needs token_file: name a file that holds a long random "
                "text, or listen on 127.0.0.1"
            )
        return self

    @property
    def _is_exposed(self) -> bool:
        address = parse_admin_address(self.listen)
        return isinstance(address, TcpAddress) and not address.is_loopback

    @property
    def most_per_minute(self) -> int | None:
        """:attr:`requests_per_minute` with its default."""
        exposed = defaults.OPENAI_REQUESTS_PER_MINUTE if self._is_exposed else None
        return self.requests_per_minute or exposed


class LogConfig(Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "text", "json"] = "auto"
    """``auto``: text on a terminal, JSON otherwise."""
