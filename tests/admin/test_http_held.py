"""HTTP clients that would hold a place for ever: by HTTP/2, which is not spoken, and by requests that never end."""

from __future__ import annotations

from pathlib import Path

import h2.config
import h2.connection
import h2.settings
import pytest
import trio
from admin_support import asking, free_port, served
from test_chat import Endpoint

from kwaainet_bridge import defaults
from kwaainet_bridge.admin_address import TcpAddress, UnixAddress
from kwaainet_bridge.node.openai.sharing import SharedApp
from kwaainet_bridge.node.state import NodeState


async def until_closed(stream: trio.SocketStream) -> bytes:
    """What comes until the other side closes."""
    told = b""
    with trio.fail_after(10):
        try:
            while more := await stream.receive_some():
                told += more
        except trio.BrokenResourceError:
            pass
    return told


def deaf() -> h2.connection.H2Connection:
    """One that gives nobody room to send it anything."""
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    client.local_settings = h2.settings.Settings(
        client=True, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0}
    )
    return client


@pytest.mark.parametrize("asks", [False, True])
async def test_http2_is_not_spoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, asks: bool) -> None:
    """A client that gives no room for answers would be waited for without a limit, and one that asks nothing as well."""
    monkeypatch.setattr(defaults, "WEB_IDLE_SECONDS", 1)
    monkeypatch.setattr(defaults, "WEB_SEND_SECONDS", 1)
    address = UnixAddress(tmp_path / "node.sock")
    async with served(address):
        client = deaf()
        client.initiate_connection()
        if asks:
            names = {":method": "GET", ":path": "/metrics", ":scheme": "http", ":authority": "localhost"}
            client.send_headers(1, list(names.items()), end_stream=True)
        async with await trio.open_unix_socket(str(address.path)) as stream:
            await stream.send_all(client.data_to_send())
            assert b"HTTP/1.1 4" in await until_closed(stream)


async def test_a_client_that_would_rather_speak_http2_is_answered_as_it_asked(tmp_path: Path) -> None:
    address = UnixAddress(tmp_path / "node.sock")
    upgrade = {
        "Connection": "Upgrade, HTTP2-Settings",
        "Upgrade": "h2c",
        "HTTP2-Settings": "AAMAAABkAAQAAAAA",
    }
    async with served(address), asking(address) as client:
        answer = await client.get("/livez", headers=upgrade)
        assert (answer.status_code, answer.text, answer.http_version) == (200, "ok\n", "HTTP/1.1")


@pytest.mark.parametrize("after", [b"G", b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"])
@pytest.mark.parametrize("at_once", [True, False])
async def test_who_asks_again_before_the_answer_and_leaves_is_not_waited_for(
    tmp_path: Path, after: bytes, *, at_once: bool
) -> None:
    """What comes before an answer is not read until that is sent, nor is the end of what a client sends."""
    address, state, endpoint = UnixAddress(tmp_path / "node.sock"), NodeState(), Endpoint()
    state.openai = SharedApp(endpoint.make, token=None)
    request = b"GET /v1/wait HTTP/1.1\r\nHost: localhost\r\n\r\n"
    async with served(address, state=state, openai=True):
        async with await trio.open_unix_socket(str(address.path)) as client:
            with trio.fail_after(10):
                await client.send_all(request + after if at_once else request)
                await endpoint.waiting.wait()
                if not at_once:
                    await client.send_all(after)
        with trio.fail_after(10):
            await endpoint.left.wait()


async def test_who_asks_again_as_soon_as_answered_is_answered(tmp_path: Path) -> None:
    address = UnixAddress(tmp_path / "node.sock")
    request = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
    async with served(address), await trio.open_unix_socket(str(address.path)) as client:
        with trio.fail_after(20):
            for together in (1, 3):
                for _ in range(100):
                    await client.send_all(request * together)
                    told = b""
                    while told.count(b"ok\n") < together:
                        more = await client.receive_some()
                        assert more
                        told += more


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
async def test_pages_of_other_sites_hold_no_places_by_pictures(site: str) -> None:
    """Browsers tell no origin of what a page shows, but whose page it is."""
    address = TcpAddress("127.0.0.1", free_port())
    async with served(address), asking(address) as client:
        for path in ("/api/events", "/api/logs?follow=1", "/api/status"):
            shown = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
            assert (await client.get(path, headers=shown)).status_code == 403
        link = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
        assert (await client.get("/", headers=link)).status_code == 200
        for own in ("same-origin", "none"):
            headers = {"Sec-Fetch-Site": own, "Sec-Fetch-Mode": "cors"}
            assert (await client.get("/api/status", headers=headers)).status_code == 200
