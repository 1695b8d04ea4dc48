"""The laboratory itself: what the other tests take for granted of it. Plain sockets, no peers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from lab import Host, Lab, LabFailed, Machine, NatKind, Router

PYTHON = sys.executable
PORT = 4001
SILENCE = 0.5  # seconds without an answer, where one would come at once

pytestmark = pytest.mark.slow

# tells each caller where it came from
SERVER = f"""
import socket
server = socket.create_server(("", {PORT}))
print("up", flush=True)
while True:
    caller, (host, port) = server.accept()
    caller.sendall(f"{{host}} {{port}}".encode())
    caller.close()
"""
# prints what such a server tells, or how the call failed
CALLER = """
import json, socket, sys
host, port, own_port, seconds = sys.argv[1], *map(json.loads, sys.argv[2:])
try:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # an earlier call may have used it
        s.bind(("", own_port))
        s.settimeout(seconds)
        s.connect((host, port))
        print(s.recv(100).decode())
except OSError as e:
    print(type(e).__name__)
"""
# sends datagrams and prints how many of them come back; none is lost for lack of room, however busy this machine is
DATAGRAMS = 1000
ROOM = "s.setsockopt(socket.SOL_SOCKET, 33, 4 << 20)  # SO_RCVBUFFORCE"
COUNTER = f"""
import contextlib, socket, sys
with socket.socket(type=socket.SOCK_DGRAM) as s:
    {ROOM}
    s.connect((sys.argv[1], {PORT}))
    returned = 0
    for _ in range({DATAGRAMS}):
        s.send(b"x")
        with contextlib.suppress(BlockingIOError):
            while s.recv(1, socket.MSG_DONTWAIT):
                returned += 1
    s.settimeout(0.5)
    with contextlib.suppress(TimeoutError):
        while s.recv(1):
            returned += 1
    print(returned)
"""
MIRROR = f"""
import socket
with socket.socket(type=socket.SOCK_DGRAM) as s:
    {ROOM}
    s.bind(("", {PORT}))
    print("up", flush=True)
    while True:
        s.sendto(*s.recvfrom(1))
"""
# keeps a connection busy, and prints how it ended
TALKER = f"""
import socket, sys, time
with socket.create_connection((sys.argv[1], {PORT})) as s:
    print("connected", flush=True)
    try:
        while True:
            s.send(b"x")
            time.sleep(0.05)
    except OSError as e:
        print(type(e).__name__)
"""
LISTENER = f"""
import socket
server = socket.create_server(("", {PORT}))
print("up", flush=True)
caller, _ = server.accept()
while caller.recv(100):
    pass
"""
# connects to one that connects to it at the same time, each from the port that the other dials
PUNCHER = f"""
import socket, sys
with socket.socket() as s:
    s.bind(("", {PORT}))
    s.settimeout(3)
    try:
        s.connect((sys.argv[1], {PORT}))
        s.sendall(b"through")
        print(s.recv(100).decode())
    except OSError as e:
        print(type(e).__name__)
"""


def serve(machine: Machine, script: str = SERVER) -> None:
    machine.process("server", [PYTHON, "-c", script], env=os.environ).wait_for("up")


def call(machine: Machine, host: str, *, port: int = PORT, own_port: int = 0, seconds: float = 10) -> str:
    """What the server says, where the call came from, or the name of the error."""
    return machine.run(PYTHON, "-c", CALLER, host, str(port), str(own_port), str(seconds)).strip()


def behind(lab: Lab, kind: NatKind) -> tuple[Router, Host]:
    router = lab.nat("router", kind)
    return router, router.host("inside")


# --- networks


def test_public_hosts_reach_each_other(lab: Lab) -> None:
    one, other = lab.host("one"), lab.host("other")
    serve(other)
    assert call(one, other.address, own_port=5000) == f"{one.address} 5000"


def test_nothing_leads_out_of_the_laboratory(lab: Lab) -> None:
    host = lab.host("host")
    with socket.create_server(("", 0)) as outside:
        port = outside.getsockname()[1]
        assert call(host, "127.0.0.1", port=port) == "ConnectionRefusedError"
    addresses = {a.address for of in psutil.net_if_addrs().values() for a in of if a.family == socket.AF_INET}
    for address in addresses - {"127.0.0.1"}:
        assert call(host, address, port=port, seconds=SILENCE) in {
            "TimeoutError",
            "OSError",
        }  # no answer, or no route


def test_two_laboratories_do_not_meet(lab: Lab, tmp_path: Path) -> None:
    with Lab(tmp_path) as other_lab:
        here, there = lab.host("host"), other_lab.host("host")
        assert here.address == there.address
        serve(there)
        assert call(here, here.address) == "ConnectionRefusedError"
        assert call(there, there.address).startswith(there.address)


def test_a_command_that_fails_is_named(lab: Lab) -> None:
    with pytest.raises(LabFailed, match=r"(?s)nft -f -: .*syntax error"):
        lab.host("host").nft("nonsense")


# --- network address translation


@pytest.mark.parametrize("kind", ["cone", "symmetric"])
def test_a_nat_lets_nobody_in_and_does_not_answer(lab: Lab, kind: NatKind) -> None:
    router, inside = behind(lab, kind)
    outside = lab.host("outside")
    serve(inside)
    assert call(router.host("neighbour"), inside.address).startswith("192.168.")
    assert call(outside, router.address, seconds=SILENCE) == "TimeoutError"
    assert call(outside, inside.address, seconds=SILENCE) == "TimeoutError"


def test_a_cone_keeps_the_port_for_everybody(lab: Lab) -> None:
    router, inside = behind(lab, "cone")
    for outside in (lab.host("one"), lab.host("other")):
        serve(outside)
        assert call(inside, outside.address, own_port=5000) == f"{router.address} 5000"


def test_a_symmetric_nat_changes_the_port_for_each_peer(lab: Lab) -> None:
    router, inside = behind(lab, "symmetric")
    seen = {f"{router.address} 5000"}
    for outside in (lab.host("one"), lab.host("other"), lab.host("third")):
        serve(outside)
        seen.add(call(inside, outside.address, own_port=5000))
    assert len(seen) == 4  # fails by chance once in 10,000 runs


def test_a_forwarded_port_leads_inside_and_no_other_does(lab: Lab) -> None:
    router, inside = behind(lab, "symmetric")
    outside = lab.host("outside")
    serve(inside)
    router.forward_port(7000, inside, PORT)
    assert call(outside, router.address, port=7000, own_port=5000) == f"{outside.address} 5000"
    assert call(outside, router.address, port=PORT, seconds=SILENCE) == "TimeoutError"


def test_a_symmetric_nat_that_forgets_ends_connections(lab: Lab) -> None:
    """What the inside sends next comes from another port, and is refused."""
    router, inside = behind(lab, "symmetric")
    outside = lab.host("outside")
    serve(outside, LISTENER)
    talker = inside.process("talker", [PYTHON, "-c", TALKER, outside.address], env=os.environ)
    talker.wait_for("connected")
    router.forget()
    talker.wait_for("ConnectionResetError")


@pytest.mark.parametrize(("kind", "outcome"), [("cone", "through"), ("symmetric", "TimeoutError")])
def test_holes_can_be_punched_through_cones_alone(lab: Lab, kind: NatKind, outcome: str) -> None:
    routers = [lab.nat("left", kind), lab.nat("right", kind)]
    inside = [router.host(f"behind-{router.name}") for router in routers]
    pairs = zip(inside, reversed(routers), strict=True)
    punchers = [
        host.process("puncher", [PYTHON, "-c", PUNCHER, router.address], env=os.environ)
        for host, router in pairs
    ]
    assert [p.wait_for("through|Error")[0] for p in punchers] == [outcome.removeprefix("Timeout")] * 2


# --- links


def returned(machine: Machine, host: Machine) -> int:
    return int(machine.run(PYTHON, "-c", COUNTER, host.address))


def test_a_link_loses_the_share_asked_for_in_both_directions(lab: Lab) -> None:
    one, other = lab.host("one"), lab.host("other")
    serve(other, MIRROR)
    assert returned(one, other) == DATAGRAMS
    one.link.loss(20)
    assert 550 < returned(one, other) < 730  # 0.8 * 0.8 of 1000, give or take six standard deviations
    one.link.loss(50)
    assert 170 < returned(one, other) < 330
    one.link.mend()
    assert returned(one, other) == DATAGRAMS


def test_a_link_that_is_cut_carries_nothing_until_it_is_mended(lab: Lab) -> None:
    router, inside = behind(lab, "cone")
    outside = lab.host("outside")
    serve(outside)
    for link in (inside.link, router.link, outside.link):
        link.cut()
        assert call(inside, outside.address, seconds=SILENCE) == "TimeoutError"
        link.mend()
        assert call(inside, outside.address).startswith(router.address)


# --- ends


def test_leaving_ends_processes_and_networks(tmp_path: Path, namespaces: None) -> None:
    with Lab(tmp_path) as lab:
        host = lab.host("host")
        process = host.process("sleeper", ["sh", "-c", "echo up; exec sleep inf"], env=os.environ)
        process.wait_for("up")
        assert Path(f"/proc/{process.pid}/ns/net").samefile(host.path)
    assert process.returncode == -signal.SIGKILL
    assert not psutil.pid_exists(host.pid)


def test_nothing_is_left_of_a_run_that_was_killed(tmp_path: Path, namespaces: None) -> None:
    builder = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path\n"
        "from lab import Lab\n"
        "with Lab(Path(sys.argv[1])) as lab:\n"
        "    host = lab.host('host')\n"
        "    print(host.pid, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    here = Path(__file__).parent
    argv = [PYTHON, "-c", builder, tmp_path, here, here.parent / "interop"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        holder = psutil.Process(int(run.stdout.readline()))
        run.kill()
        assert psutil.wait_procs([holder], timeout=5)[1] == []
