"""The line protocol by which tests drive a script that runs in the stock environment.

Each line is one JSON object. The test writes ``{"id": 1, "do": "echo", ...}`` to the script's stdin; the script
answers on stdout ``{"id": 1, "result": ...}`` or ``{"id": 1, "error": "text", "kind": "ValueError"}``, in any order,
and reports what happens to it unasked as ``{"event": "name", ...}``.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any


class Lines:
    """The script's side. Takes stdout for itself: whatever else prints there goes to stderr from now on."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        self._lock = threading.Lock()
        os.dup2(2, 1)
        sys.stdout = sys.stderr

    def _write(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._out.write(json.dumps(message) + "\n")

    def event(self, name: str, **details: Any) -> None:
        self._write({"event": name, **details})

    def result(self, request: dict[str, Any], value: Any) -> None:
        self._write({"id": request["id"], "result": value})

    def error(self, request: dict[str, Any], error: BaseException) -> None:
        self._write({"id": request["id"], "error": str(error) or repr(error), "kind": type(error).__name__})
