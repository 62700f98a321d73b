"""Simulates pipelines on other machines: when each rank computes and waits, from the seconds of the blocks."""

import heapq
import itertools
import math
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.distributed.pipelining.schedules import ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble

from layerwise.core.cost import balanced_ends
from layerwise.parallel.transport import DEPTH
from layerwise.scaling.options import PARTS, Interconnect

WAITS = {"gpipe": "phases", "1f1b": "turns", "zb1p": "steps", "zbv": "steps"}
"""Schedules, and when their ranks wait for sends, see `scheduled`."""
Action = tuple[str, int, int]
"""Kind, part of the network, micro-batch. The kinds are F (forward), B (backward), and the halves I and W of B."""


@dataclass(frozen=True)
class Op:
    """One operation of a rank."""

    name: Hashable
    seconds: float
    needs: tuple[Hashable, ...] = ()
    """Names of ops of other ranks that have to arrive here first; `("begun", name)` is the notice that an op has begun,
    `("sent", name)` the end of sending a result of this rank."""
    to: tuple[int, ...] = ()
    """Ranks that its result is sent to when it is done."""
    bytes: float = 0.0
    """Size of the result."""
    notifies: tuple[int, ...] = ()
    """Ranks that get a notice when it begins; the notice costs latency and no bandwidth."""
    asked: bool = False
    """Whether the result is sent only when it has been requested, as in gloo: the rank that needs it requests it when
    it reaches that op."""
    lane: int | None = None
    """Results of the same lane are sent one after another, each when it is known that the previous one has arrived."""
    trips: int = 1
    """Messages of which the result consists, each sent when it is known that the previous one has arrived."""


def simulate(
    programs: Sequence[Sequence[Op]],
    interconnect: Interconnect | None = None,
    speed: Callable[[int], float] | None = None,
) -> dict[Hashable, tuple[float, float]]:
    """Run the ranks' programs, each in its own order, as soon as the inputs of an op have arrived.

    Args:
        programs: per rank.
        interconnect: between ranks; sending takes no time if not given.
        speed: of each of `k` ranks that compute at the same moment, where 1 is a rank alone; always 1 if not given.

    Returns:
        Seconds at which every op begins and ends.

    Raises:
        ValueError: the programs wait for one another forever.

    >>> programs = [[Op("a", 2.0, to=(1,), bytes=3.0)], [Op("b", 1.0, needs=("a",))]]
    >>> simulate(programs, Interconnect(0.5, bandwidth=6.0))["b"]
    (3.0, 4.0)
    """
    interconnect, speed = interconnect or Interconnect(), speed or (lambda running: 1.0)
    home = {op.name: (rank, op) for rank, program in enumerate(programs) for op in program}
    arrived: list[set[Hashable]] = [set() for _ in programs]
    free: dict[Hashable, float] = {}
    begun: dict[Hashable, float] = {}
    spans: dict[Hashable, tuple[float, float]] = {}
    position, reached = [0] * len(programs), [-1] * len(programs)
    left: dict[int, float] = {}  # seconds of work of the ranks that compute now
    events: list[tuple[float, int, int, Hashable]] = []
    order, now = itertools.count(), 0.0
    idle = set(range(len(programs)))

    def later(seconds: float, rank: int, name: Hashable) -> None:
        heapq.heappush(events, (seconds, next(order), rank, name))

    def send(op: Op, rank: int, other: int) -> None:
        way = (rank, other)
        start = max(now, free.get(way, 0.0), free.get((way, op.lane), 0.0) if op.lane is not None else 0.0)
        free[way] = start + op.bytes / interconnect.bandwidth
        arrival = free[way] + (2 * op.trips - 1) * interconnect.latency
        free[way, op.lane] = arrival + interconnect.latency
        later(free[way], rank, ("sent", op.name))
        later(arrival, other, op.name)

    while True:
        for rank in sorted(idle):
            if position[rank] == len(programs[rank]):
                idle.discard(rank)
                continue
            op = programs[rank][position[rank]]
            if reached[rank] < position[rank]:
                reached[rank] = position[rank]
                for name in op.needs:
                    if name in home and home[name][1].asked:
                        later(now + interconnect.latency, home[name][0], ("asked", name))
            if arrived[rank].issuperset(op.needs):
                idle.discard(rank)
                left[rank], begun[op.name] = op.seconds, now
                for notified in op.notifies:
                    later(now + interconnect.latency, notified, ("begun", op.name))
        if not left and not events:
            break
        rate = speed(len(left)) if left else 1.0
        finish = now + min(left.values()) / rate if left else math.inf
        then = min(finish, events[0][0] if events else math.inf)
        done = [rank for rank, seconds in left.items() if now + seconds / rate <= then]
        left = {rank: seconds - (then - now) * rate for rank, seconds in left.items() if rank not in done}
        now = then
        for rank in done:
            op = programs[rank][position[rank]]
            spans[op.name] = begun[op.name], now
            position[rank] += 1
            idle.add(rank)
            if not op.asked or ("asked", op.name) in arrived[rank]:
                for other in op.to:
                    send(op, rank, other)
        while events and events[0][0] <= now:
            _, _, rank, name = heapq.heappop(events)
            arrived[rank].add(name)
            if isinstance(name, tuple) and name[0] == "asked" and name[1] in spans:
                for other in home[name[1]][1].to:
                    send(home[name[1]][1], rank, other)
    if idle:
        stuck = min(idle)
        raise ValueError(f"rank {stuck} waits for ever at {programs[stuck][position[stuck]].name}.")
    return spans


def forward_only(
    costs: Sequence[float], steps: int, size: float = 0.0, queue: int = 2 * DEPTH, lanes: int = DEPTH, trips: int = 3
) -> list[list[Op]]:
    """Our pipeline: rank r works on batch t as soon as it has it, and is at most `queue` finished batches ahead.

    start(r, t) = max(end(r, t - 1), arrival of (r - 1, t), notice that (r + 1, t - 1 - queue) has begun)

    Args:
        costs: seconds per batch of each rank.
        steps: batches.
        size: bytes per batch from each rank to the next.
        queue: batches that may wait between two ranks.
        lanes: that the batches take in turn.
        trips: messages per batch; usually whether the layout has changed, the activation, and the rule's message.
    """
    last = len(costs) - 1
    return [
        [
            Op(
                (rank, step),
                cost,
                needs=(
                    *([(rank - 1, step)] if rank > 0 else []),
                    *([("begun", (rank + 1, step - 1 - queue))] if rank < last and step > queue else []),
                ),
                to=(rank + 1,) if rank < last else (),
                bytes=size,
                notifies=(rank - 1,) if rank > 0 else (),
                lane=step % lanes,
                trips=trips,
            )
            for step in range(steps)
        ]
        for rank, cost in enumerate(costs)
    ]


def actions(schedule: str, ranks: int, micro_batches: int) -> list[list[Action]]:
    """The order in which every rank works, for one batch; the zero-bubble orders are torch's own.

    >>> actions("1f1b", 2, 2)
    [[('F', 0, 0), ('F', 0, 1), ('B', 0, 0), ('B', 0, 1)], [('F', 1, 0), ('B', 1, 0), ('F', 1, 1), ('B', 1, 1)]]
    """
    if schedule in ("zb1p", "zbv"):
        per = PARTS[schedule]
        kind = ScheduleInterleavedZeroBubble if schedule == "zb1p" else ScheduleZBVZeroBubble
        # The order depends on these attributes alone; a real stage would need a process group.
        stages: list[Any] = [
            SimpleNamespace(
                group_size=ranks,
                group_rank=0,
                num_stages=per * ranks,
                stage_index=part,
                submod=nn.Identity(),
                has_backward=True,
                is_first=part == 0,
                is_last=False,
            )
            for part in range(per)
        ]
        found = kind(stages, micro_batches, loss_fn=lambda output, target: output).pipeline_order
        return [
            [(a.computation_type.value, a.stage_index, a.microbatch_index) for a in found[rank] if a is not None]  # pyright: ignore[reportReturnType]
            for rank in range(ranks)
        ]
    lists = []
    for rank in range(ranks):
        ahead = micro_batches if schedule == "gpipe" else min(micro_batches, ranks - rank)
        order = [("F", rank, i) for i in range(ahead)]
        for i in range(micro_batches):
            order.append(("B", rank, i))
            if i + ahead < micro_batches:
                order.append(("F", rank, i + ahead))
        lists.append(order)
    return lists


def scheduled(
    orders: Sequence[Sequence[Action]],
    costs: Sequence[Mapping[str, float]],
    steps: int,
    size: float = 0.0,
    wait: str = "steps",
) -> list[list[Op]]:
    """Programs of a backpropagation pipeline; every batch ends with the optimizer's step.

    Args:
        orders: of `actions`.
        costs: per part of the network, seconds of `F`, `B`, `I`, `W` for one micro-batch, and `optimizer`.
        steps: batches.
        size: bytes of one micro-batch at a boundary, forward or backward.
        wait: when a rank waits until its sends are done: at the end of `steps`, of `phases` (forward and backward), or
            of `turns`, which means before every next operation, except between two forwards in a row.
    """
    home = {part: rank for rank, order in enumerate(orders) for _, part, _ in order}
    last = max(home)
    programs: list[list[Op]] = []
    for rank, order in enumerate(orders):
        program: list[Op] = []
        sending: list[Hashable] = []
        for step in range(steps):
            before = ""
            for kind, part, micro in order:
                seen = "B" if kind == "I" else kind
                below, above = {"F": (part - 1, part + 1), "B": (part + 1, part - 1)}.get(seen, (-1, -1))
                needs: list[Hashable] = []
                if 0 <= below <= last and home[below] != rank:
                    needs.append((seen, below, micro, step))
                if (wait == "turns" and (before, seen) != ("F", "F")) or (
                    wait == "phases" and (before, seen) == ("F", "B")
                ):
                    needs += sending
                    sending = []
                name = (seen, part, micro, step)
                to = (home[above],) if 0 <= above <= last and home[above] != rank else ()
                program.append(Op(name, costs[part][kind], tuple(needs), to, size, asked=True))
                if to:
                    sending.append(("sent", name))
                before = seen
            own = sum(costs[part]["optimizer"] for part in sorted({part for _, part, _ in order}))
            program.append(Op(("optimizer", rank, 0, step), own, tuple(sending)))
            sending = []
        programs.append(program)
    return programs


def period(spans: Mapping[Hashable, tuple[float, float]], finals: Sequence[Hashable], skip: int) -> float:
    """Seconds per batch in the steady state: from the end of final op `skip - 1` to that of the last one."""
    ends = [spans[name][1] for name in finals]
    return (ends[-1] - ends[skip - 1]) / (len(ends) - skip)


def grown(row: Sequence[Any], blocks: int) -> list[Any]:
    """Figures per block and head of a network with this number of blocks; inner ones equal the median inner one.

    >>> grown([5, 1, 2, 3, 7], 2)
    [5, 2, 7]
    """
    return [row[0], *[statistics.median(row[1:-1] or row[:1])] * (blocks - 1), row[-1]]


@dataclass(frozen=True)
class Costs:
    """Seconds of every block and the head, as `layerwise bench scaling` measures them in one process.

    Attributes:
        rule: one update of our rule, whole batch.
        forward: of backpropagation, one micro-batch.
        backward: the same; `input` is the part of it for the input.
        optimizer: one step of it.
    """

    rule: Sequence[float]
    forward: Sequence[float]
    backward: Sequence[float]
    input: Sequence[float]
    optimizer: Sequence[float]
    micro_batches: int
    """The number of parts into which a batch was cut when this was measured."""

    def grown(self, blocks: int) -> "Costs":
        """A network with this number of blocks, whose inner ones cost as much as the median inner one."""
        names = ("rule", "forward", "backward", "input", "optimizer")
        return replace(self, **{name: grown(getattr(self, name), blocks) for name in names})

    def backprop(self) -> float:
        """Seconds of one batch of backpropagation in one process."""
        return self.micro_batches * (sum(self.forward) + sum(self.backward)) + sum(self.optimizer)

    def parts(self, operations: Sequence[int], number: int, micro_batches: int) -> list[dict[str, float]]:
        """The input of `scheduled` for `number` parts of the network; micro-batches cost in proportion to size."""
        scale = self.micro_batches / micro_batches
        found = []
        for start, end in itertools.pairwise([0, *balanced_ends(operations, number)]):
            forward, backward = sum(self.forward[start:end]), sum(self.backward[start:end])
            inner = min(sum(self.input[start:end]), backward)
            found.append(
                {
                    "F": scale * forward,
                    "B": scale * backward,
                    "I": scale * inner,
                    "W": scale * (backward - inner),
                    "optimizer": sum(self.optimizer[start:end]),
                }
            )
        return found


def predicted(
    schedule: str,
    ranks: int,
    costs: Costs,
    operations: Sequence[int],
    size: float,
    micro_batches: int,
    interconnect: Interconnect | None = None,
    speed: Callable[[int], float] | None = None,
) -> float:
    """Seconds per batch in the steady state.

    Args:
        schedule: `pipeline`, `gpipe`, `1f1b`, `zb1p` or `zbv`.
        ranks: how many.
        costs: of the blocks.
        operations: by which the network is cut, per block and head.
        size: bytes of a batch at a boundary.
        micro_batches: per batch, for the schedules of backpropagation.
        interconnect: between ranks.
        speed: see `simulate`.
    """
    if schedule == "pipeline":
        skip = 2 * (ranks + 2 * DEPTH)
        counted = skip + 24
        # If ranks slow one another down, none may idle at the end.
        ahead = 0 if speed is None else (ranks - 1) * (2 * DEPTH + 1)
        bounds = itertools.pairwise([0, *balanced_ends(operations, ranks)])
        own = [sum(costs.rule[start:end]) for start, end in bounds]
        spans = simulate(forward_only(own, counted + ahead, size), interconnect, speed)
        return period(spans, [(ranks - 1, step) for step in range(counted)], skip)
    skip, steps = 1, 4
    orders = actions(schedule, ranks, micro_batches)
    parts = costs.parts(operations, PARTS[schedule] * ranks, micro_batches)
    spans = simulate(scheduled(orders, parts, steps, size / micro_batches, WAITS[schedule]), interconnect, speed)
    ends = [max(spans["optimizer", rank, 0, step][1] for rank in range(ranks)) for step in range(steps)]
    return (ends[-1] - ends[skip - 1]) / (steps - skip)
