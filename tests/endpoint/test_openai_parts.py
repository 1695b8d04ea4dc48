"""Parts of the endpoint by themselves: stop words, limits, settings."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from node_support import node_config

from kwaainet_bridge.errors import ConfigError
from kwaainet_bridge.node.generating import TextModels
from kwaainet_bridge.node.openai.answers import StopText
from kwaainet_bridge.node.openai.app import EventStream
from kwaainet_bridge.node.openai.bodies import ApiError
from kwaainet_bridge.node.openai.limits import Limits

LETTERS = st.text("ab", max_size=8)


@given(pieces=st.lists(LETTERS), words=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_word(pieces: list[str], words: list[str]) -> None:
    stop = StopText(words)
    given_out = ""
    for piece in pieces:
        given_out += stop.feed(piece)
        if stop.found:
            break
    else:
        given_out += stop.finish()
    # cut in pieces a word may be seen before one that begins earlier and ends later
    whole = "".join(pieces)
    assert whole.startswith(given_out)
    assert not any(word in given_out for word in words)
    if not any(word in whole for word in words):
        assert given_out == whole
        assert not stop.found
    else:
        assert stop.found


def test_only_what_may_begin_a_word_is_held_back() -> None:
    stop = StopText(["STOP"])
    assert [stop.feed(piece) for piece in ("a S", "T", "x", " STO", "P b")] == ["a ", "", "STx", " ", ""]
    assert stop.found


async def test_requests_per_minute(autojump_clock: trio.testing.MockClock) -> None:
    limits = Limits(at_once=10, per_minute=3)
    for _ in range(3):
        with limits.request():
            pass
    with pytest.raises(ApiError, match="more than 3 requests a minute") as caught, limits.request():
        pass
    assert caught.value.status == 429
    await trio.sleep(20)
    with limits.request():
        pass
    with pytest.raises(ApiError), limits.request():
        pass


def test_requests_at_once() -> None:
    limits = Limits(at_once=1, per_minute=None)
    with limits.request(), pytest.raises(ApiError, match="1 requests are answered now"), limits.request():
        pass
    with limits.request():
        pass


@pytest.mark.parametrize("sent", [0, 1, 2])
async def test_an_answer_is_closed_wherever_its_client_leaves(sent: int) -> None:
    """Also while an event is on its way, when nobody runs the generator."""
    closed, stuck = trio.Event(), trio.Event()

    async def events() -> AsyncGenerator[str, None]:
        try:
            for n in range(9):
                yield str(n)
        finally:
            closed.set()

    async def send(_message: Any) -> None:
        nonlocal sent
        if sent == 0:
            stuck.set()
            await trio.sleep_forever()
        sent -= 1

    async def receive() -> dict[str, str]:
        await stuck.wait()
        return {"type": "http.disconnect"}

    answer = events()
    response = EventStream(await anext(answer), answer)
    with trio.fail_after(5):
        await response({"type": "http"}, receive, send)
    assert closed.is_set()


async def test_a_model_is_loaded_once_and_only_by_its_name() -> None:
    loaded = []

    def load(name: str) -> None:
        loaded.append(name)
        raise OSError("no such disk")

    models = TextModels(["one"], [], load=load)  # type: ignore[arg-type]
    with pytest.raises(KeyError):
        await models.get("two")
    with pytest.raises(OSError, match="no such disk"):
        await models.get("one")
    assert loaded == ["one"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"listen": "127.0.0.1:8000"}, "there is no model to generate with: give openai.models"),
        ({"listen": "unix", "models": ["austen"]}, "name the socket"),
        ({"listen": "0.0.0.0:8000", "models": ["austen"]}, "it needs token_file"),
        ({"listen": "here", "models": ["austen"]}, "listen"),
        ({"models": ["./nowhere"]}, "openai.models: there is no folder"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        node_config(tmp_path, "node", openai=settings)


def test_limits_are_on_where_others_can_ask(tmp_path) -> None:
    (tmp_path / "token").write_text("0" * 32)
    exposed = {"listen": "0.0.0.0:8000", "models": ["austen"], "token_file": "token"}
    assert node_config(tmp_path, "node", openai=exposed).openai.most_per_minute == 60
    assert (
        node_config(tmp_path, "node", openai=exposed | {"requests_per_minute": 7}).openai.most_per_minute == 7
    )
    local = {"listen": "127.0.0.1:8000", "models": ["austen"]}
    assert node_config(tmp_path, "node", openai=local).openai.most_per_minute is None
