"""Our host beside stock Hivemind's ``P2P`` and its Go daemon: calls, steps and transfers in all four pairings.

``python -m bench.net`` alternates the pairings of client and server, so that a machine that slows down slows all,
and prints medians and their ratios to stock→stock as a table and as JSON. ``a→b`` is client a and server b. Servers
and clients are processes of their own (a stock one has a daemon besides), started once and idle unless measured.
``ratio`` is that of the medians, ``lowest`` and ``highest`` those of single pairs, ``best ratio`` that of the best
values. ``cpu`` is user and system time of the client's and the server's processes, daemons included, per call; it
strays less than wall time does. ``of cipher`` is the share of what one core encrypts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from child_processes import Driver
from stock_swarm import START_SECONDS, StockEnvironment

from bench.net_rows import ABOUT, BASE, BULK_BYTES, GROUPS, KIB, LEGS, OURS, ROWS, Leg, Row, busy_parts

DELAY_SECONDS = 0.05  # each way
WITHIN = 120.0  # seconds for one command
CIPHER_MESSAGE = 64 * KIB
WARM_UP_SHARE = 10  # the first pair is a tenth as long and not counted
STOCK = Path(__file__).with_name("net_stock.py")


@dataclass(frozen=True)
class Sample:
    """One measurement. CPU in ms per call; ``parts`` are what the value is made of, by name and unit."""

    value: float
    client_cpu: float
    server_cpu: float
    failed: int
    parts: dict[str, float]


class Side:
    """One process that serves or calls, the daemons that it started, and its addresses by the name of the host."""

    def __init__(self, driver: Driver, hosts: list[str]) -> None:
        self.driver = driver
        self.addresses = {name: driver.ask("open", name=name, within=START_SECONDS) for name in hosts}
        self._clocks = [_cpu_clock(process.pid) for process in driver.members()]

    @property
    def peer(self) -> str:
        return self.addresses["near"].rpartition("/p2p/")[2]

    def cpu_seconds(self) -> float:
        return sum(map(time.clock_gettime, self._clocks))


def _cpu_clock(pid: int) -> int:
    """Another process's CPU clock, in nanoseconds and with the threads that ended: clock_getcpuclockid(3)."""
    return (~pid << 3) | 2


def far(server: str) -> str:
    """The client's host that reaches this server through the proxy."""
    return f"far-{server}"


class Bench:
    def __init__(self, servers: dict[str, Side], clients: dict[str, Side], round_trip: float) -> None:
        self.servers = servers
        self.clients = clients
        self.round_trip = round_trip

    def measure(self, row: Row, leg: Leg, *, warm_up: bool = False) -> Sample:
        client, server = self.clients[leg.client], self.servers[leg.server]
        arguments = row.arguments | {"name": far(leg.server) if row.far else "near", "peer": server.peer}
        if warm_up:
            arguments["count"] = max(arguments["count"] // WARM_UP_SHARE, 1)
        before = client.cpu_seconds(), server.cpu_seconds()
        answer = client.driver.ask(row.do, within=WITHIN, **arguments)
        after = client.cpu_seconds(), server.cpu_seconds()
        if answer["failed"] * 20 > answer["calls"]:
            raise RuntimeError(f"{row.name} {leg}: {answer['failed']} of {answer['calls']} calls failed")
        value = row.value(answer)
        if row.far:
            value /= self.round_trip
            if value < 0.95:
                raise RuntimeError(
                    f"{row.name} {leg}: {value:.2f} RTT: the peers found a way around the proxy"
                )
        cpu = [(b - a) * 1e3 / answer["calls"] for a, b in zip(before, after, strict=True)]
        parts = busy_parts(answer) if row.do == "busy" else {}
        return Sample(value, *cpu, answer["failed"], parts)

    def cipher(self) -> float:
        """MB/s of raw ChaCha20-Poly1305 on one core."""
        seconds = self.clients["ours"].driver.ask("cipher", size=BULK_BYTES, message=CIPHER_MESSAGE)
        return BULK_BYTES / seconds / 1e6


@contextmanager
def echo_port() -> Iterator[int]:
    """A plain TCP echo for one connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                while data := connection.recv(64):
                    connection.sendall(data)

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]


def round_trip(delay: Driver) -> float:
    """What a byte takes through the proxy and back."""
    taken = []
    with echo_port() as port:
        near = delay.ask("forward", port=port, seconds=DELAY_SECONDS)
        with socket.create_connection(("127.0.0.1", near)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(10):
                began = time.perf_counter()
                connection.sendall(b"x")
                connection.recv(1)
                taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def through(delay: Driver, address: str) -> str:
    """The address under which the proxy passes connections on to ``address``."""
    host, port, peer = address.partition("/tcp/")[0], *address.partition("/tcp/")[2].split("/p2p/")
    near = delay.ask("forward", port=int(port), seconds=DELAY_SECONDS)
    return f"{host}/tcp/{near}/p2p/{peer}"


@contextmanager
def started(stock: StockEnvironment, loop: str) -> Iterator[Bench]:
    """All processes, with every client connected to every server twice: directly and through the proxy.

    A client has one far host for each server: Go daemons tell each other of whom they know, and would dial around
    the proxy.
    """
    with ExitStack() as stack:

        def start(name: str, argv: list[Any], env: dict[str, str]) -> Driver:
            log = stock.work / f"net-{name}.log"
            log.unlink(missing_ok=True)
            return stack.enter_context(Driver(name, argv, env=env, log=log))

        def start_ours(name: str, module: str) -> Driver:
            return start(name, [sys.executable, "-W", "ignore", "-m", module], dict(os.environ))

        def start_peer(kind: str, role: str) -> Driver:
            if kind == "ours":
                return start_ours(f"ours-{role}", "bench.net_ours")
            return start(f"stock-{role}", [stock.python, STOCK, loop], stock.variables)

        kinds = ("ours", "stock")
        delay = start_ours("delay", "bench.net_delay")
        servers = {kind: Side(start_peer(kind, "server"), ["near"]) for kind in kinds}
        hosts = ["near", *map(far, kinds)]
        clients = {kind: Side(start_peer(kind, "client"), hosts) for kind in kinds}
        for client in clients.values():
            for kind, server in servers.items():
                address = server.addresses["near"]
                client.driver.ask("connect", name="near", address=address)
                client.driver.ask("connect", name=far(kind), address=through(delay, address))
        yield Bench(servers, clients, round_trip(delay))


@dataclass
class Found:
    """All samples of a run, by row and leg."""

    samples: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)
    cipher: list[float] = field(default_factory=list)

    def median(self, row: Row, leg: Leg, name: str = "value") -> float:
        return statistics.median(getattr(sample, name) for sample in self.samples[row.name, str(leg)])

    def cpu(self, row: Row, leg: Leg) -> float:
        return self.median(row, leg, "client_cpu") + self.median(row, leg, "server_cpu")

    def result(self, row: Row, leg: Leg) -> dict[str, Any]:
        samples, beside = self.samples[row.name, str(leg)], self.samples[row.name, str(BASE)]
        value, base = self.median(row, leg), self.median(row, BASE)
        ratios = [sample.value / other.value for sample, other in zip(samples, beside, strict=True)]
        best = min if row.better == "lower" else max
        best_value, best_base = (best(sample.value for sample in of) for of in (samples, beside))
        result = {
            "row": row.name,
            "leg": str(leg),
            "median": value,
            "unit": row.unit,
            "better": row.better,
            "ratio": value / base,
            "lowest": min(ratios),
            "highest": max(ratios),
            **judgement(row, leg, value, base),
            "best": best_value,
            "best ratio": best_value / best_base,
        }
        if row.cpu:
            result |= {
                "cpu ms": self.cpu(row, leg),
                "client ms": self.median(row, leg, "client_cpu"),
                "server ms": self.median(row, leg, "server_cpu"),
                "cpu ratio": self.cpu(row, leg) / self.cpu(row, BASE),
            }
        if row.do == "bulk":
            result["of cipher"] = value / statistics.median(self.cipher)
        for name in samples[0].parts:
            result[name] = statistics.median(sample.parts[name] for sample in samples)
        if failed := sum(sample.failed for sample in samples):
            result["failed"] = failed
        return result


def judgement(row: Row, leg: Leg, value: float, base: float) -> dict[str, Any]:
    target = row.targets.get(leg)
    if target is None:
        return {"target": None, "met": None}
    judged = value if target.absolute else value / base
    sign = "≤" if row.better == "lower" else "≥"
    met = judged <= target.bound if row.better == "lower" else judged >= target.bound
    return {"target": f"{'' if target.absolute else 'ratio '}{sign} {target.bound:g}", "met": met}


def compare(bench: Bench, rows: list[Row], pairs: int) -> Found:
    found = Found()
    for number in range(-1, pairs):
        for row in rows:
            for leg in row.legs if number % 2 == 0 else row.legs[::-1]:
                sample = bench.measure(row, leg, warm_up=number < 0)
                if number >= 0:
                    found.samples.setdefault((row.name, str(leg)), []).append(sample)
                    print(f"pair {number + 1} {row.name} {leg}: {sample}", file=sys.stderr, flush=True)
        found.cipher.append(bench.cipher())
    return found


def cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.2f}"
    return "" if value is None else str(value)


def table(results: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for result in results for column in result))
    lines = [columns, *([cell(result.get(column)) for column in columns] for result in results)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(text.rjust(w) for text, w in zip(line, widths, strict=True)) for line in lines)


def print_profile(bench: Bench, row: Row, leg: Leg, role: str) -> None:
    bench.measure(row, leg, warm_up=True)
    driver = (bench.clients if role == "client" else bench.servers)["ours"].driver
    driver.ask("profile", on=True)
    sample = bench.measure(row, leg)
    text = driver.ask("profile", on=False)
    print(f"{row.name} {leg}, {row.arguments}, profiled: our {role}: {sample}\n{text}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.net",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="rows:\n" + "\n".join(f"  {name:9} {text}" for name, text in ABOUT.items()),
    )
    add = parser.add_argument
    add("--pairs", type=int, default=5, help="measurements of each pairing (default: %(default)s)")
    add("--row", choices=GROUPS, action="append", help="only this one; may be repeated")
    add("--loop", choices=("uvloop", "asyncio"), default="uvloop", help="event loop of the stock processes")
    add("--work", type=Path, default=Path("build/bench"), help="folder of logs and results")
    add("--profile", choices=("client", "server"), help="where the time of our side goes, in one row")
    add("--leg", choices=LEGS, default=str(OURS), help="the pairing to profile (default: %(default)s)")
    options = parser.parse_args()
    rows = [row for row in ROWS if row.name.partition("-")[0] in (options.row or GROUPS)]
    leg = LEGS[options.leg]
    if options.profile and (len(options.row or ()) != 1 or getattr(leg, options.profile) != "ours"):
        parser.error("--profile needs one --row and a --leg in which that side is ours")

    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    with started(StockEnvironment.find(work), options.loop) as bench:
        if options.profile:
            for row in rows:
                print_profile(bench, row, leg, options.profile)
            return
        found = compare(bench, rows, options.pairs)
        measured_round_trip = bench.round_trip
    results = [found.result(row, leg) for row in rows for leg in row.legs]
    summary = {
        "pairs": options.pairs,
        "stock event loop": options.loop,
        "load before": load,
        "load after": os.getloadavg()[0],
        "round trip ms": measured_round_trip * 1e3,
        "raw ChaCha20-Poly1305 MB/s": statistics.median(found.cipher),
        "rows": {name: ABOUT[name] for name in options.row or GROUPS},
        "results": results,
    }
    samples = {f"{row} {leg}": [asdict(s) for s in of] for (row, leg), of in found.samples.items()}
    (work / "net.json").write_text(json.dumps(summary | {"samples": samples}, indent=1))
    print(json.dumps(summary, indent=1, ensure_ascii=False))
    print(table(results))
    for name in ("load before", "load after", "round trip ms", "raw ChaCha20-Poly1305 MB/s"):
        print(f"{name}: {summary[name]:.2f}")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
