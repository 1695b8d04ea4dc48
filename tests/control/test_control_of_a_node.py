"""A node in the test's own process, told over HTTP what to do."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import trio
from admin_support import asking, check_documented, condition_of, free_port, until
from node_clients import World, node_in_both, step
from node_support import node_config, running_node

from kwaainet_bridge.errors import CapacityDenied, HandlerError
from kwaainet_bridge.hivemind.experts.records import ServerState
from kwaainet_bridge.node.state import Phase

POSTS = ("drain", "pause", "resume", "reload")


async def test_a_paused_node_takes_no_new_work_and_finishes_what_runs(tmp_path: Path) -> None:
    async with node_in_both(tmp_path) as world:
        node, admin, user, kwaai = world.node, world.admin, world.petals, world.kwaainet.kwaai
        await until(lambda: world.are(ServerState.ONLINE))
        engine = node.served and node.served.engine
        async with user.session() as session:
            await session.send(step())
            await session.receive(timeout=10)
            await kwaai.step_ids(user.node, 7, 0, [1, 2])

            answer = (await admin.post("/api/pause")).json()
            assert answer == {"paused": "the operator has paused it", "sessions": 2}
            await node.state.wait_for(Phase.PAUSED)
            told = await condition_of(admin, "serving")
            assert (told.met, told.code) == (False, 503)
            assert told.reason.startswith("paused for")
            assert told.reason.endswith(": the operator has paused it")
            await until(lambda: world.are(ServerState.OFFLINE))
            status = (await admin.get("/api/status")).json()
            check_documented(status)
            assert (status["paused"], status["phase"]["name"]) == (answer["paused"], "paused")
            assert status["networks"]["petals"]["sessions"] == status["networks"]["kwaainet"]["sessions"] == 1

            await session.send(step())  # what runs goes on
            await session.receive(timeout=10)
            await kwaai.step_ids(user.node, 7, 2, [3])
            await assert_refused(world)
            await session.send(step())
            await session.receive(timeout=10)

        assert node.served is not None
        assert node.served.engine is engine
        assert (await admin.post("/api/resume")).json() == {"paused": None}
        await node.state.wait_for(Phase.SERVING)
        await until(lambda: world.are(ServerState.ONLINE))
        await user.forward()
        await kwaai.lease(user.node)
        await kwaai.step_ids(user.node, 8, 0, [1])
        async with user.session() as session:
            await session.send(step())
            await session.receive(timeout=10)


async def assert_refused(world: World) -> None:
    user, kwaai = world.petals, world.kwaainet.kwaai
    with pytest.raises(HandlerError, match="paused by its operator and takes no requests"):
        await user.forward()
    async with user.session() as other:
        await other.send(step())
        with pytest.raises(HandlerError, match="paused by its operator and takes no new sessions"):
            await other.receive(timeout=10)
    with pytest.raises(HandlerError, match="paused by its operator: go on with another one"):
        await kwaai.step_ids(user.node, 8, 0, [1])
    with pytest.raises(CapacityDenied):
        await kwaai.lease(user.node)


async def test_a_pause_that_ends_sessions(tmp_path: Path) -> None:
    async with node_in_both(tmp_path) as world:
        user, kwaai = world.petals, world.kwaainet.kwaai
        async with user.session() as session:
            await session.send(step())
            await session.receive(timeout=10)
            await kwaai.step_ids(user.node, 7, 0, [1, 2])
            answer = await world.admin.post("/api/pause", params={"now": "true"})
            assert answer.json()["sessions"] == 2
            with pytest.raises(HandlerError, match="paused by its operator: go on with another one"):
                await session.receive(timeout=10)
        with pytest.raises(HandlerError, match="you have no session 7 here"):
            await kwaai.step_ids(user.node, 7, 2, [3])
        assert world.node.served is not None
        assert world.node.served.open_sessions == 0
        await world.node.drained()  # one that is paused ends as any other
    assert world.node.state.phase is Phase.STOPPED


async def test_a_node_is_drained_once_and_then_takes_no_orders(tmp_path: Path) -> None:
    config = node_config(tmp_path, "node", drain_seconds=7)
    async with running_node(config) as node, asking(config.admin_address) as admin:
        await node.serving()
        assert (await admin.post("/api/drain")).json() == {"sessions": 0, "drain_seconds": 7.0}
        with trio.fail_after(10):
            await node.state.wait_for(Phase.STOPPED)
        with pytest.raises(httpx.TransportError):
            await admin.get("/livez")


async def test_orders_while_it_drains(tmp_path: Path) -> None:
    async with node_in_both(tmp_path) as world:
        async with world.petals.session() as session:
            await session.send(step())
            await session.receive(timeout=10)
            assert (await world.admin.post("/api/drain")).json()["sessions"] == 1
            await world.node.state.wait_for(Phase.DRAINING)
            assert (await world.admin.post("/api/drain")).status_code == 200
            for order in ("pause", "resume", "reload"):
                answer = await world.admin.post(f"/api/{order}")
                assert (answer.status_code, answer.json()["error"]) == (
                    409,
                    "the node drains, and ends then: start it anew",
                )
        with trio.fail_after(10):
            await world.node.state.wait_for(Phase.STOPPED)


async def test_only_posts_are_orders(tmp_path: Path) -> None:
    config = node_config(tmp_path, "node")
    async with running_node(config) as node, asking(config.admin_address) as admin:
        for order in POSTS:
            assert (await admin.get(f"/api/{order}")).status_code == 405
        answer = await admin.post("/api/pause", params={"now": "maybe"})
        assert (answer.status_code, answer.json()["error"]) == (422, "now=maybe: must be true or false")
        assert (await admin.post("/api/stop")).status_code == 404
        assert not node.stop.is_set()
        assert not node.state.pausing.asked


async def test_pages_of_other_sites_and_those_without_the_token_give_no_orders(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a-long-enough-token")
    (tmp_path / "token").chmod(0o600)
    address = f"127.0.0.1:{free_port()}"
    config = node_config(tmp_path, "node", admin={"listen": address})
    async with running_node(config) as node, asking(config.admin_address) as admin:
        for origin in ("http://example.org", "http://127.0.0.1:1", "null"):
            for order in POSTS:
                answer = await admin.post(f"/api/{order}", headers={"origin": origin})
                assert answer.status_code == 403
        assert (await admin.post("/api/pause", headers={"host": "example.org"})).status_code == 421
        assert not node.state.pausing.asked
        own = await admin.post("/api/pause", headers={"origin": f"http://{address}"})
        assert own.status_code == 200
        assert not node.stop.is_set()
    config = node_config(tmp_path, "other", admin={"token_file": "token"})
    async with running_node(config) as node, asking(config.admin_address) as admin:
        for order in POSTS:
            assert (await admin.post(f"/api/{order}")).status_code == 401
        authorization = {"authorization": "Bearer a-long-enough-token"}
        assert (await admin.post("/api/pause", headers=authorization)).status_code == 200
        await node.state.wait_for(Phase.PAUSED)


async def test_averaging_stops_meanwhile(tmp_path: Path) -> None:
    from kwaainet_bridge.node.averaging import AveragingService

    began: list[str] = []
    ended: list[str] = []

    class Service(AveragingService):
        async def _help(self, run):
            began.append(run.name)
            try:
                await trio.sleep_forever()
            finally:
                ended.append(run.name)

    config = node_config(tmp_path, "node", averaging={"runs": [{"prefix": "run"}]})
    async with running_node(config) as node, trio.open_nursery() as nursery:
        nursery.start_soon(Service("petals", config.averaging, None, node.state).run)
        await trio.testing.wait_all_tasks_blocked()
        assert (began, ended) == (["run"], [])
        node.state.pausing.ask("operator", "by hand")
        await trio.testing.wait_all_tasks_blocked()
        assert (began, ended) == (["run"], ["run"])
        node.state.pausing.lift()
        await trio.testing.wait_all_tasks_blocked()
        assert began == ["run", "run"]
        nursery.cancel_scope.cancel()
