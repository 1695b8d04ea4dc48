"""``doctor``: each hop that can fail is told with a remedy, and the steps after it are skipped."""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from typer.testing import CliRunner

from kwaainet_bridge import defaults
from kwaainet_bridge.cli import doctor
from kwaainet_bridge.cli.app import app
from kwaainet_bridge.cli.doctor import (
    REMEDIES,
    Examination,
    Step,
    Verdict,
    examine,
    examine_peers,
    open_callee,
)
from kwaainet_bridge.config import parse_config
from kwaainet_bridge.errors import ConfigError, PeerUnreachable
from kwaainet_bridge.hivemind.dht import DhtNode
from kwaainet_bridge.net import Host, HostConfig, open_host
from kwaainet_bridge.net.addresses import Address
from kwaainet_bridge.net.autonat import AUTONAT, AutoNatService
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.net.kademlia import KAD
from kwaainet_bridge.net.probe import dial_anew
from kwaainet_bridge.rpc import RpcClient, RpcServer

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
NOBODY = Identity.generate("ed25519").peer_id
STEPS = list(REMEDIES)


def closed_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    """A peer that serves no DHT."""
    async with open_host(HostConfig(Identity.generate("ed25519"))) as host:
        yield host


@asynccontextmanager
async def dht_peer(host: Host, clock: Callable[[], float] = time.time) -> AsyncIterator[str]:
    """``host`` with a DHT; its address."""
    async with DhtNode(host, RpcServer(host), RpcClient(host), clock=clock).running():
        yield host.addresses()[0]


def failed_at(examination: Examination) -> Step:
    """The one step that failed; all before it passed, all after it are skipped."""
    assert [step.name for step in examination.steps] == STEPS
    at = STEPS.index(examination.failed)
    for step in examination.steps[:at]:
        assert step.verdict is Verdict.OK or (step.name, step.verdict) == ("dns", Verdict.SKIPPED)
    for step in examination.steps[at + 1 :]:
        assert (step.verdict, step.seconds, step.remedy) == (Verdict.SKIPPED, None, "")
    failed = examination.steps[at]
    assert failed.detail
    assert failed.seconds is not None
    assert str(failed).endswith(f"; {failed.remedy}")
    return failed


async def test_a_peer_that_is_well(host: Host) -> None:
    told: list[Step] = []
    async with dht_peer(host) as address:
        examination = await examine(address, tell=told.append)
    assert examination.failed is None
    assert told == examination.steps
    assert [step.name for step in told] == STEPS
    verdicts = {step.name: step.verdict for step in told}
    assert [name for name, verdict in verdicts.items() if verdict is Verdict.SKIPPED] == ["dns", "dial-back"]
    assert all((step.seconds or 0) > 0 for step in told if step.verdict is Verdict.OK)
    assert abs(examination.clock_seconds) < 1


async def test_a_name_is_resolved(host: Host) -> None:
    async with dht_peer(host) as address:
        examination = await examine(address.replace("/ip4/127.0.0.1/", "/dns4/localhost/"))
    assert examination.failed is None
    assert examination.steps[0].verdict is Verdict.OK


async def test_dial_back(host: Host) -> None:
    async with dht_peer(host) as address, open_callee(LOOPBACK) as callee:
        examination = await examine(address, callee=callee)
    assert examination.steps[-1].verdict is Verdict.OK
    assert "over our connection" in examination.steps[-1].detail


async def test_dial_back_over_a_connection_of_its_own(host: Host) -> None:
    host.serve(AUTONAT, AutoNatService(lambda _: "127.0.0.1", dial_anew).serve)
    async with dht_peer(host) as address, open_callee(LOOPBACK) as callee:
        last = (await examine(address, callee=callee)).steps[-1]
        [own] = callee.host.own.direct
    assert (last.verdict, last.detail) == (
        Verdict.OK,
        f"over a connection of its own to {own} (AutoNAT)",
    )


async def test_who_dials_back_and_does_not_get_through(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    async def blocked(*_: object) -> Address:
        raise PeerUnreachable("a router drops it", hop="tcp")

    monkeypatch.setattr(defaults, "AUTONAT_DIAL_SECONDS", 0.01)
    host.serve(AUTONAT, AutoNatService(lambda _: "127.0.0.1", blocked).serve)
    async with dht_peer(host) as address, open_callee(LOOPBACK) as callee:
        failed = failed_at(await examine(address, callee=callee))
    assert failed.name == "dial-back"
    assert failed.detail == "it dialled us over a connection of its own and did not get through (AutoNAT)"
    assert "forward it in the router" in failed.remedy


async def test_nobody_calls_back(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    async def deaf(*_: object) -> None:
        return None

    monkeypatch.setattr("kwaainet_bridge.hivemind.dht.client.DhtClient.call_back", deaf)
    async with dht_peer(host) as address, open_callee(LOOPBACK) as callee:
        failed = failed_at(await examine(address, callee=callee))
    assert failed.name == "dial-back"
    assert "call us back" in failed.detail


class NoNames(trio.abc.HostnameResolver):
    async def getaddrinfo(self, *_):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async def getnameinfo(self, *_):
        raise NotImplementedError


async def test_unknown_name() -> None:
    trio.socket.set_custom_hostname_resolver(NoNames())
    failed = failed_at(await examine(f"/dns4/no.such.example/tcp/4001/p2p/{NOBODY}"))
    assert failed.name == "dns"
    assert "not known" in failed.detail


async def test_refused() -> None:
    failed = failed_at(await examine(f"/ip4/127.0.0.1/tcp/{closed_port()}/p2p/{NOBODY}"))
    assert failed.name == "tcp"
    assert "refused" in failed.detail
    assert "forwarded" in failed.remedy


async def test_another_peer(host: Host) -> None:
    failed = failed_at(await examine(host.addresses()[0].replace(str(host.peer_id), str(NOBODY))))
    assert failed.name == "noise"
    assert str(host.peer_id) in failed.detail
    assert "peer id" in failed.remedy


async def test_no_kademlia(host: Host) -> None:
    host.unserve(KAD)
    assert failed_at(await examine(host.addresses()[0])).name == "kademlia"


async def test_no_dht(host: Host) -> None:
    failed = failed_at(await examine(host.addresses()[0]))
    assert failed.name == "dht ping"
    assert "bootstrap peer" in failed.remedy


@pytest.mark.parametrize("ahead", [10.0, -10.0])
async def test_clock(host: Host, ahead: float) -> None:
    async with dht_peer(host, lambda: time.time() + ahead) as address:
        examination = await examine(address)
    failed = failed_at(examination)
    assert failed.name == "dht ping"
    assert "NTP" in failed.remedy
    assert abs(examination.clock_seconds - ahead) < 2


async def test_a_clock_beyond_all_numbers_is_valid_json(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    async with dht_peer(host, lambda: math.nan) as address:
        assert not await examine_peers(config_of(address), None, True)
    assert "NaN" not in capsys.readouterr().out


def test_what_a_peer_says_stays_on_its_line() -> None:
    assert str(Step("identify", Verdict.OK, 0.001, "an\nagent\x1b[2J")).endswith("ok       an?agent?[2J")


async def test_a_clock_within_the_limit(host: Host) -> None:
    ahead = defaults.DHT_CLOCK_SKEW_SECONDS - 1
    async with dht_peer(host, lambda: time.time() + ahead) as address:
        examination = await examine(address)
    assert examination.failed is None
    assert abs(examination.clock_seconds - ahead) < 1


def config_of(*addresses: str):
    return parse_config("", "test", {"networks": {"petals": {"bootstrap": list(addresses)}}})


async def test_json(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = f"/ip4/127.0.0.1/tcp/{closed_port()}/p2p/{NOBODY}"
    async with dht_peer(host) as address:
        assert not await examine_peers(config_of(address, nowhere), LOOPBACK, True)
    told = json.loads(capsys.readouterr().out)
    assert told.keys() == {"passed", "peers"}
    assert [(p["address"], p["passed"]) for p in told["peers"]] == [(address, True), (nowhere, False)]
    for peer in told["peers"]:
        assert peer.keys() == {"address", "passed", "clock_seconds", "steps"}
        assert [step["step"] for step in peer["steps"]] == STEPS
        for step in peer["steps"]:
            assert step.keys() == {"step", "verdict", "ms", "detail", "remedy"}
            assert (step["ms"] is None) == (step["verdict"] == "skipped")
            assert bool(step["remedy"]) == (step["verdict"] == "FAILED")
    assert told["peers"][1]["clock_seconds"] is None


async def test_lines(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    async with dht_peer(host) as address:
        assert await examine_peers(config_of(address), None, False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"peer      {address}"
    assert [line[:10].strip() for line in lines[1:]] == STEPS
    assert lines[2].endswith("ms  ok")


async def test_no_peer_to_examine() -> None:
    with pytest.raises(ConfigError, match="no peer to examine"):
        await examine_peers(config_of(), None, False)


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 1)])
def test_exit_code(monkeypatch: pytest.MonkeyPatch, passed: bool, code: int) -> None:
    asked = []

    async def examine_peers(config, listen, as_json):
        await trio.lowlevel.checkpoint()
        asked.append((config.networks.petals.bootstrap, listen, as_json))
        return passed

    monkeypatch.setattr(doctor, "examine_peers", examine_peers)
    address = f"/ip4/127.0.0.1/tcp/1/p2p/{NOBODY}"
    assert CliRunner().invoke(app, ["doctor", address, "--json", "--listen", LOOPBACK]).exit_code == code
    assert asked == [((address,), LOOPBACK, True)]
