"""Private swarms: every request and response carries a token of its sender and a signature over the whole message.

What a token is and who hands it out is the application's business, as in stock. Source of the fields, the signed
bytes and the checks: hivemind 1.1.12, ``utils/auth.py``, where only the DHT uses them.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

import trio
from cryptography.hazmat.primitives.asymmetric import rsa

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.dht import rsa_keys
from kwaainet_bridge.wire.pb import dht_pb2 as pb

AccessToken = pb.AccessToken
Req = TypeVar("Req", pb.PingRequest, pb.StoreRequest, pb.FindRequest)
Res = TypeVar("Res", pb.PingResponse, pb.StoreResponse, pb.FindResponse)
Request = pb.PingRequest | pb.StoreRequest | pb.FindRequest
Response = pb.PingResponse | pb.StoreResponse | pb.FindResponse

_NONCE_BYTES = 8


class Authorizer(ABC):
    """Signs what this node sends, and checks what it receives."""

    @abstractmethod
    async def sign_request(self, request: Request) -> None:
        """Fill in ``request.auth``."""

    @abstractmethod
    async def check_request(self, request: Request) -> bool:
        """Whether a request comes from a member of the swarm, lately, and for the first time."""

    @abstractmethod
    async def sign_response(self, response: Response, request: Request) -> None:
        """Fill in ``response.auth``."""

    @abstractmethod
    async def check_response(self, response: Response, request: Request) -> bool:
        """Whether a response comes from a member of the swarm and answers ``request``."""


class TokenAuthorizer(Authorizer):
    """Members have access tokens that bind an RSA key to the swarm; ``key`` is this node's.

    A subclass says where tokens come from and which are valid. ``clock`` gives unix time.
    """

    def __init__(self, key: rsa.RSAPrivateKey, *, clock: Callable[[], float]) -> None:
        self._key = key
        self.public_key = rsa_keys.public_bytes(key)
        self._clock = clock
        self._token: pb.AccessToken | None = None
        self._refreshing = trio.Lock()
        self._nonces: dict[
            bytes, float
        ] = {}  # with the time after which they are forgotten, the earliest first

    @abstractmethod
    async def get_token(self) -> AccessToken:
        """A token for this node's key. It is kept until it needs a refresh; what this raises, calls raise."""

    @abstractmethod
    def is_token_valid(self, token: AccessToken) -> bool:
        """Whether the holder of a token, ours or a peer's, is a member now. Raises nothing."""

    @abstractmethod
    def needs_refresh(self, token: AccessToken) -> bool:
        """Whether this node's token should be replaced."""

    async def _own_token(self) -> pb.AccessToken:
        async with self._refreshing:
            if self._token is None or self.needs_refresh(self._token):
                self._token = await self.get_token()
            return self._token

    async def sign_request(self, request: Request) -> None:
        request.auth.client_access_token.CopyFrom(await self._own_token())
        request.auth.time = self._clock()
        request.auth.nonce = secrets.token_bytes(_NONCE_BYTES)
        request.auth.signature = rsa_keys.sign(self._key, _signed_bytes(request))

    async def check_request(self, request: Request) -> bool:
        await trio.lowlevel.checkpoint()
        auth, now = request.auth, self._clock()
        token = auth.client_access_token
        if not self.is_token_valid(token):
            return False
        if not rsa_keys.verify(token.public_key, _signed_bytes(request), auth.signature):
            return False
        if auth.service_public_key and auth.service_public_key != self.public_key:
            return False
        if not abs(auth.time - now) <= defaults.DHT_AUTH_SKEW_SECONDS:
            return False
        return self._is_new(auth.nonce, now)

    def _is_new(self, nonce: bytes, now: float) -> bool:
        """Take note of a nonce. False if it was seen, or if there is no room to remember it."""
        while self._nonces:
            earliest = next(iter(self._nonces))
            if self._nonces[earliest] >= now:
                break
            del self._nonces[earliest]
        if nonce in self._nonces or len(self._nonces) >= defaults.DHT_AUTH_NONCES:
            return False
        self._nonces[nonce] = now + 3 * defaults.DHT_AUTH_SKEW_SECONDS
        return True

    async def sign_response(self, response: Response, request: Request) -> None:
        response.auth.service_access_token.CopyFrom(await self._own_token())
        response.auth.nonce = request.auth.nonce
        response.auth.signature = rsa_keys.sign(self._key, _signed_bytes(response))

    async def check_response(self, response: Response, request: Request) -> bool:
        await trio.lowlevel.checkpoint()
        token = response.auth.service_access_token
        return (
            response.auth.nonce == request.auth.nonce
            and self.is_token_valid(token)
            and rsa_keys.verify(token.public_key, _signed_bytes(response), response.auth.signature)
        )


def _signed_bytes(message: Request | Response) -> bytes:
    """The message as it is with an empty signature."""
    signature = message.auth.signature
    message.auth.signature = b""
    try:
        return message.SerializeToString()
    finally:
        message.auth.signature = signature
