"""Finds races: two threads touch the same memory, one of them writes, and nothing puts them in order.

Between two barriers of a CTA (an epoch) its warps run in any order, between two barriers of a warp (a warp epoch) its
threads do, and CTAs always do.
"""

from typing import NamedTuple

import numpy as np

LANES, WARPS, CTAS = 1, 2, 3
"""How far apart the readers of a place are: in one warp, in several of a CTA, in several CTAs."""


class Threads(NamedTuple):
    """Of each access: the thread, counted over all CTAs of the launch, and its epochs."""

    thread: np.ndarray
    epoch: np.ndarray
    warp_epoch: np.ndarray

    def repeat(self, times: int) -> "Threads":
        """The threads of accesses that touch so many places each."""
        return Threads(*(np.repeat(numbers, times) for numbers in self))


class Record:
    """The last access to each place, and how far apart the threads of the last epoch are that made one."""

    def __init__(self, places: int):
        self.thread = np.full(places, -1, np.int32)
        self.epoch = np.zeros(places, np.int32)
        self.warp_epoch = np.zeros(places, np.int32)
        self.spread = np.zeros(places, np.uint8)

    def conflict(
        self, place: np.ndarray, by: Threads, cta_threads: int, matters: np.ndarray | bool = True
    ) -> tuple[str, int] | None:
        """What kind of threads made the recorded accesses without order to these, and the index of the first."""
        past, spread = self.thread[place], self.spread[place]
        known = (past >= 0) & matters
        if not known.any():
            return None
        same_cta = past // cta_threads == by.thread // cta_threads
        same_warp = past // 32 == by.thread // 32
        now = known & same_cta & (self.epoch[place] == by.epoch)
        now_in_warp = now & same_warp & (self.warp_epoch[place] == by.warp_epoch)
        for name, found in (
            ("between CTAs", known & (~same_cta | (spread == CTAS))),
            ("between warps", now & (~same_warp | (spread >= WARPS))),
            ("within a warp", now_in_warp & ((past != by.thread) | (spread >= LANES))),
        ):
            if found.any():
                return name, int(np.flatnonzero(found)[0])
        return None

    def note(self, place: np.ndarray, by: Threads, cta_threads: int) -> np.ndarray:
        """Records accesses, and returns which of them were to a place that another thread touched in the same step."""
        past, spread = self.thread[place], self.spread[place]
        same_cta = past // cta_threads == by.thread // cta_threads
        same_epoch = same_cta & (self.epoch[place] == by.epoch)
        same_warp_epoch = same_epoch & (past // 32 == by.thread // 32) & (self.warp_epoch[place] == by.warp_epoch)
        counts = [np.zeros(len(place), bool), same_warp_epoch, same_epoch, past >= 0]  # by level
        apart = distance(past, by.thread, cta_threads)
        self.spread[place] = np.maximum(spread * np.choose(spread, counts), apart * np.choose(apart, counts))
        self.thread[place], self.epoch[place], self.warp_epoch[place] = by
        last = self.thread[place]
        shared = last != by.thread
        if shared.any():
            apart = distance(last, by.thread, cta_threads)
            for level in (LANES, WARPS, CTAS):  # a place that several levels reach keeps the highest
                reached = place[apart == level]
                self.spread[reached] = np.maximum(self.spread[reached], level)
        return shared


def distance(one: np.ndarray, other: np.ndarray, cta_threads: int) -> np.ndarray:
    """0 for the same thread, else the level of what both are in."""
    levels = np.where(one // 32 == other // 32, LANES, WARPS)
    levels = np.where(one // cta_threads == other // cta_threads, levels, CTAS)
    return np.where(one == other, 0, levels).astype(np.uint8)


class RaceDetector:
    """The reads and writes of one memory.

    A memory that nothing writes has no races, so reads are only kept until the first write.
    """

    def __init__(self, places: int, cta_threads: int):
        self.places, self.cta_threads = places, cta_threads
        self.waiting: list[tuple[np.ndarray, Threads]] = []
        self.reads: Record | None = None
        self.writes: Record | None = None

    def read(self, place: np.ndarray, by: Threads) -> tuple[str, int] | None:
        """Records reads, and returns the first race with a write."""
        if self.writes is None:
            self.waiting.append((place, by))
            return None
        self.reads.note(place, by, self.cta_threads)
        return found("write-read", self.writes.conflict(place, by, self.cta_threads))

    def write(self, place: np.ndarray, by: Threads, is_change: np.ndarray) -> tuple[tuple[str, int] | None, np.ndarray]:
        """Records writes, and returns the first race and which of the writes others make in the same step.

        Warps that compute the same store it several times: a write of what is there already races with no other write.
        """
        if self.writes is None:
            self.reads, self.writes = Record(self.places), Record(self.places)
            for waiting in self.waiting:
                self.reads.note(*waiting, self.cta_threads)
            self.waiting.clear()
        race = found("write-write", self.writes.conflict(place, by, self.cta_threads, is_change))
        race = race or found("read-write", self.reads.conflict(place, by, self.cta_threads))
        return race, self.writes.note(place, by, self.cta_threads)


def found(kind: str, conflict: tuple[str, int] | None) -> tuple[str, int] | None:
    """A conflict with its full name."""
    return conflict and (f"{kind} race {conflict[0]}", conflict[1])
