"""The loop nobody else closes, with real processes: drift, evidence, regeneration, signed update, refusal."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
from rich.console import Console

from scripts.story import loop
from scripts.story.__main__ import compress, stage

RECIPE = Path(__file__).parent / "loop.recipe.toml"
WEARERS = (1, 2, 3)

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.torch, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What the story reports of its second half, told with small models."""
    out = tmp_path_factory.mktemp("loop")
    compress(out, WEARERS, recipe=RECIPE)
    console = Console(file=io.StringIO(), width=200)
    with contextlib.ExitStack() as stack:
        context, fleet = stage(console, out, WEARERS, stack, recipe=RECIPE)
        loop.recover(fleet)
        loop.judge(fleet)
        loop.refuse(fleet)
    return context.report


def test_a_new_population_leads_to_a_committed_update_without_hands(report):
    assert report["devices"] == 3
    assert report["hands"] == 0
    for states in report["update"]["states_by_device"].values():
        assert (states[0], states[-1]) == ("planned", "committed")
    assert (report["update"]["from"], report["update"]["to"]) == (1, 2)


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
