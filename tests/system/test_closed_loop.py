"""The loop nobody else closes, with real processes: drift, evidence, regeneration, signed update, refusal."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from agent import clock
from scripts.story import loop
from scripts.story.__main__ import compress, stage
from scripts.story.acts import foreign_orders

RECIPE = Path(__file__).parent / "loop.recipe.toml"
WEARERS = (1, 2, 3)

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.torch, pytest.mark.timeout(900)]
PROBATION_S = 10.0


class Laps:
    """How long each part took, printed as it ends: `pytest -s`, or the captured output of a failed run."""

    def __init__(self) -> None:
        self._since_s = clock.monotonic_s()

    def end(self, part: str) -> None:
        now_s = clock.monotonic_s()
        sys.stdout.write(f"closed loop: {part:9} {now_s - self._since_s:6.1f} s\n")
        self._since_s = now_s


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What the story reports of its second half, told with small models."""
    out, laps = tmp_path_factory.mktemp("loop"), Laps()
    compress(out, WEARERS, recipe=RECIPE)
    laps.end("compress")
    console = Console(file=io.StringIO(), width=200)
    with contextlib.ExitStack() as stack:
        context, fleet = stage(console, out, WEARERS, stack, recipe=RECIPE, probation_s=PROBATION_S)
        laps.end("stage")
        loop.recover(fleet)
        laps.end("recover")
        loop.judge(fleet)
        laps.end("judge")
        loop.refuse(fleet)
        laps.end("refuse")
        context.report["hands_after_refusals"] = fleet.hands()
        context.report["foreign_orders"] = foreign_orders(context.world.subscriber.heard(), fleet.host.orders())
    laps.end("end")
    return context.report


def test_a_new_population_leads_to_a_committed_update_without_hands(report):
    assert report["devices"] == 3
    assert report["hands"] == 0
    assert report["loop"]["seconds"] > 0
    assert report["regeneration"]["seconds"] < report["loop"]["seconds"]
    for states in report["update"]["states_by_device"].values():
        assert (states[0], states[-1]) == ("planned", "committed")
    assert (report["update"]["from"], report["update"]["to"]) == (1, 2)


def test_a_hand_would_have_been_counted(report):
    """What is typed before the first report is known; the refusals that follow are ordered by hand, and counted."""
    typed = report["typed_before"]
    assert [one.rpartition(" ")[2] for one in typed if one.startswith("edgewarden-compressor")] == [
        "keys", "publish", "serve",
    ]  # fmt: skip
    assert sum(one.startswith("edgewarden-agent") for one in typed) == 3
    assert report["hands_after_refusals"] == 4  # signed, ordered, ordered, withdrawn
    assert report["foreign_orders"] == 2


def test_no_request_fails_while_models_are_swapped(report):
    assert report["update"]["requests"] > 100
    assert report["update"]["failed_requests"] == 0


def test_every_byte_moved_was_needed(report):
    assert 0 < report["update"]["moved_bytes"] <= report["update"]["full_bytes"]


def test_the_update_helps_the_newcomers(report):
    assert report["recovery"]["new_after"] > report["recovery"]["new_before"]
    assert report["recovery"]["old_after"] >= report["recovery"]["old_before"] - 0.1


def test_a_broken_and_a_forged_version_are_refused(report):
    assert [item["code"] for item in report["refused"]] == ["golden_mismatch", "untrusted"]
