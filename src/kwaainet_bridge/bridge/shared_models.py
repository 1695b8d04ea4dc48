"""Models that several networks serve, each under its own name, seen as one. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from kwaainet_bridge.hivemind.client.block_choice import reason, suggest
from kwaainet_bridge.hivemind.client.survey import SurveyedModel, SwarmModel


@dataclass(frozen=True, slots=True)
class SharedModel:
    """One model, as each network sees it; in one network at least. All have the same number of blocks.

    ``not_reached`` are networks of which nobody could be asked: they may have the model, too.
    """

    by_network: Mapping[str, SurveyedModel]
    not_reached: Sequence[str] = ()

    @property
    def num_blocks(self) -> int:
        return next(iter(self.by_network.values())).model.num_blocks

    @property
    def unknown_in(self) -> tuple[str, ...]:
        """The networks of which it is not known who serves the model there."""
        unread = [network for network, seen in self.by_network.items() if seen.error]
        return (*unread, *self.not_reached)

    @property
    def _read(self) -> list[SurveyedModel]:
        return [seen for seen in self.by_network.values() if not seen.error]

    @property
    def networks_per_block(self) -> tuple[int, ...]:
        """For each block, in how many networks a server of it is online, as far as they are known."""
        servers = [seen.coverage.counts for seen in self._read] or [(0,) * self.num_blocks]
        return tuple(sum(map(bool, counts)) for counts in zip(*servers, strict=True))

    def held_in(self, networks: int) -> list[range]:
        """The runs of blocks that have a server in exactly so many networks, as long as they can be."""
        return [run for number, run in _runs(self.networks_per_block) if number == networks]

    def suggestion(self, blocks_that_fit: int | None = None) -> Suggestion | None:
        """What a node with room for so many blocks should serve, were it listed in all of these networks.

        Left out: a third of the model, rounded up. Networks that are not known count as empty, and the reason tells
        so; None if no network is known.
        """
        if not self._read:
            return None
        total = self.num_blocks
        size = min(blocks_that_fit or -(-total // 3), total)
        coverages = [seen.throughputs for seen in self._read]
        blocks = suggest(coverages, size, total)
        told = reason(coverages, blocks, total)
        if self.unknown_in:
            told += f"; not known: {', '.join(self.unknown_in)}"
        return Suggestion(blocks, told)


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Blocks that a node should serve, and why."""

    blocks: range
    reason: str


def _runs(values: Sequence[int]) -> Iterator[tuple[int, range]]:
    at = 0
    for value, run in groupby(values):
        end = at + len(list(run))
        yield value, range(at, end)
        at = end


def is_same(first: SwarmModel, second: SwarmModel) -> bool:
    """Whether two networks' names are of one model: as many blocks, and one repository or one name.

    The name is compared without what Petals adds to it (``-hf``, ``-petals``, an owner), and ``Meta-Llama-…``, what the
    hub once called Llama 3, is ``Llama-…``.
    """
    if first.num_blocks != second.num_blocks:
        return False
    pages = [_repository(model.repository) for model in (first, second)]
    return (pages[0] is not None and pages[0] == pages[1]) or _name(first.prefix) == _name(second.prefix)


def _repository(page: str | None) -> str | None:
    """The name on the hub, of a page or of a bare name; the hub does not tell capitals apart."""
    if not page or not page.strip("/"):
        return None
    return "/".join(page.rstrip("/").split("/")[-2:]).casefold()


def _name(prefix: str) -> str:
    name = prefix.rsplit("/", 1)[-1].casefold()
    name = name.removesuffix("-petals").removesuffix("-hf")
    return name.removeprefix("meta-") if name.startswith("meta-llama-") else name


def shared_models(
    networks: Mapping[str, Iterable[SurveyedModel]],
    *,
    known: Mapping[str, str] | None = None,
    not_reached: Sequence[str] = (),
) -> list[SharedModel]:
    """The models of all networks, those that are in several as one; in the order of the first network that has them.

    ``known`` is what one model is called in each network, where a configuration says so, ``not_reached`` are those of
    which nobody could be asked. A network's model joins the
    first that is the same and has none of this network yet, so that no model is counted twice.
    """
    found: list[dict[str, SurveyedModel]] = []
    for network, models in networks.items():
        for surveyed in models:
            place = next((group for group in found if _fits(group, network, surveyed, known or {})), None)
            if place is None:
                found.append({network: surveyed})
            else:
                place[network] = surveyed
    return [SharedModel(group, not_reached) for group in found]


def _fits(
    group: Mapping[str, SurveyedModel], network: str, surveyed: SurveyedModel, known: Mapping[str, str]
) -> bool:
    if network in group:
        return False
    if len(known) > 1:
        named = known.get(network) == surveyed.model.prefix
        joins_named = any(known.get(other) == seen.model.prefix for other, seen in group.items())
        if named or joins_named:
            blocks = {seen.model.num_blocks for seen in group.values()}
            return named and joins_named and blocks == {surveyed.model.num_blocks}
    return any(is_same(seen.model, surveyed.model) for seen in group.values())
