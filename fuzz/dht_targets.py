"""Messages of Hivemind's DHT, and the records in them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from fuzz.wire_targets import expect
from kwaainet_bridge.errors import Refusal, RemoteError
from kwaainet_bridge.hivemind.dht import messages, values
from kwaainet_bridge.hivemind.dht.id import DhtId
from kwaainet_bridge.rpc.streams import parse
from kwaainet_bridge.wire.msgpack import DictionaryValue, pack
from kwaainet_bridge.wire.pb import dht_pb2 as pb

logging.getLogger(values.__name__).setLevel(logging.ERROR)  # a line for each record that cannot be read
logging.getLogger(messages.__name__).setLevel(logging.ERROR)

_NOW: Final = 1000.0
_KEYS: Final = tuple(DhtId(n) for n in range(3))


def ping(data: bytes) -> None:
    messages.sender(parse(pb.PingRequest, data, "ping"))
    messages.responder(parse(pb.PingResponse, data, "ping"))


def store(data: bytes) -> None:
    request = parse(pb.StoreRequest, data, "store")
    messages.sender(request)
    try:
        for item in messages.read_store_request(request):
            _use(messages.read_record(item))
    except Refusal as e:
        raise RemoteError(str(e) or "refused") from e


def find(data: bytes) -> None:
    request = parse(pb.FindRequest, data, "find")
    messages.sender(request)
    for key in request.keys:
        messages.read_key(key)


def find_response(data: bytes) -> None:
    response = parse(pb.FindResponse, data, "find")
    messages.responder(response)
    keys = _KEYS[: len(response.results)]
    for key, found in messages.read_find_response(response, keys, now=_NOW).items():
        expect(key in keys, "an answer for a key that was not asked for")
        if found.record is not None:
            _use(found.record)


def dictionary(data: bytes) -> None:
    """A dictionary as it comes as one value."""
    _use(messages.read_dictionary(data, name="values"))


def subkey(data: bytes) -> None:
    read = values.read_subkey(data)
    expect(values.read_subkey(pack(read)) == read or read != read, "round trip")  # noqa: PLR0124 - NaN


_HELD: Final = values.dictionary([("held", pack(1), 2000.0), (b"old", pack(2), 10.0)])


def _use(record: values.Record) -> None:
    """What a node does with a record that it has read: keep, merge, pass on, give to its reader."""
    values.live_part(record, _NOW)
    merged = values.merge(_HELD, record)
    values.merge(record, _HELD)
    values.decode(merged, key="fuzz")
    result = messages.find_result(merged, [])
    if isinstance(merged, DictionaryValue):
        messages.read_dictionary(result.value, name="values")


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "dht-ping": ping,
    "dht-store": store,
    "dht-find": find,
    "dht-find-response": find_response,
    "dht-dictionary": dictionary,
    "dht-subkey": subkey,
}
