"""The commands as a person runs them, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from kwaainet_bridge import __version__
from kwaainet_bridge.cli.app import app
from kwaainet_bridge.cli.run import join_command
from kwaainet_bridge.config import parse_config

pytestmark = pytest.mark.slow

COMMAND = Path(sys.executable).with_name("kwaainet-bridge")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "TERM": "dumb"}


def call(*arguments, timeout=120, cwd=None):
    return subprocess.run(
        [COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=ENV,
        cwd=cwd,
        check=False,
    )


class Node:
    """A node that ``run`` started; its log is on disk, so that nothing blocks."""

    def __init__(self, folder, *arguments):
        self.log = folder / "node.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [COMMAND, "run", *map(str, arguments)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=ENV,
                cwd=folder,
            )
        self.printed = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait(10)
        self.process.stdout.close()

    def wait_for(self, label):
        for line in self.process.stdout:
            self.printed.append(line.rstrip())
            if line.startswith(label):
                return line.split()[-1]
        raise AssertionError(f"ended with {self.process.wait()}: {self.log.read_text()}")

    def events(self):
        lines = self.log.read_text().splitlines()
        return [json.loads(line)["event"] for line in lines if line.startswith("{")]


@pytest.fixture
def node(tmp_path):
    with Node(tmp_path, "--new-swarm", "--model", "austen", "--listen", "/ip4/127.0.0.1/tcp/0") as node:
        node.address = node.wait_for("join with")
        node.wait_for("serving")
        yield node


def test_generate_on_a_node_and_drain(node, tmp_path):
    assert [line.split("  ")[0].strip() for line in node.printed] == [
        "peer id",
        "address",
        "join with",
        "serving",
    ]
    arguments = ("generate", "She was", "--initial-peers", node.address, "--max-new-tokens", 12)
    greedy = call(*arguments, "--show-route")
    assert greedy.returncode == 0, greedy.stderr
    assert greedy.stdout.startswith("She was ")
    assert len(greedy.stdout.split()) > 5
    assert greedy.stderr.strip().startswith("route: 0:8 via ")
    sampled = [call(*arguments, "--temperature", 1.0, "--top-k", 20, "--seed", 7).stdout for _ in range(2)]
    assert sampled[0] == sampled[1]
    assert sampled[0].startswith("She was ")

    wrong = call("generate", "x", "--initial-peers", node.address, "--dht-prefix", "nobody-serves-this")
    assert wrong.returncode == 1
    assert "nobody-serves-this" in wrong.stderr
    assert "Traceback" not in wrong.stderr

    node.process.send_signal(signal.SIGTERM)
    assert node.process.wait(30) == 0
    events = node.events()
    assert events[-1] == "stopped"
    assert any("as OFFLINE" in event for event in events)


def test_ping(node):
    done = call("ping", node.address, "--count", 2)
    assert done.returncode == 0, done.stderr
    labels = [line[:12].strip() for line in done.stdout.splitlines()]
    assert labels == ["peer", "connected", "round trip", "call 1", "call 2", "median"]
    told = json.loads(call("ping", node.address, "--json").stdout)
    assert node.address.endswith(told["peer"])
    assert told["muxer"] == "/yamux/1.0.0"
    assert len(told["calls_ms"]) == 5

    nobody = call("ping", f"/ip4/127.0.0.1/tcp/1/p2p/{told['peer']}")
    assert nobody.returncode == 1
    assert "(tcp)" in nobody.stderr

    unmeasured = call("bench", "net", node.address)
    assert unmeasured.returncode == 1
    assert "does not serve" in unmeasured.stderr


def test_bench_net():
    told = json.loads(call("bench", "net", "--megabytes", 2, "--json").stdout)
    assert told["megabytes"] == 2
    assert told["up_mb_s"] > 0
    assert told["down_mb_s"] > 0
    assert call("bench", "net", "--serve", told["peer"]).returncode == 2


def test_second_signal_ends_at_once(tmp_path):
    config = tmp_path / "node.yaml"
    config.write_text(
        "listen: [/ip4/127.0.0.1/tcp/0]\ndrain_seconds: 600\n"
        "networks: {petals: {bootstrap: [/ip4/127.0.0.1/tcp/1/p2p/12D3KooWJNHmzNXJwHBrjUin2kpjTMSyogJjT8oTH2T3TPKEhjAA]}}\n"
    )
    with Node(tmp_path, "-c", config) as node:
        node.wait_for("serving")
        os.kill(node.process.pid, signal.SIGSTOP)  # both signals are there before it can act on the first
        node.process.send_signal(signal.SIGTERM)
        node.process.send_signal(signal.SIGINT)
        os.kill(node.process.pid, signal.SIGCONT)
        assert node.process.wait(10) in (128 + signal.SIGTERM, 128 + signal.SIGINT)


def test_demo_generates_through_both_nodes(tmp_path):
    done = call("demo", "--once", "--folder", tmp_path / "run", cwd=tmp_path, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("It is a truth universally acknowledged")
    assert len(done.stdout.split()) > 30
    assert "route: 0:4 via" in done.stderr
    assert "=> 4:8 via" in done.stderr
    for log in (tmp_path / "run").glob("*.log"):
        assert '"stopped"' in log.read_text()


def alive(folder):
    """The nodes whose configuration lies in ``folder``."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or ())]


@pytest.mark.parametrize(
    ("number", "after"), [(signal.SIGTERM, "The swarm keeps running"), (signal.SIGHUP, "node-1 serves")]
)
def test_demo_drains_its_nodes_when_told_to_end(tmp_path, number, after):
    # under nohup a child ignores SIGHUP, and lives on
    command = ["env", "--default-signal=HUP", COMMAND, "demo", "--folder", tmp_path / "run"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENV
    ) as demo:
        assert any(line.startswith(after) for line in demo.stderr)
        started = alive(tmp_path)
        demo.send_signal(number)
        demo.stderr.read()
        assert demo.wait(60) == 128 + number
    assert len(started) >= 2  # the demonstration itself and its nodes
    assert alive(tmp_path) == []
    assert '"stopped"' in (tmp_path / "run" / "node-1.log").read_text()


def test_stop_while_bootstrapping(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        nobody = "12D3KooWJNHmzNXJwHBrjUin2kpjTMSyogJjT8oTH2T3TPKEhjAA"
        address = f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}/p2p/{nobody}"
        arguments = ("--model", "austen", "--listen", "/ip4/127.0.0.1/tcp/0", "--initial-peers", address)
        with Node(tmp_path, *arguments) as node:
            node.wait_for("peer id")
            node.process.send_signal(signal.SIGTERM)
            assert node.process.wait(12) == 0
            assert node.events()[-1] == "stopped"
            assert "loading" not in node.events()


def test_init_then_run(tmp_path):
    made = call("init", tmp_path / "mine", "--key", "ed25519")
    assert made.returncode == 0, made.stderr
    assert call("config", "check", tmp_path / "mine" / "node.yaml").stdout.endswith("good\n")
    again = call("init", tmp_path / "mine")
    assert (again.returncode, again.stderr.count("exists already")) == (2, 1)


# --- without a process ---------------------------------------------------------------------------------------

runner = CliRunner(env={"TERM": "dumb", "NO_COLOR": "1"})


def refused(*arguments, cwd=None):
    done = call(*arguments, cwd=cwd)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    return done.stderr


def test_version():
    assert runner.invoke(app, ["--version"]).output == f"kwaainet-bridge {__version__}\n"


@pytest.mark.parametrize(
    "command", [[], ["run"], ["generate"], ["demo"], ["init"], ["config"], ["config", "check"]]
)
def test_help_of_every_command(command):
    shown = runner.invoke(app, [*command, "--help"])
    assert shown.exit_code == 0
    assert "Usage" in shown.output


def test_mistakes_are_told_without_a_traceback(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("modle: {}\n")
    assert "modle: unknown key; did you mean 'model'?" in refused("config", "check", bad)
    assert "exclude each other" in refused("run", "--new-swarm", "--public-swarm")
    assert "nor is it a preset: petals-public" in refused("run", "--bootstrap", "somewhere")
    assert "--initial-peers" in refused("generate", "hello")
    assert "kwaainet-bridge init" in refused("run", "-c", tmp_path / "none.yaml")
    assert "cannot be written" in refused("init", "/dev/null/x")
    assert "no folder /no/such/model" in refused("run", "--new-swarm", "--model", "/no/such/model")
    (tmp_path / "empty").mkdir()
    listen = ("--listen", "/ip4/127.0.0.1/tcp/0")
    assert str(tmp_path / "empty") in refused(
        "run", "--new-swarm", "--model", tmp_path / "empty", *listen, cwd=tmp_path
    )


def test_join_line_is_a_whole_command():
    model = parse_config("model: {name: /my models/Llama, dht_prefix: mine}", "x").model
    assert join_command(model, "ADDR") == (
        "kwaainet-bridge run --model '/my models/Llama' --dht-prefix mine --initial-peers ADDR"
    )
    assert join_command(None, "ADDR") == "kwaainet-bridge run --initial-peers ADDR"


def test_average_shows_how_peers_converge():
    done = call(
        "average",
        "--peers",
        "4",
        "--group-size",
        "2",
        "--rounds",
        "2",
        "--elements",
        "1000",
        "--matchmaking",
        "1.5",
    )
    assert done.returncode == 0, done.stderr
    head, *rounds, _, end = done.stdout.splitlines()
    assert head.startswith("round  where the peers are")
    assert [line.split()[0] for line in rounds] == ["0", "1", "2"]
    first, last = (
        sum(int(mark) for mark in line.split()[1] if mark != "·") for line in (rounds[0], rounds[-1])
    )
    assert first == last == 4
    assert "2 + 2" in rounds[1]
    assert float(rounds[2].split()[2]) < float(rounds[0].split()[2]) / 10
    assert end.startswith("No number of any peer is further than")
    assert "--initial-peers /ip4/127.0.0.1/tcp/" in done.stderr


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--compression", "ZIP"], "--compression ZIP: must be one of NONE"),
        (["--prefix", "a.b"], "--prefix 'a.b'"),
        (["--initial-peers", "nowhere"], "nowhere"),
    ],
)
def test_average_names_what_is_wrong(options, error):
    done = call("average", *options)
    assert done.returncode == 2
    assert error in done.stderr
