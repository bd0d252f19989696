"""Topics cannot be injected into."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.contract.errors import ContractError
from agent.contract.topics import IDENTIFIER, Topics


def test_every_topic_of_a_device_lies_under_its_own_prefix():
    topics = Topics("plant-7", "gateway-1")
    assert topics.status == "ew/1/plant-7/gateway-1/status"
    assert topics.birth == "ew/1/plant-7/gateway-1/birth"
    assert topics.desired == "ew/1/plant-7/gateway-1/desired"
    assert topics.reported == "ew/1/plant-7/gateway-1/reported"
    assert topics.telemetry == "ew/1/plant-7/gateway-1/tm"
    assert topics.acknowledged == "ew/1/plant-7/gateway-1/ack"
    assert topics.event("warning", "drift") == "ew/1/plant-7/gateway-1/ev/warning/drift"
    assert topics.command("ping") == "ew/1/plant-7/gateway-1/cmd/ping"
    assert topics.response("ping") == "ew/1/plant-7/gateway-1/res/ping"


@given(st.text())
def test_an_id_is_taken_only_if_it_is_a_plain_word(text):
    plain = 1 <= len(text) <= 36 and all(c in "abcdefghijklmnopqrstuvwxyz0123456789-" for c in text)
    assert bool(IDENTIFIER.fullmatch(text)) == plain
    if not plain:
        with pytest.raises(ContractError):
            Topics("fleet", text)


@pytest.mark.parametrize("word", ["", "+", "#", "a/b", "drift\n", "Ü", "$SYS"])
def test_event_kinds_cannot_hold_wildcards_or_levels(word):
    with pytest.raises(ContractError):
        Topics("fleet", "device").event("info", word)
