"""What an operator may roll out, as a table of wishes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from agent.contract.errors import ConfigError
from compressor.fleet.proposal import Known, Proposal, Wish, order_of, propose
from tests.compressor.fleet.doubles import manifest

V1, V2, V3, ACCEL, FLOOR = ("1" * 64, "2" * 64, "3" * 64, "a" * 64, "f" * 64)
KNOWN = Known(
    published={V1: manifest(1), V2: manifest(2), V3: manifest(3), ACCEL: manifest(1, "wrist-accel")},
    minimum={},
    carried={"w1": {"wrist": V2, "wrist-accel": ACCEL}, "w2": {"wrist": V2}},
    versions={V1: 1, V2: 2, V3: 3, ACCEL: 1},
    busy={},
)
WISH = Wish("wrist", (V3, ACCEL), ("w1", "w2"))


def test_the_whole_chain_in_the_order_of_its_manifests() -> None:
    assert propose(WISH, KNOWN) == Proposal({"wrist": V3, "wrist-accel": ACCEL}, ["wrist", "wrist-accel"])
    short = replace(WISH, artifacts=(ACCEL[:8], V3[:12], V3))
    assert propose(short, KNOWN).artifacts == {"wrist": V3, "wrist-accel": ACCEL}
    turned = replace(WISH, order=("wrist-accel", "wrist"))
    assert propose(turned, KNOWN).order == ["wrist-accel", "wrist"]


def test_going_back_is_said_as_such() -> None:
    back = replace(WISH, artifacts=(V1, ACCEL), rollback=True)
    assert propose(back, KNOWN).artifacts["wrist"] == V1
    unknown = replace(KNOWN, carried={}, versions={})  # devices say nothing: they decide
    assert propose(back, unknown).artifacts["wrist"] == V1
    assert propose(replace(back, rollback=False), unknown).artifacts["wrist"] == V1


@pytest.mark.parametrize(
    ("wish", "known", "words", "hint"),
    [
        ({"artifacts": ("9" * 64,)}, {}, "is no published manifest of 'wrist'", "wrist v1 1111111111111111"),
        ({"artifacts": ("9" * 64,)}, {"published": {}}, "is no published manifest", "publish ARTIFACT"),
        ({"artifacts": (V3[:7],)}, {}, "is no published manifest", "wrist v3"),
        ({"artifacts": (V3[:9],)}, {"published": {V3: manifest(3), V3[:-1] + "4": manifest(4)}},
         "stands for several", "wrist v4"),
        ({"artifacts": (V2, V3)}, {}, "'wrist' is named twice", "one digest"),
        ({"artifacts": (V3,)}, {}, "fallbacks that would be gone: wrist-accel", "--order"),
        ({"order": ("wrist",)}, {}, "--order names wrist", "each of them once"),
        ({"order": ("wrist", "wrist", "wrist-accel")}, {}, "--order names", "each of them once"),
        ({}, {"minimum": {"wrist": 4}}, "below the signed minimum 4", "new version"),
        ({"artifacts": (V1, ACCEL), "rollback": True}, {"minimum": {"wrist": 2}},
         "below the signed minimum 2", "new version"),
        ({"artifacts": (V1, ACCEL)}, {}, "w1 runs 'wrist' version 2 and would refuse version 1", "rollout rollback"),
        ({"rollback": True, "devices": ("w1",)}, {}, "none of w1 runs anything newer", "rollout start"),
        ({}, {"busy": {"w2": 7, "w9": 3}}, "rollout 7 is under way on w2", "rollout halt 7"),
    ],
)  # fmt: skip
def test_what_cannot_go_well_is_refused_with_what_to_do(
    wish: dict[str, Any], known: dict[str, Any], words: str, hint: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        propose(replace(WISH, **wish), replace(KNOWN, **known))
    assert hint in caught.value.hint


def test_a_service_may_be_left_without_its_fallbacks_if_that_is_said() -> None:
    assert propose(replace(WISH, artifacts=(V3,), order=("wrist",)), KNOWN) == Proposal({"wrist": V3}, ["wrist"])


def test_what_a_device_carries_already_is_no_step_back() -> None:
    assert propose(replace(WISH, artifacts=(V2, ACCEL)), KNOWN).artifacts == {"wrist": V2, "wrist-accel": ACCEL}


def test_who_answers_best_first() -> None:
    manifests = [manifest(1, name) for name in ("wrist-floor", "wrist-accel", "wrist")]
    assert order_of(manifests, "wrist") == ["wrist", "wrist-accel", "wrist-floor"]
