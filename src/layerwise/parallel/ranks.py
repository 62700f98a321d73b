"""The ranks of a job: their agreement before they begin, and which of them failed."""

import contextlib
import datetime
import json
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from layerwise.errors import LayerwiseError, explained
from layerwise.parallel.rendezvous import (
    Job,
    NoAnswer,
    StoreClient,
    local_ranks,
    not_met,
    open_store,
    stay_local,
    within,
)

LANES = 4  # messages at a time from one rank to the next over gloo
REPORT = 10.0  # seconds, at most, to report a failure: the reporting rank has already waited for its limit
PARTING = 5.0  # seconds, at most, that the store stays for ranks that have not read why the ranks do not begin

Result = TypeVar("Result")


class Refused(LayerwiseError):
    """The ranks have agreed not to begin, or not to continue.

    Attributes:
        teller: the rank that explains the failure to the user; all of them if None.
    """

    def __init__(self, sentence: str, teller: int | None):
        super().__init__(sentence)
        self.teller = teller


class Ranks:
    """The processes of a job: the rank of this one, and the state of the others.

    Args:
        timeout: seconds after which a rank that does not answer counts as lost.
        device: of this rank.
        server: on rank 0, a socket that listens at the address of the store; created here if not given.

    Raises:
        LayerwiseError: not started by torchrun, or the ranks do not find one another within the limit.
        Refused: the ranks differ in their number, or in the versions of torch or layerwise.
    """

    def __init__(self, timeout: float, device: torch.device, server: socket.socket | None = None):
        self.job = Job.from_environment()
        self.rank, self.count = self.job.rank, self.job.count
        self.limit = datetime.timedelta(seconds=timeout)
        self.device = device
        self.agreed = self.meetings = 0
        self.blocks: list[str] = []
        """The blocks of each rank, for error sentences."""
        # torchrun keeps its store across restarts, with entries of earlier attempts.
        stored = dist.PrefixStore(  # pyright: ignore[reportPrivateImportUsage]
            f"attempt/{self.job.attempt}", open_store(self.job, timeout, server)
        )
        self.store = StoreClient(stored, timeout)
        self._greet()
        # NCCL refuses two ranks on one device; messages then pass through the host.
        nccl = device.type == "cuda" and dist.is_nccl_available() and local_ranks() <= torch.cuda.device_count()
        stay_local(self.job)

        def join() -> dist.ProcessGroup:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if nccl else "gloo",
                store=stored,
                rank=self.rank,
                world_size=self.count,
                timeout=self.limit,
            )
            group = dist.new_group(backend="gloo", timeout=self.limit)
            assert isinstance(group, dist.ProcessGroup)
            return group

        try:
            self.group = within(timeout + min(1.0, timeout), join)
            """Group for operations of all ranks on the host."""
        except (RuntimeError, ValueError) as reason:
            raise not_met(self.job, str(reason), timeout) from reason
        self.transfer_device = device if nccl else torch.device("cpu")
        self.lanes = 1 if nccl else LANES  # NCCL has no tags, and has its own streams

    def name(self, rank: int) -> str:
        """A rank in words."""
        return f"rank {rank} ({self.blocks[rank]})" if self.blocks else f"rank {rank}"

    # What the ranks agree on.

    def _greet(self) -> None:
        """Wait for all ranks, and compare the facts that a process group requires."""
        seconds = self.limit.total_seconds()
        facts = {
            "the number of ranks": self.count,
            "the version of torch": torch.__version__,
            "the version of layerwise": sys.modules["layerwise"].__version__,
        }
        who = f"process {os.getpid()} on {socket.gethostname()}"
        keys = [f"greeting/{rank}" for rank in range(self.count)]
        mine = json.dumps([who, facts])
        found: dict[int, Mapping[str, Any]] = {}

        def differ() -> str | None:
            for rank, key in enumerate(keys):
                if rank not in found and self.store.has(key):
                    found[rank] = parsed(self.store.get([key])[0], 2)[1]
            return difference({**found, self.rank: facts})

        try:
            other = parsed(self.store.set_once(keys[self.rank], mine), 2)[0]
            if other != who:
                raise LayerwiseError(
                    f"two processes are rank {self.rank} ({who}, and {other}); give each process its own RANK."
                )
            missing = self.store.wait(keys, seconds, unless=lambda: differ() is not None)
            if differ() is not None:
                # A rank that is slightly late is named, too.
                self.store.wait(keys, min(1.0, seconds))
                self._part("greeting", sorted(found))
                sentence = differ()
                assert sentence is not None
                raise Refused(sentence, teller=None)
        except NoAnswer as reason:
            raise not_met(self.job, "the store has not answered", seconds) from reason
        except RuntimeError as reason:
            raise not_met(self.job, str(reason), seconds) from reason
        if missing:
            names = ranks_in_words([int(key.rpartition("/")[2]) for key in missing])
            raise not_met(self.job, f"{names} did not come", seconds)

    def agree(
        self, error: str | None, facts: Mapping[str, Any] | None = None, word: Any = None, column: int = 0
    ) -> Any:
        """Continue only if all ranks do, with the same facts.

        Facts and words travel as JSON.

        Args:
            error: what is wrong here.
            facts: by name, what must be the same on all ranks of a column.
            word: a value that this rank sends to the others.
            column: number of the ranks that must agree with one another; all must if not given.

        Returns:
            The words of all ranks.

        Raises:
            Refused: on all ranks, with the error of the lowest rank that has one, or with what differs.
        """
        # Through the store, which outlives a rank that exits at once.
        self.agreed += 1
        step, seconds = f"agreed/{self.agreed}", self.limit.total_seconds()
        keys = [f"{step}/{rank}" for rank in range(self.count)]
        try:
            self.store.set(keys[self.rank], json.dumps([error, plain(facts or {}), word, column]))
            missing = self.store.wait(keys, seconds, unless=lambda: self.store.has("failure"))
            if missing:
                names = " and ".join(self.name(int(key.rpartition("/")[2])) for key in missing)
                verb = "was" if len(missing) == 1 else "were"
                sentence = f"{names} {verb} not ready within {seconds:g} s, so the run has not begun."
                raise LayerwiseError(self.announce(sentence))
            found = [parsed(text, 4) for text in self.store.get(keys)]
        except RuntimeError as reason:
            raise self.store_lost(str(reason)) from reason
        refused = next((Refused(why, rank) for rank, (why, *_) in enumerate(found) if why is not None), None)
        for number in dict.fromkeys(column for *_, column in found):
            members = {rank: facts for rank, (_, facts, _, column) in enumerate(found) if column == number}
            sentence = difference(members)
            if refused is None and sentence is not None:
                refused = Refused(sentence, teller=None)
        if refused is not None:
            with contextlib.suppress(RuntimeError):
                self._part(step, range(self.count))
            raise refused
        return [word for _, _, word, _ in found]

    def _part(self, step: str, ranks: Sequence[int]) -> None:
        """Before the ranks exit, the one that keeps the store waits until the others have read the reason."""
        self.store.set(f"{step}/read/{self.rank}", "yes")
        if self.job.keeps_store:
            self.store.wait([f"{step}/read/{rank}" for rank in ranks], min(PARTING, self.limit.total_seconds()))

    def collectively(self, work: Callable[[], Result]) -> Result:
        """Return the result of `work`, which makes groups of ranks; all ranks call it at the same time.

        Raises:
            LayerwiseError: a rank does not arrive.
        """
        try:
            return within(self.limit.total_seconds() + min(1.0, self.limit.total_seconds()), work)
        except RuntimeError as reason:
            raise self.store_lost(str(reason)) from reason

    # Who failed.

    def suspect(self, peer: int) -> int:
        """Which rank is at fault if a message to or from `peer` fails; a `Heartbeat` replaces this."""
        return peer

    @contextlib.contextmanager
    def watching(self, peer: int) -> Any:
        """A context in which a failed message to or from `peer` becomes one sentence."""
        try:
            yield
        except RuntimeError as reason:
            raise self.lost(peer, str(reason)) from reason

    @contextlib.contextmanager
    def together(self) -> Any:
        """A context in which all ranks do the same. The error names a rank that does not arrive, or hangs in it.

        It yields a function, to be called when this rank has done its own share.
        """
        self.meetings += 1
        number = self.meetings

        def mark(what: str) -> None:
            self.store.set(f"{what}/{number}/{self.rank}", "yes")

        try:
            mark("here")
            yield lambda: mark("done")
        except RuntimeError as reason:
            missing: list[int] = []
            store = self.store.limited(REPORT)
            with contextlib.suppress(RuntimeError):
                for what in ("here", "done"):
                    keys = [f"{what}/{number}/{rank}" for rank in range(self.count)]
                    missing = missing or [rank for rank, key in enumerate(keys) if not store.has(key)]
            others = [self.name(rank) for rank in missing or [0] if rank != self.rank]
            raise self._lost(" or ".join(others) or "a rank", str(reason)) from reason

    def lost(self, peer: int, reason: str) -> LayerwiseError:
        """The error about `peer`, or about another rank that `peer` waits for, or an error announced before."""
        return self.lost_rank(self.suspect(peer), reason)

    def lost_rank(self, rank: int, reason: str) -> LayerwiseError:
        """The error about a rank, or an error announced before about another rank."""
        return self._lost(self.name(rank), reason)

    def store_lost(self, reason: str) -> LayerwiseError:
        """The error about a failed store, which rank 0 or torchrun keeps."""
        if self.job.agent:
            return LayerwiseError(
                f"the store of the ranks, which torchrun keeps, has failed ({reason.splitlines()[0]}); start the run "
                "again, or continue it from its last checkpoint with --resume."
            )
        return LayerwiseError(self._about(self.name(0), reason))

    def _lost(self, who: str, reason: str) -> LayerwiseError:
        return LayerwiseError(self.announce(self._about(who, reason)))

    def _about(self, who: str, reason: str) -> str:
        if "timed out" in reason.lower():
            about = f"has not answered {self.name(self.rank)} for {self.limit.total_seconds():g} s"
        else:
            about = f"has ended, as {self.name(self.rank)} noticed"
        return f"{who} {about}; the run stops, and --resume continues it from its last checkpoint."

    def announce(self, sentence: str) -> str:
        """Announce to all ranks why the job ends; returns what was announced first."""
        try:
            return self.store.limited(REPORT).set_once("failure", sentence)
        except RuntimeError as reason:
            # Others may be waiting for the rank that keeps the store.
            return sentence if self.job.agent or self.rank == 0 else self._about(self.name(0), str(reason))

    def announced(self) -> bool:
        """Whether a rank has announced why the job ends."""
        return self.store.limited(REPORT).has("failure")


def difference(facts: Mapping[int, Mapping[str, Any]]) -> str | None:
    """The differences between the ranks, as a sentence; None if there are none.

    Args:
        facts: per rank, name to value.

    >>> difference({0: {"lr": 0.1}, 1: {"lr": 0.5}, 2: {"lr": 0.5}})
    'the ranks differ in lr (0.1 on rank 0, 0.5 on ranks 1 and 2); give all ranks the same command, data and versions.'
    """
    differing, of_some = [], []  # what only some ranks have follows from an earlier difference, such as the rule
    for name in dict.fromkeys(name for found in facts.values() for name in found):
        by_value: dict[str, list[int]] = {}
        for rank, found in sorted(facts.items()):
            text = json.dumps(found[name], sort_keys=True) if name in found else "none"
            by_value.setdefault(text, []).append(rank)
        if len(by_value) > 1:
            parts = [f"{shortened(text)} on {ranks_in_words(ranks)}" for text, ranks in by_value.items()]
            (of_some if "none" in by_value else differing).append(f"{name} ({', '.join(parts)})")
    differing += of_some
    if not differing:
        return None
    more = [f"{len(differing) - 4} more"] if len(differing) > 5 else []
    *first, last = [*differing[: 4 if more else 5], *more]
    what = f"{', '.join(first)} and {last}" if first else last
    return f"the ranks differ in {what}; give all ranks the same command, data and versions."


def parsed(text: str, items: int) -> list[Any]:
    """The list that a rank has stored as JSON, with this number of items.

    Raises:
        LayerwiseError: the text is not such a list.
    """
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text)
        if isinstance(found, list) and len(found) == items:
            return found
    raise LayerwiseError(
        "the store of the ranks holds a value that no rank has written; check that all processes belong to one job, "
        "and that nobody else reaches its port."
    )


def shortened(text: str, most: int = 60) -> str:
    """The text, without its middle if it is long."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def ranks_in_words(ranks: Sequence[int]) -> str:
    """Ranks in words.

    >>> ranks_in_words([1]), ranks_in_words([0, 2, 3])
    ('rank 1', 'ranks 0, 2 and 3')
    """
    *first, last = map(str, ranks)
    return f"ranks {', '.join(first)} and {last}" if first else f"rank {last}"


def plain(value: Any) -> Any:
    """Convert a value to plain JSON. Objects become their `repr`, without addresses in memory."""
    return json.loads(
        json.dumps(value, skipkeys=True, default=lambda other: re.sub(r" at 0x[0-9a-f]+", "", repr(other)))
    )


def guarded(ranks: Ranks, work: Callable[[], Any]) -> Any:
    """Do the work of a rank. If it fails, the other ranks are notified which rank failed, and why."""
    try:
        return work()
    except Refused:
        raise
    except Exception as error:
        ranks.announce(f"{ranks.name(ranks.rank)} has stopped: {explained(error)}")
        raise
