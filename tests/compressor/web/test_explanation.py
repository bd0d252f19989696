from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.contract.messages import Event
from compressor.config import HostConfig
from compressor.fleet.database import Database, messages
from compressor.fleet.inbox import EventSeen, Key
from compressor.web.explanation import (
    MAX_LINE,
    MAX_SHOWN,
    NOT_READABLE,
    Told,
    cohort_words,
    explanations,
    picture,
    read,
)
from tests.compressor.fleet.doubles import NOW

GOLDEN = Path(__file__).parents[2] / "contract/golden/event-drift.json"
EXPLANATION: dict[str, Any] = Event.decode(GOLDEN.read_bytes()).details["explanation"]
MEMBERS = ["w1", "w2", "w3", "w4", "w5"]
CONFIG = HostConfig.model_validate({"fleet": {"name": "demo", "cohorts": {"canary": MEMBERS}}})


class Fleet:
    """A host's database, and devices that say something one after the other."""

    def __init__(self, folder: Path) -> None:
        self.database = Database(folder)
        self.seq = 0

    def says(self, device: str, service: str = "wrist", *, at: float = NOW, **details: Any) -> None:
        self.seq += 1
        event = EventSeen(Key(device, "b", self.seq), at, "warning", "drift", service, "left", (), {}, details)
        with self.database.writing() as tx:
            messages.admit(tx, [event], now_s=at)

    def told(self, *devices: str, service: str | None = None, now_s: float = NOW) -> list[Told]:
        with self.database.reading() as tx:
            return explanations(tx, CONFIG, devices or ["w1"], service=service, now_s=now_s)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path)
    yield fleet
    fleet.database.close()


def rows_of(told: list[Told]) -> list[int]:
    return [one.document["rows"] for one in told if one.document]


def test_the_newest_of_what_a_drift_said_is_told(fleet: Fleet) -> None:
    fleet.says("w1", raised=True, explanation=EXPLANATION)
    fleet.says("w1", raised=True, explanation=EXPLANATION | {"rows": 64})
    fleet.says("w1", raised=True)  # said again after a restart, which forgot why
    fleet.says("w1", raised=True, alarm="harm", explanation=EXPLANATION | {"rows": 65})
    (one,) = fleet.told()
    assert rows_of([one]) == [64]
    assert (one.device, one.service, one.over) == ("w1", "wrist", "")
    assert one.lines[0] == "one sensor (gx), for about 64 rows, 44 s"
    assert one.lines[1].startswith("gx mean +0.8 rad/s (+4.2 sd), 90 % of the evidence  ··")
    assert one.words[1] == "gx mean +0.8 rad/s (+4.2 sd), 90 % of the evidence"


def test_a_drift_that_is_over_says_since_when_and_a_new_one_without_reasons_shows_no_old_ones(fleet: Fleet) -> None:
    fleet.says("w1", raised=True, explanation=EXPLANATION)
    fleet.says("w1", raised=False, at=NOW + 60)
    assert [one.over for one in fleet.told()] == ["2025-11-24 16:01:00"]
    fleet.says("w1", raised=True)
    assert fleet.told() == []


def test_services_are_told_apart_and_a_page_is_bounded(fleet: Fleet) -> None:
    for device in MEMBERS:
        fleet.says(device, "wrist", raised=True, explanation=EXPLANATION)
        fleet.says(device, "bench", raised=True, explanation=EXPLANATION | {"rows": 7})
    assert sorted(one.service for one in fleet.told("w1")) == ["bench", "wrist"]
    assert rows_of(fleet.told("w1", service="bench")) == [7]
    assert fleet.told("w1", service="other") == []
    assert len(fleet.told(*MEMBERS)) == MAX_SHOWN


def test_the_cohort_says_whether_it_is_one_device_or_many(fleet: Fleet) -> None:
    fleet.says("w1", raised=True, explanation=EXPLANATION)
    fleet.says("w2", "bench", raised=True)
    assert fleet.told()[0].cohort == "one device of 5 in cohort canary drifts (w1): rather this device than the world"
    for device in ("w2", "w3", "w4"):
        fleet.says(device, raised=True)
    fleet.says("w4", raised=False)
    assert fleet.told()[0].cohort.startswith("3 devices of 5 in cohort canary drift (w1, w2, w3): rather the world")
    a_month_later = fleet.told(now_s=NOW + 30 * 86_400)
    assert a_month_later[0].cohort == "no device of 5 in cohort canary drifts any more"


@pytest.mark.parametrize(("members", "drift", "said"), [
    (1, ["a"], "nobody to compare with"),
    (4, ["a", "b"], "2 devices of 4 in cohort c drift (a, b)"),
    (9, list("abcdefgh"), "(a, b, c, d, e, f and 2 more): rather the world than one device"),
])  # fmt: skip
def test_a_cohort_in_words(members: int, drift: list[str], said: str) -> None:
    assert cohort_words("c", members, drift).endswith(said)


FIRST = EXPLANATION["features"][0]
PICTURE = EXPLANATION["pictures"][0]


@pytest.mark.parametrize("said", [
    None, 7, [], {}, "x", EXPLANATION | {"rows": -1}, EXPLANATION | {"rows": 10**4000},
    EXPLANATION | {"channels": {"gx": "inf"}}, EXPLANATION | {"features": [FIRST] * 9},
    EXPLANATION | {"features": [FIRST | {"feature": "x" * 65}]},
    EXPLANATION | {"features": [FIRST | {"shift": 10**400}]},
    EXPLANATION | {"blamed": "\ud800"}, EXPLANATION | {"pictures": [PICTURE | {"now": [1001]}]},
])  # fmt: skip
def test_what_breaks_the_contract_is_not_readable(said: Any) -> None:
    assert read(said) is None


def test_an_unreadable_explanation_is_said_to_be_one(fleet: Fleet) -> None:
    fleet.says("w1", raised=True, explanation={"rows": "<b>"})
    (one,) = fleet.told()
    assert (one.document, one.lines, one.pictures) == (None, (NOT_READABLE,), ())


def test_names_cannot_steer_a_terminal_and_what_is_unknown_is_left_out(fleet: Fleet) -> None:
    wild = FIRST | {"feature": "\x1b[2J\u202egx.mean", "unit": "\n", "shift": 1e308, "more": "\x07"}
    said = EXPLANATION | {
        "features": [wild],
        "blamed": "a\nb",
        "channels": {"\x1b" * 500: 1.0},
        "changed_ago_s": 1e308,
    }
    fleet.says("w1", raised=True, explanation=said | {"more": ["\x1b"]})
    (one,) = fleet.told()
    assert one.document is not None
    assert one.document.keys() == EXPLANATION.keys()
    everything = json.dumps(one.document, ensure_ascii=False) + "".join(one.lines)
    everything.encode()
    assert everything.isprintable()
    assert max(map(len, one.lines)) <= MAX_LINE


def test_bars_are_whole_numbers_and_told_in_words() -> None:
    drawn = picture(PICTURE)
    assert drawn is not None
    assert [one.reference_height for one in drawn.bins][2:6] == [8, 32, 60, 60]
    assert (drawn.bins[9].now, drawn.bins[9].now_height, drawn.bins[0].now_height) == ("3.0", 6, 0)
    assert (drawn.bins[0].low, drawn.bins[-1].high, drawn.width) == ("-0.8", "0.8", 320)
    assert drawn.summary == (
        "Reference most often between -0.4 and -0.3 (30 % of the rows); now most often between 0.3 and 0.4 (30 % of "
        "the rows)."
    )


@pytest.mark.parametrize(("change", "drawn"), [  # drawn: with a reference or without, None = not at all
    ({"reference": []}, False), ({"low": -1e308, "high": 1e308}, True),
    *(({name: odd}, None) for name, odd in [("now", []), ("now", [0] * 16), ("reference", [5]), ("low", 0.8)]),
])  # fmt: skip
def test_only_what_can_be_drawn_is(change: dict[str, Any], drawn: Any) -> None:
    found = picture(PICTURE | change)
    assert (found and found.has_reference) is drawn
