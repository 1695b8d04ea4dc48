"""HTTP clients that would hold a place for ever: by HTTP/2, which is not spoken, and by requests that never end."""

from __future__ import annotations

from pathlib import Path

import h2.config
import h2.connection
import h2.settings
import pytest
import trio
from admin_support import asking, served

from kwaainet_bridge import defaults
from kwaainet_bridge.admin_address import UnixAddress


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
