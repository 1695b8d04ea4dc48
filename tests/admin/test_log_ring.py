"""What is kept of the process' log: which records, how many bytes, and nothing that is secret."""

from __future__ import annotations

import json
import logging
import threading
from contextlib import ExitStack

import pytest
import structlog
from admin_support import logging_to
from node_support import node_config

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import ConfigError
from kwaainet_bridge.node.log_ring import LEVELS, LogRing
from kwaainet_bridge.node.logs import log_ring

SECRET = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def kept():
    """A ring to which the log goes, and a logger of each kind."""
    with ExitStack() as stack:

        def make(level: str = "debug", **options):
            ring = LogRing(**options)
            stack.enter_context(logging_to(ring, level))
            return (
                ring,
                structlog.get_logger("kwaainet_bridge.node"),
                logging.getLogger("kwaainet_bridge.net"),
            )

        yield make


def fail(text: str) -> None:
    private = "never" + "-to-be-kept"
    raise ValueError(text if private else private)


def records(ring: LogRing, level: str = "debug", most: int = 1000) -> list[dict]:
    return [json.loads(entry.text) for entry in ring.newest(level=LEVELS[level], most=most).entries]


def test_records_of_both_kinds_of_loggers_are_kept_with_their_fields(kept):
    ring, node, net = kept()
    node.info("serving", blocks="0:4", tokens=7, peers=["a", "b"], ready=True, load=None)
    net.warning("closing %s", "it", extra={"peer": "12D3"})
    first, second = records(ring)
    at = first.pop("at")
    assert first == {
        "number": 1,
        "level": "info",
        "logger": "kwaainet_bridge.node",
        "event": "serving",
        "fields": {"blocks": "0:4", "tokens": 7, "peers": ["a", "b"], "ready": True, "load": None},
        "exception": None,
        "cut": False,
    }
    assert at == pytest.approx(second["at"], abs=5)
    assert (second["number"], second["event"], second["fields"]) == (2, "closing it", {"peer": "12D3"})


def test_levels_are_heeded(kept):
    ring, node, net = kept("info")
    node.debug("not logged at all")
    node.info("i")
    net.warning("w")
    node.error("e")
    net.critical("c")
    logging.getLogger("urllib3").info("a library")
    assert [r["event"] for r in records(ring, "debug")] == ["i", "w", "e", "c"]
    assert [r["event"] for r in records(ring, "warning")] == ["w", "e", "c"]
    assert [r["level"] for r in records(ring, "error")] == ["error", "critical"]
    answer = ring.newest(level=LEVELS["info"], most=1)
    assert ([e.number for e in answer.entries], answer.left_out, answer.missed) == ([4], 3, 0)
    assert ring.newest(level=LEVELS["info"], most=0).entries == []


def test_the_oldest_go_when_the_bytes_are_used_up(kept):
    ring, node, _ = kept(max_bytes=4000)
    for number in range(1, 101):
        node.info("it happened", n=number)
    found = records(ring)
    assert [r["number"] for r in found] == [r["fields"]["n"] for r in found]
    assert found[-1]["number"] == 100
    size = sum(len(e.text) for e in ring.newest(level=0, most=1000).entries)
    assert 3500 < size <= 4000
    assert ring.newest(level=0, most=1000).missed == 100 - len(found)


def test_a_record_that_is_too_long_is_cut(kept):
    ring, node, _ = kept()
    node.info("\0" * 100_000, data="x" * 100_000)
    try:
        fail("y" * 100_000)
    except ValueError:
        node.exception("failed")
    long, failed = records(ring)
    assert (long["cut"], long["fields"]) == (True, {})
    assert " … " in failed["exception"]
    assert failed["exception"].startswith("Traceback")
    assert all(len(e.text) <= defaults.LOG_RECORD_BYTES for e in ring.newest(level=0, most=9).entries)


def test_a_traceback_is_kept_without_values_of_variables(kept):
    ring, node, net = kept()
    for logger in (node, net):
        try:
            fail("16 characters are too many")
        except ValueError:
            logger.exception("it failed")
    for record in records(ring):
        assert "ValueError: 16 characters are too many" in record["exception"]
        assert "never-to-be-kept" not in json.dumps(record)


@pytest.mark.parametrize(
    ("event", "fields", "kept_text"),
    [
        (f"asked with {SECRET}", {}, "asked with ***"),
        ("ask", {"deep": {"list": [f"x{SECRET}y"]}}, '"list": ["x***y"]'),
        ("Authorization: Bearer abc.def-ghi", {}, "Authorization: Bearer ***"),
        ("GET https://me:hidden@host/x?token=abcdef&n=1", {}, "https://me:***@host/x?token=***&n=1"),
        ("using hf_AbCdEfGhIjKlMnOpQrSt", {}, "using ***"),
        (
            "ask",
            {"password": "abcdefg", "api_key": b"abcdefg", "admin.token": ["abcdefg"]},
            '"admin.token": "***"',
        ),
        ("admin", {"token": True, "cache_tokens": 5}, '"token": true, "cache_tokens": 5'),
    ],
)
def test_secrets_are_never_kept(kept, event, fields, kept_text):
    ring, node, net = kept(secrets=["", SECRET])
    node.info(event, **fields)
    net.info("%s", event)
    (entry, other) = ring.newest(level=0, most=9).entries
    assert kept_text in entry.text
    for secret in (SECRET, "abc.def", "hidden", "abcdef", "AbCdEf"):
        assert secret not in entry.text
        assert secret not in other.text


def test_secrets_in_a_traceback_are_not_kept(kept):
    ring, node, _ = kept(secrets=[SECRET])
    try:
        fail(f"wrong token {SECRET}")
    except ValueError:
        node.exception("failed")
    assert "wrong token ***" in records(ring)[0]["exception"]


def test_tokens_of_the_configuration_and_the_environment_are_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-the-hub")
    file = tmp_path / "token"
    file.write_text(SECRET)
    file.chmod(0o600)
    openai = {"listen": "127.0.0.1:1", "token_file": "token", "models": ["austen"]}
    ring = log_ring(node_config(tmp_path, "node", openai=openai))
    with logging_to(ring):
        logging.getLogger("kwaainet_bridge.x").info("%s and a-token-of-the-hub", SECRET)
    assert records(ring)[0]["event"] == "*** and ***"
    file.chmod(0o644)
    with pytest.raises(ConfigError, match=r"admin\.token_file.*chmod 600"):
        log_ring(node_config(tmp_path, "node", admin={"listen": "127.0.0.1:1", "token_file": "token"}))


def test_what_follows_is_told_once_and_what_was_missed_is_counted(kept):
    ring, node, _ = kept(max_bytes=2000)
    node.info("first")
    answer, seen = ring.since(0, level=LEVELS["info"])
    assert ([e.number for e in answer.entries], answer.missed, seen) == ([1], 0, 1)
    assert ring.since(seen, level=0)[0].entries == []
    node.debug("little")
    node.error("much")
    answer, seen = ring.since(seen, level=LEVELS["warning"])
    assert ([e.number for e in answer.entries], answer.missed, seen) == ([3], 0, 3)
    for _ in range(100):
        node.info("too fast")
    answer, seen = ring.since(seen, level=0)
    assert seen == 103
    assert len(answer.entries) + answer.missed == 100
    assert answer.missed > 50


def test_threads_may_log_while_others_read(kept):
    ring, _, net = kept(max_bytes=20_000)
    threads = [threading.Thread(target=lambda: [net.info("n") for _ in range(300)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        numbers = [e.number for e in ring.newest(level=0, most=1000).entries]
        assert numbers == sorted(set(numbers))
    for thread in threads:
        thread.join()
    assert ring.since(0, level=0)[1] == 1200


def test_what_cannot_be_written_is_left_out_and_logging_goes_on(kept, capsys):
    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    ring, _, net = kept()
    logging.raiseExceptions, before = False, logging.raiseExceptions
    try:
        ring.handle(logging.LogRecord("x", logging.INFO, "", 0, {"event": Broken()}, (), None))
    finally:
        logging.raiseExceptions = before
    net.info("after")
    assert [r["event"] for r in records(ring)][-1] == "after"
