"""What the log holds of an exception: its kind, its text, where it was raised, and no variable's value."""

from __future__ import annotations

import io
import json
import logging

import pytest
import structlog

from kwaainet_bridge.node.logs import configure_logging


@pytest.fixture
def restored():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("kwaainet_bridge").setLevel(logging.NOTSET)
    structlog.reset_defaults()


def fail():
    private = "never" + "-to-be-logged"
    raise ValueError(f"{len(private)} characters are too many")


def logged(style):
    out = io.StringIO()
    configure_logging("info", style, stream=out)
    for logger in (logging.getLogger("kwaainet_bridge.x"), structlog.get_logger("kwaainet_bridge.y")):
        try:
            fail()
        except ValueError:
            logger.exception("it failed")
    return out.getvalue()


@pytest.mark.parametrize("style", ["json", "text"])
def test_tracebacks_without_variables(restored, style):
    text = logged(style)
    assert text.count("it failed") == 2
    assert text.count("18 characters are too many") >= 2
    assert "in fail" in text or '"name": "fail"' in text
    assert "never-to-be-logged" not in text
    assert "locals" not in text


def test_json_is_one_object_a_line(restored):
    events = [json.loads(line) for line in logged("json").splitlines()]
    assert [event["exception"][0]["exc_type"] for event in events] == ["ValueError", "ValueError"]


def test_libraries_are_heard_from_warning_up(restored):
    out = io.StringIO()
    configure_logging("debug", "json", stream=out)
    logging.getLogger("urllib3.connection").info("quiet")
    logging.getLogger("urllib3.connection").warning("loud")
    logging.getLogger("kwaainet_bridge.x").debug("own")
    assert [json.loads(line)["event"] for line in out.getvalue().splitlines()] == ["loud", "own"]
