"""Where this host can be dialled: what is told to others, and what is only supposed so far. No I/O but a look at the
machine's interfaces."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence

import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.net.addresses import Address, private_block, reachable_forms
from kwaainet_bridge.wire.peer_id import PeerId

log = logging.getLogger(__name__)


class OwnAddresses:
    """The addresses of one host.

    ``listening`` are those it listens on, ``announced`` those that the operator wants told instead of them.
    ``changed`` is called whenever :meth:`told` has. What peers see of this host is kept apart until a dial from
    outside has proved it.
    """

    def __init__(
        self, listening: Sequence[Address], announced: Sequence[Address], changed: Callable[[], None]
    ) -> None:
        self._listening = tuple(listening)
        self._announced = tuple(announced)
        self._tell = changed
        self._changed = trio.Event()
        self._interfaces = tuple(reachable_forms(listening))
        self._proved: tuple[Address, ...] = ()
        self._relayed: tuple[Address, ...] = ()
        self._seen: OrderedDict[PeerId, tuple[Address, ...]] = OrderedDict()

    @property
    def listens(self) -> bool:
        return bool(self._listening)

    @property
    def interfaces(self) -> tuple[Address, ...]:
        """Those of this machine that it listens on, as they are now unless others are announced."""
        return self._interfaces

    @property
    def direct(self) -> tuple[Address, ...]:
        """Those that lead here without a relay; of a machine with many interfaces some."""
        # others keep so many of a peer's addresses, and half of these are for relayed ones
        proved = self._proved[: defaults.MAX_ADDRESSES_PER_PEER // 4]
        known = self._announced or self._interfaces
        return tuple(dict.fromkeys((*known[: defaults.MAX_ADDRESSES_PER_PEER // 2 - len(proved)], *proved)))

    @property
    def told(self) -> tuple[Address, ...]:
        """All that others are told, relayed ones last."""
        return (*self.direct, *self._relayed)

    # --- what is known

    def prove(self, addresses: Iterable[Address]) -> None:
        """Note at which addresses others have reached this host; they take the place of those from before."""
        known = self._announced or self._interfaces
        self._set(proved=tuple(a for a in dict.fromkeys(addresses) if a not in known))

    def relay(self, addresses: Iterable[Address]) -> None:
        """Note through which relays this host is reached; they take the place of those from before."""
        self._set(relayed=tuple(addresses)[: defaults.MAX_ADDRESSES_PER_PEER // 2])

    def _set(
        self, *, proved: tuple[Address, ...] | None = None, relayed: tuple[Address, ...] | None = None
    ) -> None:
        before = self.told
        self._proved = self._proved if proved is None else proved
        self._relayed = self._relayed if relayed is None else relayed
        if self.told != before:
            self._notify(told=True)

    def _notify(self, *, told: bool) -> None:
        if told:
            self._tell()
        self._changed.set()
        self._changed = trio.Event()

    async def wait_changed(self) -> None:
        """Return once others are told other addresses than now, or this machine has others."""
        await self._changed.wait()

    async def follow_interfaces(self, moved: Callable[[], None]) -> None:
        """Look every minute which addresses this machine has, and call ``moved`` when they are others."""
        while True:
            await trio.sleep(defaults.INTERFACES_SECONDS)
            try:
                found = tuple(reachable_forms(self._listening))
                if found == self._interfaces:
                    continue
                moved()
            except OSError as e:  # file descriptors have run out, for instance
                log.warning("cannot look which addresses this machine has: %s", e)
                continue
            log.info("this machine's addresses are now: %s", ", ".join(map(str, found)))
            before, self._interfaces = self.told, found
            self._notify(told=self.told != before)

    # --- what is supposed

    def seen(self, observer: PeerId, address: Address, *, local_port: int) -> None:
        """Note as which address ``observer`` sees this host, over a connection to ``local_port`` here.

        Its port means something if the connection is to a port that is listened on. In any case the usual forwarding
        of a router is supposed: the same port on both sides.
        """
        ports = [own.port for own in self._listening if own.family == address.family]
        supposed = [Address(address.protocol, address.host, port) for port in ports[:1]]
        if local_port in ports:
            supposed.insert(0, address.without_peer())
        self._seen.pop(observer, None)
        self._seen[observer] = tuple(dict.fromkeys(supposed))
        if len(self._seen) > defaults.MAX_OBSERVERS:
            self._seen.popitem(last=False)

    def unseen(self, observer: PeerId) -> None:
        """Forget what ``observer`` sees: it is gone."""
        self._seen.pop(observer, None)

    def supposed(self) -> list[Address]:
        """Addresses as which peers see this host, those that most see first. Only their word, so not for telling."""
        counts = Counter(address for seen in self._seen.values() for address in seen)
        most = max(counts.values(), default=0)
        # one liar among many observers is not passed on; with few of them nobody can tell
        agreed = [address for address, count in counts.most_common() if 2 * count >= most]
        return agreed[: defaults.MAX_SUPPOSED_ADDRESSES]

    def for_checks(self) -> list[Address]:
        """Addresses worth a dial from outside: the supposed ones and those that are told."""
        return list(dict.fromkeys([*self.supposed(), *self.direct]))

    def for_punching(self) -> list[Address]:
        """Public addresses from which the dials of this host come."""
        return [a for a in self.for_checks() if not a.is_name and private_block(a.host) is None]
