"""A laboratory of networks: a small public internet, hosts on it, private networks behind NAT routers, bad links.

Each machine is a network namespace without a name, held by a process that ends with this one: two runs cannot meet,
and nothing is left of one that was killed. No namespace is connected to the machine's own network, so no packet leaves.
Public addresses are of 5.44.0.0/16, which count as global everywhere: stock peers use relays and AutoNAT for such alone.

    with Lab(folder_of_logs) as lab:
        outside = lab.host("outside")             # 5.44.1.2, behind a gateway
        router = lab.nat("router", "symmetric")   # 5.44.2.2, and 192.168.2.1 inside
        inside = router.host("inside")            # 192.168.2.2
        router.forward_port(4001, inside)
        inside.link.loss(10)
        process = inside.process("node", [python, "-m", "something"], env={})
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from child_processes import Driver, Process

NatKind = Literal["cone", "symmetric"]

_MASQUERADE: dict[NatKind, str] = {
    # Keeps the inner port: its outside is the same for whomever it talks to, while no two inner hosts use it.
    "cone": "masquerade",
    # Each connection gets a port of its own, which nobody can guess.
    "symmetric": "masquerade fully-random",
}
_PRIVATE = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")


class LabFailed(Exception):
    """A command that builds the laboratory failed; the message holds it and what it said."""


def tool(name: str) -> str:
    """The path of a system command, which PATH need not lead to. FileNotFoundError."""
    path = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if path is None:
        raise FileNotFoundError(f"{name} is missing: `make setup` as root installs iproute2 and nftables")
    return path


def why_not() -> str | None:
    """What the system says to a process that may not make network namespaces; None if this one may."""
    tried = subprocess.run([tool("unshare"), "--net", "true"], capture_output=True, text=True, check=False)
    return tried.stderr.strip() if tried.returncode else None


class Lab:
    """All of it. Leaving it ends the processes that were started in it, and then its networks."""

    def __init__(self, work: Path) -> None:
        """``work``: the folder of the processes' logs."""
        self.work = work
        self.owned = ExitStack()
        self._numbers = itertools.count(1)
        self._internet = Namespace()

    def __enter__(self) -> Self:
        with ExitStack() as building:
            building.enter_context(self._internet)
            self._internet.forward_packets()
            # as in the real one: what is sent to a private address is lost without an answer
            self._internet.ip(*(f"route add blackhole {block}" for block in _PRIVATE))
            self.owned = building.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self.owned.__exit__(*exc)

    def host(self, name: str) -> Host:
        """A machine with a public address and without a firewall."""
        host = self.owned.enter_context(Host(self, name))
        self._connect(host, next(self._numbers))
        return host

    def nat(self, name: str, kind: NatKind) -> Router:
        """A router with a public address. Those inside may talk to everybody, and nobody to them unasked."""
        number = next(self._numbers)
        router = self.owned.enter_context(Router(self, name, number))
        self._connect(router, number)
        router.open(kind)
        return router

    def _connect(self, machine: Machine, number: int) -> None:
        near = f"link{number}"
        machine.connect(self._internet, near, address=f"5.44.{number}.2", gateway=f"5.44.{number}.1")
        self._internet.ip(f"address add 5.44.{number}.1/24 dev {near}")


class Namespace:
    """A network namespace, from ``with`` on; it has a loopback interface."""

    _holder: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        # cat ends when its input does: with this process, whatever becomes of it
        argv = [tool("unshare"), "--net", "sh", "-c", "echo made && exec cat"]
        self._holder = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._holder.stdout is not None
        if not self._holder.stdout.readline():
            self.__exit__()
            raise LabFailed(f"{' '.join(argv)}: ended with {self._holder.returncode}")
        self.ip("link set lo up")
        return self

    def __exit__(self, *_: object) -> None:
        self._holder.communicate()

    @property
    def pid(self) -> int:
        """A process that lives in it."""
        return self._holder.pid

    @property
    def path(self) -> str:
        """Its file, for setns(2)."""
        return f"/proc/{self.pid}/ns/net"

    def inside(self, argv: Sequence[str | os.PathLike[str]]) -> list[str]:
        """The command line that runs ``argv`` in it, as the same process."""
        return [tool("nsenter"), f"--net={self.path}", "--", *map(os.fspath, argv)]

    def run(self, *argv: str, stdin: str = "") -> str:
        """Run a short command in it and return what it printed. LabFailed."""
        done = subprocess.run(self.inside(argv), input=stdin, capture_output=True, text=True, check=False)
        if done.returncode:
            raise LabFailed(f"{' '.join(argv)}: {done.stderr.strip() or done.returncode}\n{stdin}")
        return done.stdout

    def ip(self, *commands: str) -> None:
        """Run commands of ``ip``, given without that word."""
        self.run(tool("ip"), "-batch", "-", stdin="".join(f"{command}\n" for command in commands))

    def nft(self, rules: str) -> None:
        """Apply firewall rules: all of them or none."""
        self.run(tool("nft"), "-f", "-", stdin=rules)

    def forward_packets(self) -> None:
        self.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")


@dataclass(frozen=True)
class Link:
    """One cable: the interfaces at its ends. What it does not carry is lost without a word, in both directions.

    Only IP packets are: who is at the other end of the cable stays known, as if the trouble were further off.
    """

    ends: tuple[tuple[Namespace, str], tuple[Namespace, str]]

    @classmethod
    def lay(cls, near: Namespace, near_interface: str, far: Namespace, far_interface: str) -> Link:
        near.ip(
            f"link add {near_interface} type veth peer name {far_interface} netns {far.pid}",
            f"link set {near_interface} addrgenmode none",  # no IPv6 here
            f"link set {near_interface} gso_max_segs 1 up",  # packets as small as on a wire: one is lost at a time
        )
        far.ip(
            f"link set {far_interface} addrgenmode none",
            f"link set {far_interface} gso_max_segs 1 up",
        )
        return cls(((near, near_interface), (far, far_interface)))

    def loss(self, percent: int) -> None:
        """Lose this share of the packets of each direction, by chance."""
        chance = f"numgen random mod 100 < {percent}" if percent < 100 else ""
        for namespace, interface in self.ends:
            namespace.nft(f"""
                table netdev {interface}
                delete table netdev {interface}
                table netdev {interface} {{
                  chain arriving {{
                    type filter hook ingress device "{interface}" priority filter; policy accept;
                    meta protocol ip {chance} counter drop
                  }}
                }}
            """)

    def cut(self) -> None:
        """Lose everything."""
        self.loss(100)

    def mend(self) -> None:
        """Lose nothing any more."""
        for namespace, interface in self.ends:
            namespace.nft(f"table netdev {interface}\ndelete table netdev {interface}\n")


class Machine(Namespace):
    """A namespace with a name, an address, a link to the internet, and processes."""

    interface = "eth0"
    link: Link
    address: str
    gateway: str

    def __init__(self, lab: Lab, name: str) -> None:
        self.name = name
        self.work = lab.work
        self._lab = lab

    def connect(self, above: Namespace, port: str, *, address: str, gateway: str) -> None:
        """Lay the link to ``above`` and take an address. ``port``: the name of the interface there."""
        self.link = Link.lay(above, port, self, self.interface)
        self.address = address
        self.gateway = gateway
        self.ip(f"address add {address}/24 dev {self.interface}")
        self._find_gateway()

    def _find_gateway(self) -> None:
        # The shortest wait for an acknowledgement, 200 ms by default, would be a thousand round trips here, and nearly
        # all of the time that a lossy transfer takes.
        self.ip(f"route add default via {self.gateway} rto_min 20ms")

    def at(self, port: int) -> str:
        """The multiaddr of a TCP port of this machine."""
        return f"/ip4/{self.address}/tcp/{port}"

    def process(
        self, name: str, argv: Sequence[str | os.PathLike[str]], *, env: Mapping[str, str]
    ) -> Process:
        """Start a process on this machine. It ends with the laboratory at the latest."""
        process = Process(name, self.inside(argv), env=env, log=self._log(name))
        return self._lab.owned.enter_context(process)

    def driver(self, name: str, argv: Sequence[str | os.PathLike[str]], *, env: Mapping[str, str]) -> Driver:
        """The same for a script that speaks the line protocol."""
        driver = Driver(name, self.inside(argv), env=env, log=self._log(name))
        return self._lab.owned.enter_context(driver)

    def _log(self, name: str) -> Path:
        return self.work / f"{self.name}-{name}.log"


class Host(Machine):
    """A machine that packets end at."""


class Router(Machine):
    """A NAT: 192.168.<number>.0/24 inside, one public address outside."""

    interface = "wan"

    def __init__(self, lab: Lab, name: str, number: int) -> None:
        super().__init__(lab, name)
        self._network = f"192.168.{number}"
        self._hosts = itertools.count(2)

    def open(self, kind: NatKind) -> None:
        """Begin to route, once the link is laid."""
        self.ip(
            "link add lan type bridge",
            "link set lan addrgenmode none up",
            f"address add {self._network}.1/24 dev lan",
        )
        # Unasked packets are dropped, not refused: a refusal would end the other half of a hole punching.
        self.nft(f"""
            table ip router {{
              chain forwarded_ports {{
                type nat hook prerouting priority dstnat; policy accept;
              }}
              chain leaving {{
                type nat hook postrouting priority srcnat; policy accept;
                oifname "wan" {_MASQUERADE[kind]}
              }}
              chain to_itself {{
                type filter hook input priority filter; policy drop;
                iifname "lan" accept
                ct state established,related accept
              }}
              chain through {{
                type filter hook forward priority filter; policy drop;
                iifname "lan" accept
                ct state established,related accept
                ct status dnat accept
              }}
            }}
        """)
        self.forward_packets()

    def host(self, name: str) -> Host:
        """A machine in the private network."""
        number = next(self._hosts)
        host = self._lab.owned.enter_context(Host(self._lab, name))
        host.connect(self, f"lan{number}", address=f"{self._network}.{number}", gateway=f"{self._network}.1")
        self.ip(f"link set lan{number} master lan")
        return host

    def forward_port(self, port: int, host: Host, inner_port: int | None = None) -> None:
        """Send what comes to a TCP port of the public address to a host inside, at the same port if none is named."""
        target = f"{host.address}:{port if inner_port is None else inner_port}"
        self.nft(f'add rule ip router forwarded_ports iifname "wan" tcp dport {port} dnat to {target}')

    def forget(self) -> None:
        """Lose all mappings, as when a router restarts or its line gets a new session. Forwarded ports stay."""
        self.ip("link set wan down", "link set wan up")
        self._find_gateway()
