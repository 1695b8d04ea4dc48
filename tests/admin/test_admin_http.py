"""The admin side by itself: who gets in, where it listens, and clients that behave badly."""

from __future__ import annotations

import fcntl
import socket
import stat
import struct
import termios
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import trio
from admin_support import asking, free_port, served, until

from kwaainet_bridge import defaults
from kwaainet_bridge.admin_address import TcpAddress, UnixAddress, parse_admin_address
from kwaainet_bridge.config import anchored, parse_config
from kwaainet_bridge.errors import ConfigError
from kwaainet_bridge.node.state import NodeState, Phase
from kwaainet_bridge.node.web import connections, server
from kwaainet_bridge.node.web.tokens import admits, read_token

TOKEN = "0123456789abcdef0123"


def token_file(folder: Path, text: str = TOKEN + "\n", mode: int = 0o600) -> Path:
    path = folder / "token"
    path.write_text(text)
    path.chmod(mode)
    return path


def loopback() -> TcpAddress:
    return TcpAddress("127.0.0.1", free_port())


async def test_a_socket_is_for_its_owner_alone_and_goes_with_the_node(tmp_path):
    address = UnixAddress(tmp_path / "node.sock")
    async with served(address), asking(address) as client:
        assert stat.S_IMODE(address.path.stat().st_mode) == 0o600
        answer = await client.get("/livez")
        assert (answer.status_code, answer.text) == (200, "ok\n")
        assert "server" not in answer.headers
        assert (await client.get("/nothing")).status_code == 404
        assert (await client.post("/livez")).status_code == 405
    assert not address.path.exists()


async def test_a_path_longer_than_addresses_of_sockets_can_be(tmp_path):
    folder = tmp_path / ("x" * 100) / ("y" * 100)
    folder.mkdir(parents=True)
    address = UnixAddress(folder / "node.sock")
    async with served(address), asking(address) as client:
        assert (await client.get("/livez")).status_code == 200
    assert not address.path.exists()


async def test_the_socket_of_a_crashed_node_is_replaced_and_that_of_a_running_one_is_not(tmp_path):
    address = UnixAddress(tmp_path / "node.sock")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(address.path))
    async with served(address), asking(address) as client:
        assert (await client.get("/livez")).status_code == 200
        with pytest.raises(ConfigError, match=r"another program listens at .*node\.sock"):
            async with served(address):
                pass
        assert (await client.get("/livez")).status_code == 200


async def test_a_file_in_the_way_is_left_alone(tmp_path):
    path = tmp_path / "node.sock"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="is no socket"):
        async with served(UnixAddress(path)):
            pass
    assert path.read_text() == "precious"


async def test_a_folder_that_does_not_exist_and_a_port_in_use(tmp_path):
    with pytest.raises(ConfigError, match="no socket can be made"):
        async with served(UnixAddress(tmp_path / "none" / "node.sock")):
            pass
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"cannot be listened on.*choose another port"):
            async with served(TcpAddress("127.0.0.1", taken.getsockname()[1])):
                pass


async def test_a_token_is_asked_for_everything_but_livez(tmp_path):
    address = loopback()
    async with served(address, token_file=token_file(tmp_path)), asking(address) as client:
        assert (await client.get("/livez")).status_code == 200
        right = {"Authorization": f"Bearer {TOKEN}"}
        for path in ("/readyz", "/metrics", "/api/status"):
            for wrong in ({}, {"Authorization": f"Bearer {TOKEN}x"}, {"Authorization": TOKEN}):
                answer = await client.get(path, headers=wrong)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
                assert TOKEN not in answer.text
            assert (await client.get(path, headers=right)).status_code in (200, 503)


async def test_a_page_that_has_its_name_point_here_is_refused():
    address = loopback()
    async with served(address), asking(address) as client:
        for host in ("evil.example", f"evil.example:{address.port}", "127.0.0.1.evil.example", ""):
            assert (await client.get("/api/status", headers={"Host": host})).status_code == 421
        for host in ("localhost", f"localhost:{address.port}", "[::1]:80", "127.0.0.1"):
            assert (await client.get("/api/status", headers={"Host": host})).status_code == 200


def test_tokens_are_compared_whole():
    assert admits(TOKEN, f"Bearer {TOKEN}")
    for wrong in (
        "",
        "Bearer ",
        f"bearer {TOKEN}",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN} ",
        "Bearer \xe9",
        "\udcff",
    ):
        assert not admits(TOKEN, wrong)


@pytest.mark.parametrize(
    ("text", "mode", "error"),
    [
        (TOKEN, 0o644, "chmod 600"),
        ("short", 0o600, "at least 16"),
        (f"{TOKEN} {TOKEN}", 0o600, "without a blank"),
        (f"{TOKEN}é", 0o600, "ASCII"),
    ],
)
def test_tokens_that_are_none(tmp_path, text, mode, error):
    with pytest.raises(ConfigError, match=error):
        read_token(token_file(tmp_path, text, mode), key="admin.token_file")


def test_a_token_file_that_does_not_exist(tmp_path):
    with pytest.raises(ConfigError, match=r"admin\.token_file: .*none: No such file"):
        read_token(tmp_path / "none", key="admin.token_file")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("off", None),
        ("unix", UnixAddress(None)),
        ("unix:/run/node.sock", UnixAddress(Path("/run/node.sock"))),
        ("127.0.0.1:9464", TcpAddress("127.0.0.1", 9464)),
        ("[::1]:9464", TcpAddress("::1", 9464)),
        ("0.0.0.0:80", TcpAddress("0.0.0.0", 80)),
    ],
)
def test_addresses_are_read(text, address):
    assert parse_admin_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "unix:",
        "localhost:80",
        "127.0.0.1",
        "127.0.0.1:0",
        "::1:80",
        "1.2.3.4:x",
        "[1.2.3.4]:80",
        "127.0.0.1:٣",
    ],
)
def test_addresses_that_are_none(text):
    with pytest.raises(ConfigError, match="write it as unix"):
        parse_admin_address(text)


@pytest.mark.parametrize("listen", ["0.0.0.0:9464", "192.0.2.1:80", "[::]:9464"])
def test_whoever_listens_for_others_needs_a_token(listen):
    with pytest.raises(ConfigError, match=r"admin.*others can reach .*token_file"):
        parse_config(f"admin: {{listen: '{listen}'}}", "x")
    parse_config(f"admin: {{listen: '{listen}', token_file: x}}", "x")
    parse_config("admin: {listen: '127.0.0.1:9464'}", "x")


def test_paths_are_relative_to_the_configuration_and_off_may_be_bare(tmp_path):
    def config(text):
        return anchored(parse_config(text, "x"), tmp_path)

    assert config("").admin_address == UnixAddress(tmp_path / "identity.key.sock")
    assert config("admin: {listen: 'unix:a/b.sock'}").admin_address == UnixAddress(tmp_path / "a" / "b.sock")
    assert config("admin: {token_file: t}").admin.token_file == tmp_path / "t"
    assert config("admin: {listen: off}").admin_address is None
    assert config("admin: {listen: 127.0.0.1:9464}").admin_address == TcpAddress("127.0.0.1", 9464)


# --- clients that behave badly


async def connected(address) -> trio.SocketStream:
    if isinstance(address, TcpAddress):
        return await trio.open_tcp_stream(address.host, address.port)
    return await trio.open_unix_socket(str(address.path))


async def settled(stream: trio.SocketStream) -> None:
    """Return once no more comes of what ``stream`` does not read."""
    before = -1
    while True:
        unread = struct.unpack("i", fcntl.ioctl(stream.socket, termios.FIONREAD, bytes(4)))[0]
        if unread == before:
            return
        before = unread
        await trio.sleep(0.1)


async def is_cut_off(stream: trio.SocketStream, sent: bytes) -> bool:
    """Whether the other side closes, however much is sent to it and not read."""
    try:
        while True:
            await stream.send_all(sent)
            await trio.sleep(0.01)
    except trio.BrokenResourceError:
        return True


REQUEST = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize("kind", ["unix", "tcp"])
@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"GET /metr", id="half a request"),
        pytest.param(REQUEST * 200, id="requests whose answers are not read"),
        pytest.param(
            b"POST /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999\r\n\r\nx", id="half a body"
        ),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="HTTP/2 that says nothing more"),
    ],
)
async def test_a_client_that_hangs_holds_up_neither_others_nor_the_end(tmp_path, kind, sent):
    address = UnixAddress(tmp_path / "node.sock") if kind == "unix" else loopback()
    async with served(address):
        async with asking(address) as client:
            assert (await client.get("/livez")).status_code == 200
            hung = await connected(address)
            await hung.send_all(sent)
            await settled(hung)
            with trio.fail_after(5):
                assert (await client.get("/metrics")).status_code == 200
        stopped = trio.current_time()
    assert trio.current_time() - stopped < 2
    await hung.aclose()


@pytest.mark.parametrize(
    "sent", [b"", b"GET /metr", REQUEST, b"POST /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nx"]
)
async def test_a_client_that_sends_no_more_is_cut_off(tmp_path, monkeypatch, sent):
    monkeypatch.setattr(defaults, "WEB_IDLE_SECONDS", 1)
    address = UnixAddress(tmp_path / "node.sock")
    async with served(address):
        silent = await connected(address)
        with trio.fail_after(5):
            if sent:
                await silent.send_all(sent)
            while await silent.receive_some():
                pass
        await silent.aclose()


async def test_a_client_that_reads_nothing_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(defaults, "WEB_SEND_SECONDS", 0.3)
    address = UnixAddress(tmp_path / "node.sock")
    async with served(address):
        hung = await connected(address)
        with trio.fail_after(20):
            assert await is_cut_off(hung, REQUEST * 100)
        await hung.aclose()


async def test_connections_beyond_the_limit_are_closed_and_places_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(defaults, "WEB_CONNECTIONS", 2)
    address = UnixAddress(tmp_path / "node.sock")
    async with served(address):
        async with asking(address) as client:
            await client.get("/livez")
            second = await connected(address)
            await second.send_all(REQUEST)
            assert b"200" in await second.receive_some()
            third = await connected(address)
            with trio.fail_after(5):
                assert await is_cut_off(third, REQUEST)
            await third.aclose()
            await second.aclose()

        async def answers() -> bool:
            try:
                async with asking(address) as again:
                    return (await again.get("/livez")).status_code == 200
            except httpx.TransportError:
                return False

        await until(answers, 5)


async def test_nonsense_ends_its_own_connection(tmp_path):
    address = UnixAddress(tmp_path / "node.sock")
    async with served(address), asking(address) as client:
        for sent in (
            b"\x00\xff" * 100,
            b"GET / HTTP/9.9\r\n\r\n",
            b"A" * 100_000,
            b"GET / HTTP/1.1\r\n\r\n\r\n",
        ):
            stream = await connected(address)
            with trio.fail_after(5):
                try:
                    await stream.send_all(sent)
                    await stream.receive_some()
                except trio.BrokenResourceError:
                    pass
            await stream.aclose()
        assert (await client.get("/livez")).status_code == 200


async def test_a_websocket_is_closed(tmp_path):
    address = UnixAddress(tmp_path / "node.sock")
    async with served(address):
        stream = await connected(address)
        await stream.send_all(
            b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
        )
        with trio.fail_after(5):
            assert b"HTTP/1.1 403" in await stream.receive_some()
        await stream.aclose()


async def test_a_defect_in_a_route_is_an_answer_of_500_and_the_node_goes_on(tmp_path, monkeypatch, caplog):
    address = UnixAddress(tmp_path / "node.sock")
    state = NodeState()
    async with served(address, state=state), asking(address) as client:
        monkeypatch.setattr(state, "reachability", None)
        assert (await client.get("/api/status")).status_code == 500
        monkeypatch.undo()
        assert (await client.get("/livez")).status_code == 200
    assert "TypeError" in caplog.text


async def test_what_goes_wrong_on_one_connection_ends_that_one_alone(tmp_path, monkeypatch):
    make, told = connections.make_handler, []
    quiet = SimpleNamespace(
        info=lambda *_args, **_more: None, exception=lambda text, **more: told.append((text, more))
    )
    monkeypatch.setattr(server, "log", quiet)

    def make_failing(*arguments, **options):
        handler, calls = make(*arguments, **options), []

        async def handle(stream):
            calls.append(stream)
            if len(calls) == 1:
                raise KeyError("a defect of the HTTP library")
            await handler(stream)

        return handle

    monkeypatch.setattr(connections, "make_handler", make_failing)
    address = UnixAddress(tmp_path / "node.sock")
    async with served(address):
        first = await connected(address)
        with trio.fail_after(5):
            assert await is_cut_off(first, REQUEST)
        await first.aclose()
        async with asking(address) as client:
            assert (await client.get("/livez")).status_code == 200
    assert told == [("a connection failed", {"to": "admin"})]


async def test_it_is_there_while_a_node_starts(tmp_path):
    address = UnixAddress(tmp_path / "node.sock")
    async with served(address) as state, asking(address) as client:
        assert (await client.get("/readyz")).status_code == 503
        status = (await client.get("/api/status")).json()
        assert (status["phase"]["name"], status["peer_id"], status["ready"]) == ("starting", None, False)
        state.enter(Phase.SERVING)
        assert (await client.get("/readyz")).status_code == 200
