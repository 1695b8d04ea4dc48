"""One all-reduce of one group: every member averages a share of the values and gets the others' shares averaged.

To each other member that has a share goes one stream with the parts of it; back come the differences between average
and part. Source: hivemind 1.1.12, ``averaging/allreduce.py``.

A member that fails costs its own contribution or its own share, never the rest: a share that does not come back keeps
its local values.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import trio

from kwaainet_bridge import defaults
from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.errors import CompressionError, NetworkError, RemoteError
from kwaainet_bridge.hivemind.averaging.coding import coded
from kwaainet_bridge.hivemind.averaging.group import Group
from kwaainet_bridge.hivemind.averaging.reducer import Reducer, check_values, difference
from kwaainet_bridge.hivemind.averaging.split import Part, partition
from kwaainet_bridge.hivemind.averaging.step import FailureKind
from kwaainet_bridge.rpc import ClientStream, RpcClient, ServerStream, StreamMethod
from kwaainet_bridge.wire.averaging import AveragingData, MessageCode, code_name
from kwaainet_bridge.wire.fields import total
from kwaainet_bridge.wire.peer_id import PeerId
from kwaainet_bridge.wire.tensors import TensorMessage, decode_tensor, encode_tensor

log = logging.getLogger(__name__)

Exchange = StreamMethod[AveragingData, AveragingData]

_Failure = tuple[FailureKind, str]
"""Why a member's share is given up."""


@dataclass(frozen=True, slots=True)
class Options:
    """What all members of a group must have alike (compression, part size), and what a member allows."""

    compression: CompressionType = CompressionType.NONE
    part_bytes: int = defaults.AVERAGING_PART_BYTES
    max_rms: float = math.inf
    """Root mean square of a part or a difference from which on it is refused."""
    part_seconds: float = defaults.AVERAGING_PART_SECONDS
    """How long a sender has for a part, unless others were slower before."""
    allreduce_seconds: float = defaults.AVERAGING_ALLREDUCE_SECONDS

    def __post_init__(self) -> None:
        if not (self.part_seconds > 0 and self.allreduce_seconds > 0):
            raise ValueError(
                f"part_seconds {self.part_seconds}, allreduce_seconds {self.allreduce_seconds}: not above 0"
            )

    @property
    def message_bytes(self) -> int:
        """Longest message with a part or a difference, which is float32 whatever the part was compressed to: eight
        bits may become 32."""
        return 8 * self.part_bytes + 64 * defaults.KIB

    @property
    def result_seconds(self) -> float:
        """How long a member has for the next average: it waits for senders meanwhile."""
        return defaults.AVERAGING_RESULT_FACTOR * self.part_seconds


class AllReduce:
    """The all-reduce of ``group``, as its member ``own``. The tensors stay unchanged until ``apply``.

    They must be contiguous, of floats, and may not be changed by others meanwhile. ``deltas`` is what ``deltas_of``
    made for them, to be used by one all-reduce at a time. ``shares`` are the elements that each member averages.
    ``run`` is called once; ``serve`` for every stream that comes for this group, which may be before ``run``.
    """

    def __init__(
        self,
        group: Group,
        tensors: Sequence[torch.Tensor],
        deltas: Sequence[torch.Tensor],
        *,
        own: PeerId,
        weight: float,
        shares: Sequence[int],
        options: Options,
    ) -> None:
        self.group = group
        self.failed_reducers: dict[PeerId, str] = {}
        self.failures: list[tuple[PeerId, FailureKind, str]] = []  # of senders and reducers, as they came
        self.sent_bytes = 0  # of tensors as they travel
        self.received_bytes = 0
        self._tensors = tensors
        self._deltas = deltas
        self._averaged: set[Part] = set()  # those whose deltas have come
        self._own = own
        self._weight = weight
        self._options = options
        self._share = dict(zip(group.members, shares, strict=True))
        parts = partition(tensors, shares, options.compression, options.part_bytes)
        self._parts = dict(zip(group.members, parts, strict=True))
        self._reducer = Reducer(
            [part.length for part in self._parts[own]],
            group.members,
            now=trio.current_time(),
            max_rms=options.max_rms,
            part_seconds=options.part_seconds,
        )
        self._serving: dict[PeerId, trio.CancelScope] = {}
        self._completed = trio.Event()
        self._cancelled = False

    @property
    def failed_senders(self) -> dict[PeerId, str]:
        """Whose parts are missing in what we averaged, and why."""
        return self._reducer.failed

    @property
    def missing_elements(self) -> int:
        """Elements that keep their local values since nobody averaged them."""
        return sum(
            part.length for parts in self._parts.values() for part in parts if part not in self._averaged
        )

    async def run(self, client: RpcClient, method: Exchange) -> None:
        """Take part to the end: all parts are averaged or given up. Raises nothing for members that fail.

        Cancelled: members that still wait for our averages are told so.
        """
        with trio.move_on_after(self._options.allreduce_seconds):
            try:
                async with trio.open_nursery() as nursery:
                    watching = trio.CancelScope()
                    nursery.start_soon(self._watch_senders, watching)
                    nursery.start_soon(self._average_own, watching)
                    for peer, parts in self._parts.items():
                        if peer != self._own and parts:
                            nursery.start_soon(self._exchange, client, method, peer, parts)
            finally:
                self._cancelled = not self._reducer.done
                self._wake()

    def apply(self, alpha: float = 1.0) -> None:
        """Move the tensors by ``alpha`` towards the average, all at once: nobody sees some moved and others not."""
        with torch.no_grad():
            for part in self._averaged:
                values = part.of(self._tensors)
                values.add_(part.of(self._deltas).to(values.device), alpha=alpha)

    # --- our own parts ------------------------------------------------------------------------------------

    async def _average_own(self, watching: trio.CancelScope) -> None:
        for number, part in enumerate(self._parts[self._own]):
            values = part.of(self._tensors).cpu()
            self._add_to_average(self._own, values, self._weight)
            await self._until_ready(number)
            average = self._reducer.average(number)
            if average is None:
                part.of(self._deltas).zero_()
            else:
                torch.sub(average, values, out=part.of(self._deltas))
            self._averaged.add(part)
        watching.cancel()

    async def _watch_senders(self, watching: trio.CancelScope) -> None:
        """Leave out senders that are late, until ``watching`` is cancelled."""
        with watching:
            while True:
                # deadlines only move back, as parts are completed
                await trio.sleep_until(self._reducer.deadline())
                for peer in self._reducer.late(trio.current_time()):
                    if peer != self._own:
                        self._fail(peer, FailureKind.LATE, "late")

    def _fail(self, sender: PeerId, kind: FailureKind, why: str) -> None:
        if sender in self._reducer.failed:
            return
        log.info("averaging: %s is left out from part %d on: %s", sender, self._reducer.received(sender), why)
        completed = self._reducer.fail(sender, why, now=trio.current_time())
        if sender in self._reducer.failed:
            self.failures.append((sender, kind, why))
        if completed:
            self._wake()
        if scope := self._serving.get(sender):
            scope.cancel()

    def _add_to_average(self, sender: PeerId, part: torch.Tensor, weight: float) -> None:
        if self._reducer.add(sender, part, weight, now=trio.current_time()):
            self._wake()

    def _wake(self) -> None:
        """Wake those who wait for the part that is averaged now: all of them wait for the same one."""
        self._completed.set()
        self._completed = trio.Event()

    async def _until_ready(self, number: int) -> None:
        """Wait for the average of a part, or for the end of an all-reduce without it."""
        while not (self._reducer.is_ready(number) or self._cancelled):
            await self._completed.wait()

    # --- others' shares -----------------------------------------------------------------------------------

    async def _exchange(self, client: RpcClient, method: Exchange, peer: PeerId, parts: list[Part]) -> None:
        """Have one member average its share."""
        patience = trio.CancelScope(deadline=trio.current_time() + self._options.result_seconds)
        failure: _Failure | None = None
        try:
            async with client.stream(
                peer,
                method,
                open_timeout=defaults.CONNECT_SECONDS,
                max_message_bytes=self._options.message_bytes,
            ) as stream:
                with patience:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._send, stream, parts, patience)
                        failure = await self._receive(stream, parts, patience)
                        if failure is not None:
                            nursery.cancel_scope.cancel()
                if patience.cancelled_caught:
                    why = f"no answer within {self._options.result_seconds:g} s"
                    failure = FailureKind.SILENT, why
        except NetworkError as e:
            failure = FailureKind.UNREACHABLE, str(e)
        if failure is not None:
            kind, why = failure
            log.info("averaging: the rest of the share of %s stays as it is: %.200s", peer, why)
            self.failed_reducers[peer] = why
            self.failures.append((peer, kind, why))

    async def _send(
        self,
        stream: ClientStream[AveragingData, AveragingData],
        parts: list[Part],
        patience: trio.CancelScope,
    ) -> None:
        try:
            for number, part in enumerate(parts):
                values = part.of(self._tensors)
                tensor = await coded(partial(self._encode, values), values.nbytes, self._options.compression)
                self.sent_bytes += total(tensor.values)
                message = AveragingData(tensor_part=tensor, weight=self._weight)
                if not number:
                    message.code = MessageCode.PART_FOR_AVERAGING
                    message.group_id = self.group.group_id
                await stream.send(message)
                patience.deadline = trio.current_time() + self._options.result_seconds
            await stream.end()
        except NetworkError as e:
            log.debug("averaging: sending to %s: %s", stream.peer, e)  # what it answers, if anything, counts

    def _encode(self, values: torch.Tensor) -> TensorMessage:
        return encode_tensor(values, self._options.compression, legacy_bfloat16=True)

    async def _receive(
        self,
        stream: ClientStream[AveragingData, AveragingData],
        parts: list[Part],
        patience: trio.CancelScope,
    ) -> _Failure | None:
        """Take in the differences of a share. Returns what went wrong."""
        try:
            for part in parts:
                message = await stream.receive()
                patience.deadline = trio.current_time() + self._options.result_seconds
                if message.code != MessageCode.AVERAGED_PART:
                    return FailureKind.REFUSED, f"it answers {code_name(message.code)}"
                await self._take_difference(message, part)
        except trio.EndOfChannel:
            return FailureKind.INCOMPLETE, "it answered fewer parts than it got"
        except NetworkError as e:
            return FailureKind.LEFT, str(e)
        except RemoteError as e:
            return FailureKind.INVALID, str(e)
        return await self._surplus(stream, parts)

    async def _surplus(
        self, stream: ClientStream[AveragingData, AveragingData], parts: list[Part]
    ) -> _Failure | None:
        """Make sure that a share's stream ends: nothing numbers answers, so one too many puts all in doubt."""
        with (
            trio.move_on_after(self._options.part_seconds),
            contextlib.suppress(trio.EndOfChannel, NetworkError, RemoteError),
        ):
            await stream.receive()
            self._averaged.difference_update(parts)
            return FailureKind.SURPLUS, "it answered more parts than it got"
        return None

    async def _take_difference(self, message: AveragingData, part: Part) -> None:
        """Put a difference in its place. Raises RemoteError."""
        tensor = _taken(message, part.length)
        self.received_bytes += len(tensor.buffer)
        await coded(partial(self._decode, tensor, part), len(tensor.buffer), self._options.compression)
        self._averaged.add(part)

    def _decode(self, tensor: TensorMessage, part: Part) -> None:
        delta = decode_tensor(tensor, name="difference").detach().reshape(-1)
        check_values(delta, self._options.max_rms)
        part.of(self._deltas).copy_(delta)

    # --- serving our share --------------------------------------------------------------------------------

    async def serve(self, stream: ServerStream[AveragingData, AveragingData], first: AveragingData) -> None:
        """Average the parts that come from one member. ``first`` is the stream's first message."""
        sender = stream.context.peer
        if sender not in self._reducer.senders or sender == self._own or sender in self._serving:
            await stream.send(AveragingData(code=MessageCode.PROTOCOL_VIOLATION))
            return
        if self._cancelled:
            await stream.send(AveragingData(code=MessageCode.CANCELLED))
            return
        kind, why = FailureKind.LEFT, "it left, or sent what cannot be read"
        try:
            with trio.CancelScope() as self._serving[sender]:
                await self._serve(stream, first, sender)
                kind, why = FailureKind.INCOMPLETE, "it sent fewer parts than its share has"
        except (RemoteError, CompressionError) as e:
            kind, why = FailureKind.INVALID, str(e)
        finally:
            if self._reducer.received(sender) < len(self._reducer.lengths):
                self._fail(sender, kind, why)
        if sender in self._reducer.failed:
            await stream.send(AveragingData(code=MessageCode.INTERNAL_ERROR))
        elif not self._reducer.done:
            await stream.send(AveragingData(code=MessageCode.CANCELLED))

    async def _serve(
        self, stream: ServerStream[AveragingData, AveragingData], message: AveragingData, sender: PeerId
    ) -> None:
        if message.code != MessageCode.PART_FOR_AVERAGING:
            raise RemoteError(f"its first message has {code_name(message.code)}")
        # whoever averages nothing has a thin line, perhaps: it gets answers when it has sent everything
        answers: list[AveragingData] | None = None if self._share[sender] else []
        number = 0
        while True:
            answer = await self._average_part(number, message, sender)
            if answer is None:
                return
            if answers is None:
                await stream.send(answer)
            else:
                answers.append(answer)
            del answer  # all members wait for each other here, and need not hold a part meanwhile
            number += 1
            try:
                message = await stream.receive()
            except trio.EndOfChannel:
                break
        for answer in answers or ():
            await stream.send(answer)

    async def _average_part(
        self, number: int, message: AveragingData, sender: PeerId
    ) -> AveragingData | None:
        """Add a part to the average, wait for that of all, and return the difference; None if there will be none."""
        tensor = _taken(message, self._reducer.expected(sender))
        compression, weight = tensor.compression, message.weight
        self.received_bytes += len(tensor.buffer)
        decode = partial(self._decode_part, tensor, weight)
        part = await coded(decode, len(tensor.buffer), self._options.compression)
        del tensor, decode
        self._add_to_average(sender, part, weight)
        await self._until_ready(number)
        return await self._difference(number, part, compression) if self._reducer.is_ready(number) else None

    def _decode_part(self, tensor: TensorMessage, weight: float) -> torch.Tensor:
        part = decode_tensor(tensor, name="part").detach().reshape(-1)
        self._reducer.check(part, weight)
        return part

    async def _difference(self, number: int, part: torch.Tensor, compression: int) -> AveragingData:
        average = self._reducer.average(number)

        def encode() -> TensorMessage:
            delta = torch.zeros_like(part) if average is None else difference(average, part)
            return encode_tensor(delta, compression, legacy_bfloat16=True)

        tensor = await coded(encode, part.nbytes, self._options.compression)
        self.sent_bytes += total(tensor.values)
        return AveragingData(code=MessageCode.AVERAGED_PART, tensor_part=tensor)


def _taken(message: AveragingData, length: int) -> TensorMessage:
    """The tensor of a message, known to have ``length`` elements. Raises RemoteError before anything is decoded.

    It is taken out of the message: whoever holds on to that holds no memory.
    """
    tensor, message.tensor_part = message.tensor_part, None
    if tensor is None:
        raise RemoteError("a message has no tensor")
    if math.prod(tensor.size) != length:
        raise RemoteError(f"a part has size {tensor.size!r:.100}, not {length}")
    return tensor
