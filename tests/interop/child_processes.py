"""Child processes of the tests: started in a session of their own, watched line by line, ended to the last one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import psutil
import trio

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
GRACE_SECONDS = 3.0  # for a script whose input ended
TAIL_LINES = 30  # of its output, in the message about a process that failed


class ProcessFailed(Exception):
    """A child process ended, or did not do what was expected of it in time; the message holds its last lines."""


class Process:
    """One child process and its descendants. Output (stdout and stderr) goes to ``log`` and can be waited for."""

    def __init__(
        self, name: str, argv: Sequence[str | os.PathLike[str]], *, env: Mapping[str, str], log: Path
    ) -> None:
        self.name = name
        self.log = log
        self._changed = threading.Condition()
        self._lines: list[str] = []
        self._popen = subprocess.Popen(
            [os.fspath(a) for a in argv],
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr(),
            start_new_session=True,
        )
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._read, self._wait)]
        for thread in self._threads:
            thread.start()

    def _stderr(self) -> Any:
        return subprocess.STDOUT

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._popen.returncode

    def _read(self) -> None:
        assert self._popen.stdout is not None
        with self._popen.stdout as output, self.log.open("a", encoding="utf-8") as log:
            for raw in output:
                line = COLOURS.sub("", raw.decode(errors="replace")).rstrip("\n")
                log.write(line + "\n")
                log.flush()
                with self._changed:
                    self._take(line)
                    self._changed.notify_all()

    def _take(self, line: str) -> None:
        self._lines.append(line)

    def _wait(self) -> None:
        self._popen.wait()
        with self._changed:
            self._changed.notify_all()

    def _until(self, found: Callable[[], Any], what: str, timeout: float) -> Any:
        with self._changed:
            self._changed.wait_for(lambda: found() is not None or self.returncode is not None, timeout)
            value = found()
        if value is None and self.returncode is not None:
            self._threads[0].join(GRACE_SECONDS)  # it may have ended before its last lines were read
            with self._changed:
                value = found()
        if value is None:
            state = "still runs" if self.returncode is None else f"ended with {self.returncode}"
            raise ProcessFailed(f"{self.name}: no {what} within {timeout:g} s; it {state}\n{self.tail()}")
        return value

    def wait_for(self, pattern: str, timeout: float = 60.0) -> re.Match[str]:
        """The first match in its output, past lines included. Raises ProcessFailed when it ends without one."""
        expression = re.compile(pattern)

        def found() -> re.Match[str] | None:
            return next(filter(None, map(expression.search, self._lines)), None)

        match: re.Match[str] = self._until(found, f"line like {pattern!r}", timeout)
        return match

    def wait(self, timeout: float = 30.0) -> int:
        """Its exit status. Raises ProcessFailed if it runs on."""
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ProcessFailed(f"{self.name}: still runs after {timeout:g} s\n{self.tail()}") from None

    def tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-TAIL_LINES:])

    def members(self) -> list[psutil.Process]:
        """The process and all its descendants, also those whose parent has gone: they share its session."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (OSError, psutil.Error):
                continue  # it ended meanwhile
        return found

    def resident_bytes(self) -> int:
        """Memory of all members, shared pages counted once (the sum of their proportional set sizes)."""
        total = 0
        for process in self.members():
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue  # it ended meanwhile
        return total

    def signal(self, number: int) -> None:
        """Signal the process itself, not its descendants."""
        self._popen.send_signal(number)

    def kill(self) -> None:
        """End it and its descendants at once, without warning, and remove the sockets they leave in /tmp."""
        members = self.members()
        sockets = {path for process in members for path in _unix_sockets(process)}
        for process in members:
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
                process.kill()
        self._popen.wait()
        while self.members():  # not psutil.wait_procs: orphans stay zombies until init looks for them
            time.sleep(0.01)
        for path in sockets:
            path.unlink(missing_ok=True)
        for thread in self._threads:
            thread.join()  # all ends of its pipes are closed now
        self._close_input()

    def _close_input(self) -> None:
        assert self._popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.close()

    def terminate(self, grace: float) -> None:
        """Ask the process itself to end by SIGTERM, and kill what is left after ``grace`` seconds."""
        self._popen.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(grace)
        self.kill()

    def stop(self) -> None:
        """End it in the way that suits it best."""
        self.kill()

    @contextmanager
    def killed_on_failure(self) -> Iterator[Self]:
        """For what must succeed before anybody else owns the process."""
        try:
            yield self
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _unix_sockets(process: psutil.Process) -> list[Path]:
    """Files in /tmp that the process listens on: Hivemind and its daemon talk through such."""
    try:
        connections = process.net_connections("unix")
    except psutil.Error:
        return []  # it ended meanwhile
    return [Path(c.laddr) for c in connections if str(c.laddr).startswith("/tmp/hivemind-")]


class Driver(Process):
    """A script that speaks the line protocol of ``stock/lines.py``. Its stderr goes to ``log``."""

    def __init__(
        self, name: str, argv: Sequence[str | os.PathLike[str]], *, env: Mapping[str, str], log: Path
    ) -> None:
        self._answers: dict[int, Future[Any]] = {}
        self._events: list[dict[str, Any]] = []
        self._next_id = 0
        self._errors = log.open("ab")
        super().__init__(name, argv, env=env, log=log)

    def _stderr(self) -> Any:
        return self._errors

    def _take(self, line: str) -> None:
        message = json.loads(line)
        if "event" in message:
            self._events.append(message)
        elif "error" in message:
            error = PeerError(message["error"], message["kind"])
            self._answers.pop(message["id"]).set_exception(error)
        else:
            self._answers.pop(message["id"]).set_result(message["result"])

    def _wait(self) -> None:
        super()._wait()
        with self._changed:
            for answer in self._answers.values():
                answer.set_exception(
                    ProcessFailed(f"{self.name} ended with {self.returncode}\n{self.tail()}")
                )
            self._answers.clear()

    def begin(self, do: str, **arguments: Any) -> tuple[int, Future[Any]]:
        """Send a command; returns its id and its answer to come."""
        assert self._popen.stdin is not None
        answer: Future[Any] = Future()
        with self._changed:
            self._next_id += 1
            number = self._next_id
            self._answers[number] = answer
            self._popen.stdin.write(json.dumps({"id": number, "do": do, **arguments}).encode() + b"\n")
            self._popen.stdin.flush()
        return number, answer

    def ask(self, do: str, *, within: float = 60.0, **arguments: Any) -> Any:
        """Send a command and wait for its result. Raises PeerError with the script's error, ProcessFailed."""
        answer = self.begin(do, **arguments)[1]
        try:
            return answer.result(within)
        except TimeoutError:
            raise ProcessFailed(
                f"{self.name}: no answer to {do!r} within {within:g} s\n{self.tail()}"
            ) from None

    async def aask(self, do: str, *, within: float = 60.0, **arguments: Any) -> Any:
        """``ask`` for a trio test. Cancelled: the command goes on, its result is dropped."""
        ask = partial(self.ask, do, within=within, **arguments)
        return await trio.to_thread.run_sync(ask, abandon_on_cancel=True)

    def event(self, name: str, *, within: float = 30.0, **details: Any) -> dict[str, Any]:
        """Take the first event of that name and those details, waiting for it if need be."""
        wanted = {"event": name, **details}

        def found() -> dict[str, Any] | None:
            return next((e for e in self._events if wanted.items() <= e.items()), None)

        with self._changed:
            event: dict[str, Any] = self._until(found, f"event {wanted}", within)
            self._events.remove(event)
        return event

    def events(self, name: str) -> list[dict[str, Any]]:
        """The events of that name so far which nobody took."""
        with self._changed:
            return [event for event in self._events if event["event"] == name]

    async def aevent(self, name: str, *, within: float = 30.0, **details: Any) -> dict[str, Any]:
        """``event`` for a trio test."""
        take = partial(self.event, name, within=within, **details)
        return await trio.to_thread.run_sync(take, abandon_on_cancel=True)

    def stop(self) -> None:
        """End its input, at which it ends by itself, and then whatever is left."""
        self._close_input()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(GRACE_SECONDS)
        self.kill()

    def kill(self) -> None:
        """As above; its log is closed."""
        super().kill()
        self._errors.close()


class PeerError(Exception):
    """An exception in the script: its text, and ``kind``, the name of its class there."""

    def __init__(self, text: str, kind: str) -> None:
        super().__init__(text)
        self.kind = kind
