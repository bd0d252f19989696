"""The bytes on the wire: a change here is a change of contract v1 and needs a changelog line."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from agent.contract import artifact, messages
from agent.contract.errors import Corrupt, MalformedMessage, UnsupportedVersion

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"


def _examples():
    spec = importlib.util.spec_from_file_location("contract_examples", HERE / "examples.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.DOCUMENTS


DOCUMENTS = _examples()


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_a_document_is_written_as_the_golden_bytes(name):
    assert DOCUMENTS[name].encode() == (GOLDEN / f"{name}.json").read_bytes()


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_golden_bytes_are_read_back_as_the_same_document(name):
    raw = (GOLDEN / f"{name}.json").read_bytes()
    document = DOCUMENTS[name]
    read = artifact.parse_manifest(raw) if name == "manifest" else type(document).decode(raw)
    assert read == document


def test_an_older_reader_keeps_fields_it_does_not_know():
    document = json.loads((GOLDEN / "event.json").read_bytes()) | {"colour": "red"}
    again = json.loads(messages.Event.decode(json.dumps(document).encode()).encode())
    assert again["colour"] == "red"


def test_a_newer_message_format_is_refused():
    document = json.loads((GOLDEN / "event.json").read_bytes()) | {"v": 2}
    with pytest.raises(UnsupportedVersion, match="format 2"):
        messages.Event.decode(json.dumps(document).encode())


@pytest.mark.parametrize("payload", [b"", b"[]", b"{", b"\xff\xfe", b'{"v":1}', b"x" * 300_000])
def test_malformed_messages_are_refused_with_the_message_type(payload):
    with pytest.raises(MalformedMessage, match="Event"):
        messages.Event.decode(payload)


def test_a_newer_manifest_format_is_refused():
    document = json.loads((GOLDEN / "manifest.json").read_bytes()) | {"format": 2}
    with pytest.raises(UnsupportedVersion, match="format 2"):
        artifact.parse_manifest(json.dumps(document).encode())


@pytest.mark.parametrize("field", ["name", "version", "inputs", "runtime"])
def test_a_manifest_without_a_needed_field_is_corrupt(field):
    document = json.loads((GOLDEN / "manifest.json").read_bytes())
    del document[field]
    with pytest.raises(Corrupt, match=field):
        artifact.parse_manifest(json.dumps(document).encode())
