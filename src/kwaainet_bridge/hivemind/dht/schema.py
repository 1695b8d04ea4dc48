"""Records that must fit a schema.

Source of the rules: hivemind 1.1.12, ``dht/schema.py``, which uses pydantic 1 and one model for each prefix as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, TypeAdapter, ValidationError

from kwaainet_bridge.errors import RemoteError
from kwaainet_bridge.hivemind.dht.id import DhtId
from kwaainet_bridge.hivemind.dht.signatures import names_owner
from kwaainet_bridge.hivemind.dht.validation import DhtRecord, RecordValidator
from kwaainet_bridge.hivemind.dht.values import read_subkey
from kwaainet_bridge.wire.msgpack import pack, unpack


def _check_owner(subkey: bytes) -> bytes:
    if not names_owner(subkey):
        raise ValueError("names no owner")
    return subkey


ProtectedSubkey = Annotated[bytes, AfterValidator(_check_owner)]
"""The type of subkeys that must name an owner, so that each peer can store one entry, its own."""


class SchemaValidator(RecordValidator):
    """Accepts under certain keys only values that fit.

    ``schemas`` maps a prefix to a model each of whose fields is a key: ``<prefix>_<field>``, or the field's name
    alone for an empty prefix. A field for a dictionary is a ``dict`` of its subkeys' type and its values' type;
    entries are checked one by one. Values must have the field's type as they are: nothing is converted, an
    integer is no float. Other keys are accepted with ``others``.
    """

    def __init__(self, schemas: Mapping[str, type[BaseModel]], *, others: bool = True) -> None:
        self._fields: dict[bytes, TypeAdapter[Any]] = {}
        for prefix, model in schemas.items():
            for name, field in model.model_fields.items():
                key = DhtId.of(f"{prefix}_{name}" if prefix else name)
                self._fields[key.to_bytes()] = TypeAdapter(
                    Annotated[field.annotation, field]  # type: ignore[arg-type] # made at run time
                )
        self._others = others

    def validate(self, record: DhtRecord) -> bool:
        field = self._fields.get(record.key)
        if field is None:
            return self._others
        try:
            value = unpack(record.value)
            if record.subkey != pack(None):
                value = {read_subkey(record.subkey): value}
            elif isinstance(value, dict):
                return False  # only subkeys make a dictionary
            return _identical(field.dump_python(field.validate_python(value)), value)
        except (RemoteError, ValidationError):
            return False


def _identical(left: Any, right: Any) -> bool:
    """Equal, and of equal types throughout."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_identical(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(_identical, left, right))
    return bool(left == right)
