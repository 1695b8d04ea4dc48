"""A long time of mixed load on one node of ours, in which people come and go.

``python -m bench.soak`` runs a node with the embedded model in both networks. Stock Petals clients generate, leave
texts in the middle, run passes and gradients; one of them is killed again and again. Simulated KwaaiNet clients
generate and are cut off, and programs stream from the OpenAI endpoint and hang up. Every text is compared token for
token with that of the whole model. At the end, what the clients counted is compared with the node's metrics, its status
and what a dashboard was told; and whether memory stays once it is warm. Exit status 1 if anything is off.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import trio

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "kwaainet"))

from child_processes import Driver, Process
from our_nodes import start_node, wait_until_ready
from simulator import AUSTEN, SimulatedPeer, generate_locally, simulated_bootstrap, simulated_client
from stock_swarm import START_SECONDS, StockEnvironment, start_bootstrap

from bench.node_metrics import lag_quantile, metrics_of, value

ROOT = Path(__file__).resolve().parents[1]
MIB = 1024 * 1024
PREFIX = "austen-hf"
TOKENS = 48
LENGTHS = (3, 17, 60, 260)
"""Of the prompts, in tokens."""
SAMPLE_SECONDS = 5.0
SETTLED_SECONDS = 60.0
"""Within which all that was left must be gone."""
WITHIN = 120.0
FLAT = 1.02
"""Most that memory may be in the second half of a warm run, in multiples of what it was in the first."""
WARM_SECONDS = 1080.0
"""Until then memory says nothing: the allocators and the sessions of KwaaiNet, which have no end, still grow."""


@dataclass
class Counted:
    """What the clients know of a network's steps. ``loose``: tokens of steps that may or may not have been computed."""

    tokens: int = 0
    loose: int = 0
    passes: int = 0
    loose_passes: int = 0
    texts: int = 0
    left: int = 0

    def told(self, counts: dict[str, int]) -> None:
        self.tokens += counts.get("step_tokens", 0)
        self.passes += counts.get("passes", 0)
        self.texts += counts.get("texts", 0)
        self.left += counts.get("left", 0)


@dataclass
class Soak:
    """One node under load, and what is seen of it."""

    node: Process
    socket: Path
    endpoint: Path
    prompts: list[list[int]]
    expected: dict[int, list[int]]
    rng: random.Random
    counted: dict[str, Counted] = field(default_factory=lambda: {"petals": Counted(), "kwaainet": Counted()})
    wrong: list[str] = field(default_factory=list)
    samples: list[dict[str, float]] = field(default_factory=list)
    dashboard: dict[str, Any] = field(default_factory=dict)
    events: Counter[str] = field(default_factory=Counter)

    def http(self) -> httpx.AsyncClient:
        """A client of the admin side."""
        return over_socket(self.socket)

    async def watch(self) -> None:
        """Samples of the node, until cancelled."""
        async with self.http() as client:
            while True:
                status = (await client.get("/api/status")).raise_for_status().json()
                sample = {
                    "at": trio.current_time(),
                    "memory": await trio.to_thread.run_sync(self.node.resident_bytes) / MIB,
                    "sessions": sum(network["sessions"] for network in status["networks"].values()),
                    "cache_left": status["models"][0]["cache"]["tokens_left"],
                }
                self.samples.append(sample)
                if not status["ready"]:
                    self.wrong.append(f"the node was not ready: {status['problems']}")
                await trio.sleep(SAMPLE_SECONDS)

    async def look_on(self) -> None:
        """Be a dashboard that stays open, until cancelled."""
        async with self.http() as client, client.stream("GET", "/api/events", timeout=None) as response:
            kind = ""
            async for line in response.aiter_lines():
                if line.startswith("event:"):
                    kind = line.partition(":")[2].strip()
                elif line.startswith("data:"):
                    self.events[kind] += 1
                    if kind == "status":
                        self.dashboard = json.loads(line.partition(":")[2])

    async def by_kwaainet(self, boot: SimulatedPeer, number: int) -> None:
        """Texts of KwaaiNet clients, each a peer of its own, of which a part is cut off, until cancelled."""
        rng, counted = random.Random(number), self.counted["kwaainet"]
        while True:
            prompt = rng.choice(self.prompts)
            length = len(prompt)
            before = self.expected[length]
            with trio.move_on_after(rng.uniform(0.05, 1.0) if rng.random() < 0.3 else WITHIN) as limit:
                async with simulated_client(bootstrap=[boot], model=AUSTEN) as client:
                    got = await client.generate(prompt, TOKENS)
                    if got != before:
                        self.wrong.append(
                            f"kwaainet: another text after {length} tokens: {got}, not {before}"
                        )
                    if client.failures or client.complaints:
                        self.wrong.append(f"kwaainet: {client.failures} {client.complaints}")
                    counted.tokens += length + TOKENS - 1
                    counted.texts += 1
            if limit.cancelled_caught:
                counted.loose += length + TOKENS - 1
                counted.left += 1

    async def by_endpoint(self, number: int) -> None:
        """Texts streamed by the OpenAI endpoint, of which a part is hung up on, until cancelled."""
        rng, counted = random.Random(number), self.counted["petals"]
        async with over_socket(self.endpoint) as client:
            expected = {len(p): (await self._complete(client, p, None))[0] for p in self.prompts}
            while True:
                prompt = rng.choice(self.prompts)
                pieces = rng.randrange(1, TOKENS // 2) if rng.random() < 0.4 else None
                length = len(prompt)
                counted.loose += (most := length + TOKENS - 1)
                text, usage = await self._complete(client, prompt, pieces)
                if not expected[length].startswith(text) or (pieces is None and text != expected[length]):
                    self.wrong.append(f"endpoint: another text after {length} tokens: {text!r}")
                if usage is None:
                    counted.left += 1
                else:
                    counted.loose -= most
                    counted.tokens += usage["prompt_tokens"] + usage["completion_tokens"] - 1
                    counted.texts += 1

    async def _complete(
        self, client: httpx.AsyncClient, prompt: list[int], pieces: int | None
    ) -> tuple[str, Any]:
        body = {
            "model": "austen", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        text, usage, seen = "", None, 0
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                await response.aread()
                response.raise_for_status()
            async with aclosing(_events(response)) as events:
                async for event in events:
                    if "error" in event:
                        raise RuntimeError(f"the endpoint says {event['error']}")
                    usage = event.get("usage") or usage
                    text += "".join(choice["text"] for choice in event["choices"])
                    seen += 1
                    if seen == pieces:
                        break
        return text, usage


def over_socket(path: Path) -> httpx.AsyncClient:
    """Of what listens on a socket in the file system."""
    transport = httpx.AsyncHTTPTransport(uds=str(path))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=WITHIN)


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


class StockLoad:
    """Stock clients: one that stays, and one that is killed and begins anew."""

    def __init__(self, soak: Soak, stock: StockEnvironment, peers: Sequence[str]) -> None:
        self._soak, self._stock, self._peers = soak, stock, list(peers)

    async def stays(self, seconds: float, workers: int) -> None:
        """Load for so long, all of whose steps are counted."""
        with await trio.to_thread.run_sync(self._start, "stays") as client:
            await self._prepare(client)
            found = await client.aask(
                "mix", key="soak", seconds=seconds, workers=workers, seed=1, within=seconds + WITHIN
            )
            self._soak.counted["petals"].told(found["counts"])
            self._soak.wrong += [f"stock client: {failure}" for failure in found["failures"]]

    async def is_killed(self, every: float, workers: int) -> None:
        """Load by clients that are killed after about so many seconds, until cancelled."""
        number = 100
        while True:
            number += 1
            client = await trio.to_thread.run_sync(self._start, f"killed-{number}")
            try:
                await self._prepare(client)
                with trio.move_on_after(self._soak.rng.uniform(0.5, 1.5) * every):
                    await client.aask(
                        "mix", key="soak", seconds=1e6, workers=workers, seed=number, within=1e6
                    )
            finally:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(client.kill)
                self._account(client, workers)

    def _account(self, client: Driver, workers: int) -> None:
        """What a killed client had told, and what it may have had under way."""
        counted = self._soak.counted["petals"]
        for event in client.events("computed"):
            counted.told(event)
        counted.loose += workers * (max(LENGTHS) + 4)
        counted.loose_passes += 2 * workers

    def _start(self, name: str) -> Driver:
        script = Path(__file__).resolve().with_name("soak_client.py")
        scripts = ROOT / "tests" / "interop" / "stock"
        variables = self._stock.variables | {"PYTHONPATH": str(scripts)}
        log = self._stock.work / f"{name}.log"
        with Driver(name, [self._stock.python, script], env=variables, log=log).killed_on_failure() as client:
            client.event("ready", within=START_SECONDS)
            return client

    async def _prepare(self, client: Driver) -> None:
        load = {"model": str(AUSTEN.folder), "prefix": PREFIX, "peers": self._peers}
        await client.aask("load", key="soak", within=START_SECONDS, **load)
        await client.aask("prepare", key="soak", prompts=self._soak.prompts, within=START_SECONDS)


def judge_memory(samples: Sequence[dict[str, float]]) -> dict[str, float]:
    """The most, and the medians of both halves of what was seen when the node was warm, if it was."""
    warm = [sample["memory"] for sample in samples if sample["at"] - samples[0]["at"] >= WARM_SECONDS]
    most = {"most": max(sample["memory"] for sample in samples)}
    if len(warm) < 2:
        return most
    half = len(warm) // 2
    return most | {"early": statistics.median(warm[:half]), "late": statistics.median(warm[half:])}


def judge(soak: Soak, begun: dict[str, Any], ended: dict[str, Any], first: str, last: str) -> dict[str, Any]:
    """The report; what is off is added to ``soak.wrong``. ``first`` and ``last`` are the metrics before and after."""
    found: dict[str, Any] = {}
    for network, counted in soak.counted.items():
        served = ended["networks"][network]["served"]
        at_first = begun["networks"][network]["served"]
        by_metrics = value(last, "tokens_total", **step_of(network)) - value(
            first, "tokens_total", **step_of(network)
        )
        by_status = served["step_tokens"] - at_first["step_tokens"]
        by_dashboard = soak.dashboard["networks"][network]["served"]["step_tokens"] - at_first["step_tokens"]
        passes = served["passes"] - at_first["passes"]
        found[network] = {
            "texts": counted.texts, "left": counted.left, "tokens": counted.tokens, "loose": counted.loose,
            "metrics": by_metrics, "status": by_status, "dashboard": by_dashboard, "passes": passes,
        }  # fmt: skip
        if not by_metrics == by_status == by_dashboard:
            soak.wrong.append(f"{network}: metrics, status and dashboard do not agree: {found[network]}")
        if not counted.tokens <= by_status <= counted.tokens + counted.loose:
            soak.wrong.append(f"{network}: tokens are not those that the clients counted: {found[network]}")
        if not counted.passes <= passes <= counted.passes + counted.loose_passes:
            soak.wrong.append(f"{network}: {passes} passes, and the clients counted {counted.passes}")
    found["memory_mib"] = memory = judge_memory(soak.samples)
    if memory.get("late", 0.0) > FLAT * memory.get("early", 0.0):
        soak.wrong.append(f"memory grew from {memory['early']:.0f} to {memory['late']:.0f} MiB")
    found["most_sessions"] = max(sample["sessions"] for sample in soak.samples)
    found["event_loop_lag_p99_seconds"] = lag_quantile(first, last, 0.99)
    found["events"] = dict(soak.events)
    found["samples"] = soak.samples
    found["wrong"] = soak.wrong
    return found


def step_of(network: str) -> dict[str, str]:
    """Labels of the tokens that sessions of a network had computed."""
    return {"network": network, "kind": "step"}


async def settled(client: httpx.AsyncClient) -> dict[str, Any]:
    """The status once no session of Petals is left; the last one if that never comes."""
    with trio.move_on_after(SETTLED_SECONDS):
        while True:
            status: dict[str, Any] = (await client.get("/api/status")).json()
            if not status["networks"]["petals"]["sessions"]:
                return status
            await trio.sleep(0.5)
    return (await client.get("/api/status")).json()


async def soak_node(
    work: Path, stock: StockEnvironment, seconds: float, *, kill_every: float = 60.0
) -> dict[str, Any]:
    """Load for so long; the report."""
    rng = random.Random(7)
    prompts = [[rng.randrange(3, 2000) for _ in range(length)] for length in LENGTHS]
    generate = partial(generate_locally, AUSTEN, count=TOKENS, boundaries=[])
    expected = {len(p): await trio.to_thread.run_sync(partial(generate, p)) for p in prompts}
    async with AsyncExitStack() as stack:
        bootstrap, address = await trio.to_thread.run_sync(start_bootstrap, stock)
        stack.enter_context(bootstrap)
        boot = await stack.enter_async_context(simulated_bootstrap())
        networks = {
            "petals": {"bootstrap": [address]},
            "kwaainet": {"bootstrap": [boot.address], "dht_prefix": AUSTEN.prefix},
        }
        node = start_node(
            work, "soak", model="austen", prefix=PREFIX, networks=networks, cache_tokens=1 << 16,
            sections={"openai": {"listen": "unix:openai.sock"}},
        )  # fmt: skip
        stack.enter_context(node)
        await trio.to_thread.run_sync(wait_until_ready, node)
        soak = Soak(node, work / "soak.key.sock", work / "openai.sock", prompts, expected, rng)
        client = await stack.enter_async_context(soak.http())
        begun = (await client.get("/api/status")).json()
        first = await trio.to_thread.run_sync(metrics_of, soak.socket)
        load = StockLoad(soak, stock, [address])
        async with trio.open_nursery() as watching:
            watching.start_soon(soak.look_on)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(soak.watch)
                for number in range(2):
                    nursery.start_soon(soak.by_kwaainet, boot, number)
                    nursery.start_soon(soak.by_endpoint, number)
                nursery.start_soon(load.is_killed, kill_every, 3)
                await load.stays(seconds, workers=6)
                nursery.cancel_scope.cancel()
            ended = await settled(client)
            if left := ended["networks"]["petals"]["sessions"]:
                soak.wrong.append(f"{left} sessions of Petals were left")
            last = await trio.to_thread.run_sync(metrics_of, soak.socket)
            await trio.sleep(2)  # two more rounds of the dashboard
            watching.cancel_scope.cancel()
        return judge(soak, begun, ended, first, last)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="(default: %(default)s)")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "soak", help="folder of logs and the report"
    )
    parser.add_argument(
        "--kill-every", type=float, default=60.0, help="seconds that a client lives (default: %(default)s)"
    )
    options = parser.parse_args()
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    stock = StockEnvironment.find(work)
    report = trio.run(partial(soak_node, work, stock, options.minutes * 60, kill_every=options.kill_every))
    (work / "soak.json").write_text(json.dumps(report, indent=1))
    del report["samples"]
    print(json.dumps(report, indent=1))
    sys.exit(bool(report["wrong"]))


if __name__ == "__main__":
    main()
