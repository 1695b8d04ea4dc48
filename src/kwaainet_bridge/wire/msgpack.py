"""msgpack as Hivemind peers speak it: tuples, DHT dictionaries and tensor descriptors are extension types.

Source: hivemind 1.1.12, ``utils/serializer.py``, ``dht/storage.py``, ``utils/tensor_descr.py``, and bytes
made by them. Petals adds no type of its own.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Final

import msgpack

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.wire.msgpack_bounds import check_bounds

_TUPLE: Final = 0x40
_DICTIONARY: Final = 0x50
_DESCRIPTOR: Final = 0x51


@dataclass(frozen=True, slots=True)
class DictionaryValue:
    """A DHT value with subkeys.

    Entries are ``(subkey, value, expiration)``: a hashable msgpack value, the value's own msgpack bytes, and
    unix seconds. ``maxsize`` is infinite unless the storing peer set one; entries are in insertion order.
    """

    maxsize: float
    latest_expiration: float
    entries: tuple[tuple[Any, bytes, float], ...]


@dataclass(frozen=True, slots=True)
class TensorDescriptor:
    """What a tensor of a batch looks like; stock servers describe their inputs and outputs by it.

    ``size`` has None for the batch dimension; ``dtype`` and ``layout`` are torch's names, ``"torch.float32"``
    and ``"torch.strided"``; ``compression`` is the CompressionType that the server wants and sends.
    """

    size: tuple[int | None, ...]
    dtype: str | None
    layout: str | None = "torch.strided"
    requires_grad: bool = False
    pin_memory: bool = False
    compression: int = 0
    device_type: str | None = None
    device_index: int | None = None


def pack(value: Any) -> bytes:
    """Encode ``value`` as stock peers do, so that equal keys give equal DHT ids.

    Types are taken strictly: numpy scalars and subclasses of str, int, dict or list are refused rather than
    sent as something else. Raises TypeError for those, OverflowError for integers beyond 64 bits, ValueError
    for nesting that the library cannot follow.
    """
    try:
        return _pack(value)
    except RecursionError as e:
        raise ValueError("nested too deeply for msgpack") from e


def _pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, use_bin_type=True, strict_types=True, default=_to_ext)
    return packed


def _to_ext(value: Any) -> Any:
    """Called for what msgpack has no type for; returning ``value`` itself makes it raise TypeError."""
    if isinstance(value, DictionaryValue):
        entries = [list(entry) for entry in value.entries]
        return msgpack.ExtType(_DICTIONARY, _pack([value.maxsize, value.latest_expiration, entries]))
    if isinstance(value, TensorDescriptor):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return msgpack.ExtType(_DESCRIPTOR, _pack(fields))
    if isinstance(value, tuple):
        return msgpack.ExtType(_TUPLE, _pack(list(value)))
    return value


def unpack(
    data: bytes,
    *,
    max_bytes: int = defaults.MAX_MSGPACK_BYTES,
    max_depth: int = defaults.MAX_MSGPACK_DEPTH,
    max_items: int = defaults.MAX_MSGPACK_ITEMS,
    name: str = "msgpack value",
) -> Any:
    """Decode one value. Arrays become lists; extension types tuples, DictionaryValue and TensorDescriptor.

    Keys of maps are str or bytes, as stock peers require. An extension type that Hivemind does not define
    becomes its payload's bytes, as in stock peers (msgpack's own timestamps become ``msgpack.Timestamp``).

    Raises RemoteError that begins with ``name``, the field's name for people, on anything else: bytes that
    are cut, trailing or too many, text that is not UTF-8, more than ``max_items`` items over all containers,
    or more than ``max_depth`` levels of containers and extension types.
    """
    if len(data) > max_bytes:
        raise RemoteError(f"{name}: {len(data)} bytes, at most {max_bytes} are accepted")
    data = bytes(data)
    nested = frozenset((_TUPLE, _DICTIONARY, _DESCRIPTOR))
    check_bounds(data, nested_ext=nested, max_depth=max_depth, max_items=max_items, name=name)
    try:
        return _unpack(data)
    except RemoteError as e:
        raise RemoteError(f"{name}: {e}") from e
    except (ValueError, OverflowError, msgpack.exceptions.UnpackException) as e:
        raise RemoteError(f"{name}: does not decode: {e}") from e


def _unpack(data: bytes) -> Any:
    # the counts inside were checked against the data, so its length is limit enough
    return msgpack.unpackb(data, raw=False, strict_map_key=True, ext_hook=_from_ext)


def _from_ext(code: int, payload: bytes) -> Any:
    match code:
        case 0x40:
            value = _unpack(payload)
            if not isinstance(value, list):
                raise RemoteError(f"tuple is made of {type(value).__name__}, not of a list")
            return tuple(value)
        case 0x50:
            return _dictionary_value(_unpack(payload))
        case 0x51:
            return _tensor_descriptor(_unpack(payload))
        case _:
            return payload


def _dictionary_value(parts: Any) -> DictionaryValue:
    if not isinstance(parts, list) or len(parts) != 3:
        raise RemoteError("dictionary value: not a list of 3")
    maxsize, latest, raw_entries = parts
    if not isinstance(raw_entries, list):
        raise RemoteError("dictionary value: entries are no list")
    entries = []
    for entry in raw_entries:
        if not isinstance(entry, list) or len(entry) != 3:
            raise RemoteError("dictionary value: an entry is not a list of 3")
        subkey, value, expiration = entry
        try:
            hash(subkey)
        except TypeError as e:
            raise RemoteError(f"dictionary value: subkey {type(subkey).__name__} is not hashable") from e
        if not isinstance(value, bytes):
            raise RemoteError(f"dictionary value: the value of an entry is {type(value).__name__}, not bytes")
        entries.append((subkey, value, _number(expiration, "dictionary value: expiration")))
    return DictionaryValue(
        _number(maxsize, "dictionary value: maxsize"),
        _number(latest, "dictionary value: latest_expiration"),
        tuple(entries),
    )


def _number(value: Any, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise RemoteError(f"{field} is no number: {value!r:.40}")
    return value


_DESCRIPTOR_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "size": (tuple, list),
    "dtype": (str, type(None)),
    "layout": (str, type(None)),
    "requires_grad": (bool,),
    "pin_memory": (bool,),
    "compression": (int,),
    "device_type": (str, type(None)),
    "device_index": (int, type(None)),
}


def _tensor_descriptor(fields: Any) -> TensorDescriptor:
    if not isinstance(fields, dict):
        raise RemoteError("tensor descriptor: not a map")
    for field, types in _DESCRIPTOR_TYPES.items():
        if field not in fields:
            raise RemoteError(f"tensor descriptor: {field} is absent")
        value = fields[field]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise RemoteError(f"tensor descriptor: {field} is {type(value).__name__}")
    known = {field: fields[field] for field in _DESCRIPTOR_TYPES}
    size = tuple(known.pop("size"))
    for dimension in size:
        if dimension is not None and (type(dimension) is not int or dimension < 0):
            raise RemoteError(f"tensor descriptor: size has {dimension!r:.40}")
    return TensorDescriptor(size=size, **known)
