"""The YAML schema of a node; docs/configuration.md is the reader's view."""

from __future__ import annotations

from typing import Annotated

from pydantic import (
    Field,
    model_validator,
)

from kwaainet_bridge import defaults
from kwaainet_bridge.admin_address import TcpAddress, UnixAddress, parse_admin_address
from kwaainet_bridge.config import layouts
from kwaainet_bridge.config.running import IdleConfig, PeersConfig
from kwaainet_bridge.config.sections import (
    AdminConfig,
    IdentityConfig,
    KademliaConfig,
    LimitsConfig,
    LogConfig,
    NetworksConfig,
    OpenAIConfig,
    ProtocolsConfig,
    ReachabilityConfig,
)
from kwaainet_bridge.config.several import check_together
from kwaainet_bridge.config.values import AnnounceAddresses, ListenAddresses, Section
from kwaainet_bridge.config.work import AveragingConfig, ModelConfig


class NodeConfig(Section):
    """A whole node."""

    version: Annotated[int, Field(ge=1)] = layouts.present()
    """Layout of the file. There has been one so far; ``config migrate`` will lead from older to newer ones."""
    identity: IdentityConfig = IdentityConfig()
    listen: ListenAddresses = defaults.LISTEN_ADDRESSES
    """Where to listen: ``/ip4/<address>/tcp/<port>`` or ``/ip6/…``. Port 0 takes any free one. An empty list
    listens nowhere; such a node can only dial."""
    announce: AnnounceAddresses = ()
    """What others are told to dial instead of the addresses listened on, for instance a router's forwarded
    port. ``/ip4``, ``/ip6``, ``/dns``, ``/dns4`` or ``/dns6``, then ``/tcp/<port>``."""
    networks: NetworksConfig = NetworksConfig()
    protocols: ProtocolsConfig = ProtocolsConfig()
    kademlia: KademliaConfig = KademliaConfig()
    model: ModelConfig | None = None
    """What to serve. Left out: nothing. ``model: {}`` serves the whole embedded model."""
    models: tuple[ModelConfig, ...] = ()
    """The same for several models (docs/configuration.md#several-models), each with the keys of ``model``,
    which must be left out then."""
    averaging: AveragingConfig = AveragingConfig()
    drain_seconds: Annotated[float, Field(ge=0)] = defaults.DRAIN_SECONDS
    """How long running sessions may go on after SIGTERM."""
    reachability: ReachabilityConfig = ReachabilityConfig()
    limits: LimitsConfig = LimitsConfig()
    peers: PeersConfig = PeersConfig()
    idle: IdleConfig = IdleConfig()
    admin: AdminConfig = AdminConfig()
    openai: OpenAIConfig = OpenAIConfig()
    log: LogConfig = LogConfig()

    @property
    def admin_address(self) -> UnixAddress | TcpAddress | None:
        """Where the admin side is; None if it is off."""
        address = parse_admin_address(self.admin.listen)
        if isinstance(address, UnixAddress) and address.path is None:
            identity = self.identity.path
            return UnixAddress(identity.with_name(f"{identity.name}.sock"))
        return address

    @property
    def openai_models(self) -> tuple[str, ...]:
        """What clients of the endpoint may ask for."""
        return self.openai.models or tuple(dict.fromkeys(model.name for model in self.served_models))

    @property
    def served_models(self) -> tuple[ModelConfig, ...]:
        """All that is to be served: ``model`` or ``models``."""
        return self.models if self.model is None else (self.model,)

    @model_validator(mode="after")
    def _check_openai_has_a_model(self) -> NodeConfig:
        if self.openai.listen != "off" and not self.openai_models:
            raise ValueError(
                "openai.listen is set, but there is no model to generate with: give openai.models"
            )
        return self

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
    def _check_models_can_be_served(self) -> NodeConfig:
        if self.model is not None and self.models:
            raise ValueError("model and models exclude each other: make model an entry of models")
        networks, protocols = self.networks, self.protocols
        by_petals = networks.petals is not None and protocols.petals_inference
        by_kwaai = networks.kwaainet is not None and protocols.kwaai_inference
        only_dials = networks.petals is not None and networks.petals.dht == "client"
        for model in self.served_models:
            given = "model is given" if self.model is not None else f"models has {model.name!r}"
            in_petals = by_petals and "petals" in model.networks
            if not in_petals and not (by_kwaai and "kwaainet" in model.networks):
                raise ValueError(
                    f"{given} but no network serves it: turn on networks.petals with protocols.petals_inference, or "
                    "networks.kwaainet with protocols.kwaai_inference, and name it under the model's networks, or "
                    "remove the model"
                )
            if (in_petals and only_dials) or not self.listen:
                raise ValueError(
                    f"{given} but nobody can dial this node: set networks.petals.dht to server and give "
                    "it an address under listen, or remove the model"
                )
        check_together(self.served_models, kwaainet=by_kwaai)
        return self
