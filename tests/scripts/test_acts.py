"""What counts as a person's step, and which orders at the broker the host never gave."""

from __future__ import annotations

from scripts.story.acts import Acts, foreign_orders
from scripts.story.subscriber import Seen

BASE = "ew/1/demo"


def seen(topic: str, number: int) -> Seen:
    return Seen(f"{BASE}/{topic}", {"signed": {"number": number}}, retained=False)


def test_an_act_belongs_to_the_time_before_or_after() -> None:
    acts = Acts()
    acts.note("keys init")
    first_report_s = acts.entries[0].at_s + 1e-9
    assert (acts.before(first_report_s), acts.since(first_report_s)) == (["keys init"], [])
    assert acts.since(acts.entries[0].at_s) == ["keys init"]


def test_orders_that_the_host_gave_are_nobodys_step_however_often_they_arrive() -> None:
    heard = [seen("w1/desired", 1), seen("w1/desired", 1), seen("w1/cmd/sample", 1), seen("w2/cmd/sample", 1)]
    heard += [seen("w1/reported", 7), seen("w1/ev/warning/drift", 8)]
    assert foreign_orders(heard, {"w1": (1, 1), "w2": (0, 1)}) == 0


def test_every_order_beyond_the_hosts_own_books_counts() -> None:
    heard = [seen("w1/desired", 1), seen("w1/desired", 2), seen("w1/cmd/sample", 1), seen("w3/cmd/pin", 1)]
    assert foreign_orders(heard, {"w1": (1, 1)}) == 2
