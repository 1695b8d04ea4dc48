"""The all-reduce of one group in simulated time: the real ``Reducer``, with simulated streams around it.

Each member averages an equal share of the values, in one part. What happens to those who die is as in
``averaging/allreduce.py``: a sender whose part has not come is left out once its stream ends or it is late, and a share
whose reducer died keeps its local values.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from kwaainet_bridge import defaults
from kwaainet_bridge.hivemind.averaging.group import Group
from kwaainet_bridge.hivemind.averaging.reducer import Reducer
from kwaainet_bridge.hivemind.averaging.split import share_elements
from kwaainet_bridge.wire.peer_id import PeerId

if TYPE_CHECKING:
    from bench.averaging_peers import Peer


class Reduction:
    """One member's part in it. ``begin`` is called once; then it ends by itself and changes the peer's values."""

    def __init__(self, peer: Peer, group: Group) -> None:
        self.begun = False
        self.group = group
        self._peer = peer
        self._network = peer.network
        shares = share_elements(peer.values.numel(), [None] * len(group.members))
        ends = list(itertools.accumulate(shares))
        self._slices = {
            member: slice(end - share, end)
            for member, share, end in zip(group.members, shares, ends, strict=True)
            if share
        }
        own = self._slices.get(peer.peer_id)
        self._reducer = Reducer(
            [] if own is None else [own.stop - own.start], group.members, now=peer.network.now
        )
        self._parts: dict[PeerId, torch.Tensor] = {}
        self._deltas: dict[PeerId, torch.Tensor] = {}
        self._failed: set[PeerId] = set()
        self._answered = False

    def begin(self) -> None:
        self.begun = True
        peer = self._peer
        self._network.at(self._reducer.deadline(), self._late)
        for member, elements in self._slices.items():
            part = peer.values[elements].clone()
            if member == peer.peer_id:
                self.part_came(member, part)
            else:
                self._send(peer.peers[member], part)
        for sender, part in peer.early.pop(self.group.group_id, ()):
            self.part_came(sender, part)
        self._finish_if_done()

    # --- sending ------------------------------------------------------------------------------------------

    def _send(self, receiver: Peer, part: torch.Tensor) -> None:
        sender, delay = self._peer, self._network.delay(self._peer.peer_id, receiver.peer_id)

        def arrive() -> None:
            if receiver.alive:
                self._network.after(defaults.AVERAGING_RESULT_SECONDS, self.give_up, receiver.peer_id)
                receive_part(receiver, self.group, sender.peer_id, part)
            elif receiver.silent:
                self._network.after(defaults.CONNECT_SECONDS, self.give_up, receiver.peer_id)
            else:
                self._network.after(delay, self.give_up, receiver.peer_id)

        self._network.after(3 * delay, arrive)  # a stream is opened first

    def answered(self, reducer: PeerId, delta: torch.Tensor) -> None:
        """A share came back."""
        if self._peer.alive and reducer not in self._failed:
            self._deltas[reducer] = delta
            self._finish_if_done()

    def give_up(self, reducer: PeerId) -> None:
        """A share will not come back."""
        if self._peer.alive and reducer in self._slices and reducer not in self._deltas:
            self._failed.add(reducer)
            self._finish_if_done()

    # --- reducing -----------------------------------------------------------------------------------------

    def part_came(self, sender: PeerId, part: torch.Tensor) -> None:
        if not self._peer.alive or sender in self._parts:
            return
        if sender in self._reducer.failed:
            refuse(self._peer, self.group, sender)
            return
        self._parts[sender] = part
        self._reducer.check(part, 1.0)
        self._reducer.add(sender, part, 1.0, now=self._network.now)
        self._answer_if_ready()

    def ends(self) -> None:
        """The member died, and all others of the group learn of it."""
        for member in self.group.members:
            other = self._peer.peers[member]
            if other is not self._peer:
                delay = self._network.delay(self._peer.peer_id, member)
                self._network.after(delay, member_ended, other, self.group, self._peer.peer_id)

    def member_ended(self, member: PeerId) -> None:
        if member not in self._parts:
            self._reducer.fail(member, "it left", now=self._network.now)
            self._answer_if_ready()
        self.give_up(member)

    def _late(self) -> None:
        if self._peer.alive and self._reducer.deadline() <= self._network.now:
            for member in self._reducer.late(self._network.now):
                self._reducer.fail(member, "late", now=self._network.now)
            self._answer_if_ready()

    def _answer_if_ready(self) -> None:
        if self._answered or not self._reducer.lengths or not self._reducer.done:
            return
        self._answered = True
        average = self._reducer.average(0)
        assert average is not None
        for sender, part in self._parts.items():
            if sender == self._peer.peer_id:
                self.answered(sender, average - part)
            else:
                other = self._peer.peers[sender]
                delay = self._network.delay(self._peer.peer_id, sender)
                self._network.after(delay, answer_came, other, self.group, self._peer.peer_id, average - part)

    # --- the end ------------------------------------------------------------------------------------------

    def _finish_if_done(self) -> None:
        peer = self._peer
        if peer.reduction is not self or len(self._deltas) + len(self._failed) < len(self._slices):
            return
        for member, delta in self._deltas.items():
            peer.values[self._slices[member]] += delta
        assert peer.look is not None
        peer.look.averaged = self._network.now
        peer.look.missing = sum(
            elements.stop - elements.start
            for member, elements in self._slices.items()
            if member in self._failed
        )
        peer.reduction = None


def receive_part(receiver: Peer, group: Group, sender: PeerId, part: torch.Tensor) -> None:
    """A part comes to a member, perhaps before its leader's word that the group begins."""
    if receiver.reduction is not None and receiver.reduction.group.group_id == group.group_id:
        receiver.reduction.part_came(sender, part)
    elif receiver.is_busy:
        receiver.early.setdefault(group.group_id, []).append((sender, part))
        receiver.network.after(defaults.AVERAGING_REQUEST_SECONDS, refuse_early, receiver, group)
    else:
        refuse(receiver, group, sender)


def refuse_early(receiver: Peer, group: Group) -> None:
    """It does not take part in that group."""
    for sender, _ in receiver.early.pop(group.group_id, ()):
        refuse(receiver, group, sender)


def refuse(receiver: Peer, group: Group, sender: PeerId) -> None:
    delay = receiver.network.delay(receiver.peer_id, sender)
    receiver.network.after(delay, refused, receiver.peers[sender], group, receiver.peer_id)


def refused(peer: Peer, group: Group, reducer: PeerId) -> None:
    if peer.reduction is not None and peer.reduction.group.group_id == group.group_id:
        peer.reduction.give_up(reducer)


def answer_came(peer: Peer, group: Group, reducer: PeerId, delta: torch.Tensor) -> None:
    if peer.reduction is not None and peer.reduction.group.group_id == group.group_id:
        peer.reduction.answered(reducer, delta)


def member_ended(peer: Peer, group: Group, member: PeerId) -> None:
    if peer.alive and peer.reduction is not None and peer.reduction.group.group_id == group.group_id:
        peer.reduction.member_ended(member)
