"""A private swarm in memory; against stock it is tested in tests/interop."""

from __future__ import annotations

from functools import cache

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import rsa
from dht_nodes import START, clock, swarm
from trio.testing import MockClock

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import HandlerError, RemoteError
from kwaainet_bridge.hivemind.dht import AccessToken, TokenAuthorizer, rsa_keys
from kwaainet_bridge.hivemind.dht.messages import FIND, PING
from kwaainet_bridge.rpc.client import RpcClient
from kwaainet_bridge.wire.pb import dht_pb2 as pb

LATER = START + 5000.0


@cache
def key(_owner: str) -> rsa.RSAPrivateKey:
    return rsa_keys.generate_key()


class Members(TokenAuthorizer):
    """Names that a list holds; tokens live for 100 s."""

    def __init__(self, name: str, *, members: tuple[str, ...] = ("a", "b", "c")) -> None:
        super().__init__(key(name), clock=clock)
        self.name = name
        self.members = members
        self.tokens = 0

    async def get_token(self) -> AccessToken:
        await trio.sleep(0.01)
        self.tokens += 1
        return AccessToken(username=self.name, public_key=self.public_key, expiration_time=str(clock() + 100))

    def is_token_valid(self, token: AccessToken) -> bool:
        return token.username in self.members and float(token.expiration_time) > clock()

    def needs_refresh(self, token: AccessToken) -> bool:
        return float(token.expiration_time) < clock() + 10


async def signed(name: str = "a") -> pb.FindRequest:
    request = pb.FindRequest(keys=[b"k" * 20])
    await Members(name).sign_request(request)
    return request


async def test_members_store_and_read_and_renew_their_tokens(autojump_clock: MockClock) -> None:
    async with swarm() as nodes:
        authorizers = [Members(name) for name in "abc"]
        for authorizer in authorizers:
            await nodes.start(authorizer=authorizer)
        assert len((await nodes.nodes[0].store("key", 1, LATER)).accepted) == 3
        await trio.sleep(1000)
        for node in nodes.nodes:
            assert (await node.get("key")).value == 1
        assert all(authorizer.tokens <= 3 for authorizer in authorizers)


async def test_strangers_are_told_and_not_believed(autojump_clock: MockClock) -> None:
    async with swarm() as nodes:
        member = await nodes.start(authorizer=Members("a"))
        stranger = await nodes.start(join=False)
        outcast = await nodes.start(join=False, authorizer=Members("d", members=("a", "d")))
        for node in (stranger, outcast):
            (result,) = await node.bootstrap([member.peer_id])
            assert isinstance(result.error, HandlerError)
            assert "PermissionError" in str(result.error)
        assert member.neighbours() == []
        with pytest.raises(RemoteError, match="not authorized"):
            await member.ping(stranger.peer_id)
        assert stranger.neighbours() != []  # it serves everybody
        assert member.neighbours() == []


async def test_a_signature_covers_the_whole_request_once_and_lately(autojump_clock: MockClock) -> None:
    authorizer = Members("b")
    assert await authorizer.check_request(await signed())
    request = await signed()
    assert await authorizer.check_request(request)
    assert not await authorizer.check_request(request)  # a replay

    for change in ("keys", "nonce", "time", "signature", "token", "service"):
        request = await signed()
        if change == "keys":
            request.keys.append(b"more")
        elif change == "nonce":
            request.auth.nonce = b"other"
        elif change == "time":
            request.auth.time += 1
        elif change == "signature":
            request.auth.signature = b"AAAA"
        elif change == "token":
            request.auth.client_access_token.public_key = Members("c").public_key
        else:
            request.auth.service_public_key = authorizer.public_key
        assert not await authorizer.check_request(request), change
    assert not await authorizer.check_request(await signed("d"))
    assert not await authorizer.check_request(pb.FindRequest())

    request = await signed()
    await trio.sleep(defaults.DHT_AUTH_SKEW_SECONDS + 1)
    assert not await authorizer.check_request(request)


async def test_a_request_for_another_service_is_refused(autojump_clock: MockClock) -> None:
    for service, accepted in ((key("b"), True), (key("c"), False)):
        request = pb.FindRequest()
        author = Members("a")
        await author.sign_request(request)
        request.auth.service_public_key = rsa_keys.public_bytes(service)
        request.auth.signature = b""
        request.auth.signature = rsa_keys.sign(key("a"), request.SerializeToString())
        assert await Members("b").check_request(request) is accepted


async def test_a_response_answers_one_request(autojump_clock: MockClock) -> None:
    client, server = Members("a"), Members("b")
    request, other = await signed(), await signed()
    response = pb.FindResponse(results=[pb.FindResult()])
    await server.sign_response(response, request)
    assert await client.check_response(response, request)
    assert not await client.check_response(response, other)
    response.results.append(pb.FindResult())
    assert not await client.check_response(response, request)
    assert not await client.check_response(pb.FindResponse(), request)


async def test_nonces_are_remembered_as_long_as_they_matter_and_no_longer(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defaults, "DHT_AUTH_NONCES", 3)
    authorizer = Members("b")
    assert [await authorizer.check_request(await signed()) for _ in range(5)] == [True] * 3 + [False] * 2
    await trio.sleep(3 * defaults.DHT_AUTH_SKEW_SECONDS + 1)
    assert await authorizer.check_request(await signed())
    assert len(authorizer._nonces) == 1


async def test_without_an_authorizer_nothing_is_signed(autojump_clock: MockClock) -> None:
    async with swarm(1) as nodes:
        host = nodes.host()
        rpc = RpcClient(host)
        assert not (await rpc.call(nodes.nodes[0].peer_id, PING, pb.PingRequest(), timeout=3.0)).HasField(
            "auth"
        )
        answer = await rpc.call(nodes.nodes[0].peer_id, FIND, await signed("d"), timeout=3.0)
        assert not answer.HasField("auth")
