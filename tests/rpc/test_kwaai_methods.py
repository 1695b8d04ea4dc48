"""KwaaiNet's unary protocols as methods: their ids begin with a slash, and their bodies are no protobuf."""

from __future__ import annotations

import msgpack
import pytest
import torch
from rpc_pairs import memory_pair

from kwaainet_bridge.errors import HandlerError
from kwaainet_bridge.rpc import unary
from kwaainet_bridge.wire import envelope, kwaai_hello, kwaai_inference, kwaai_lease
from kwaainet_bridge.wire.kwaai_hello import Hello
from kwaainet_bridge.wire.kwaai_inference import InferenceRequest, InferenceResponse, ResponseType
from kwaainet_bridge.wire.kwaai_lease import Denial, Denied, LeaseReply, LeaseRequest

INFERENCE = unary(kwaai_inference.PROTOCOL, InferenceRequest, InferenceResponse)
LEASE = unary(kwaai_lease.PROTOCOL, LeaseRequest, LeaseReply)
HELLO = unary(kwaai_hello.PROTOCOL, Hello, Hello)


async def double(request, context):
    assert context.method == "/kwaai/inference/1.0.0"
    hidden = request.hidden_states()
    return InferenceResponse.of_values(request.session_id, ResponseType.HIDDEN_STATES, hidden * 2)


async def test_methods_are_mounted_as_they_are(pair):
    async def full(request, context):
        return LeaseReply(Denied(Denial.WRONG_MODEL if request.model else Denial.AT_CAPACITY, 0))

    async def hello(request, context):
        return Hello(kwaai_hello.RECEIVED)

    pair.server.mount(INFERENCE, double)
    pair.server.mount(LEASE, full)
    pair.server.mount(HELLO, hello)
    hidden = torch.arange(512.0).reshape(1, 2, 256)
    request = InferenceRequest.of_hidden_states(2**63, 5, hidden)
    response = await pair.client.call(pair.peer, INFERENCE, request, timeout=10)
    assert response.session_id == 2**63
    assert torch.equal(response.values(), hidden * 2)
    reply = await pair.client.call(pair.peer, LEASE, LeaseRequest("m"), timeout=10)
    assert reply.outcome == Denied(Denial.WRONG_MODEL)
    assert (await pair.client.call(pair.peer, HELLO, Hello("hi"), timeout=10)).text == "ok"


async def test_a_rust_caller_s_bytes_are_served():
    async with memory_pair() as pair:
        pair.server.mount(INFERENCE, double)
        fields = {"session_id": 1, "seq_pos": 0, "payload_type": "hidden_states", "shape": [1, 1, 2]}
        packed = msgpack.packb(fields | {"data": list(torch.tensor([1.5, -3]).half().numpy().tobytes())})
        stream = await pair.client_host.open_stream(pair.peer, INFERENCE.name)
        await stream.write(envelope.encode_call(bytes(16), b"", INFERENCE.name, packed))
        (body,) = envelope.DelimitedDecoder(1 << 16).feed(await stream.read(1 << 16))
        answer = msgpack.unpackb(envelope.decode_answer(body).response)
        assert answer == {
            "session_id": 1,
            "response_type": "hidden_states",
            "shape": [1, 1, 2],
            "data": torch.tensor([3.0, -6]).half().numpy().tobytes(),
            "error": None,
        }
        await stream.reset()


async def test_bad_bytes_are_answered_with_the_field():
    async with memory_pair() as pair:
        pair.server.mount(LEASE, double)
        lax = unary(LEASE.name, Hello, Hello)
        with pytest.raises(HandlerError, match="LeaseRequest: the request is an integer, not a map"):
            await pair.client.call(pair.peer, lax, Hello("hi"), timeout=10)
