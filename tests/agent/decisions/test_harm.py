"""Harm as decisions see it: who is switched to, when not, and the way back."""

from __future__ import annotations

import pytest

from agent.decisions.events import AlarmCleared, AlarmKind, AlarmRaised, Level, Pinned, decode_event, encode
from agent.decisions.service import SWITCHING
from tests.agent.decisions.wrist import GYRO, Story, cleared, policy, raised

DRIFT, HARM, DEAD = AlarmKind.DRIFT, AlarmKind.HARM, AlarmKind.DEAD


def harm(better: str = "wrist-accel", gain: float = 0.5) -> AlarmRaised:
    numbers = {"disagreement": 0.66, "gain_at_least": gain, "quietness": 0.1}
    return AlarmRaised("wrist", HARM, Level.HARMFUL, text="it disagrees on 66 %", numbers=numbers, better=better)


def test_harm_switches_to_the_witness_heals_and_returns_through_probation() -> None:
    story = Story().started()
    story.do(raised(DRIFT, "ax"))
    assert story.serving == "wrist"
    story.do(harm())
    assert (story.serving, story.phase, story.health) == ("wrist-accel", "fallback", "degraded")
    story.live(300.0)  # long after the dwell: the drift still stands
    assert story.phase == "fallback"
    story.do(cleared(DRIFT, "ax"))
    story.do(AlarmCleared("wrist", HARM))
    story.live(14.0)
    assert story.phase == "fallback"
    story.live(2.0)
    assert (story.serving, story.phase) == ("wrist", "probation")
    story.live(61.0)
    assert (story.serving, story.phase) == ("wrist", "preferred")
    assert story.steps() == ["switched", "probation", "returned"]


def test_the_switch_says_why_and_what_it_gains() -> None:
    story = Story().started()
    story.do(raised(DRIFT, "ax"))
    story.do(harm())
    (switch,) = story.published("fallback")
    assert switch.text == "wrist -> wrist-accel: it disagrees on 66 %"
    assert (switch.details["why"], switch.details["to"]) == ("harm", "wrist-accel")
    assert (switch.numbers["gain_at_least"], switch.numbers["quietness"]) == (0.5, 0.1)
    told = story.published("drift")[-1]
    assert (told.severity, told.details["level"], told.details["better"]) == ("error", "harmful", "wrist-accel")


def test_harm_that_comes_back_on_probation_keeps_the_witness_longer() -> None:
    story = Story().started()
    story.do(harm())
    story.live(130.0)
    story.do(AlarmCleared("wrist", HARM))
    story.live(20.0)
    assert story.phase == "probation"
    story.do(harm())
    assert (story.serving, story.phase) == ("wrist-accel", "fallback")
    story.do(AlarmCleared("wrist", HARM))
    story.live(235.0)
    assert story.phase == "fallback"
    story.live(10.0)
    assert story.phase == "probation"


@pytest.mark.parametrize(
    "changes", [{"switching": SWITCHING - {HARM}}, {"least_gain": 0.6}], ids=["switched off", "gains too little"]
)
def test_a_policy_may_leave_it_at_telling(changes: dict[str, object]) -> None:
    story = Story(policy(**changes)).started()
    story.do(raised(DRIFT, "ax"))
    story.do(harm())
    story.live(60.0)
    assert (story.serving, story.health, story.steps()) == ("wrist", "degraded", [])
    assert story.published("drift")[-1].details["alarm"] == "harm"


def test_a_witness_that_is_benched_or_not_there_is_not_switched_to() -> None:
    story = Story().started()
    story.do(harm("wrist-norm"))
    assert story.serving == "wrist"


def test_a_pinned_engine_stays() -> None:
    story = Story().started()
    story.do(Pinned("wrist", "wrist"))
    story.do(harm())
    assert story.serving == "wrist"


def test_a_diagnosed_fault_decides_before_harm_and_harm_does_not_move_its_choice() -> None:
    story = Story().started()
    story.do(raised(DEAD, *GYRO))
    assert story.serving == "wrist-accel"
    story.do(harm("wrist-floor"))
    story.live(200.0)
    assert story.serving == "wrist-accel"
    assert story.steps() == ["switched"]


def test_an_open_harm_switches_again_after_a_restart() -> None:
    story = Story().started()
    story.do(harm())
    story.restart()
    assert story.serving == "wrist-accel"
    story.do(harm())  # announced by the monitor
    story.live(200.0)
    assert story.phase == "fallback"


def test_the_recorder_reads_what_it_wrote() -> None:
    assert decode_event(encode(harm())) == harm()
