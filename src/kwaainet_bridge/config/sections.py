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
    """The private key, from which the peer id follows. Created if missing, mode 0600. The format is that of
    Hivemind's ``identity_path``."""
    kind: Literal["rsa", "ed25519"] = "rsa"
    """Kind of a key that is created; an existing file keeps its own. RSA keys have 2048 bits. Stock Hivemind
    writes RSA, and reads only RSA once it has initial peers."""


class PetalsNetwork(Section):
    """The Petals swarm to take part in."""

    bootstrap: Bootstrap = ()
    """Peers to join through, each ending in ``/p2p/<peer id>``. Empty: a new private swarm."""
    dht: Literal["auto", "server", "client"] = "auto"
    """``server`` holds records for others. ``client`` does not and is in nobody's table. ``auto`` is a server
    unless others cannot dial this node without a relay."""


class KwaaiNetwork(Section):
    """The KwaaiNet swarm to keep in touch with."""

    bootstrap: Bootstrap = PRESETS["kwaainet-public"]
    """As above. Records of this node's blocks are written to each of them."""
    dht_prefix: Annotated[str, checked(check_prefix)] | None = None
    """Name of the blocks there, without dots and spaces. Left out: the last part of the repository's or
    folder's name, dots as dashes."""

    @property
    def peers(self) -> frozenset[PeerId]:
        """The bootstrap peers."""
        return frozenset(peer for peer, _ in parse_bootstrap_addresses(self.bootstrap))


class NetworksConfig(Section):
    """Which networks this node is part of; one that is left out costs nothing."""

    petals: PetalsNetwork | None = PetalsNetwork()
    """The Petals swarm. ``null`` turns it off; then there can be no ``model``."""
    kwaainet: KwaaiNetwork | None = None
    """The KwaaiNet swarm. ``kwaainet: {}`` turns it on with its preset."""


class MuxConfig(Section):
    """A local HTTP server that KwaaiNet peers may use through this node."""

    endpoint: Annotated[str, Field(pattern=r"^https?://[^/?#]+/?$")]
    """The server: ``http://127.0.0.1:8080``. Whoever connects may use it, so it should be one that is meant
    for strangers."""
    paths: Annotated[tuple[Annotated[str, Field(pattern=r"^/")], ...], Field(min_length=1)]
    """What may be asked for: whole paths, or beginnings that end in ``*``."""
    remote: bool = False
    """Whether the server may be on another machine."""


class ProtocolsConfig(Section):
    """Protocols that serve others, each of a network that is on. One that is off is not mounted and costs nothing."""

    petals_inference: bool = True
    """Petals' expert calls."""
    kwaai_inference: bool = True
    """``/kwaai/inference/1.0.0``."""
    kwaai_hello: bool = True
    """``/kwaai/p2p/hello/1.0.0``: greetings."""
    kwaai_lease: bool = True
    """``/kwaai/capacity-lease/1.0.0``: places for sessions."""
    kwaai_mux: MuxConfig | None = None
    """``/kwaai/inference-mux/1.0.0``: KwaaiNet peers use a local HTTP server through this node."""


class KademliaConfig(Section):
    """libp2p's Kademlia network, in which a peer without a known address is looked up by its id."""

    protocol: Annotated[str, checked(check_protocol)] = KAD
    """The network's protocol id. Stock Petals and Hivemind peers speak the default, as IPFS does; later
    versions of KwaaiNet have ``/kwaai/kad/1.0.0``. Networks with different ids do not know of each other."""
    mode: Literal["server", "client"] = "server"
    """``server`` answers others and is in their tables. ``client`` only asks, and is named only by peers that
    it is connected to: for a machine that nobody can dial."""


class ReachabilityConfig(Section):
    """What the node does about being dialled by others; see docs/operating.md."""

    relays: Relays = ()
    """Relays that are tried first, each ending in ``/p2p/<peer id>``. Left out: connected peers that offer to
    relay, bootstrap peers mostly."""
    relay_service: bool = True
    """Whether to relay for others that cannot be dialled, unless this node turns out to be one of them: up to
    128 peers, 8 of them at one public address, and 4 GiB and 30 minutes in one circuit."""


class NetworkQuotas(Section):
    """Connections of each network beyond which its idle ones are closed before those of others."""

    petals: Positive | None = None
    """When connections must be closed, what the Petals swarm has beyond this goes first of what is idle,
    after strangers."""
    kwaainet: Positive | None = None
    """The same of KwaaiNet. A peer that is in both counts here."""


class LimitsConfig(Section):
    """How much the node takes on; see :class:`kwaainet_bridge.net.limits.Limits`."""

    connections: Positive = defaults.MAX_CONNECTIONS
    """Connections at one time, fewer if the system grants fewer file descriptors. When they are all taken, an
    idle one is closed for a newcomer that has proved its peer id; if none is idle, the newcomer is refused."""
    connections_high: Positive | None = None
    """Above this many, idle connections are closed. At most ``connections``."""
    connections_low: Positive | None = None
    """How many are left then. At most ``connections_high``."""
    connections_per_address: Positive = defaults.MAX_CONNECTIONS_PER_ADDRESS
    """Inbound connections from one public IPv4 address or one IPv6 /64; fewer when fewer places are left.
    Private and loopback addresses are not limited: behind a port forwarder or a container's proxy all peers
    come from one of them."""
    connections_per_network: NetworkQuotas = NetworkQuotas()
    strangers: Annotated[int, Field(ge=0)] | None = None
    """Connections kept of *strangers*, see below."""

    streams: Positive = defaults.MAX_STREAMS
    """Streams opened by peers that are served at one time; each counts until its handler has ended. Further
    ones are reset, as are those beyond 2048 for one protocol."""
    streams_per_peer: Positive = defaults.MAX_STREAMS_PER_PEER
    """The same of one peer; 256 for one protocol."""
    stream_buffers_mib: Positive = defaults.STREAM_BUFFER_BYTES // defaults.MIB
    """MiB of memory for what peers have sent and nobody has read yet: 256 KiB for each stream that a peer
    opens, and whatever windows grow by to keep fast links busy. When it is used up, windows grow no further
    and new streams are reset."""

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
    """``unix`` is a socket named ``<identity.path>.sock``; ``unix:<path>`` one elsewhere. Both are for the
    user who runs the node. On loopback (``127.0.0.1:9464``) all programs of this machine may ask."""
    token_file: Path | None = None
    """File with a token of at least 16 visible characters, mode 0600, which clients must send. Required to
    listen on an address that is not loopback."""

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
    """Where to listen."""
    token_file: Path | None = None
    """File with a token of at least 16 visible characters, mode 0600, which clients send as their API key.
    Required to listen on an address that is not loopback."""
    models: tuple[str, ...] = ()
    """Folders or hub repositories that clients may ask for. Left out: the model whose blocks are served."""
    at_once: Positive = defaults.OPENAI_REQUESTS
    """Requests that are answered at one time; further ones are refused with 429."""
    requests_per_minute: Positive | None = None
    """Most requests that begin in a minute. Left out: any number on loopback or a socket, 60 elsewhere."""

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
    """Least severe event of this package that is logged. Libraries are heard from ``warning`` up."""
    format: Literal["auto", "text", "json"] = "auto"
    """``auto`` is text when standard error is a terminal, and JSON, one object a line, otherwise."""
