from __future__ import annotations

from pathlib import Path

import pytest
import torch
import trio
from client_fakes import ToySwarm, peer, random_hidden, run_blocks, toy_swarm

from kwaainet_bridge import defaults
from kwaainet_bridge.compression import CompressionType
from kwaainet_bridge.errors import InvalidRequest, NoRoute, Refusal
from kwaainet_bridge.hivemind.client import InferenceSession, open_session
from kwaainet_bridge.hivemind.client.routing import Hop
from kwaainet_bridge.wire import msgpack
from kwaainet_bridge.wire.expert import ExpertRequest
from kwaainet_bridge.wire.tensors import decode_tensor

MESSAGES = Path(__file__).parents[1] / "vectors" / "petals-tiny-llama" / "messages"


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


async def steps(session: InferenceSession, hidden: torch.Tensor, *lengths: int) -> torch.Tensor:
    outputs, start = [], session.position
    for length in lengths:
        outputs.append(await session.step(hidden[:, start : start + length]))
        start += length
    return torch.cat(outputs, dim=1)


async def test_steps_through_a_chain_equal_one_pass() -> None:
    async with toy_swarm(6) as toy:
        toy.add(0, 2), toy.add(2, 3), toy.add(3, 6)
        hidden = random_hidden(2, 9, 4)
        async with open_session(toy.swarm, batch_size=2, max_length=16) as session:
            close(await steps(session, hidden, 5, 1, 1, 2), toy.reference(hidden))
            assert session.position == 9
            assert [c.split(" ")[0] for c in session.chain] == ["0:2", "2:3", "3:6"]
        assert [s.ended_in_order for s in toy.servers] == [1, 1, 1]
        assert [s.sessions for s in toy.servers] == [0, 0, 0]


async def test_part_of_the_model() -> None:
    async with toy_swarm(6) as toy:
        toy.add(0, 4), toy.add(4, 6)
        hidden = random_hidden(1, 3, 4)
        async with open_session(toy.swarm, max_length=4, blocks=range(2, 5)) as session:
            close(await session.step(hidden), run_blocks(range(2, 5), hidden))


def recorded(number: int) -> ExpertRequest:
    return ExpertRequest.read((MESSAGES / f"{number:03}-rpc_inference.request.bin").read_bytes())


async def test_requests_are_byte_for_byte_those_of_a_stock_client() -> None:
    """Three steps, one of them with hypotheses and one empty, as Petals' main sent them to two servers."""
    ids = ["872a8e6b-57e5-4440-9994-1f394ff1174c", "c7aaa474-526e-455d-9205-32881b695c83"]
    ids += ["cf8ecd91-a327-4661-ba71-9a0873302fdf", "7da7f4b7-299f-4783-9b08-574c65229cf9"]
    ids += ["dc62ca82-5973-4ae8-9368-63bb29be0fcf", "c6351248-a5ee-46fd-af44-a2d69584cacb"]
    async with toy_swarm(8) as toy:
        toy.add(0, 4), toy.add(4, 8)
        made = iter(ids)
        async with open_session(toy.swarm, batch_size=2, max_length=16, new_id=lambda: next(made)) as session:
            for number in (17, 21, 25, 29):
                hidden, _, hypo_ids = map(decode_tensor, recorded(number).tensors)
                await session.step(hidden, hypo_ids=hypo_ids if hypo_ids.numel() else None)
        first, second = toy.servers
        assert [b"".join(r.parts()) for r in first.requests] == [
            (MESSAGES / f"{number:03}-rpc_inference.request.bin").read_bytes()
            for number in (17, 21, 25, 29, 33)
        ]
        assert [(r.uid, r.metadata) for r in second.requests] == [
            (r.uid, r.metadata) for r in map(recorded, (19, 23, 27, 31, 34))
        ]


async def test_deep_prompts_reach_each_server_for_its_own_blocks() -> None:
    async with toy_swarm(4) as toy:
        toy.add(0, 1), toy.add(1, 4)
        hidden, prompts = random_hidden(2, 5, 4), random_hidden(4, 1, 3, 4, seed=1)
        async with open_session(toy.swarm, batch_size=2, max_length=8) as session:
            close(await session.step(hidden, prompts=prompts), toy.reference(hidden, prompts))


async def test_hypotheses_reorder_the_sequences() -> None:
    async with toy_swarm(4) as toy:
        toy.add(0, 2), toy.add(2, 4)
        hidden = random_hidden(3, 6, 4)
        order = torch.tensor([2, 2, 0])
        async with open_session(toy.swarm, batch_size=3, max_length=8) as session:
            await session.step(hidden[:, :5])
            output = await session.step(hidden[:, 5:], hypo_ids=order)
        whole = torch.cat([hidden[order, :5], hidden[:, 5:]], dim=1)
        close(output, toy.reference(whole)[:, 5:])


async def test_rollback_overwrites_what_came_after() -> None:
    async with toy_swarm(4) as toy:
        toy.add(0, 2), toy.add(2, 4)
        hidden = random_hidden(1, 8, 4)
        async with open_session(toy.swarm, max_length=8) as session:
            await session.step(random_hidden(1, 7, 4, seed=5))
            session.rollback(0)
            await steps(session, hidden, 3, 2)
            await session.step(random_hidden(1, 2, 4, seed=6))
            session.rollback(5)
            close(await session.step(hidden[:, 5:]), toy.reference(hidden)[:, 5:])
            with pytest.raises(InvalidRequest, match="from position 8 back to 9"):
                session.rollback(9)
        assert [s.ended_in_order for s in toy.servers] == [1, 1]


async def test_rollback_on_a_release_that_ignores_positions_replays() -> None:
    async with toy_swarm(4) as toy:
        toy.add(0, 2, version="2.2.0.post1", heeds_position=False), toy.add(2, 4)
        hidden = random_hidden(1, 8, 4)
        async with open_session(toy.swarm, max_length=8) as session:
            await steps(session, hidden, 5)
            await session.step(random_hidden(1, 2, 4, seed=6))
            session.rollback(5)
            close(await session.step(hidden[:, 5:]), toy.reference(hidden)[:, 5:])
        assert toy.servers[0].tokens == [5, 2, 5, 3]


@pytest.mark.parametrize("compression", [CompressionType.FLOAT16, CompressionType.MEANSTD_16BIT])
async def test_requests_are_compressed_as_the_server_announces(compression) -> None:
    async with toy_swarm(4) as toy:
        toy.add(0, 2, compression=compression), toy.add(2, 4)
        hidden = random_hidden(1, 5, 4).bfloat16()
        prompts = random_hidden(4, 1, 2, 4, seed=1).bfloat16()
        async with open_session(toy.swarm, max_length=8) as session:
            output = await session.step(hidden, prompts=prompts)
        assert output.dtype == torch.bfloat16
        first, second = toy.servers[0].requests[0].tensors, toy.servers[1].requests[0].tensors
        assert [t.compression for t in first] == [compression, compression, CompressionType.NONE]
        assert [t.compression for t in second] == [CompressionType.NONE] * 3
        # these two cannot hold bfloat16
        assert [t.dtype for t in first] == ["float32", "float32", "int64"]
        assert [t.dtype for t in second] == ["bfloat16", "bfloat16", "int64"]
        assert [s.calls["info"] for s in toy.servers] == [1, 1]


# failures ---------------------------------------------------------------------------------------------------


async def two_replicas(toy: ToySwarm):
    """0:2 | 2:4 twice, the first of the two preferred."""
    return toy.add(0, 2), toy.add(2, 4, rps=1000.0), toy.add(2, 4, rps=100.0)


def fail_from(step: int, how):
    def hook(server, number, hidden):
        return how(hidden) if number >= step else None

    return hook


def refuse(hidden):
    raise Refusal("out of order today")


async def hang(hidden):
    await trio.sleep_forever()


@pytest.mark.parametrize(
    "how",
    [
        refuse,
        hang,
        lambda hidden: hidden[:, :, :2],
        lambda hidden: hidden[None],
        lambda hidden: hidden.long(),
    ],
    ids=["refuses", "hangs", "too narrow", "four dimensions", "integers"],
)
async def test_a_failing_server_is_replaced_and_the_text_goes_on(how, autojump_clock, caplog) -> None:
    async with toy_swarm(4) as toy:
        first, bad, good = await two_replicas(toy)
        bad.before_answer = fail_from(2, how)
        hidden = random_hidden(2, 8, 4)
        async with open_session(toy.swarm, batch_size=2, max_length=8) as session:
            close(await steps(session, hidden, 4, 1, 1, 1, 1), toy.reference(hidden))
            assert str(good.peer)[-6:] in session.chain[1]
        assert good.tokens == [5, 1, 1, 1]  # the five that the other one had, then the step itself
        assert first.tokens == [4, 1, 1, 1, 1]
        assert bad.sessions == 0


async def test_a_killed_server_is_replaced(autojump_clock) -> None:
    async with toy_swarm(4) as toy:
        _, bad, good = await two_replicas(toy)

        async def die(server, number, hidden):
            if number == 1:
                toy.kill(bad)
                raise Refusal("killed")

        bad.before_answer = die
        hidden = random_hidden(1, 6, 4)
        async with open_session(toy.swarm, max_length=8) as session:
            close(await steps(session, hidden, 3, 1, 1, 1), toy.reference(hidden))
        assert good.tokens == [3, 1, 1, 1]


async def test_one_span_is_replaced_by_two() -> None:
    async with toy_swarm(6) as toy:
        bad = toy.add(0, 6)
        toy.add(0, 2), toy.add(2, 6)
        bad.before_answer = fail_from(1, refuse)
        hidden = random_hidden(1, 7, 4)
        async with open_session(toy.swarm, max_length=8) as session:
            close(await steps(session, hidden, 5, 1, 1), toy.reference(hidden))
            assert len(session.chain) == 2


async def test_a_replacement_that_fails_while_catching_up_is_replaced(autojump_clock) -> None:
    async with toy_swarm(6) as toy:
        first = toy.add(0, 6, rps=1000.0)
        toy.add(0, 3, rps=900.0)
        also_bad, good = toy.add(3, 6, rps=900.0), toy.add(3, 6, rps=10.0)
        first.before_answer = fail_from(1, refuse)
        also_bad.before_answer = fail_from(0, refuse)
        hidden = random_hidden(1, 7, 4)
        async with open_session(toy.swarm, max_length=8) as session:
            close(await steps(session, hidden, 5, 1, 1), toy.reference(hidden))
        assert good.ended_in_order == 1
        assert [s.sessions for s in toy.servers] == [0, 0, 0, 0]


async def test_prompts_and_hypotheses_survive_a_replacement() -> None:
    async with toy_swarm(4) as toy:
        bad = toy.add(0, 4)
        toy.add(0, 1), toy.add(1, 4)
        bad.before_answer = fail_from(4, refuse)
        hidden, prompts = random_hidden(2, 9, 4), random_hidden(4, 2, 2, 4, seed=1)
        later = random_hidden(4, 2, 1, 4, seed=2)
        order = torch.tensor([1, 1])
        async with open_session(toy.swarm, batch_size=2, max_length=16) as session:
            await session.step(hidden[:, :3], prompts=prompts)
            await session.step(hidden[:, 3:4])
            await session.step(hidden[:, 4:6], prompts=later)
            await session.step(hidden[:, 6:7], hypo_ids=order)
            output = await session.step(hidden[:, 7:])
            assert len(session.chain) == 2
        # the same on a server that never fails
        bad.before_answer = None
        toy.swarm.note_success(Hop(bad.peer, range(1)))
        async with open_session(toy.swarm, batch_size=2, max_length=16) as session:
            await session.step(hidden[:, :3], prompts=prompts)
            await session.step(hidden[:, 3:4])
            await session.step(hidden[:, 4:6], prompts=later)
            await session.step(hidden[:, 6:7], hypo_ids=order)
            close(output, await session.step(hidden[:, 7:]))
            assert len(session.chain) == 1


async def test_a_step_with_hypotheses_may_fail_in_the_middle() -> None:
    async with toy_swarm(4) as toy:
        _, bad, _ = await two_replicas(toy)
        bad.before_answer = fail_from(1, refuse)
        hidden, order = random_hidden(2, 6, 4), torch.tensor([1, 0])
        async with open_session(toy.swarm, batch_size=2, max_length=8) as session:
            await session.step(hidden[:, :4])
            outputs = [await session.step(hidden[:, 4:5], hypo_ids=order)]
            outputs += [await session.step(hidden[:, 5:])]
        whole = torch.cat([hidden[order, :4], hidden[:, 4:]], dim=1)
        close(torch.cat(outputs, dim=1), toy.reference(whole)[:, 4:])


async def test_long_histories_are_replayed_in_pieces(monkeypatch) -> None:
    monkeypatch.setattr(defaults, "PREFILL_TOKENS", 8)
    async with toy_swarm(2) as toy:
        bad, good = toy.add(0, 2, rps=1000.0), toy.add(0, 2)
        bad.before_answer = fail_from(3, refuse)
        hidden = random_hidden(2, 16, 4)
        async with open_session(toy.swarm, batch_size=2, max_length=32) as session:
            close(await steps(session, hidden, 9, 1, 1, 1, 4), toy.reference(hidden))
        assert good.tokens == [4, 4, 3, 1, 4]


async def test_the_only_server_may_come_back(autojump_clock) -> None:
    async with toy_swarm(2) as toy:
        only = toy.add(0, 2)
        hidden = random_hidden(1, 5, 4)
        async with trio.open_nursery() as nursery, open_session(toy.swarm, max_length=8) as session:
            outputs = [await session.step(hidden[:, :4])]

            async def restart() -> None:
                await trio.sleep(10)
                toy.revive(only)

            def drop(server, step, hidden):
                toy.kill(only)
                only.before_answer = None
                raise Refusal("restarting")

            only.before_answer = drop
            nursery.start_soon(restart)
            outputs.append(await session.step(hidden[:, 4:]))
        close(torch.cat(outputs, dim=1), toy.reference(hidden))


async def test_giving_up_names_blocks_attempts_and_the_last_error(autojump_clock) -> None:
    async with toy_swarm(4) as toy:
        toy.add(0, 2)
        bad = toy.add(2, 4)
        bad.before_answer = fail_from(1, refuse)
        hidden = random_hidden(1, 5, 4)
        async with open_session(toy.swarm, max_length=8) as session:
            outputs = [await session.step(hidden[:, :4])]
            before = trio.current_time()
            # replaying the four tokens is step 0 of a new stream, and succeeds each time
            with pytest.raises(
                NoRoute,
                match=r"tiny-llama-hf: gave up on blocks 2:4 after 8 attempts, the last: .*out of order",
            ) as caught:
                await session.step(hidden[:, 4:])
            assert caught.value.blocks == (2, 3)
            assert trio.current_time() - before == pytest.approx(63)
            assert session.position == 4
            bad.before_answer = None
            outputs.append(await session.step(hidden[:, 4:]))
        close(torch.cat(outputs, dim=1), toy.reference(hidden))


async def test_a_server_that_left_the_records_is_waited_for(autojump_clock) -> None:
    async with toy_swarm(2) as toy:
        only = toy.add(0, 2)
        only.before_answer = fail_from(1, refuse)
        async with open_session(toy.swarm, max_length=8) as session:
            await session.step(random_hidden(1, 2, 4))
            toy.dht.withdraw(only.peer)
            with pytest.raises(
                NoRoute, match=r"after 8 attempts, the last: .*no server is online for blocks 0:2"
            ):
                await session.step(random_hidden(1, 1, 4))


async def test_no_route_at_the_start_is_said_at_once(autojump_clock) -> None:
    async with toy_swarm(4) as toy:
        toy.add(0, 2)
        before = trio.current_time()
        async with open_session(toy.swarm, max_length=8) as session:
            with pytest.raises(NoRoute, match="blocks 2:4"):
                await session.step(random_hidden(1, 1, 4))
        assert trio.current_time() == before


async def test_a_cancelled_step_may_be_repeated(autojump_clock) -> None:
    async with toy_swarm(4) as toy:
        first, second, third = toy.add(0, 2), toy.add(2, 3), toy.add(3, 4)
        hidden = random_hidden(2, 6, 4)
        order = torch.tensor([1, 0])
        second.before_answer = fail_from(1, hang)
        async with open_session(toy.swarm, batch_size=2, max_length=8) as session:
            outputs = [await session.step(hidden[:, :4])]
            for hypo_ids in (None, order):
                with trio.move_on_after(5) as scope:
                    await session.step(hidden[:, 4:5], hypo_ids=hypo_ids)
                assert scope.cancelled_caught
                await trio.testing.wait_all_tasks_blocked()
                assert second.sessions == 0
                assert first.sessions == (1 if hypo_ids is None else 0)
                assert third.sessions == 1
                assert session.position == 4
            second.before_answer = None
            outputs += [await session.step(hidden[:, 4:5]), await session.step(hidden[:, 5:])]
        close(torch.cat(outputs, dim=1), toy.reference(hidden))


async def test_leaving_by_an_error_frees_the_servers_at_once() -> None:
    async with toy_swarm(2) as toy:
        server = toy.add(0, 2)
        with pytest.raises(KeyError):  # noqa: PT012 - the block is what raises
            async with open_session(toy.swarm, max_length=8) as session:
                await session.step(random_hidden(1, 2, 4))
                raise KeyError
        await trio.testing.wait_all_tasks_blocked()
        assert server.sessions == 0
        assert server.ended_in_order == 0


async def test_closing_waits_for_the_server_but_not_for_ever(autojump_clock) -> None:
    async with toy_swarm(2) as toy:
        toy.add(0, 2)
        async with open_session(toy.swarm, max_length=8) as session:
            await session.step(random_hidden(1, 2, 4))
            part = session._parts[0]

            async def silent():
                await trio.sleep_forever()

            part._stream.receive = silent
            before = trio.current_time()
        assert trio.current_time() - before == pytest.approx(defaults.CLOSE_GRACE_SECONDS)


async def test_a_session_without_steps_contacts_nobody() -> None:
    async with toy_swarm(2) as toy:
        async with open_session(toy.swarm, max_length=8) as session:
            assert session.chain == []
        assert toy.dht.reads == 0


@pytest.mark.parametrize(
    ("shape", "prompts", "hypo_ids", "text"),
    [
        ((3, 1, 4), None, None, r"\[3, 1, 4\] are not \[2, tokens"),
        ((2, 4), None, None, "are not"),
        ((2, 9, 4), None, None, "prefix 0 \\+ current 9 exceeds pre-allocated maximum 8"),
        ((2, 3, 4), (3, 1, 2, 4), None, "deep prompts"),
        ((2, 3, 4), (4, 3, 2, 4), None, "deep prompts"),
        ((2, 3, 4), (4, 2, 4, 4), None, "deep prompts"),
        ((2, 3, 4), (4, 2, 3, 5), None, "deep prompts"),
        ((2, 3, 4), None, torch.tensor([0]), "int64"),
        ((2, 3, 4), None, torch.tensor([0.0, 1.0]), "int64"),
        ((2, 3, 4), None, torch.tensor([0, 2]), "0 to 1"),
    ],
)
async def test_what_does_not_fit_is_refused_before_it_is_sent(shape, prompts, hypo_ids, text) -> None:
    async with toy_swarm(4) as toy, open_session(toy.swarm, batch_size=2, max_length=8) as session:
        with pytest.raises(InvalidRequest, match=text):
            await session.step(
                torch.zeros(shape),
                prompts=None if prompts is None else torch.zeros(prompts),
                hypo_ids=hypo_ids,
            )


async def test_pushes_name_the_rest_of_the_chain() -> None:
    async with toy_swarm(6) as toy:
        toy.add(0, 2), toy.add(2, 4), toy.add(4, 6)
        async with open_session(toy.swarm, max_length=8, push=True) as session:
            for _ in range(3):
                await session.step(torch.zeros(1, 1, 4))
            await session.step(torch.zeros(1, 1, 4), hypo_ids=torch.tensor([0]))
            await session.step(torch.zeros(1, 1, 4))
        named = [[entries(r) for r in s.requests if r.tensors] for s in toy.servers]
        ids = [msgpack.unpack(s.requests[0].metadata)["session_id"] for s in toy.servers]
        second, third = (str(peer(2)), ids[1], 2, 4), (str(peer(3)), ids[2], 4, 6)
        assert named[0] == [(), (second, third), (second, third), (), ()]
        assert named[1] == [(), (third,), (third,), (), ()]
        assert named[2] == [()] * 5


def entries(request: ExpertRequest) -> tuple:
    return tuple(msgpack.unpack(request.metadata).get("next_servers", ()))
