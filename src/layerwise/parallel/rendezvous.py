"""How the processes of a job find one another: ranks, key-value store, a time limit for every call on it."""

import contextlib
import datetime
import errno
import ipaddress
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch.distributed import Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from layerwise.errors import LayerwiseError, short, why
from layerwise.parsing import environment_number

MOST_RANKS = 2**16
"""Largest number of ranks: each asks the store for all others."""
Result = TypeVar("Result")


class NoAnswer(RuntimeError):
    """A call has not returned within its limit. The thread that made it may never end."""


def within(seconds: float, work: Callable[[], Result]) -> Result:
    """Run `work` with a time limit in seconds.

    torch's store waits on its socket without a limit: if the process at the other end is stopped, or is not a store, a
    call never returns. So the call is made in its own thread, which is abandoned when the time is over.

    Raises:
        NoAnswer: the time is over.
    """
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def call() -> None:
        try:
            answers.put((work(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=call, daemon=True, name="bounded call").start()
    try:
        result, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise NoAnswer(f"timed out after {seconds:g} s") from None
    if error is not None:
        raise error
    return result


class StoreClient:
    """The key-value store of a job, whose values are text. Every call returns within a limit.

    Args:
        store: torch's client.
        seconds: the limit of a call.
        silent: set when a call has reached the limit; a new event if not given.

    Every method raises `NoAnswer` when the limit is over, at once if an earlier call has reached it, and another
    RuntimeError if the store is gone.
    """

    def __init__(self, store: Store, seconds: float, silent: threading.Event | None = None):
        self.store, self.seconds = store, seconds
        self._silent = silent or threading.Event()

    def _call(self, name: str, *arguments: Any) -> Any:
        if self._silent.is_set():
            raise NoAnswer("timed out before")
        try:
            return within(self.seconds, lambda: getattr(self.store, name)(*arguments))
        except NoAnswer:
            self._silent.set()
            raise

    def limited(self, seconds: float) -> "StoreClient":
        """The same client with a shorter limit, for callers that have waited already."""
        return StoreClient(self.store, min(seconds, self.seconds), self._silent)

    def clone(self) -> "StoreClient":
        """A client with its own connection, because a connection serves one call at a time."""
        return StoreClient(self._call("clone"), self.seconds)

    def set(self, key: str, text: str) -> None:
        """Store a text."""
        self._call("set", key, text)

    def set_once(self, key: str, text: str) -> str:
        """Store a text unless there is one; return the stored text."""
        return self._call("compare_set", key, "", text).decode(errors="replace")

    def has(self, key: str) -> bool:
        """Whether a text is stored."""
        return self._call("check", [key])

    def get(self, keys: Sequence[str]) -> list[str]:
        """The stored texts."""
        return [value.decode(errors="replace") for value in self._call("multi_get", list(keys))] if keys else []

    def wait(self, keys: Sequence[str], seconds: float, unless: Callable[[], bool] = lambda: False) -> list[str]:
        """Wait until texts are stored.

        Args:
            keys: of the texts.
            seconds: to wait at most.
            unless: ends the wait when it returns True.

        Returns:
            The keys that are still missing.
        """
        # Polling: a wait inside the store would block every other call on this connection.
        end, pause = time.monotonic() + seconds, 0.001
        missing = [key for key in keys if not self.has(key)]
        while missing and time.monotonic() < end and not unless():
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
            missing = [key for key in missing if not self.has(key)]
        return missing


@dataclass(frozen=True)
class Job:
    """The job and the rank of this process, from its launcher's environment variables."""

    rank: int
    count: int
    address: str
    port: int
    agent: bool
    """Whether torchrun's own process keeps the store; otherwise rank 0 does."""
    attempt: int
    """Number of restarts by torchrun."""

    @classmethod
    def from_environment(cls) -> "Job":
        """The job of this process.

        Raises:
            LayerwiseError: not started by torchrun, or a variable has an invalid value.
        """
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise LayerwiseError(
                    "--parallel needs several processes; start it with torchrun --nproc-per-node N -m layerwise train "
                    "--parallel ..."
                )
        rank, count, port = (environment_number(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        if not 0 <= rank < count:
            raise LayerwiseError(
                f"RANK is {rank} and WORLD_SIZE is {count}; number the processes from 0 to WORLD_SIZE - 1."
            )
        if count > MOST_RANKS:
            raise LayerwiseError(f"WORLD_SIZE is {short(count)}; the most is {MOST_RANKS}.")
        if not 1 <= port < 2**16:
            raise LayerwiseError(f"MASTER_PORT is {port}; give a port from 1 to 65535.")
        return cls(
            rank,
            count,
            os.environ["MASTER_ADDR"],
            port,
            os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            environment_number("TORCHELASTIC_RESTART_COUNT"),
        )

    @property
    def keeps_store(self) -> bool:
        """Whether the store is in this process."""
        return self.rank == 0 and not self.agent

    @property
    def place(self) -> str:
        """Address and port of the store."""
        return f"port {self.port} of {self.address}"

    @property
    def is_local(self) -> bool:
        """Whether all ranks are on this machine, as far as is known."""
        if "LOCAL_WORLD_SIZE" in os.environ:
            return local_ranks() == self.count
        with contextlib.suppress(OSError, ValueError):
            return ipaddress.ip_address(socket.gethostbyname(self.address)).is_loopback
        return False


def listen(address: str, port: int) -> socket.socket:
    """A socket that listens at this address alone; torch's own store listens at every address of the machine.

    Args:
        address: of this machine, or a name of it.
        port: 0 for one that is free.

    Raises:
        LayerwiseError: the address is not of this machine, or the port is in use.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        server = socket.socket(family, socket.SOCK_STREAM)
        try:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(place)
            server.listen(4096)
        except OSError:
            server.close()
            raise
    except OSError as reason:
        if reason.errno == errno.EADDRINUSE:
            raise LayerwiseError(
                f"port {port} of {address} is in use, so the ranks cannot meet there; choose another one (torchrun "
                "--master-port)."
            ) from reason
        raise LayerwiseError(
            f"rank 0 cannot listen at port {port} of {address} ({reason.strerror}); give an address of its own machine "
            "(MASTER_ADDR, torchrun --master-addr)."
        ) from reason
    return server


def open_store(job: Job, seconds: float, server: socket.socket | None = None) -> TCPStore:
    """The store of a job; rank 0 creates it, unless torchrun's own process keeps it.

    Args:
        job: of this process.
        seconds: after which a store that does not answer counts as lost.
        server: a socket that listens at its address; created here if not given.

    Raises:
        LayerwiseError: the ranks do not find one another.
    """
    handle = (server or listen(job.address, job.port)).detach() if job.keeps_store else None

    def connect() -> TCPStore:
        limit = datetime.timedelta(seconds=seconds)
        options: Any = {"is_master": job.keeps_store, "timeout": limit, "wait_for_workers": False}
        return TCPStore(job.address, job.port, None, **options, master_listen_fd=handle)

    try:
        return within(seconds + min(1.0, seconds), connect)  # torch's own message says more, if its limit works
    except NoAnswer as reason:
        if (failure := _no_connection(job)) is not None:
            raise not_met(job, failure, seconds) from reason
        raise LayerwiseError(
            f"a program listens at {job.place}, but it has not answered rank {job.rank} within {seconds:g} s, as the "
            "store of the ranks would; choose another port (torchrun --master-port)."
        ) from reason
    except (RuntimeError, ValueError) as reason:
        raise not_met(job, str(reason), seconds) from reason


def _no_connection(job: Job) -> str | None:
    """Why nothing can be reached at the address of the store; None if something listens there."""
    try:
        within(2.0, lambda: socket.create_connection((job.address, job.port), timeout=1.0).close())
    except (OSError, ValueError, NoAnswer) as reason:  # ValueError: a name that no host can have
        return why(reason)
    return None


def not_met(job: Job, reason: str, seconds: float) -> LayerwiseError:
    """The error if the ranks have not met."""
    return LayerwiseError(
        f"the ranks did not find one another within {seconds:g} s ({reason.splitlines()[0]}); check that all of them "
        f"were started and that {job.place} can be reached."
    )


def stay_local(job: Job) -> None:
    """Make gloo's sockets listen at the loopback address if all ranks are on this machine."""
    if job.is_local:
        loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
        if loopback:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])


def local_ranks() -> int:
    """Ranks on this machine."""
    return environment_number("LOCAL_WORLD_SIZE", environment_number("WORLD_SIZE", 1))
