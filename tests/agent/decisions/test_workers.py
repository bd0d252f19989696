"""A lost worker is replaced at once, a crash loop with pauses, and a loop is remembered."""

from __future__ import annotations

from agent.decisions.workers import CRASH_WINDOW_S, PAUSES_S, Workers, calmed, lost, pause_s, ready, shifted


def lose(workers: Workers, *times_s: float) -> Workers:
    for now_s in times_s:
        workers = lost(workers, workers.generation, now_s)
    return workers


def test_the_first_loss_is_answered_at_once_and_the_next_ones_after_growing_pauses() -> None:
    workers, pauses = Workers(), []
    for number in range(10):
        workers = lose(workers, number * 0.1)
        pauses.append(pause_s(workers))
    assert pauses == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


def test_a_loop_that_keeps_its_pauses_stays_a_loop() -> None:
    workers, now_s = Workers(), 0.0
    for _ in range(100):
        workers = lose(workers, now_s)
        now_s += pause_s(workers) + 0.1
    assert workers.looping


def test_losses_are_forgotten_after_the_window_and_bounded_within_it() -> None:
    workers = lose(Workers(), *range(50))
    assert len(workers.lost_s) == len(PAUSES_S)
    assert calmed(workers, 49.0 + CRASH_WINDOW_S) == Workers()


def test_the_word_says_what_state_the_worker_is_in() -> None:
    assert Workers().word == "starting"
    assert ready(Workers(), 1).word == "up"
    assert lose(ready(Workers(), 1), 0.0).word == "lost"
    assert lose(Workers(), 0.0, 1.0, 2.0).word == "loop"


def test_losing_a_replacement_that_never_got_ready_keeps_the_serving_worker() -> None:
    workers = lost(ready(Workers(), 4), 5, 0.0)
    assert (workers.generation, len(workers.lost_s)) == (4, 1)


def test_losses_keep_their_age_when_a_clock_is_set() -> None:
    workers = shifted(lose(Workers(), 100.0), 1000.0)
    assert calmed(workers, 1100.0 + CRASH_WINDOW_S - 1.0) == workers
