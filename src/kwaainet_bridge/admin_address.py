"""Where a node's admin side is: how it is written, and how one gets there."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kwaainet_bridge.errors import ConfigError

UNIX_PREFIX: Final = "unix:"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A socket in the file system; ``path`` None for the one beside the node's identity."""

    path: Path | None

    def __str__(self) -> str:
        return f"{UNIX_PREFIX}{self.path}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """An IP address and a port."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        return ipaddress.ip_address(self.host).is_loopback

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def __str__(self) -> str:
        return self.url.removeprefix("http://")


def parse_admin_address(text: str) -> UnixAddress | TcpAddress | None:
    """Read ``unix``, ``unix:<path>``, ``<IP address>:<port>`` or ``off``, which is None. Raises ConfigError."""
    if text == "off":
        return None
    if text == "unix":
        return UnixAddress(None)
    if text.startswith(UNIX_PREFIX) and len(text) > len(UNIX_PREFIX):
        return UnixAddress(Path(text.removeprefix(UNIX_PREFIX)))
    host, _, port = text.rpartition(":")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        number = int(port) if port.isascii() and port.isdecimal() else -1
    except ValueError:
        number = -1
    if not 0 < number < 65536 or ("[" in host) is not (":" in host):
        raise ConfigError(
            "write it as unix, unix:<path>, an IP address and a port (127.0.0.1:9464, [::1]:9464), or off"
        )
    return TcpAddress(str(address), number)
