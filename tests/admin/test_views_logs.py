"""The log over HTTP: the newest records, those that come, and what is asked wrongly."""

from __future__ import annotations

import json
import logging
from contextlib import asynccontextmanager

import pytest
import trio
from admin_support import asking, free_port, logging_to, served, until

from kwaainet_bridge import defaults
from kwaainet_bridge.admin_address import TcpAddress, UnixAddress
from kwaainet_bridge.node.log_ring import LogRing
from kwaainet_bridge.node.state import NodeState

log = logging.getLogger("kwaainet_bridge.tests")


@pytest.fixture
async def kept():
    """A node's state whose ring has this process' log."""
    state = NodeState()
    state.logs = LogRing()
    own = logging.getLogger("kwaainet_bridge.node")
    own.setLevel("ERROR")  # what the admin side itself logs is none of these tests' business
    with logging_to(state.logs):
        yield state
    own.setLevel(logging.NOTSET)


@asynccontextmanager
async def asked(tmp_path, state):
    address = UnixAddress(tmp_path / "node.sock")
    async with served(address, state=state), asking(address) as client:
        yield client


async def test_the_newest_records_are_told_by_level(tmp_path, kept):
    for number in range(5):
        log.info("i%d", number)
        log.warning("w%d", number)
    async with asked(tmp_path, kept) as client:
        told = (await client.get("/api/logs")).json()
        assert (told["schema"], told["level"], told["left_out"], told["missed"]) == (1, "debug", 0, 0)
        assert [r["event"] for r in told["records"]][-2:] == ["i4", "w4"]
        told = (await client.get("/api/logs", params={"level": "warning", "last": 2})).json()
        assert [r["event"] for r in told["records"]] == ["w3", "w4"]
        assert told["left_out"] == 3
        assert (await client.get("/api/logs?level=error")).json()["records"] == []
        assert (await client.get("/api/logs?last=0")).json()["left_out"] == 10


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("level=loud", "level 'loud' is none of debug, info, warning, error"),
        ("level=", "level '' is none of"),
        ("last=-1", "last '-1' is no number from 0 to 2000"),
        ("last=2001", "last '2001' is no number"),
        ("last=%D9%A3", "is no number"),
        ("last=" + "9" * 5000, "is no number"),
        ("follow=yes", "follow 'yes' is neither 0 nor 1"),
    ],
)
async def test_what_is_asked_wrongly_is_told(tmp_path, kept, query, error):
    async with asked(tmp_path, kept) as client:
        answer = await client.get(f"/api/logs?{query}")
        assert answer.status_code == 422
        assert error in answer.json()["error"]
        assert len(answer.content) < 300


async def test_a_process_that_keeps_no_records_says_so(tmp_path):
    async with asked(tmp_path, NodeState()) as client:
        for query in ("", "?follow=1"):
            answer = await client.get(f"/api/logs{query}")
            assert answer.status_code == 422
            assert "keeps no records" in answer.json()["error"]


class Lines:
    """What a reader is told, line by line."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._rest = b""

    async def next(self) -> str:
        with trio.fail_after(20):
            while b"\n" not in self._rest:
                more = await self._stream.receive_some()
                assert more, "the log ended"
                self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode().strip()

    async def record(self) -> dict:
        while not (line := await self.next()):
            pass
        return json.loads(line)


@asynccontextmanager
async def following(tmp_path, query: str = ""):
    """A reader. It speaks HTTP/1.0, whose answers are what comes until the end."""
    async with await trio.open_unix_socket(str(tmp_path / "node.sock")) as stream:
        request = f"GET /api/logs?follow=1{query} HTTP/1.0\r\nHost: localhost\r\n\r\n"
        await stream.send_all(request.encode())
        lines = Lines(stream)
        head = []
        while line := await lines.next():
            head.append(line)
        assert " 200" in head[0]
        assert "content-type: application/x-ndjson" in head
        yield lines


async def test_records_are_told_as_they_come(tmp_path, kept, monkeypatch):
    monkeypatch.setattr(defaults, "LOG_FOLLOW_SECONDS", 0.01)
    log.warning("before")
    log.warning("just before")
    async with asked(tmp_path, kept), following(tmp_path, "&level=warning&last=1") as lines:
        assert (await lines.record())["event"] == "just before"
        log.info("too little")
        log.error("now")
        await trio.to_thread.run_sync(log.error, "from a thread")
        assert [(await lines.record())["event"] for _ in range(2)] == ["now", "from a thread"]


async def test_an_empty_line_tells_that_the_node_lives(tmp_path, kept, monkeypatch):
    monkeypatch.setattr(defaults, "LOG_FOLLOW_SECONDS", 0.01)
    monkeypatch.setattr(defaults, "LOG_SILENCE_SECONDS", 0.03)
    async with asked(tmp_path, kept), following(tmp_path, "&level=error") as lines:
        assert [await lines.next() for _ in range(3)] == ["", "", ""]


async def test_records_that_went_before_they_were_told_are_counted(tmp_path, kept, monkeypatch):
    monkeypatch.setattr(defaults, "LOG_FOLLOW_SECONDS", 0.2)
    kept.logs._max_bytes = 2000
    async with asked(tmp_path, kept), following(tmp_path, "&last=0") as lines:
        assert await lines.next() == ""
        for number in range(100):
            log.info("n%d", number)
        missed = (await lines.record())["missed"]
        assert missed > 50
        assert (await lines.record())["event"] == f"n{missed}"


async def test_few_may_follow_at_one_time_and_their_places_are_free_again(tmp_path, kept, monkeypatch):
    monkeypatch.setattr(defaults, "LOG_FOLLOWERS", 1)
    async with asked(tmp_path, kept) as client:
        assert (await client.head("/api/logs?follow=1")).status_code == 200
        async with following(tmp_path) as lines:
            await lines.next()
            full = await client.get("/api/logs?follow=1")
            assert (full.status_code, full.headers["retry-after"]) == (503, "5")

        async def has_room() -> bool:
            async with client.stream("GET", "/api/logs?follow=1") as answer:
                return answer.status_code == 200

        await until(has_room)


async def test_the_node_stops_while_somebody_follows(tmp_path, kept):
    address = UnixAddress(tmp_path / "node.sock")
    async with served(address, state=kept):
        client = await trio.open_unix_socket(str(address.path))
        await client.send_all(b"GET /api/logs?follow=1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert await client.receive_some()
        stopped = trio.current_time()
    assert trio.current_time() - stopped < 2
    await client.aclose()


async def test_nobody_gets_a_view_without_the_token(tmp_path, kept):
    file = tmp_path / "token"
    file.write_text("0123456789abcdef0123")
    file.chmod(0o600)
    address = TcpAddress("127.0.0.1", free_port())
    async with served(address, token_file=file, state=kept), asking(address) as client:
        for path in ("/api/peers", "/api/sessions", "/api/blocks", "/api/logs", "/api/logs?follow=1"):
            for wrong in ({}, {"Authorization": "Bearer 0123456789abcdef012x"}):
                assert (await client.get(path, headers=wrong)).status_code == 401
        right = {"Authorization": "Bearer 0123456789abcdef0123"}
        assert (await client.get("/api/logs", headers=right)).status_code == 200
