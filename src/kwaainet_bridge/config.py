"""The YAML schema of a node. Every key is documented here; docs/configuration.md is the reader's view."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from kwaainet_bridge import defaults
from kwaainet_bridge.admin_address import UNIX_PREFIX, TcpAddress, UnixAddress, parse_admin_address
from kwaainet_bridge.errors import ConfigError, RemoteError
from kwaainet_bridge.hivemind.experts.records import check_prefix
from kwaainet_bridge.net.addresses import parse_announce_address, parse_listen_address
from kwaainet_bridge.net.bootstrap import parse_bootstrap_addresses
from kwaainet_bridge.net.kademlia import KAD, check_protocol
from kwaainet_bridge.wire.kwaai_avg import check_prefix as check_kwaai_prefix
from kwaainet_bridge.wire.peer_id import PeerId

EMBEDDED_MODEL: Final = "austen"
"""The small model that the package holds; ``model.name: austen`` needs no download."""

PRESETS: Final[dict[str, tuple[str, ...]]] = {
    "petals-public": (
        "/dns/bootstrap1.petals.dev/tcp/31337/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY",
        "/ip4/159.89.214.152/tcp/31337/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY",
        "/dns/bootstrap2.petals.dev/tcp/31338/p2p/QmQGTqmM7NKjV6ggU1ZCap8zWiyKR89RViDXiqehSiCpY5",
    ),
    "kwaainet-public": (
        "/dns/bootstrap-1.kwaai.ai/tcp/8000/p2p/QmQhRuheeCLEsVD3RsnknM75gPDDqxAb8DhnWgro7KhaJc",
        "/dns/bootstrap-2.kwaai.ai/tcp/8000/p2p/Qmd3A8N5aQBATe2SYvNikaeCS9CAKN4E86jdCPacZ6RZJY",
    ),
}
"""Names that stand for the bootstrap peers of public swarms, wherever an address is expected."""

AUTO: Final = "auto"
"""``model.blocks`` of a node that chooses them itself."""

_BLOCKS = re.compile(r"^(\d{1,5}):(\d{1,5})$")


def _checked(parse: Callable[[str], object]) -> AfterValidator:
    """A validator that keeps the text and refuses what the network's own parser refuses."""

    def check(text: str) -> str:
        try:
            parse(text)
        except ConfigError as e:
            raise ValueError(str(e)) from e
        return text

    return AfterValidator(check)


def _peer_id(text: str) -> PeerId:
    try:
        return PeerId.parse(text)
    except RemoteError as e:
        raise ConfigError(str(e)) from e


def _check_bootstrap(entry: str) -> str:
    if entry not in PRESETS:
        try:
            parse_bootstrap_addresses([entry])
        except ConfigError as e:
            raise ValueError(f"{e}; nor is it a preset: {', '.join(PRESETS)}") from e
    return entry


def _expand_presets(entries: Iterable[str]) -> tuple[str, ...]:
    addresses = [address for entry in entries for address in PRESETS.get(entry, (entry,))]
    return tuple(dict.fromkeys(addresses))


ListenAddresses = tuple[Annotated[str, _checked(parse_listen_address)], ...]
AnnounceAddresses = tuple[Annotated[str, _checked(parse_announce_address)], ...]
Bootstrap = Annotated[
    tuple[Annotated[str, AfterValidator(_check_bootstrap)], ...], AfterValidator(_expand_presets)
]

Relays = tuple[Annotated[str, _checked(lambda text: parse_bootstrap_addresses([text]))], ...]

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
CompressionName = Literal[
    "NONE", "MEANSTD_16BIT", "FLOAT16", "QUANTILE_8BIT", "UNIFORM_8BIT", "BLOCKWISE_8BIT"
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class IdentityConfig(_Section):
    """The key that makes the peer id."""

    path: Path = Path("identity.key")
    """Key file, relative to the configuration file; created on first use, readable by its owner only."""
    kind: Literal["rsa", "ed25519"] = "rsa"
    """Kind of a key that is created. Stock Hivemind peers write RSA."""


class PetalsNetwork(_Section):
    """The Petals swarm to take part in."""

    bootstrap: Bootstrap = ()
    """Addresses (``/ip4/…/tcp/…/p2p/<id>``) or the preset ``petals-public``. Empty: a new private swarm."""
    dht: Literal["auto", "server", "client"] = "auto"
    """Whether this node holds records for others. ``auto``: unless nobody can dial it without a relay."""


class KwaaiNetwork(_Section):
    """The KwaaiNet swarm to keep in touch with."""

    bootstrap: Bootstrap = PRESETS["kwaainet-public"]
    """Addresses or the preset ``kwaainet-public``."""
    dht_prefix: Annotated[str, _checked(check_prefix)] | None = None
    """Name of the blocks there. Left out: the last part of the repository's name, dots as dashes."""

    @property
    def peers(self) -> frozenset[PeerId]:
        """The bootstrap peers."""
        return frozenset(peer for peer, _ in parse_bootstrap_addresses(self.bootstrap))


class NetworksConfig(_Section):
    """Which networks this node is part of; one that is left out costs nothing."""

    petals: PetalsNetwork | None = PetalsNetwork()
    kwaainet: KwaaiNetwork | None = None


class MuxConfig(_Section):
    """A local HTTP server that KwaaiNet peers may use through this node."""

    endpoint: Annotated[str, Field(pattern=r"^https?://[^/?#]+/?$")]
    """Its address: ``http://127.0.0.1:8080``."""
    paths: Annotated[tuple[Annotated[str, Field(pattern=r"^/")], ...], Field(min_length=1)]
    """What they may ask for: whole paths, or beginnings that end in ``*``."""
    remote: bool = False
    """Whether ``endpoint`` may be on another machine."""


class ProtocolsConfig(_Section):
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


class KademliaConfig(_Section):
    """libp2p's Kademlia network, in which a peer without a known address is looked up by its id."""

    protocol: Annotated[str, _checked(check_protocol)] = KAD
    """The network's protocol id. Networks with different ids do not know of each other."""
    mode: Literal["server", "client"] = "server"
    """Whether others may ask this node and keep it in their tables. ``client`` asks only."""


class ReachabilityConfig(_Section):
    """What the node does about being dialled by others; see docs/operating.md."""

    relays: Relays = ()
    """Full addresses of relays that are tried first while nobody can dial this node. Left out: peers that offer it."""
    relay_service: bool = True
    """Whether to relay for others that cannot be dialled, unless this node turns out to be one of them."""


class ModelConfig(_Section):
    """The blocks to serve."""

    name: str = EMBEDDED_MODEL
    """Folder of a Hugging Face checkpoint (relative to the configuration file), hub repository, or ``austen``."""
    blocks: str | None = None
    """``first:end``, end not included; ``auto`` for ``num_blocks`` of the node's own choice; all when left out."""
    num_blocks: Positive | None = None
    """How many to serve with ``blocks: auto``, which needs it; without effect otherwise."""
    rebalance_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = defaults.REBALANCE_SECONDS
    """With ``blocks: auto``: mean time between two looks at whether others need it more; 0 or ``off`` for none."""
    balance_quality: Annotated[float, Field(ge=0, le=1)] = defaults.BALANCE_QUALITY
    """It moves if the model's weakest block has less than this share of the throughput that it could have."""
    dht_prefix: Annotated[str, _checked(check_prefix)] | None = None
    """Name of the blocks in the swarm. Left out: what Petals derives from the repository's name."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """``auto`` is the checkpoint's own."""
    device: str = "cpu"
    """A torch device: ``cpu``, ``cuda``, ``cuda:1``."""
    cache_tokens: Annotated[int, Field(ge=defaults.MIN_CACHE_TOKENS)] = defaults.CACHE_TOKENS
    """Size of the KV cache: tokens of one sequence through all served blocks."""
    max_length: Positive = defaults.MAX_LENGTH
    """Longest session, in tokens."""
    max_batch_tokens: Positive = defaults.MAX_BATCH_TOKENS
    """Most tokens (batch x length) in one request."""
    threads: Positive | None = None
    """Threads of torch; left out: as many as cores."""
    compression: CompressionName = "NONE"
    """Compression of hidden states on the wire. All servers of a model should announce the same."""
    throughput: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto"] = "auto"
    """Tokens per second to announce; ``auto`` measures it at the start."""
    network_mbps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = defaults.NETWORK_MBPS
    """Speed of the link in megabits per second, for the announced throughput."""
    public_name: str | None = None
    """Shown by swarm monitors."""

    @field_validator("blocks", mode="before")
    @classmethod
    def _check_blocks(cls, value: Any) -> Any:
        if value is None or value == AUTO:
            return value
        # YAML 1.1 reads 4:8 as a number in base 60
        match = _BLOCKS.match(value) if isinstance(value, str) else None
        if match is None:
            raise ValueError('write it as "first:end" in quotes, for example "0:4", or auto')
        if int(match[1]) >= int(match[2]):
            raise ValueError(f"{value} holds no block: the end comes after the last block")
        return value

    @field_validator("rebalance_seconds", mode="before")
    @classmethod
    def _check_rebalancing(cls, value: Any) -> Any:
        if value is True:
            raise ValueError("say how often, in seconds, or off")
        return 0 if value is False or value == "off" else value  # YAML 1.1 reads off as false

    @model_validator(mode="after")
    def _check_auto_knows_how_many(self) -> ModelConfig:
        if self.blocks == AUTO and self.num_blocks is None:
            raise ValueError(
                "blocks: auto chooses which blocks, not how many: give num_blocks (--num-blocks)"
            )
        return self

    @property
    def blocks_to_choose(self) -> int | None:
        """How many blocks are to be chosen at the start, None if it is not left to the node which."""
        return self.num_blocks if self.blocks == AUTO else None

    @property
    def block_range(self) -> range | None:
        """``blocks`` as a range, None for all, and for those that the node chooses."""
        if self.blocks is None or self.blocks == AUTO:
            return None
        first, end = self.blocks.split(":")
        return range(int(first), int(end))


class AveragingRun(_Section):
    """A run of averagers that this node helps: it averages for the others and adds nothing of its own."""

    network: Literal["petals", "kwaainet"] = "petals"
    """Where the run's peers are: Hivemind's averagers in the Petals swarm, or those of ``/kwaai/avg/1.0.0``."""
    prefix: Annotated[str, Field(pattern=r"^[^.]+$")]
    """Name of the run's averagers; those of a stock optimizer with run id ``r`` are ``r_grad_averager`` and
    ``r_state_averager``."""
    kind: Literal["DecentralizedAverager", "GradientAverager", "TrainingStateAverager"] = (
        "DecentralizedAverager"
    )
    """Class of the run's averagers."""
    target_group_size: Annotated[int, Field(ge=2, le=defaults.AVERAGING_MAX_GROUP)] | None = None
    """Members of a full group. Left out: groups have no size at which they are full."""
    group_bits: Annotated[str, Field(pattern="^[01]*$")] = ""
    """Where to look for the first group, in runs whose groups form a grid."""
    compression: CompressionName = "NONE"
    """Compression of parts. All members must have the same."""
    part_kib: Positive = defaults.AVERAGING_PART_BYTES // defaults.KIB
    """KiB of one part. All members must have the same."""
    matchmaking_seconds: Seconds = defaults.AVERAGING_MATCHMAKING_SECONDS
    """How long the run's peers wait for each other (stock: ``min_matchmaking_time``, ``matchmaking_time``)."""
    bandwidth: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """In the unit of the run's other peers; decides how much this node averages. Left out: their mean."""
    max_rms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Root mean square from which on a part is refused. Left out: any that cannot overflow."""

    @model_validator(mode="after")
    def _check_kwaainet_has_such_runs(self) -> AveragingRun:
        if self.network == "kwaainet":
            check_kwaai_prefix(self.prefix)
            if self.kind != "DecentralizedAverager":
                raise ValueError(f"kind {self.kind} is of Hivemind's runs alone: remove it")
        return self

    @property
    def name(self) -> str:
        """What the run is called here: its prefix, and its network if that is not Petals."""
        return self.prefix if self.network == "petals" else f"{self.prefix} ({self.network})"


class AveragingConfig(_Section):
    """Averaging for runs of others; off unless runs are named."""

    runs: tuple[AveragingRun, ...] = ()
    peers: tuple[Annotated[str, _checked(_peer_id)], ...] | None = None
    """Ids of the only peers to average with. Left out: whoever takes part in the runs."""
    max_tensors_mib: Positive = defaults.AVERAGING_HELPED_BYTES // defaults.MIB
    """Largest tensors of a run, in MiB; up to three times that much memory is used."""

    @model_validator(mode="after")
    def _check_runs_differ(self) -> AveragingConfig:
        names = [(run.name, run.kind) for run in self.runs]
        if twice := next((name for name, kind in names if names.count((name, kind)) > 1), None):
            raise ValueError(f"runs: {twice!r} is there twice: remove one")
        return self


class NetworkQuotas(_Section):
    """Connections of each network beyond which its idle ones are closed before those of others."""

    petals: Positive | None = None
    kwaainet: Positive | None = None


class LimitsConfig(_Section):
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


class AdminConfig(_Section):
    """HTTP for the operator: is the node well, what does it do; see docs/monitoring.md."""

    listen: Annotated[str, _checked(parse_admin_address)] = "unix"
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


class LogConfig(_Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "text", "json"] = "auto"
    """``auto``: text on a terminal, JSON otherwise."""


class NodeConfig(_Section):
    """A whole node."""

    identity: IdentityConfig = IdentityConfig()
    listen: ListenAddresses = defaults.LISTEN_ADDRESSES
    """Addresses to listen on; port 0 takes any free one."""
    announce: AnnounceAddresses = ()
    """Addresses that others should dial, when they differ from those listened on (port forwarding)."""
    networks: NetworksConfig = NetworksConfig()
    protocols: ProtocolsConfig = ProtocolsConfig()
    kademlia: KademliaConfig = KademliaConfig()
    model: ModelConfig | None = None
    """What to serve; left out: nothing, the node is a bootstrap peer."""
    averaging: AveragingConfig = AveragingConfig()
    drain_seconds: Annotated[float, Field(ge=0)] = defaults.DRAIN_SECONDS
    """How long running sessions may go on after SIGTERM."""
    reachability: ReachabilityConfig = ReachabilityConfig()
    limits: LimitsConfig = LimitsConfig()
    admin: AdminConfig = AdminConfig()
    log: LogConfig = LogConfig()

    @property
    def admin_address(self) -> UnixAddress | TcpAddress | None:
        """Where the admin side is; None if it is off."""
        address = parse_admin_address(self.admin.listen)
        if isinstance(address, UnixAddress) and address.path is None:
            identity = self.identity.path
            return UnixAddress(identity.with_name(f"{identity.name}.sock"))
        return address

    @model_validator(mode="after")
    def _check_averaging_has_a_network(self) -> NodeConfig:
        for run in self.averaging.runs:
            if getattr(self.networks, run.network) is None or not self.listen:
                raise ValueError(
                    f"averaging.runs has {run.prefix!r}, but no averager can call this node: turn "
                    f"networks.{run.network} on and give it an address under listen, or remove the run"
                )
        return self

    @model_validator(mode="after")
    def _check_model_can_be_served(self) -> NodeConfig:
        if self.model is None:
            return self
        networks, protocols = self.networks, self.protocols
        by_petals = networks.petals is not None and protocols.petals_inference
        by_kwaai = networks.kwaainet is not None and protocols.kwaai_inference
        if not by_petals and not by_kwaai:
            raise ValueError(
                "model is given but no network serves it: turn on networks.petals with protocols.petals_inference, or "
                "networks.kwaainet with protocols.kwaai_inference, or remove model"
            )
        only_dials = networks.petals is not None and networks.petals.dht == "client"
        if (by_petals and only_dials) or not self.listen:
            raise ValueError(
                "model is given but nobody can dial this node: set networks.petals.dht to server and give "
                "it an address under listen, or remove model"
            )
        return self


def parse_config(text: str, source: str, overrides: dict[str, Any] | None = None) -> NodeConfig:
    """Read a configuration. ``overrides`` (nested like the YAML) replace its values.

    Raises ConfigError that lists every mistake with its key and the remedy.
    """
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ConfigError(f"{source}: not YAML: {e}") from e
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: expected keys and values, found {type(raw).__name__}")
    try:
        return NodeConfig.model_validate(merge_settings(raw, overrides or {}))
    except ValidationError as e:
        mistakes = "".join(f"\n  {mistake}" for mistake in _explain(e.errors()))
        raise ConfigError(f"{source}:{mistakes}") from e


def load_config(path: Path, overrides: dict[str, Any] | None = None) -> NodeConfig:
    """Read a configuration file; relative paths in it are relative to its folder. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(
            f"{path}: {e.strerror}; `kwaainet-bridge init` writes a configuration to start from"
        ) from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: not UTF-8 text") from e
    return anchored(parse_config(text, str(path), overrides), path.parent)


def anchored(config: NodeConfig, folder: Path) -> NodeConfig:
    """The same configuration with its paths made absolute: from ``folder``, ~ from the home folder.

    A model's name is a path if it looks like one, or if there is such a folder. Raises ConfigError for one that
    looks like a path where there is none.
    """
    path = _absolute("identity.path", config.identity.path, folder)
    identity = config.identity.model_copy(update={"path": path})
    model = config.model
    if model is not None and model.name != EMBEDDED_MODEL:
        path = _absolute("model.name", Path(model.name), folder)
        if path.is_dir():
            model = model.model_copy(update={"name": str(path)})
        elif model.name.startswith(("/", "./", "../", "~")):
            raise ConfigError(f"model.name: there is no folder {path}")
    admin = config.admin
    address = parse_admin_address(admin.listen)
    if isinstance(address, UnixAddress) and address.path is not None:
        listen = f"{UNIX_PREFIX}{_absolute('admin.listen', address.path, folder)}"
        admin = admin.model_copy(update={"listen": listen})
    if admin.token_file is not None:
        token_file = _absolute("admin.token_file", admin.token_file, folder)
        admin = admin.model_copy(update={"token_file": token_file})
    return config.model_copy(update={"identity": identity, "model": model, "admin": admin})


def _absolute(key: str, path: Path, folder: Path) -> Path:
    try:
        return (folder / path.expanduser()).absolute()
    except RuntimeError as e:
        raise ConfigError(f"{key}: {path} is in the home folder of nobody here") from e


def merge_settings(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``over``, section by section."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, dict):
            merged[key] = merge_settings(below if isinstance(below, dict) else {}, value)
        else:
            merged[key] = value
    return merged


_EXPECTED: Final = "Input should be "


def _explain(errors: Iterable[Any]) -> Iterator[str]:
    """Each mistake as "key: what is wrong; what to do (found what)"."""
    for location, group in itertools.groupby(errors, key=_location):
        alternatives = list(group)  # a value that is none of several types is reported once for each
        first, *others = (_wrong(location, error) for error in alternatives)
        message = " or ".join([first, *(other.removeprefix(_EXPECTED) for other in others)])
        found = alternatives[0].get("input")
        shown = (
            "" if "unknown key" in message or isinstance(found, dict | BaseModel) else f" (found {found!r})"
        )
        yield f"{'.'.join(location) or 'configuration'}: {message}{shown}"


def _location(error: Any) -> list[str]:
    # behind a key pydantic names the alternatives of its type, which mean nothing to a reader
    return list(itertools.takewhile(lambda part: re.fullmatch(r"[a-z_0-9]+", part), map(str, error["loc"])))


def _wrong(location: Sequence[str], error: Any) -> str:
    match error["type"]:
        case "extra_forbidden":
            known = _keys_at(location[:-1])
            close = difflib.get_close_matches(location[-1], known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
            return f"unknown key; {hint}"
        case "model_type":
            return f"holds keys and values ({', '.join(_keys_at(location))}), or is left out"
        case "tuple_type":
            return "must be a list: each value on a line of its own after a dash, or in brackets"
        case "float_parsing" | "float_type":
            return f"{_EXPECTED}a number"
    return str(error["msg"]).removeprefix("Value error, ")


def _keys_at(location: Sequence[str]) -> list[str]:
    """The keys that the schema knows below ``location``."""
    section: Any = NodeConfig
    for part in location:
        annotation = section.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(section.model_fields)
