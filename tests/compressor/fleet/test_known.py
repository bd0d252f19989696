"""Who may speak: a slow look never takes back what a later one found."""

from __future__ import annotations

import pytest

from agent.contract.errors import StateUnreadable
from compressor.fleet.known import Known


def test_who_enrols_while_the_list_is_being_read_stays_known() -> None:
    enrolled = {"old"}
    slow = False

    def read() -> set[str]:
        nonlocal slow
        found = set(enrolled)
        if slow:  # meanwhile another thread enrols a device, and looks
            slow = False
            enrolled.add("new")
            known.refresh()
            assert "new" in known
        return found

    known = Known(read)
    slow = True
    known.refresh()
    assert "old" in known
    assert "new" in known


def test_who_is_enrolled_no_longer_may_not_speak_any_more() -> None:
    enrolled = ["w1", "w2"]
    known = Known(lambda: enrolled)
    enrolled.remove("w1")
    known.refresh()
    assert "w1" not in known
    assert "w2" in known


def test_a_look_that_fails_changes_nothing() -> None:
    answers = [{"w1"}]

    def read() -> set[str]:
        if not answers:
            raise StateUnreadable("the database is held by another program")
        return answers.pop()

    known = Known(read)
    with pytest.raises(StateUnreadable):
        known.refresh()
    assert "w1" in known
