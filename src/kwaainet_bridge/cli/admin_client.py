"""A client of a running node's admin side: it finds the node by its configuration, and says what is wrong."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from kwaainet_bridge import defaults
from kwaainet_bridge.admin_address import UnixAddress
from kwaainet_bridge.config import NodeConfig
from kwaainet_bridge.errors import ConfigError, NetworkError, RemoteError
from kwaainet_bridge.node.web.sockets import reachable
from kwaainet_bridge.node.web.tokens import bearer, read_token


class NoAnswer(NetworkError):
    """A node runs there, and does not answer in time."""


@contextmanager
def asking(config: NodeConfig) -> Iterator[AdminClient]:
    """A client of the node that runs with this configuration.

    Raises ConfigError if it has no admin side, or for a token file that cannot be used; NetworkError if nobody listens.
    """
    address = config.admin_address
    if address is None:
        raise ConfigError("admin.listen is off in this configuration: the node cannot be asked anything")
    headers = {}
    if config.admin.token_file is not None:
        headers["Authorization"] = bearer(read_token(config.admin.token_file, key="admin.token_file"))
    if isinstance(address, UnixAddress):
        assert address.path is not None
        with _name_of(address.path, str(address)) as name:
            transport = httpx.HTTPTransport(uds=name)
            with httpx.Client(transport=transport, base_url="http://localhost", headers=headers) as client:
                yield AdminClient(client, str(address))
    else:
        with httpx.Client(base_url=address.url, headers=headers, trust_env=False) as client:
            yield AdminClient(client, str(address))


class AdminClient:
    """Asks one node. ``client`` is for what is no single question, such as a stream; ``where`` is the node's address.

    Each method raises NoAnswer if the node does not answer in time, another NetworkError if it breaks off, ConfigError
    if it wants another token, and RemoteError if what answers is no node, or not one of this version.
    """

    def __init__(self, client: httpx.Client, where: str) -> None:
        self.client = client
        self.where = where

    def get(self, path: str, params: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The JSON object at ``path``."""
        return self._ask("GET", path, params)

    def post(
        self, path: str, params: Mapping[str, str] | None = None, *, seconds: float | None = None
    ) -> dict[str, Any]:
        """Have the node do something, and what it answers; it may take ``seconds``. Raises ConfigError for what it
        refuses because its operator must mend something."""
        return self._ask("POST", path, params, seconds)

    def _ask(
        self, method: str, path: str, params: Mapping[str, str] | None, seconds: float | None = None
    ) -> dict[str, Any]:
        timeout = defaults.STATUS_SECONDS if seconds is None else seconds
        with self.failures_told(timeout):
            answer = self.client.request(method, path, params=params, timeout=timeout)
        return self.json_of(answer)

    @contextmanager
    def failures_told(self, seconds: float = defaults.STATUS_SECONDS) -> Iterator[None]:
        """Raise httpx's errors in the block as NetworkError."""
        try:
            yield
        except httpx.ConnectError as e:
            raise NetworkError(_nobody(self.where, e)) from e
        except httpx.TimeoutException as e:
            raise _no_answer(self.where, seconds) from e
        except httpx.HTTPError as e:
            raise NetworkError(f"the node at {self.where} broke off: {e}; it may just have stopped") from e

    def json_of(self, answer: httpx.Response) -> dict[str, Any]:
        """The object in an answer that has been read."""
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            raise ConfigError(
                f"the node at {self.where} wants another token: give the configuration with which it runs, with its "
                "token_file"
            )
        try:
            value = answer.json()
        except ValueError as e:
            raise RemoteError(f"what answers at {self.where} is no node: {answer.text[:100]!r}") from e
        if answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY and isinstance(value, dict):
            raise ConfigError(str(value.get("error")))
        if answer.status_code == httpx.codes.CONFLICT and isinstance(value, dict):
            raise RemoteError(str(value.get("error")))
        if not answer.is_success or not isinstance(value, dict):
            raise RemoteError(
                f"what answers at {self.where} is no node: HTTP {answer.status_code}; one of an older "
                "version knows fewer commands"
            )
        return value


@contextmanager
def _name_of(path: Path, where: str) -> Iterator[str]:
    """A short enough name of the socket at ``path``, if somebody listens there."""
    with ExitStack() as stack:
        try:
            name = stack.enter_context(reachable(path))
            # httpx forgets to close a socket with which it could not connect
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(defaults.STATUS_SECONDS)
                probe.connect(name)
        except (TimeoutError, BlockingIOError) as e:  # its queue is full
            raise _no_answer(where, defaults.STATUS_SECONDS) from e
        except OSError as e:
            raise NetworkError(_nobody(where, e)) from e
        yield name


def _no_answer(where: str, seconds: float) -> NoAnswer:
    return NoAnswer(
        f"the node at {where} does not answer within {seconds:g} s: it is overloaded or hangs; its log may tell why"
    )


def _nobody(where: str, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or error
    return (
        f"no node answers at {where} ({reason}): start one with `kwaainet-bridge run`, or name with -c the "
        "configuration of the one that runs; a socket is for the user who runs the node"
    )
