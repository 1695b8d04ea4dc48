"""What values in a configuration may be: names, addresses, numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Annotated, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
)

from kwaainet_bridge.errors import ConfigError, RemoteError
from kwaainet_bridge.net.addresses import parse_announce_address, parse_listen_address
from kwaainet_bridge.net.bootstrap import parse_bootstrap_addresses
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

BLOCKS = re.compile(r"^(\d{1,5}):(\d{1,5})$")


def checked(parse: Callable[[str], object]) -> AfterValidator:
    """A validator that keeps the text and refuses what the network's own parser refuses."""

    def check(text: str) -> str:
        try:
            parse(text)
        except ConfigError as e:
            raise ValueError(str(e)) from e
        return text

    return AfterValidator(check)


def as_peer_id(text: str) -> PeerId:
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


ListenAddresses = tuple[Annotated[str, checked(parse_listen_address)], ...]
AnnounceAddresses = tuple[Annotated[str, checked(parse_announce_address)], ...]
Bootstrap = Annotated[
    tuple[Annotated[str, AfterValidator(_check_bootstrap)], ...], AfterValidator(_expand_presets)
]

Relays = tuple[Annotated[str, checked(lambda text: parse_bootstrap_addresses([text]))], ...]

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
CompressionName = Literal[
    "NONE", "MEANSTD_16BIT", "FLOAT16", "QUANTILE_8BIT", "UNIFORM_8BIT", "BLOCKWISE_8BIT"
]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
