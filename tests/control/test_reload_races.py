"""Reloads at awkward moments: of files that are no YAML in unusual ways, many at once, and while the node starts."""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from node_support import TINY, node_config
from structlog.testing import capture_logs

from kwaainet_bridge.cli.run import _obey
from kwaainet_bridge.config import NodeConfig, load_config, parse_config
from kwaainet_bridge.errors import ConfigError
from kwaainet_bridge.node import daemon
from kwaainet_bridge.node.control import Control
from kwaainet_bridge.node.daemon import run_node
from kwaainet_bridge.node.state import NodeState


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("drain_seconds: 2026-13-45", "not YAML: month must be in 1..12"),
        ("[" * 3000, "not YAML: it is nested too deeply"),
        ("limits: {connections: " + "9" * 5000 + "}", "not YAML: Exceeds the limit"),
        ("model: {name: /" + "x" * 5000 + "}", r"model\.name: /x+: File name too long"),
    ],
)
def test_what_no_file_of_a_node_has(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "node.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=told):
        load_config(file)


async def signalled(control: Control, *numbers: int) -> None:
    """Have a node that is no terminal's get these signals."""

    async def signals() -> AsyncIterator[int]:
        for number in numbers:
            yield number
            await trio.lowlevel.checkpoint()

    await _obey(signals(), control, has_terminal=False)


async def test_a_defect_in_reading_ends_no_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        signal, "getsignal", lambda _: signal.SIG_IGN
    )  # of whoever runs the tests under nohup

    def read() -> NodeConfig:
        raise ZeroDivisionError

    control = Control(NodeConfig(), NodeState(), trio.Event(), read=read)
    with capture_logs() as logs:
        await signalled(control, signal.SIGHUP)
    assert [entry["event"] for entry in logs] == ["configuration not reloaded"]


async def test_a_storm_of_signals_is_one_reload_after_that_which_runs() -> None:
    reads = 0
    begun, go_on = trio.Event(), trio.Event()
    token = trio.lowlevel.current_trio_token()

    def read() -> NodeConfig:
        nonlocal reads
        reads += 1
        trio.from_thread.run_sync(begun.set, trio_token=token)
        trio.from_thread.run(go_on.wait, trio_token=token)
        return NodeConfig()

    control = Control(NodeConfig(), NodeState(), trio.Event(), read=read)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(signalled, control, *[signal.SIGHUP] * 100)
        await begun.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == 1
        go_on.set()
    assert reads == 2


async def test_what_is_reloaded_while_the_node_starts_applies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = {"name": str(TINY), "dht_prefix": "tiny", "blocks": "0:2", "throughput": 1.0, "threads": 1}
    config = node_config(tmp_path, "node", model=section)
    wanted = node_config(tmp_path, "node", model={**section, "public_name": "me"}, limits={"streams": 32})
    state, stop = NodeState(), trio.Event()
    control = Control(config, state, stop, read=lambda: wanted)
    opening = daemon.open_host

    def open_host(*arguments: Any) -> Any:
        class Opened:
            async def __aenter__(self) -> Any:
                result = await control.reload()  # somebody asks while it is being opened
                assert result.applied == ("limits.streams", "model.public_name")
                self.host = opening(*arguments)
                return await self.host.__aenter__()

            async def __aexit__(self, *error: object) -> Any:
                return await self.host.__aexit__(*error)

        return Opened()

    monkeypatch.setattr(daemon, "open_host", open_host)
    names: list[str | None] = []

    def on_models(models: Any) -> None:
        assert state.host is not None
        assert state.host.inbound.limit == 32
        names.extend(model.config.public_name for model in models._models.values())
        stop.set()

    with trio.fail_after(30):
        await run_node(
            config, state, stop, on_started=lambda _contact: None, on_models=on_models, control=control
        )
    assert names == ["me"]


async def test_a_rule_that_has_not_changed_is_not_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it reads may be gone for now, which is no reason to refuse other changes."""
    before = parse_config("idle: {watch: cpu}", "test")
    wanted = parse_config("{idle: {watch: cpu}, limits: {streams: 32}}", "test")
    control = Control(before, NodeState(), trio.Event(), read=lambda: wanted)
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert (await control.reload()).applied == ("limits.streams",)


async def test_a_rule_is_of_the_gpus_that_the_node_has(monkeypatch: pytest.MonkeyPatch) -> None:
    before = parse_config("model: {device: 'cuda:0'}", "test")
    wanted = parse_config("{model: {device: 'cuda:1'}, idle: {watch: gpu}}", "test")
    read: list[NodeConfig] = []
    control = Control(before, NodeState(), trio.Event(), read=lambda: wanted)
    monkeypatch.setattr("kwaainet_bridge.node.control.reader_for", read.append)
    result = await control.reload()
    assert (result.applied, result.restart) == (("idle.watch",), ("model.device",))
    assert [(c.idle.watch, c.served_models[0].device) for c in read] == [("gpu", "cuda:0")]
