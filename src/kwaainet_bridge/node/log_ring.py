"""The newest records of the process' log, for whoever asks the node: bounded in bytes, and without secrets."""

from __future__ import annotations

import json
import logging
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Final

from kwaainet_bridge import defaults

LEVELS: Final[Mapping[str, int]] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
"""From which number on a record is of this level or a graver one."""

_OWN_KEYS: Final = ("level", "logger", "timestamp", "event", "exception")
_HIDDEN: Final = "***"
_SECRET_KEY: Final = re.compile(
    r"(?:^|[_.-])(?:token|secret|password|passphrase|authorization|cookie|api_?key|private_?key)$",
    re.IGNORECASE,
)
_SECRET_TEXT: Final = re.compile(
    r"(?P<kept>\bbearer\s+|://[^/\s:@]*:(?=[^/\s@]+@)|\b(?:token|secret|password|api_?key)=)(?:[^\s@&\"']+)"
    r"|\bhf_[A-Za-z0-9]{16,}",
    re.IGNORECASE,
)
_CUT: Final = " … "


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One record. ``number`` counts from 1 for the first of the process; ``text`` is a JSON object on one line."""

    number: int
    level: int
    text: str


@dataclass(frozen=True, slots=True)
class LogAnswer:
    """Entries, oldest first. ``left_out`` older ones would have fitted the question; ``missed`` are kept no longer."""

    entries: Sequence[LogEntry]
    left_out: int
    missed: int


class LogRing(logging.Handler):
    """A handler that keeps records, ``max_bytes`` of them at most; the oldest go first.

    Its formatter gives a dictionary's items as a JSON object (:func:`~.logs.configure_logging` sees to it). ``secrets``
    are texts that must not be kept, whatever record holds them; what looks like a token, a password or a key is
    hidden anyway.
    """

    def __init__(self, *, max_bytes: int = defaults.LOG_RING_BYTES, secrets: Iterable[str] = ()) -> None:
        super().__init__()
        self._max_bytes = max_bytes
        self._secrets = tuple(secret for secret in secrets if secret)
        self._entries: deque[LogEntry] = deque()
        self._bytes = 0
        self._noted = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record. The lock is held; as any handler's it may be called by any thread."""
        try:
            text = self.format(record)
        except Exception:
            self.handleError(record)
            return
        self._noted += 1
        text = f'{{"number": {self._noted}, "at": {record.created:.6f}, {text[1:]}'
        self._entries.append(LogEntry(self._noted, record.levelno, text))
        self._bytes += len(text)
        while self._bytes > self._max_bytes:
            self._bytes -= len(self._entries.popleft().text)

    def render(self, _logger: Any, _name: str, event: Any) -> str:
        """A record's items as a JSON object: the last of structlog's processors."""
        fields = {
            str(key): self._hidden(value, str(key)) for key, value in event.items() if key not in _OWN_KEYS
        }
        said, trace = self._hidden(event.get("event")), event.get("exception")
        known = {"level": str(event.get("level", "")), "logger": str(event.get("logger", ""))}
        trace = None if trace is None else self._without_secrets(str(trace))
        text = _json({**known, "event": str(said), "fields": fields, "exception": trace, "cut": False})
        if len(text) <= defaults.LOG_RECORD_BYTES:
            return text
        most = defaults.LOG_RECORD_BYTES // 16  # a character takes up to six bytes
        said, trace = _cut(str(said), most), None if trace is None else _cut(trace, most)
        return _json({**known, "event": said, "fields": {}, "exception": trace, "cut": True})

    def newest(self, *, level: int, most: int) -> LogAnswer:
        """The newest ``most`` entries of ``level`` and above."""
        self.acquire()
        try:
            found = [entry for entry in self._entries if entry.level >= level]
            missed = self._noted - len(self._entries)
        finally:
            self.release()
        shown = found[-most:] if most else []
        return LogAnswer(shown, len(found) - len(shown), missed)

    def since(self, number: int, *, level: int) -> tuple[LogAnswer, int]:
        """The entries of ``level`` and above after that of this number, and the number of the last of all."""
        self.acquire()
        try:
            newer = list(takewhile(lambda entry: entry.number > number, reversed(self._entries)))
            last = self._noted
        finally:
            self.release()
        missed = last - number - len(newer)
        return LogAnswer([entry for entry in reversed(newer) if entry.level >= level], 0, missed), last

    # --- what is not kept

    def _hidden(self, value: Any, key: str = "") -> Any:
        """``value`` as JSON has it, without secrets."""
        if isinstance(value, bool) or value is None:
            return value
        if isinstance(value, int | float):
            return value if abs(value) < float("inf") else str(value)
        if _SECRET_KEY.search(key):
            return _HIDDEN
        if isinstance(value, Mapping):
            return {str(name): self._hidden(item, str(name)) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._hidden(item) for item in value]
        return self._without_secrets(value if isinstance(value, str) else repr(value))

    def _without_secrets(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, _HIDDEN)
        return _SECRET_TEXT.sub(lambda found: (found["kept"] or "") + _HIDDEN, text)


def _json(value: Any) -> str:
    return json.dumps(value, default=repr)


def _cut(text: str, most: int) -> str:
    """Beginning and end of a text that is longer."""
    if len(text) <= most:
        return text
    half = (most - len(_CUT)) // 2
    return text[:half] + _CUT + text[-half:]
