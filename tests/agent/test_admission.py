"""Who may wait: the table, and the arithmetic of a queue that is entered and left."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.admission import MAX_RETRY_S, Admission, Judgement, Load, judge, retry_after_s

ADMITTED, FULL, LATE, OVER = Judgement.ADMITTED, Judgement.FULL, Judgement.LATE, Judgement.OVER_SHARE


@pytest.mark.parametrize(
    ("waiting", "mine", "clients", "service_us", "deadline_us", "expected"),
    [
        # nobody waits: admitted however slow the engine is, failing over is faster than refusing
        (0, 0, 1, 9e9, 1.0, ADMITTED),
        # one client alone has the whole queue, and a full one is the device's business
        (7, 7, 1, 0.0, 1e6, ADMITTED),
        (8, 8, 1, 0.0, 1e6, FULL),
        # a full queue: who has more than a share hears so, who has not hears that the device is full
        (8, 5, 2, 0.0, 1e6, OVER),
        (8, 4, 2, 0.0, 1e6, FULL),
        (8, 0, 3, 0.0, 1e6, FULL),
        # the last quarter of the places is not for those that have their share already
        (5, 5, 2, 0.0, 1e6, ADMITTED),
        (6, 4, 2, 0.0, 1e6, OVER),
        (6, 3, 2, 0.0, 1e6, ADMITTED),
        (6, 0, 2, 0.0, 1e6, ADMITTED),
        (7, 0, 2, 0.0, 1e6, ADMITTED),
        # the wait and its own run must fit the deadline
        (4, 4, 1, 100.0, 500.0, ADMITTED),
        (4, 4, 1, 100.0, 499.0, LATE),
        (1, 0, 2, 100.0, 199.0, LATE),
    ],
)
def test_the_table(
    waiting: int, mine: int, clients: int, service_us: float, deadline_us: float, expected: Judgement
) -> None:
    load = Load(waiting, mine, clients, service_us)
    assert judge(load, limit=8, deadline_us=deadline_us) is expected


@pytest.mark.parametrize(
    ("waiting", "service_us", "seconds"),
    [(0, 5e6, 1), (3, 100.0, 1), (10, 150_000.0, 2), (64, 1e6, MAX_RETRY_S)],
)
def test_a_client_is_told_to_come_back_when_what_waits_is_done(waiting: int, service_us: float, seconds: int) -> None:
    assert retry_after_s(Load(waiting, 0, 1, service_us)) == seconds


def test_a_client_that_floods_leaves_places_for_another() -> None:
    queue = Admission(8, 0.0)

    def flood(client: str) -> int:
        for n in range(20):
            if queue.ask(client, 1e6) is not ADMITTED:
                return n
            queue.enter(client)
        return 20

    assert flood("a") == 8  # alone, all of them
    for _ in range(2):
        queue.leave("a")
    assert queue.ask("b", 1e6) is ADMITTED  # two places are free and the newcomer gets one
    queue.enter("b")
    assert queue.ask("a", 1e6) is OVER
    assert flood("b") == 1
    assert queue.ask("b", 1e6) is FULL
    assert queue.load("b") == Load(8, 2, 2, 0.0)
    assert queue.statistics() == {
        "waiting": 8, "waiting_clients": 2, "refused_full": 3, "refused_late": 0, "refused_over_share": 1,
    }  # fmt: skip


def test_the_service_time_follows_what_is_measured_and_ignores_what_did_not_run() -> None:
    queue = Admission(8, 100.0)
    for _ in range(60):
        queue.enter("a")
        queue.leave("a", 1000.0)
    assert queue.service_us == pytest.approx(1000.0, rel=1e-3)
    queue.enter("a")
    queue.leave("a")
    assert queue.service_us == pytest.approx(1000.0, rel=1e-3)


@given(
    limit=st.integers(1, 12),
    steps=st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.floats(0, 1e6)), max_size=80),
)
def test_whatever_comes_the_queue_is_bounded_and_forgets_who_left(
    limit: int, steps: list[tuple[str, bool, float]]
) -> None:
    queue, inside = Admission(limit, 0.0), {"a": 0, "b": 0, "c": 0}
    for client, comes, service_us in steps:
        if comes and queue.ask(client, 1e12) is ADMITTED:
            queue.enter(client)
            inside[client] += 1
        elif not comes and inside[client]:
            queue.leave(client, service_us)
            inside[client] -= 1
        present = [who for who, n in inside.items() if n]
        assert queue.waiting == sum(inside.values()) <= limit
        assert queue.statistics()["waiting_clients"] == len(present)
        assert queue.load("new").clients == len(present) + 1
