"""The processes of a distributed job find each other, and end when one of them is lost.

They share the key-value store that the launcher tells them of by MASTER_ADDR and MASTER_PORT. torchrun keeps this store
when it restarts workers, with all that earlier ones have written, and its count of restarts differs from machine to
machine. So the processes agree on the id of a job through the store itself.
"""

import atexit
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import NoReturn
from uuid import uuid4

from torch.distributed import DistError, DistNetworkError, DistStoreError, PrefixStore, Store, TCPStore

POLL_SECONDS = 0.1
"""Between two looks at a key that another process will set."""

BEATS = 10
"""Signs of life that a process gives within the time after which it counts as lost, at least."""

MAX_INTERVAL = 5
"""Seconds between two signs of life, at most."""


class Peers:
    """This process among those that torchrun or accelerate started, on one or several machines.

    A thread gives signs of life as long as the process runs, and looks for those of the others while a job lasts. If
    there is none of one of them for `timeout`, or no answer from the store, it writes one line that names what is
    missing and ends the process with status 1. The main thread cannot do so, because it may be waiting for that peer.

    A peer that lives and makes no progress is not noticed.

    Args:
        timeout: seconds.

    Raises:
        ValueError: WORLD_SIZE is above 1, and MASTER_ADDR or MASTER_PORT is not set.
        ConnectionError: the store did not answer within `timeout`.
    """

    def __init__(self, timeout: float) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ["WORLD_SIZE"])
        self.timeout, self.interval = timeout, min(timeout / BEATS, MAX_INTERVAL)
        self.address, tcp_store = connect(self.rank, timeout)
        self.store = PrefixStore("tabom", tcp_store)
        self.expected: dict[int, float] = {}  # when each other process of the current job was last heard of
        self.answered = time.monotonic()  # when the store last answered
        self.job = ""  # until the processes have agreed on its id
        self.stopping = threading.Event()
        beating = PrefixStore("tabom", tcp_store.clone())  # a connection of its own: a blocked one blocks one thread
        self.threads = [
            threading.Thread(target=self.beat, args=(beating,), daemon=True, name="beat"),
            threading.Thread(target=self.watch, daemon=True, name="watch"),
        ]
        for thread in self.threads:
            thread.start()
        atexit.register(self.stop)

    @contextmanager
    def jobs_store(self) -> Iterator[Store]:
        """Joins the other processes for one job and yields its store, which is empty at first.

        Every process must join the same jobs in the same order. One that fails within the job does not leave it, so the
        others end, too. The first process leaves last, because it may serve the store.

        Raises:
            ConnectionError: the process that serves the store has ended.
        """
        try:
            self.expected = dict.fromkeys(set(range(self.size)) - {self.rank}, time.monotonic())
            self.job = self.agree()
            store = PrefixStore(self.job, self.store)
            yield store
            if self.rank == 0:
                wait_for(store, [f"left/{rank}" for rank in range(1, self.size)])
            self.expected = {}
            store.set(f"left/{self.rank}", "")
        except (DistNetworkError, DistStoreError) as error:  # not the errors of a process group
            raise ConnectionError(f"lost the store at {self.address}, which rank 0 serves: {error}") from error
        finally:
            self.expected, self.job = {}, ""

    def agree(self) -> str:
        """An id that all processes know and that no job had before.

        The first process draws it. It answers each that introduces itself, and goes on until all have confirmed the
        answer: what it reads at first may be the introduction of a process that lived before a restart.
        """
        if self.rank > 0:
            name = uuid4().hex
            self.store.set(f"here/{self.rank}", name)
            wait_for(self.store, [f"welcome/{name}"])
            job = self.store.get(f"welcome/{name}").decode()
            self.store.set(f"{job}/joined/{self.rank}", "")
            return job
        job, missing = uuid4().hex, list(range(1, self.size))
        while missing:
            for rank in missing:
                if self.store.check([f"here/{rank}"]):
                    self.store.set(f"welcome/{self.store.get(f'here/{rank}').decode()}", job)
            time.sleep(POLL_SECONDS)
            missing = [rank for rank in missing if not self.store.check([f"{job}/joined/{rank}"])]
        return job

    def beat(self, store: Store) -> None:
        """Gives signs of life, and ends the process if one that it expects has given none for too long."""
        counts: dict[int, int] = {}
        try:
            while not self.stopping.wait(self.interval):
                store.add(f"beats/{self.rank}", 1)
                expected, job, silent = self.expected, self.job, []
                for rank in list(expected):
                    count = store.add(f"beats/{rank}", 0)
                    if count != counts.get(rank):
                        counts[rank] = count
                        expected[rank] = time.monotonic()
                    elif seconds_since(expected[rank]) > self.timeout / 2:
                        if store.check([f"{job}/left/{rank}"]):
                            del expected[rank]
                        else:
                            silent.append(rank)
                self.answered = time.monotonic()
                if any(seconds_since(expected[rank]) > self.timeout for rank in silent):
                    ranks = f"rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))}"
                    self.end(f"no sign of life from {ranks} of {self.size} processes")
        except DistError:
            return  # `watch` finds that the store does not answer any more

    def watch(self) -> None:
        """Ends the process if the store does not answer while a job lasts."""
        while not self.stopping.wait(self.interval):
            if self.expected and seconds_since(self.answered) > self.timeout:
                self.end(f"no answer from {self.address}, the store on the machine of rank 0")

    def end(self, what: str) -> NoReturn:
        """Ends the process at once, whatever its main thread waits for."""
        print(
            f"tabom: error: {what} for {self.timeout:g} s (peer_timeout): ending; see whether that machine is up and "
            "reachable, and start the same command again",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def stop(self) -> None:
        """Stops the threads; one that is blocked ends with the process."""
        self.stopping.set()
        for thread in self.threads:
            thread.join(1)


peers = cache(Peers)
"""The `Peers` of this process; it has one connection for all its jobs."""


def connect(rank: int, timeout: float) -> tuple[str, TCPStore]:
    """The address of the store that all processes share, and a connection to it.

    The first process serves the store if the launcher does not.
    """
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ValueError(f"WORLD_SIZE={os.environ['WORLD_SIZE']} without {name}: start with torchrun or accelerate")
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = TCPStore(
            host,
            int(port),
            is_master=serves,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,  # a process group of the same process serves its store at this port, too
        )
    except DistError as error:
        raise ConnectionError(
            f"MASTER_ADDR={host}, MASTER_PORT={port}: rank 0 serves no store there that rank {rank} reaches within "
            f"{timeout:g} s (peer_timeout)"
        ) from error
    return f"{host}:{port}", store


def seconds_since(moment: float) -> float:
    """Seconds since a moment of the monotonic clock."""
    return time.monotonic() - moment


def wait_for(store: Store, keys: list[str]) -> None:
    """Blocks until all keys are set. `Peers` ends the process if one that has to set them is lost."""
    while not store.check(keys):
        time.sleep(POLL_SECONDS)
