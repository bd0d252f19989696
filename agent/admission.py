"""Who may wait for a busy engine, and who is told to come again: a queue bounded by count, by time and by share.

Knows nothing of requests, sockets or clocks. A request that needs no queue is never asked about, and neither are
health, metadata and statistics: they are answered however long the queue is.

    waiting                     judged
    nothing                     admitted: nobody is in its way
    `limit` requests            over_share if the client has more than its share of them, else full
    nearly `limit`              over_share if the client has its share already: the last places are for the others
    longer than its deadline    late: it would be given up before its turn, or in the middle of its run
    else                        admitted

A client's share is `limit` divided by the clients that wait, so one client alone has the whole queue. Admitting what
cannot be answered in time costs those behind it their answers: under twice the load a device can bear, the requests
that are served are served in time, and the others hear at once when to ask again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

RESERVED = 0.25  # of the places: for clients that have less than their share of them
SMOOTHING = 0.2  # weight of the newest service time in the running mean
MIN_RETRY_S, MAX_RETRY_S = 1, 60  # of Retry-After, which counts whole seconds


class Judgement(StrEnum):
    ADMITTED = "admitted"
    FULL = "full"  # the device has as much to do as it may have
    LATE = "late"  # it would not be answered in time
    OVER_SHARE = "over_share"  # others are to have a place too


@dataclass(frozen=True, slots=True)
class Load:
    """What waits or runs when somebody asks. `clients`: different ones, the asking one among them.

    `mine`: requests of the asking client. `service_us`: typical time of one request once it is its turn.
    """

    waiting: int
    mine: int
    clients: int
    service_us: float

    @property
    def wait_us(self) -> float:
        """When it would be one more request's turn."""
        return self.waiting * self.service_us


def judge(load: Load, *, limit: int, deadline_us: float) -> Judgement:
    """Whether one more request may wait; `limit`: the most that may, `deadline_us`: when its answer is due."""
    if not load.waiting:
        return Judgement.ADMITTED
    share = limit / load.clients
    if load.waiting >= limit:
        return Judgement.OVER_SHARE if load.mine > share else Judgement.FULL
    if load.waiting >= limit * (1 - RESERVED) and load.clients > 1 and load.mine >= share:
        return Judgement.OVER_SHARE
    if load.wait_us + load.service_us > deadline_us:
        return Judgement.LATE
    return Judgement.ADMITTED


def retry_after_s(load: Load) -> int:
    """When what waits now is done, for a Retry-After header."""
    return min(max(math.ceil(load.wait_us / 1e6), MIN_RETRY_S), MAX_RETRY_S)


class Admission:
    """The queue of one service by numbers: how many wait, whose they are, how long one takes. One thread's.

    Bounded by its limit: a client is known as long as it has something here.
    """

    def __init__(self, limit: int, service_us: float) -> None:
        """`service_us`: what one request is expected to take before any was seen."""
        self.limit = limit
        self.waiting = 0
        self.service_us = service_us
        self.refused = dict.fromkeys(Judgement, 0)
        self._by_client: dict[str, int] = {}

    def load(self, client: str) -> Load:
        """As `client` finds it."""
        mine = self._by_client.get(client, 0)
        return Load(self.waiting, mine, len(self._by_client) + (not mine), self.service_us)

    def ask(self, client: str, deadline_us: float) -> Judgement:
        """Whether `client` may `enter` with one more request; refusals are counted."""
        judgement = judge(self.load(client), limit=self.limit, deadline_us=deadline_us)
        if judgement is not Judgement.ADMITTED:
            self.refused[judgement] += 1
        return judgement

    def enter(self, client: str) -> None:
        self.waiting += 1
        self._by_client[client] = self._by_client.get(client, 0) + 1

    def leave(self, client: str, service_us: float | None = None) -> None:
        """It has its answer. `service_us`: from its turn to its answer; None = it tells nothing about the others."""
        self.waiting -= 1
        left = self._by_client[client] - 1
        if left:
            self._by_client[client] = left
        else:
            del self._by_client[client]
        if service_us is not None:
            self.service_us += SMOOTHING * (service_us - self.service_us)

    def statistics(self) -> dict[str, float]:
        """Flat numbers: what waits, whose, and what was refused why."""
        refused = {f"refused_{why}": float(n) for why, n in self.refused.items() if why is not Judgement.ADMITTED}
        return {"waiting": self.waiting, "waiting_clients": len(self._by_client), **refused}
