"""The Hivemind DHT: records that expire, kept by the nodes whose ids are nearest to their keys."""

from kwaainet_bridge.hivemind.dht.id import DhtId
from kwaainet_bridge.hivemind.dht.node import BootstrapResult, DhtNode, Item
from kwaainet_bridge.hivemind.dht.placement import StoreResult
from kwaainet_bridge.hivemind.dht.routing import Contact
from kwaainet_bridge.hivemind.dht.values import Found, FoundEntry

__all__ = ["BootstrapResult", "Contact", "DhtId", "DhtNode", "Found", "FoundEntry", "Item", "StoreResult"]
