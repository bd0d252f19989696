"""`keys` and `publish` as typed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from agent.contract.errors import ConfigError
from compressor import commands_trust
from tests.agent.ota.world import make_artifact


def typed(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    parser = argparse.ArgumentParser()
    commands_trust.register(parser.add_subparsers(required=True))
    options = parser.parse_args([str(word) for word in words])
    assert options.run(options) == 0
    return capsys.readouterr().out


def test_from_no_keys_to_an_approved_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys, repository = tmp_path / "keys", tmp_path / "repository"
    assert "offline" in typed(capsys, "keys", "init", "--keys", keys)
    digest = make_artifact(tmp_path / "a", version=2)
    where = ("--keys", keys, "--repository", repository)
    out = typed(capsys, "publish", tmp_path / "a", *where, "--root", tmp_path / "root.json", "--json")
    document: dict[str, Any] = json.loads(out)
    assert document["published"] == [{"name": "wrist", "version": 2, "digest": digest, "approved": False}]
    assert document["days_left"]["timestamp"] == 1.0
    assert json.loads((tmp_path / "root.json").read_bytes())["signed"]["_type"] == "root"
    assert "approved" in typed(capsys, "publish", tmp_path / "a", *where, "--approve")
    assert "nothing was added" in typed(capsys, "publish", *where, "--policy", "auto", "--canary", "gateway-1")
    assert "worth nothing" in typed(capsys, "keys", "rotate", "timestamp", *where)
    shown = json.loads(typed(capsys, "keys", "show", "--keys", keys, "--json"))
    assert shown["keys"]["pipeline-wrist"]["private"] == "here"
    (keys / "root1.pem").unlink()
    assert "offline" in typed(capsys, "keys", "show", "--keys", keys)


def test_a_service_may_come_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--keys", tmp_path / "keys", "--repository", tmp_path / "repository")
    typed(capsys, "keys", "init", "--keys", tmp_path / "keys", "--family", "door")
    typed(capsys, "publish", *where, "--minimum", "door=3")
    make_artifact(tmp_path / "a", version=2)
    with pytest.raises(ConfigError, match="knows no family 'wrist'") as caught:
        typed(capsys, "publish", tmp_path / "a", *where)
    assert "keys add wrist" in caught.value.hint
    assert "can be published now" in typed(capsys, "keys", "add", "wrist", *where)
    assert "approved" in typed(capsys, "publish", tmp_path / "a", *where, "--approve")
    with pytest.raises(ConfigError, match="already"):
        typed(capsys, "keys", "add", "wrist", *where)


def test_a_minimum_is_a_name_and_a_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed(capsys, "keys", "init", "--keys", tmp_path / "keys", "--family", "door")
    where = ("--keys", tmp_path / "keys", "--repository", tmp_path / "repository")
    with pytest.raises(ConfigError, match="no minimum version"):
        typed(capsys, "publish", *where, "--minimum", "wrist")
    typed(capsys, "publish", *where, "--minimum", "door=3")


def test_keys_that_are_not_there_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"public\.json"):
        typed(capsys, "keys", "show", "--keys", tmp_path)
