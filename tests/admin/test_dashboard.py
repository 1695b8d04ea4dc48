"""The dashboard's routes: who gets what, what a page is told and when, and what it costs the network."""

from __future__ import annotations

import json
import re
from contextlib import asynccontextmanager
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import trio
from admin_support import asking, check_documented, free_port, served, until
from node_support import NOWHERE, PREFIX, node_config, running_node

from kwaainet_bridge import defaults
from kwaainet_bridge.admin_address import TcpAddress, UnixAddress
from kwaainet_bridge.errors import NetworkError
from kwaainet_bridge.hivemind.client import Span, SurveyedModel, SwarmModel
from kwaainet_bridge.hivemind.experts.records import ServerInfo, ServerState
from kwaainet_bridge.node.admin.coverage import CoverageWatch
from kwaainet_bridge.node.admin.dashboard import STATIC_PATHS
from kwaainet_bridge.node.admin.problems import problems, remedy_of
from kwaainet_bridge.node.readiness import conditions
from kwaainet_bridge.node.state import NodeState, Phase
from kwaainet_bridge.node.surveying import models_to_show
from kwaainet_bridge.wire.peer_id import PeerId

TOKEN = "0123456789abcdef0123"
PEERS = [PeerId(b"\x12\x20" + bytes([n]) * 32) for n in range(3)]


class Page:
    """What a page is told, as it comes."""

    def __init__(self, stream: trio.SocketStream, rest: bytes) -> None:
        self._stream = stream
        self._rest = rest
        self.seen: dict[str, list] = {}

    async def next(self, name: str):
        """The next message of this name; those on the way, too, are kept in ``seen``."""
        with trio.fail_after(20):
            while True:
                message, end, self._rest = self._rest.partition(b"\n\n")
                if not end:
                    more = await self._stream.receive_some()
                    assert more, f"the stream ended before {name}"
                    self._rest = message + more
                    continue
                event, data = message.decode().split("\n")
                kind = event.removeprefix("event: ")
                self.seen.setdefault(kind, []).append(json.loads(data.removeprefix("data: ")))
                if kind == name:
                    return self.seen[kind][-1]


@asynccontextmanager
async def opened(address, *headers: str, asked: str = ""):
    """A page. It speaks HTTP/1.0, whose answers are what comes until the end."""
    if isinstance(address, TcpAddress):
        stream = await trio.open_tcp_stream(address.host, address.port)
    else:
        stream = await trio.open_unix_socket(str(address.path))
    async with stream:
        lines = (f"GET /api/events?{asked} HTTP/1.0", "Host: localhost", *headers, "", "")
        await stream.send_all("\r\n".join(lines).encode())
        head = b""
        while b"\r\n\r\n" not in head:
            head += await stream.receive_some()
        head, _, rest = head.partition(b"\r\n\r\n")
        status, *told = head.decode().lower().split("\r\n")
        assert " 200" in status
        assert {"content-type: text/event-stream; charset=utf-8", "cache-control: no-store"} <= set(told)
        yield Page(stream, rest)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(defaults, "DASHBOARD_PERIOD_SECONDS", 0.02)


# --- files


async def test_the_pages_are_whole_and_ask_nobody_else(tmp_path):
    """Every file that they name is served by the node, and no address of another host is in it."""
    address = UnixAddress(tmp_path / "node.sock")
    pages, common = ("/", "/chat"), {"/", "/chat", "/dashboard.css", "data:,"}
    async with served(address), asking(address) as client:
        for path, own in zip(pages, ({"/dashboard.js"}, {"/chat.css", "/chat.js"}), strict=True):
            named = Named()
            named.feed((await client.get(path)).text)
            assert named.files == common | own
            assert not named.inline, "the policy forbids it"
        for path in STATIC_PATHS:
            answer = await client.get(path)
            assert answer.status_code == 200
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            others = set(re.findall(r"https?://[^\"'\s]+", answer.text)) - {"http://www.w3.org/2000/svg"}
            assert not others, path
            imported = set(re.findall(r'from "\.(/[\w.]+)"', answer.text))
            assert imported <= set(STATIC_PATHS), path
        assert (await client.get("/dashboard.map")).status_code == 404
        assert (await client.post("/")).status_code == 405


class Named(HTMLParser):
    """Files that a page names, and what it has of scripts and styles itself."""

    def __init__(self) -> None:
        super().__init__()
        self.files: set[str] = set()
        self.inline: list[str] = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.files |= {given[name] for name in ("src", "href") if name in given}
        self.inline += [name for name in given if name == "style" or name.startswith("on")]
        self.inline += [tag for _ in [0] if tag == "style" or (tag == "script" and "src" not in given)]


async def test_text_gets_into_the_page_as_text_only(tmp_path):
    address = UnixAddress(tmp_path / "node.sock")
    async with served(address), asking(address) as client:
        scripts = [(await client.get(path)).text for path in ("/dashboard.js", "/page.js", "/chat.js")]
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "DOMParser"):
        assert not any(way in script for script in scripts)


# --- who may


async def test_the_page_needs_no_token_and_what_it_shows_does(tmp_path):
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    address = TcpAddress("127.0.0.1", free_port())
    async with served(address, token_file=file), asking(address) as client:
        for path in STATIC_PATHS:
            assert (await client.get(path)).status_code == 200
        for wrong in ({}, {"Authorization": f"Bearer {TOKEN}x"}):
            assert (await client.get("/api/events", headers=wrong)).status_code == 401
        async with opened(address, f"Authorization: Bearer {TOKEN}") as page:
            assert (await page.next("status"))["phase"]["name"] == "starting"


async def test_a_site_that_has_its_name_point_here_gets_nothing():
    address = TcpAddress("127.0.0.1", free_port())
    async with served(address), asking(address) as client:
        for path in (*STATIC_PATHS, "/api/events"):
            assert (await client.get(path, headers={"Host": "evil.example"})).status_code == 421


# --- what a page is told


async def test_a_page_is_told_all_at_first_and_then_what_changes(tmp_path):
    address = UnixAddress(tmp_path / "node.sock")
    state = NodeState(unix_clock=lambda: 1000.0)
    state.degrade("clock", "two hours late")
    async with served(address, state=state), opened(address) as page:
        check_documented(await page.next("status"))
        assert await page.next("events") == [
            {"at": 1000.0, "kind": "degraded", "text": "clock: two hours late"}
        ]
        assert await page.next("peers") == {"total": 0, "peers": []}
        assert await page.next("coverage") == {}
        for _ in range(3):
            await page.next("status")
        assert {name: len(told) for name, told in page.seen.items() if name != "status"} == {
            "events": 1,
            "peers": 1,
            "coverage": 1,
        }
        state.recover("clock")
        assert [event["kind"] for event in await page.next("events")] == ["degraded", "recovered"]
        assert (await page.next("status"))["problems"] == []


async def test_a_page_may_be_told_the_status_alone_and_then_the_networks_are_not_read(tmp_path):
    address = UnixAddress(tmp_path / "node.sock")
    state = NodeState()
    surveys = Surveys(state, [])
    async with served(address, state=state), opened(address, asked="only=status") as page:
        for _ in range(3):
            check_documented(await page.next("status"))
        assert set(page.seen) == {"status"}
        assert surveys.reads == 0
        async with asking(address) as client:
            wrong = await client.get("/api/events?only=peers")
            assert (wrong.status_code, wrong.text) == (400, "only=status, or nothing for everything\n")


async def test_a_page_that_is_closed_is_no_longer_told_and_its_place_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(defaults, "DASHBOARD_PAGES", 1)
    address = UnixAddress(tmp_path / "node.sock")
    async with served(address), asking(address) as client:
        async with opened(address) as page:
            await page.next("status")
            full = await client.get("/api/events")
            assert (full.status_code, full.headers["retry-after"]) == (503, "5")
            assert "close one" in full.text

        async def has_room() -> bool:
            async with client.stream("GET", "/api/events") as answer:
                return answer.status_code == 200

        await until(has_room)


async def test_pages_listen_for_longer_than_others_may_be_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(defaults, "WEB_IDLE_SECONDS", 1)
    address = UnixAddress(tmp_path / "node.sock")
    async with served(address), opened(address) as page:
        began = trio.current_time()
        while trio.current_time() < began + 1.5:
            await page.next("status")


async def test_whoever_asks_for_the_head_of_the_stream_alone_gets_that(tmp_path):
    address = UnixAddress(tmp_path / "node.sock")
    async with served(address), asking(address) as client:
        assert (await client.head("/api/events")).status_code == 200


async def test_the_node_stops_while_pages_are_open(tmp_path):
    address = UnixAddress(tmp_path / "node.sock")
    async with served(address):
        client = await trio.open_unix_socket(str(address.path))
        await client.send_all(b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert await client.receive_some()
        stopped = trio.current_time()
    assert trio.current_time() - stopped < 2
    await client.aclose()


# --- coverage


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def surveyed(blocks: int = 8, *spans: Span) -> SurveyedModel:
    return SurveyedModel(SwarmModel("m-hf", blocks), spans)


def span(n: int, first: int, end: int, state=ServerState.ONLINE, **more) -> Span:
    info = ServerInfo(state, more.pop("throughput", 5.0), start_block=first, end_block=end, **more)
    return Span(PEERS[n], range(first, end), info)


class Surveys:
    """A network that counts how often it is read."""

    def __init__(self, state: NodeState, *answers) -> None:
        self.reads = 0
        self._answers = answers
        state.surveys = {"petals": self.read}

    async def read(self):
        self.reads += 1
        answer = self._answers[min(self.reads, len(self._answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer


async def test_the_network_is_read_at_most_once_a_minute_however_many_pages_look(nursery):
    clock = Clock()
    state = NodeState(clock=clock)
    surveys, watch = Surveys(state, [surveyed()]), CoverageWatch(state, nursery)
    for second in range(125):
        clock.now = 100.0 + second
        for _ in range(4):
            watch.refresh()
        await trio.testing.wait_all_tasks_blocked()
    assert surveys.reads == 3
    assert watch.version == 3


async def test_nobody_looks_and_nothing_is_read(nursery):
    state = NodeState(clock=Clock())
    surveys, watch = Surveys(state, [surveyed()]), CoverageWatch(state, nursery)
    await trio.testing.wait_all_tasks_blocked()
    assert surveys.reads == 0
    assert watch.as_json() == {}


async def test_coverage_tells_counts_gaps_and_servers_with_this_one_first(nursery):
    state = NodeState(clock=Clock(), unix_clock=lambda: 1000.0)
    state.host = SimpleNamespace(peer_id=PEERS[2])
    spans = (
        span(0, 0, 4, public_name="<b>x</b>", using_relay=True, throughput=float("inf")),
        span(1, 2, 4, ServerState.OFFLINE),
        span(2, 3, 6),
    )
    Surveys(state, [surveyed(8, *spans)])
    watch = CoverageWatch(state, nursery)
    watch.refresh()
    await trio.testing.wait_all_tasks_blocked()
    told = watch.as_json()["petals"]
    json.dumps(told, allow_nan=False)
    (model,) = told["models"]
    assert (told["at"], told["error"]) == (1000.0, "")
    assert model["servers_per_cell"] == [1, 1, 1, 2, 1, 1, 0, 0]
    assert model["gaps"] == [[6, 8]]
    assert model["servers_total"] == 2
    assert [
        (s["own"], s["first"], s["end"], s["using_relay"], s["throughput"]) for s in model["servers"]
    ] == [
        (True, 3, 6, False, 5.0),
        (False, 0, 4, True, None),
    ]


async def test_a_model_that_claims_many_blocks_is_told_in_few_cells(nursery):
    state = NodeState(clock=Clock())
    Surveys(state, [surveyed(4096)])
    watch = CoverageWatch(state, nursery)
    watch.refresh()
    await trio.testing.wait_all_tasks_blocked()
    (model,) = watch.as_json()["petals"]["models"]
    assert len(model["servers_per_cell"]) <= defaults.DASHBOARD_CELLS
    assert model["blocks_per_cell"] == 43


@pytest.mark.parametrize(
    ("error", "told"), [(NetworkError("nobody is there"), "nobody is there"), (KeyError("x"), "a defect")]
)
async def test_a_network_that_cannot_be_read_is_told_and_hurts_nothing(nursery, error, told):
    clock = Clock()
    state = NodeState(clock=clock)
    Surveys(state, error, [surveyed()])
    watch = CoverageWatch(state, nursery)
    for expected in (told, ""):
        watch.refresh()
        await trio.testing.wait_all_tasks_blocked()
        assert expected in watch.as_json()["petals"]["error"]
        clock.now += defaults.SURVEY_PERIOD_SECONDS
    assert watch.as_json()["petals"]["models"]


async def test_a_network_that_gives_no_answer(nursery, autojump_clock):
    state = NodeState()
    state.surveys = {"petals": trio.sleep_forever}
    watch = CoverageWatch(state, nursery)
    watch.refresh()
    await trio.sleep(defaults.SURVEY_PERIOD_SECONDS + 1)
    assert "no answer within 60 s" in watch.as_json()["petals"]["error"]


class Registry:
    """A DHT in which some models are registered."""

    def __init__(self, *names: str) -> None:
        self._names = names

    async def get_many(self, keys, **_more):
        value = {name: ({"num_blocks": 4, "repository": None}, 1e9) for name in self._names}
        return {key: SimpleNamespace(is_dictionary=True, value=value) for key in keys}


async def test_the_node_own_model_comes_first_registered_or_not_and_as_it_is():
    state = NodeState()
    names = [f"m{n:02}" for n in range(defaults.DASHBOARD_MODELS + 3)]
    assert [m.prefix for m in await models_to_show("petals", Registry(*names), state)] == names[
        : defaults.DASHBOARD_MODELS
    ]
    model = state.add_model("own", ["petals"])
    for own in ("_private", names[-1]):
        model.served = SimpleNamespace(
            prefixes={"petals": own}, engine=SimpleNamespace(model=SimpleNamespace(num_blocks=8))
        )
        shown = await models_to_show("petals", Registry(*names), state)
        assert (shown[0].prefix, shown[0].num_blocks) == (own, 8)
        assert len(shown) == defaults.DASHBOARD_MODELS
        assert len({model.prefix for model in shown}) == len(shown)
    assert [m.prefix for m in await models_to_show("kwaainet", Registry("a"), state)] == ["a"]


# --- events and problems


def test_the_newest_events_are_kept():
    state = NodeState(clock=Clock(), unix_clock=lambda: 5.0)
    for n in range(defaults.EVENTS_KEPT + 7):
        state.note("test", str(n))
    kept = list(state.events)
    assert len(kept) == defaults.EVENTS_KEPT
    assert (kept[0].text, kept[-1].text) == ("7", str(defaults.EVENTS_KEPT + 6))
    assert state.events.noted == defaults.EVENTS_KEPT + 7
    state.note("test", "x" * 100_000)
    assert len(list(state.events)[-1].text) == defaults.MAX_ERROR_CHARACTERS


def test_phases_verdicts_and_degradations_are_events_once():
    state = NodeState(clock=Clock())
    state.enter(Phase.SERVING)
    state.degrade("engine", "hangs")
    state.degrade("engine", "hangs")
    state.recover("engine")
    state.recover("engine")
    assert [(e.kind, e.text) for e in state.events] == [
        ("phase", "serving, after 0.0 s of starting"),
        ("degraded", "engine: hangs"),
        ("recovered", "engine"),
    ]


def test_every_condition_has_a_remedy_of_its_own():
    names = [
        "reachable",
        "clock",
        "engine",
        "blocks",
        "placement",
        "bootstrap petals",
        "announced kwaainet",
        "averaging run {x}",
        "idle",
    ]
    told = [remedy_of(name) for name in names]
    assert len(set(told)) == len(names)
    assert remedy_of("something new") not in told
    assert "networks.petals.bootstrap" in remedy_of("bootstrap petals")
    assert "run {x}" in remedy_of("averaging run {x}")


def test_a_start_is_no_problem_and_a_lasting_lack_is():
    state = NodeState(clock=Clock())
    model = state.add_model("own", ["petals"])
    assert problems(state) == ()
    state.degrade("bootstrap petals", "none of 1")
    assert [p.name for p in problems(state)] == ["bootstrap petals"]
    model.degrade("blocks", "no such file")
    assert [(p.name, p.model) for p in problems(state)] == [("bootstrap petals", None), ("blocks", "own")]
    state.enter(Phase.SERVING)
    found = problems(state)
    assert [p.name for p in found] == ["bootstrap petals", "blocks", "announced petals"]
    assert [p.model for p in found] == [None, "own", "own"]
    assert all(p.reason and p.remedy for p in found)
    assert {p.name for p in found} >= {c.name for c in conditions(state) if not c.met}


# --- whole nodes


async def test_a_page_of_a_node_in_a_swarm(tmp_path):
    """The other node is listed as a peer, both are in the coverage, and what happened at the start is told."""
    async with running_node(node_config(tmp_path, "first", blocks="0:5")) as first:
        await first.serving()
        config = node_config(tmp_path, "node", blocks="3:6", bootstrap=[first.address])
        async with running_node(config) as node, asking(config.admin_address) as client:
            await node.serving()
            await until(lambda: is_ready(client))
            async with opened(config.admin_address) as page:
                check_documented(await page.next("status"))
                kinds = {event["kind"] for event in await page.next("events")}
                assert {"phase", "bootstrap", "announced"} <= kinds
                known = await page.next("peers")
                (row,) = [p for p in known["peers"] if p["peer"] == str(first.contact.peer_id)]
                assert row["bootstrap"]
                assert row["network"] == "petals"
                assert row["address"] == "127.0.0.1"
                assert row["relay"] is None
                while not (told := await page.next("coverage")):
                    pass
                (model,) = [m for m in told["petals"]["models"] if m["prefix"] == PREFIX]
                assert model["servers_per_cell"] == [1, 1, 1, 2, 2, 1, 0, 0]
                assert [(s["own"], s["first"], s["end"]) for s in model["servers"]] == [
                    (True, 3, 6),
                    (False, 0, 5),
                ]


async def test_coverage_in_kwaainet_and_what_is_told_when_the_network_goes(tmp_path):
    async with running_node(node_config(tmp_path, "kwaai")) as kwaai:
        networks = {"petals": None, "kwaainet": {"bootstrap": [kwaai.address]}}
        config = node_config(tmp_path, "node", blocks="0:2", networks=networks)
        async with running_node(config) as node, asking(config.admin_address) as client:
            await node.serving()
            await until(lambda: is_ready(client))
            async with opened(config.admin_address) as page:
                while not (told := await page.next("coverage")):
                    pass
                assert told["kwaainet"]["error"] == ""
                (model,) = told["kwaainet"]["models"]
                assert model["servers_per_cell"] == [1, 1, 0, 0, 0, 0, 0, 0]
                assert [(s["own"], s["first"], s["end"]) for s in model["servers"]] == [(True, 0, 2)]
                await kwaai.drained()
                texts: list[str] = []
                while not any("none of 1" in text for text in texts):
                    texts = [event["text"] for event in await page.next("events")]
                assert f"kwaainet: {kwaai.contact.peer_id.short} is lost" in texts
                found = (await page.next("status"))["problems"]
                assert [p["name"] for p in found] == ["bootstrap kwaainet"]


async def test_a_page_of_a_node_that_reaches_nobody(tmp_path):
    config = node_config(tmp_path, "node", bootstrap=[NOWHERE])
    async with running_node(config) as node:
        await node.serving()
        async with opened(config.admin_address) as page:
            while not (told := await page.next("coverage")):
                pass
            assert "none of 1 bootstrap peers is reached" in told["petals"]["error"]
            (problem,) = (await page.next("status"))["problems"]
            assert problem["name"] == "bootstrap petals"
            assert "networks.petals.bootstrap" in problem["remedy"]


async def is_ready(client) -> bool:
    return (await client.get("/readyz")).status_code == 200
