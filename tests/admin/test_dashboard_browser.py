"""The dashboard in a real browser: on a phone and a screen, light and dark, live, with a token, and over a restart.

What the browser showed is kept in ``build/dashboard/``.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import trio
from admin_support import asking, free_port, served, until
from browser_support import IN_BROWSER, PHONE, TOKEN, Look, in_browser, tcp_config
from node_support import PREFIX, node_config, running_node

from kwaainet_bridge.admin_address import TcpAddress
from kwaainet_bridge.hivemind.client import Span, SurveyedModel, SwarmModel
from kwaainet_bridge.hivemind.experts import methods
from kwaainet_bridge.hivemind.experts.records import ServerInfo, ServerState
from kwaainet_bridge.net import HostConfig, open_host
from kwaainet_bridge.net.identity import Identity
from kwaainet_bridge.node.admin import dashboard
from kwaainet_bridge.node.admin.status import status_of
from kwaainet_bridge.node.state import NodeState, Phase
from kwaainet_bridge.rpc import RpcClient
from kwaainet_bridge.wire import msgpack
from kwaainet_bridge.wire.expert import ExpertRequest
from kwaainet_bridge.wire.peer_id import PeerId
from kwaainet_bridge.wire.tensors import encode_tensor

pytestmark = IN_BROWSER


async def test_a_node_in_a_swarm_as_phones_and_screens_show_it(tmp_path):
    """All that the page promises is there and moves; nothing is too wide, asked of others, or an error."""
    async with running_node(node_config(tmp_path, "first", blocks="0:5")) as first:
        await first.serving()
        config = tcp_config(tmp_path, "node", blocks="3:6", bootstrap=[first.address])
        async with (
            running_node(config) as node,
            open_host(HostConfig(Identity.generate("ed25519"), listen=())) as host,
        ):
            await node.serving()
            async with asking(config.admin_address) as client:
                await until(lambda: is_ready(client))
            peer = await host.connect(node.address)
            calls = RpcClient(host)

            async def use() -> None:
                async with calls.stream(peer, methods.RPC_INFERENCE, open_timeout=5) as call:
                    for _ in range(4):
                        await call.send(step(range(3, 6)))
                        await call.receive(timeout=10)
                        await trio.sleep(0.3)  # so that there are steps in more than one second

            def look(started) -> None:
                screen = Look(started, config.admin_address)
                screen.waits("#phase", "serving")
                screen.waits("#ready", "^ready")
                screen.waits("#link", "^live")
                screen.waits("#networks", f"{PREFIX} 8 blocks, 2 servers")
                cells = screen.page.eval_on_selector_all(
                    ".cells:not(.own) i", "all => all.map(e => e.className)"
                )
                assert cells == ["one", "one", "one", "more", "more", "one", "", ""]
                own = screen.page.eval_on_selector_all(".cells.own i", "all => all.map(e => e.className)")
                assert own == ["", "", "", "mine", "mine", "mine", "", ""]
                assert "Nobody serves 6:8." in screen.text("#networks")
                assert "Nothing that is known." in screen.text("#problems")
                assert str(first.contact.peer_id)[-6:] in screen.text("#peers")
                assert "serving, after" in screen.text("#events")
                assert "0 of " in screen.text("#caches")
                trio.from_thread.run(use)
                screen.waits("#totals", "4 steps with 4 tokens")
                screen.waits("#delay", r"\d")
                screen.page.wait_for_selector("#rate-line polyline")
                screen.page.click("summary")
                assert "this node" in screen.text("#networks table")
                screen.shot("screen-light")
                phone = Look(started, config.admin_address, size=PHONE, dark=True)
                phone.waits("#networks", "2 servers")
                phone.page.click("summary")
                assert phone.fits()
                phone.shot("phone-dark")
                backs = [
                    one.page.evaluate("getComputedStyle(document.body).backgroundColor")
                    for one in (screen, phone)
                ]
                assert backs[0] != backs[1]
                phone.page.emulate_media(color_scheme="light")
                assert phone.page.evaluate("getComputedStyle(document.body).backgroundColor") == backs[0]
                phone.shot("phone-light")
                assert screen.wrong == phone.wrong == []

            await in_browser(look)


def step(blocks: range) -> ExpertRequest:
    return ExpertRequest(
        uid=" ".join(f"{PREFIX}.{block}" for block in blocks),
        tensors=[encode_tensor(torch.zeros(1, 1, 64)), encode_tensor(torch.empty(0))],  # no prompts
        metadata=msgpack.pack({"max_length": 8}),
    )


async def is_ready(client) -> bool:
    return (await client.get("/readyz")).status_code == 200


async def test_a_page_outlives_the_node_and_finds_the_next_one(tmp_path):
    config = tcp_config(tmp_path, "node")
    restart, stopped, again, done = (trio.Event() for _ in range(4))

    def look(started) -> None:
        page = Look(started, config.admin_address)
        page.waits("#link", "^live")
        trio.from_thread.run_sync(restart.set)
        trio.from_thread.run(stopped.wait)
        page.waits("#link", r"^not connected since .*\d")
        assert page.page.evaluate("document.querySelector('main').classList.contains('stale')")
        assert "serving" in page.text("#phase")  # what was known last
        page.shot("not-connected")
        trio.from_thread.run_sync(again.set)
        page.waits("#link", "^live")
        page.waits("#phase", "serving")
        assert not page.page.evaluate("document.querySelector('main').classList.contains('stale')")
        assert all("ERR_" in wrong for wrong in page.wrong)  # refused and broken connections, as they were
        trio.from_thread.run_sync(done.set)

    async with trio.open_nursery() as nursery:
        async with running_node(config) as node:
            await node.serving()
            nursery.start_soon(in_browser, look)
            await restart.wait()
            await node.drained()
        stopped.set()
        await again.wait()
        async with running_node(config) as node:
            await node.serving()
            await done.wait()


async def test_a_node_that_is_paused_says_why_on_both_pages(monkeypatch):
    address = TcpAddress("127.0.0.1", free_port())
    state = NodeState()
    pausing = {"paused": "the GPU is used by others", "phase": {"name": "paused", "seconds": 3.0}}
    monkeypatch.setattr(dashboard, "status_of", lambda state: status_of(state) | pausing)

    def look(started) -> None:
        for path, name in (("/", "paused"), ("/chat", "chat-paused")):
            page = Look(started, address, size=PHONE, dark=path == "/", path=path)
            page.waits("#phase", "^paused$")
            page.waits("#paused", "Paused: the GPU is used by others.*kwaainet-bridge resume ends it")
            assert page.page.eval_on_selector("#phase", "e => e.className") == "badge warn"
            assert page.page.title().startswith("paused")
            assert page.fits()
            page.shot(name)
            pausing.clear()
            page.page.wait_for_selector("#paused", state="hidden")
            pausing.update(paused="the GPU is used by others", phase={"name": "paused", "seconds": 3.0})

    async with served(address, state=state):
        await in_browser(look)


async def test_a_token_is_asked_for_and_kept_for_the_tab(tmp_path):
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    address = TcpAddress("127.0.0.1", free_port())

    def look(started) -> None:
        page = Look(started, address, size=PHONE)
        for given in ("not the one that it is", TOKEN):
            page.page.wait_for_selector("#ask:not([hidden])")
            assert not page.page.is_visible("#main")
            page.page.fill("#token", given)
            page.page.click("button")
            if given != TOKEN:
                page.page.wait_for_selector("#refused:not([hidden])")
                page.shot("token")
        page.waits("#link", "^live")
        assert not page.page.is_visible("#ask")
        page.page.reload()
        page.waits("#link", "^live")
        other = Look(started, address)  # another tab asks anew
        other.page.wait_for_selector("#ask:not([hidden])")
        assert TOKEN not in page.page.content()

    async with served(address, token_file=file):
        await in_browser(look)


HOSTILE = "<img src=x onerror=\"document.title='gone'\"><script>document.title='gone'</script>"


async def test_what_peers_say_is_text_and_troubles_come_with_their_remedies():
    address = TcpAddress("127.0.0.1", free_port())
    state = NodeState()
    state.bootstrap = {"petals": SimpleNamespace(total=1, reached=set())}
    state.enter(Phase.SERVING)
    state.degrade("bootstrap petals", f"none of 1 bootstrap peers is reached {HOSTILE}")
    info = ServerInfo(
        ServerState.ONLINE, 5.0, start_block=0, end_block=2, public_name=HOSTILE, version=HOSTILE
    )
    span = Span(PeerId(b"\x12\x20" + bytes(32)), range(2), info)

    async def survey():
        return [
            SurveyedModel(SwarmModel(HOSTILE, 4), (span,), left_out={}),
            SurveyedModel(SwarmModel("x", 3), error=HOSTILE),
        ]

    state.surveys = {"petals": survey}

    def look(started) -> None:
        page = Look(started, address, size=PHONE)
        page.waits("#problems", "bootstrap petals")
        page.waits("#problems", r"What helps: .*networks\.petals\.bootstrap")
        page.waits("#networks", "its servers")
        page.page.click("summary")
        assert "<img src=x" in page.text("#networks table")
        assert page.text("#networks").count("<script>") >= 3
        assert page.page.eval_on_selector_all("img, body script", "all => all.length") == 0
        assert page.page.title().startswith("⚠ serving")
        assert "Nobody serves 0:3" not in page.text("#networks")  # nobody knows
        assert page.fits()
        page.shot("trouble")
        # a script that got into the page nevertheless would not run
        page.page.evaluate(
            "document.body.append(Object.assign(document.createElement('script'), {text: 'document.title = 1'}))"
        )
        assert page.page.title().startswith("⚠")
        assert any("Content Security Policy" in wrong for wrong in page.wrong)
        assert len(page.wrong) == 1
        trio.from_thread.run_sync(state.recover, "bootstrap petals")
        page.waits("#problems", "Nothing that is known")

    async with served(address, state=state):
        await in_browser(look)
