"""The Hivemind DHT: records that expire, kept by the nodes whose ids are nearest to their keys."""

from kwaainet_bridge.hivemind.dht.authorization import AccessToken, Authorizer, TokenAuthorizer
from kwaainet_bridge.hivemind.dht.client import Pong
from kwaainet_bridge.hivemind.dht.id import DhtId
from kwaainet_bridge.hivemind.dht.node import BootstrapResult, DhtNode, Item
from kwaainet_bridge.hivemind.dht.placement import StoreResult
from kwaainet_bridge.hivemind.dht.routing import Contact
from kwaainet_bridge.hivemind.dht.schema import ProtectedSubkey, SchemaValidator
from kwaainet_bridge.hivemind.dht.signatures import RsaSignatureValidator
from kwaainet_bridge.hivemind.dht.validation import CompositeValidator, DhtRecord, RecordValidator
from kwaainet_bridge.hivemind.dht.values import Found, FoundEntry

__all__ = [
    "AccessToken",
    "Authorizer",
    "BootstrapResult",
    "CompositeValidator",
    "Contact",
    "DhtId",
    "DhtNode",
    "DhtRecord",
    "Found",
    "FoundEntry",
    "Item",
    "Pong",
    "ProtectedSubkey",
    "RecordValidator",
    "RsaSignatureValidator",
    "SchemaValidator",
    "StoreResult",
    "TokenAuthorizer",
]
