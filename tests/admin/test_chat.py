"""The admin side has the OpenAI endpoint, for its own page: who may ask, and what is told while there is none."""

from __future__ import annotations

import pytest
import trio
from admin_support import asking, free_port, served
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from kwaainet_bridge import defaults
from kwaainet_bridge.admin_address import TcpAddress, UnixAddress
from kwaainet_bridge.node.openai.sharing import SharedApp
from kwaainet_bridge.node.state import NodeState, Phase

TOKEN, OTHER = "0123456789abcdef0123", "another-0123456789"


def loopback() -> TcpAddress:
    return TcpAddress("127.0.0.1", free_port())


@pytest.mark.parametrize("origin", ["https://evil.example", "http://127.0.0.1:1", "null"])
async def test_pages_of_other_sites_may_not_ask(origin):
    address = loopback()
    async with served(address), asking(address) as client:
        for ask in (client.get, client.post):
            refused = await ask("/api/status", headers={"Origin": origin})
            assert refused.status_code == 403
            assert "open this node's own page" in refused.text
        assert (await client.get("/api/status", headers={"Origin": address.url})).status_code == 200


# --- while there is none


async def test_an_endpoint_that_is_off_names_the_key_that_turns_it_on(tmp_path):
    address = UnixAddress(tmp_path / "node.sock")
    async with served(address), asking(address) as client:
        for answer in (await client.get("/v1/models"), await client.post("/v1/chat/completions", json={})):
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (404, "endpoint_off")
            assert "give openai.listen in its configuration" in error["message"]


async def test_a_node_that_starts_or_stops_says_so(tmp_path):
    address = UnixAddress(tmp_path / "node.sock")
    state = NodeState()
    async with served(address, state=state, openai=True), asking(address) as client:
        for phase in (Phase.STARTING, Phase.DRAINING):
            state.enter(phase)
            answer = await client.get("/v1/models")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "endpoint_not_there")
            assert f"the node is {phase.value}" in answer.json()["error"]["message"]


# --- while there is one


class Endpoint:
    """Answers what it is asked for, or, at ``/v1/wait``, nothing."""

    def __init__(self) -> None:
        self.made = 0
        self.waiting = trio.Event()
        self.left = trio.Event()

    def make(self) -> Endpoint:
        self.made += 1
        return self

    async def __call__(self, scope, receive, send) -> None:
        if scope["path"] == "/v1/wait":
            self.waiting.set()
            try:
                await trio.sleep_forever()
            finally:
                self.left.set()
        body = await Request(scope, receive).body()
        await PlainTextResponse(f"{scope['method']} {scope['path']} {body.decode()}")(scope, receive, send)


async def test_the_endpoint_is_asked_with_the_admin_sides_token(tmp_path):
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    address, state, endpoint = loopback(), NodeState(), Endpoint()
    state.openai = SharedApp(endpoint.make, token=OTHER)
    async with served(address, token_file=file, state=state, openai=True), asking(address) as client:
        for wrong in ({}, {"Authorization": f"Bearer {OTHER}"}):
            refused = await client.post("/v1/chat/completions", headers=wrong)
            assert refused.status_code == 401
            assert "admin.token_file" in refused.text
        assert endpoint.made == 0
        for n in range(2):
            right = {"Authorization": f"Bearer {TOKEN}"}
            answer = await client.post("/v1/chat/completions", headers=right, content=str(n))
            assert answer.text == f"POST /v1/chat/completions {n}"
        assert endpoint.made == 1


async def test_an_admin_side_without_a_token_asks_for_the_endpoints(tmp_path):
    address, state = loopback(), NodeState()
    state.openai = SharedApp(Endpoint().make, token=OTHER)
    async with served(address, state=state, openai=True), asking(address) as client:
        for wrong in ({}, {"Authorization": f"Bearer {TOKEN}"}):
            refused = await client.get("/v1/models", headers=wrong)
            assert refused.status_code == 401
            assert "openai.token_file" in refused.text
            assert OTHER not in refused.text
        right = await client.get("/v1/models", headers={"Authorization": f"Bearer {OTHER}"})
        assert right.text == "GET /v1/models "
        assert (await client.get("/api/status")).status_code == 200


async def test_pages_of_other_sites_cannot_have_anything_generated():
    address, state, endpoint = loopback(), NodeState(), Endpoint()
    state.openai = SharedApp(endpoint.make, token=None)
    async with served(address, state=state, openai=True), asking(address) as client:
        foreign = {"Origin": "https://evil.example", "Content-Type": "text/plain"}
        assert (await client.post("/v1/completions", headers=foreign, content="{}")).status_code == 403
        assert endpoint.made == 0


async def test_a_request_that_never_ends_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(defaults, "WEB_IDLE_SECONDS", 0.2)
    address, state = UnixAddress(tmp_path / "node.sock"), NodeState()
    state.openai = SharedApp(Endpoint().make, token=None)
    async with served(address, state=state, openai=True):
        client = await trio.open_unix_socket(str(address.path))
        async with client:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
            await client.send_all(head)
            with trio.fail_after(10):
                told = b""
                while more := await client.receive_some():
                    told += more
        assert b" 200" not in told


async def test_requests_end_with_the_endpoint(tmp_path):
    address, state, endpoint = UnixAddress(tmp_path / "node.sock"), NodeState(), Endpoint()
    state.openai = shared = SharedApp(endpoint.make, token=None)
    async with served(address, state=state, openai=True):
        client = await trio.open_unix_socket(str(address.path))
        async with client:
            await client.send_all(b"GET /v1/wait HTTP/1.1\r\nHost: localhost\r\n\r\n")
            with trio.fail_after(10):
                await endpoint.waiting.wait()
                state.openai = None
                await shared.close()
                assert endpoint.left.is_set()
                assert b" 500" in await client.receive_some()


async def test_whoever_closes_waits_for_what_runs_even_if_cancelled():
    endpoint = Endpoint()
    shared = SharedApp(endpoint.make, token=None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shared, {"type": "http", "path": "/v1/wait"}, None, None)
        await endpoint.waiting.wait()
        with trio.CancelScope() as closing:
            closing.cancel()
            await shared.close()
        assert endpoint.left.is_set()
