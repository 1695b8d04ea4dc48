"""In which order and how fast addresses are tried; sockets and names only pretend, time is the test clock's."""

from __future__ import annotations

import math
import socket
from collections.abc import AsyncIterator

import pytest
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import NetworkError, PeerUnreachable
from kwaainet_bridge.net.addresses import Address, parse_address
from kwaainet_bridge.net.channel import WrongPeer
from kwaainet_bridge.net.dialer import Dialer, HostFull
from kwaainet_bridge.wire.peer_id import PeerId

PEER, OTHER = (PeerId(b"\x12\x20" + bytes([i]) * 32) for i in range(2))
REFUSED = ConnectionRefusedError("Connection refused")


class Network:
    """``answers[host]``: seconds until it connects, or the exception that it fails with. Others are silent."""

    def __init__(self) -> None:
        self.answers: dict[str, float | Exception] = {}
        self.tried: list[tuple[float, str]] = []
        self.start = trio.current_time()
        self.upgraded: Exception | None = None

    async def connect(self, family: int, target) -> str:
        host = target[0]
        assert (family == socket.AF_INET6) == (":" in host)
        self.tried.append((round(trio.current_time() - self.start, 3), host))
        answer = self.answers.get(host, math.inf)
        if isinstance(answer, Exception):
            raise answer
        await trio.sleep(answer)
        return host

    async def connect_through(self, address: Address, _: PeerId) -> str:
        """Relays are asked like hosts, under their own ids."""
        relay = str(address.relay)
        self.tried.append((round(trio.current_time() - self.start, 3), relay))
        answer = self.answers.get(relay, math.inf)
        if isinstance(answer, Exception):
            raise answer
        await trio.sleep(answer)
        return relay

    async def upgrade(self, stream: str, _: PeerId, progress) -> str:
        await trio.lowlevel.checkpoint()
        if self.upgraded is not None:
            progress.enter("noise")
            raise self.upgraded
        return f"connection to {stream}"


class Resolver(trio.abc.HostnameResolver):
    def __init__(self) -> None:
        self.known: dict[str, tuple[float, list[str]]] = {}

    async def getaddrinfo(self, host, port, family=0, *_):
        seconds, found = self.known.get(host.decode(), (0, []))
        await trio.sleep(seconds)
        usable = [h for h in found if family in (0, socket.AF_INET6 if ":" in h else socket.AF_INET)]
        if not usable:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (h, port, 0, 0))
            if ":" in h
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (h, port))
            for h in usable
        ]

    async def getnameinfo(self, sockaddr, flags):
        raise NotImplementedError


@pytest.fixture
async def names() -> Resolver:
    resolver = Resolver()
    trio.socket.set_custom_hostname_resolver(resolver)
    return resolver


@pytest.fixture
async def network() -> Network:
    return Network()


misplaced: list[tuple[PeerId, Address]] = []


@pytest.fixture
async def dialer(network: Network) -> AsyncIterator[Dialer]:
    misplaced.clear()
    async with trio.open_nursery() as nursery:
        yield Dialer(
            nursery,
            network.upgrade,
            connect=network.connect,
            connect_through=network.connect_through,
            misplaced=lambda peer, address: misplaced.append((peer, address)),
        )
        nursery.cancel_scope.cancel()  # lookups outlive the dials


def at(*hosts: str) -> list[Address]:
    return [parse_address(f"{h if h.startswith('/') else family(h)}/tcp/1") for h in hosts]


def family(host: str) -> str:
    return f"/ip6/{host}" if ":" in host else f"/ip4/{host}"


async def test_families_take_turns_and_ipv6_is_first(autojump_clock, network, dialer) -> None:
    network.answers["8.8.8.3"] = 0.0
    v4, v6 = [f"8.8.8.{i}" for i in range(1, 5)], [f"2001:4860::{i}" for i in range(1, 3)]
    await dialer.dial(PEER, at(*v4, *v6))
    assert network.tried == [
        (0.0, v6[0]),
        (0.25, v4[0]),
        (0.5, v6[1]),
        (0.75, v4[1]),
        (1.0, v4[2]),
    ]


async def test_a_failure_starts_the_next_at_once(autojump_clock, network, dialer) -> None:
    network.answers = {"2001:4860::1": OSError("Network is unreachable"), "8.8.8.1": REFUSED, "8.8.8.2": 0.1}
    assert await dialer.dial(PEER, at("8.8.8.1", "8.8.8.2", "2001:4860::1")) == "connection to 8.8.8.2"
    assert network.tried == [(0.0, "2001:4860::1"), (0.0, "8.8.8.1"), (0.0, "8.8.8.2")]


async def test_a_slow_one_may_still_win(autojump_clock, network, dialer) -> None:
    network.answers = {"8.8.8.1": 0.6, "8.8.8.2": 5.0}
    assert await dialer.dial(PEER, at("8.8.8.1", "8.8.8.2")) == "connection to 8.8.8.1"
    assert trio.current_time() - network.start == pytest.approx(0.6)


async def test_private_addresses_come_last(autojump_clock, network, dialer) -> None:
    network.answers["192.168.1.1"] = 0.0
    await dialer.dial(PEER, at("192.168.1.1", "8.8.8.1", "127.0.0.1"))
    assert network.tried == [(0.0, "8.8.8.1"), (0.25, "192.168.1.1")]


async def test_names_become_attempts(autojump_clock, network, dialer, names) -> None:
    names.known["both.example"] = (0.1, ["8.8.8.1", "2001:4860::1", "8.8.8.2"])
    network.answers["8.8.8.2"] = 0.0
    await dialer.dial(PEER, at("/dns/both.example"))
    assert network.tried == [(0.1, "2001:4860::1"), (0.35, "8.8.8.1"), (0.6, "8.8.8.2")]


@pytest.mark.parametrize("only", [("dns4", "8.8.8.1"), ("dns6", "2001:4860::1")])
async def test_names_of_one_family(autojump_clock, network, dialer, names, only) -> None:
    protocol, host = only
    names.known["both.example"] = (0.0, ["8.8.8.1", "2001:4860::1"])
    network.answers[host] = 0.0
    await dialer.dial(PEER, at(f"/{protocol}/both.example"))
    assert network.tried == [(0.0, host)]


async def test_a_slow_name_holds_nobody_up(autojump_clock, network, dialer, names) -> None:
    names.known["slow.example"] = (3.0, ["8.8.8.1"])
    network.answers["8.8.8.2"] = 0.0
    await dialer.dial(PEER, at("/dns/slow.example", "8.8.8.2"))
    assert network.tried == [(0.0, "8.8.8.2")]


async def test_a_private_address_waits_for_a_name_but_not_long(
    autojump_clock, network, dialer, names
) -> None:
    names.known = {"quick.example": (0.1, ["8.8.8.1"]), "slow.example": (3.0, ["8.8.8.2"])}
    network.answers["10.0.0.1"] = 0.0
    await dialer.dial(PEER, at("/dns/quick.example", "/dns/slow.example", "10.0.0.1"))
    assert network.tried == [(0.1, "8.8.8.1"), (0.6, "10.0.0.1")]


async def test_the_same_endpoint_is_tried_once(autojump_clock, network, dialer, names) -> None:
    names.known["node.example"] = (0.0, ["8.8.8.1"])
    with pytest.raises(PeerUnreachable):
        await dialer.dial(PEER, at("8.8.8.1", "/dns/node.example"))
    assert len(network.tried) == 1


async def test_a_name_with_many_addresses(autojump_clock, network, dialer, names) -> None:
    names.known["many.example"] = (0.0, [f"8.8.8.{i}" for i in range(100)])
    network.answers = {f"8.8.8.{i}": REFUSED for i in range(100)}
    with pytest.raises(
        PeerUnreachable, match=r"/dns/many\.example/tcp/1 \(8\.8\.8\.3\): tcp: Connection refused"
    ):
        await dialer.dial(PEER, at("/dns/many.example"))
    assert len(network.tried) == defaults.MAX_ENDPOINTS_PER_NAME
    [result] = dialer.history.of(PEER)
    assert (result.failures, result.hop) == (1, "tcp")


async def test_a_silent_address_ends_after_its_time(autojump_clock, network, dialer) -> None:
    with pytest.raises(PeerUnreachable, match="no answer within 10 s"):
        await dialer.dial(PEER, at("8.8.8.1"))
    assert trio.current_time() - network.start == pytest.approx(10)


async def test_a_name_server_that_is_silent(autojump_clock, network, dialer, names) -> None:
    names.known["slow.example"] = (math.inf, [])
    with pytest.raises(PeerUnreachable, match="dns: no answer within 10 s") as caught:
        await dialer.dial(PEER, at("/dns/slow.example"))
    assert caught.value.hop == "dns"


async def test_what_failed_is_left_out_until_its_time(autojump_clock, network, dialer) -> None:
    network.answers["8.8.8.1"] = REFUSED
    addresses = at("8.8.8.1", "8.8.8.2")
    network.answers["8.8.8.2"] = 0.0
    await dialer.dial(PEER, addresses)
    await dialer.dial(PEER, addresses)
    assert [host for _, host in network.tried] == ["8.8.8.1", "8.8.8.2", "8.8.8.2"]
    await trio.sleep(defaults.DIAL_BACKOFF_SECONDS)
    await dialer.dial(PEER, addresses)
    assert [host for _, host in network.tried[3:]] == ["8.8.8.1", "8.8.8.2"]


async def test_all_left_out_fails_at_once_and_says_why(autojump_clock, network, dialer) -> None:
    network.answers["8.8.8.1"] = REFUSED
    for _ in range(2):
        with pytest.raises(PeerUnreachable) as caught:
            await dialer.dial(PEER, at("8.8.8.1"))
    assert len(network.tried) == 1
    assert "8.8.8.1/tcp/1: tcp: Connection refused; tried again in" in str(caught.value)


async def test_anyway_is_not_answered_by_an_attempt_that_left_something_out(
    autojump_clock, network, dialer
) -> None:
    network.answers["8.8.8.1"] = REFUSED
    with pytest.raises(PeerUnreachable):
        await dialer.dial(PEER, at("8.8.8.1"))
    network.answers["8.8.8.1"] = 0.0
    addresses = at("8.8.8.1", "8.8.8.2")  # the second is silent

    async def cautious() -> None:
        with pytest.raises(PeerUnreachable):
            await dialer.dial(PEER, addresses)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cautious)
        await trio.testing.wait_all_tasks_blocked()
        assert await dialer.dial(PEER, addresses, anyway=True) == "connection to 8.8.8.1"


async def test_cancelled_attempts_are_no_failures(autojump_clock, network, dialer) -> None:
    network.answers["8.8.8.2"] = 0.0
    await dialer.dial(PEER, at("8.8.8.1", "8.8.8.2"))  # the first is still waiting when the second wins
    [result] = dialer.history.of(PEER)
    assert result.address.host == "8.8.8.2"


async def test_another_peer_is_reported(autojump_clock, network, dialer) -> None:
    network.answers["8.8.8.1"] = 0.0
    network.upgraded = WrongPeer(OTHER)
    with pytest.raises(PeerUnreachable, match=f"another peer answers at this address: {OTHER}"):
        await dialer.dial(PEER, at("8.8.8.1"))
    assert misplaced == [(PEER, at("8.8.8.1")[0])]


async def test_a_full_host_blames_no_address(autojump_clock, network, dialer) -> None:
    network.answers["8.8.8.1"] = 0.0
    network.upgraded = HostFull("this host has 3 connections")
    with pytest.raises(PeerUnreachable, match="this host has 3 connections"):
        await dialer.dial(PEER, at("8.8.8.1"))
    assert dialer.history.of(PEER) == []


async def test_no_address(autojump_clock, dialer) -> None:
    with pytest.raises(PeerUnreachable, match="no address is known"):
        await dialer.dial(PEER, [])


async def test_a_leaver_takes_nothing_from_the_others(autojump_clock, network, dialer) -> None:
    network.answers["8.8.8.1"] = 1.0
    connections = []

    async def stay() -> None:
        connections.append(await dialer.dial(PEER, at("8.8.8.1")))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stay)
        with trio.move_on_after(0.5):
            await dialer.dial(PEER, at("8.8.8.1"))
    assert connections == ["connection to 8.8.8.1"]
    assert len(network.tried) == 1


async def test_relays_are_the_last_resort(autojump_clock, network: Network, dialer: Dialer) -> None:
    """A relayed address waits for its turn, behind private ones, and wins if nobody else answers."""
    network.answers[str(OTHER)] = 0.1
    addresses = [Address("ip4", "8.8.8.8", 1, relay=OTHER), *at("192.168.1.1", "9.9.9.9")]
    assert await dialer.dial(PEER, addresses) == f"connection to {OTHER}"
    assert network.tried == [(0.0, "9.9.9.9"), (0.25, "192.168.1.1"), (0.5, str(OTHER))]


async def test_a_relay_that_refuses_is_a_hop_of_its_own(network: Network, dialer: Dialer) -> None:
    network.answers[str(OTHER)] = NetworkError("no place")
    with pytest.raises(PeerUnreachable, match=r"relay: no place") as failed:
        await dialer.dial(PEER, [Address("ip4", "8.8.8.8", 1, relay=OTHER)])
    assert failed.value.hop == "relay"


async def test_many_addresses_leave_relayed_ones_a_turn(
    autojump_clock, network: Network, dialer: Dialer
) -> None:
    """Of a machine with many interfaces that only a relay leads to."""
    network.answers[str(OTHER)] = 0.1
    interfaces = at(*(f"8.8.8.{number}" for number in range(3 * defaults.MAX_DIAL_ADDRESSES)))
    found = await dialer.dial(PEER, [*interfaces, Address("ip4", "9.9.9.9", 1, relay=OTHER)])
    assert found == f"connection to {OTHER}"
    assert len(network.tried) == defaults.MAX_DIAL_ADDRESSES
