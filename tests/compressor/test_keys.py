"""The folder of private keys: made once, private, encrypted if wanted, rotated without a gap."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from agent.contract.errors import ConfigError
from agent.contract.signed import key_id, public_bytes
from compressor.keys import KeyRing, read_passphrase

NAMES = (
    "director", "pipeline-door", "pipeline-wrist", "root1", "root2", "root3", "snapshot", "targets", "timestamp"
)  # fmt: skip


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    return KeyRing.create(tmp_path / "keys", ["wrist", "door"])


def test_every_key_is_made_private_and_listed(ring: KeyRing) -> None:
    assert ring.names == NAMES
    assert ring.families == ("door", "wrist")
    assert len({ring.public(name) for name in NAMES}) == len(NAMES)
    for name in NAMES:
        path = ring.folder / f"{name}.pem"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert public_bytes(ring.private(name)) == ring.public(name)
    document = json.loads((ring.folder / "public.json").read_bytes())
    assert document["keys"]["root1"]["keyid"] == key_id(ring.public("root1"))


def test_keys_are_never_made_anew_over_old_ones(ring: KeyRing) -> None:
    with pytest.raises(ConfigError, match="already holds keys"):
        KeyRing.create(ring.folder, ["wrist"])


def test_an_interrupted_init_can_be_run_again(ring: KeyRing) -> None:
    (ring.folder / "public.json").unlink()
    assert KeyRing.create(ring.folder, ["wrist"]).families == ("wrist",)


def test_a_passphrase_protects_the_private_keys(tmp_path: Path) -> None:
    (tmp_path / "word").write_text("open sesame\n")
    word = read_passphrase(tmp_path / "word")
    ring = KeyRing.create(tmp_path / "keys", ["wrist"], passphrase=word)
    assert b"ENCRYPTED" in (ring.folder / "root1.pem").read_bytes()
    assert KeyRing(ring.folder, passphrase=word).private("root1")
    for wrong in (None, b"open barley"):
        with pytest.raises(ConfigError, match="passphrase"):
            KeyRing(ring.folder, passphrase=wrong).private("root1")


def test_a_passphrase_file_that_is_missing_or_empty_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for name in ("empty", "missing"):
        with pytest.raises(ConfigError):
            read_passphrase(tmp_path / name)
    assert read_passphrase(None) is None


def test_a_key_that_others_may_read_is_not_used(ring: KeyRing) -> None:
    (ring.folder / "targets.pem").chmod(0o640)
    with pytest.raises(ConfigError, match="used by others"):
        ring.private("targets")


@pytest.mark.parametrize("content", [b"", b"nonsense", b"x" * 100_000])
def test_what_is_no_key_is_said(ring: KeyRing, content: bytes) -> None:
    (ring.folder / "targets.pem").write_bytes(content)
    with pytest.raises(ConfigError):
        ring.private("targets")


def test_an_offline_key_is_still_known(ring: KeyRing) -> None:
    (ring.folder / "root1.pem").unlink()
    again = KeyRing(ring.folder)
    assert again.public("root1") == ring.public("root1")
    assert again.held("root1") == []
    with pytest.raises(ConfigError) as caught:
        again.private("root1")
    assert "Offline keys" in caught.value.sentence()
    with pytest.raises(ConfigError, match="no key 'root9'"):
        again.public("root9")


def test_a_rotation_has_two_keys_until_it_ends(ring: KeyRing) -> None:
    old = ring.public("timestamp")
    new = public_bytes(ring.prepare("timestamp"))
    assert public_bytes(KeyRing(ring.folder).prepare("timestamp")) == new
    assert ring.is_rotating("timestamp")
    assert {public_bytes(key) for key in ring.held("timestamp")} == {old, new}
    ring.promote("timestamp")
    assert not ring.is_rotating("timestamp")
    assert ring.public("timestamp") == public_bytes(ring.private("timestamp")) == new


def test_a_family_added_later_keeps_its_key(ring: KeyRing) -> None:
    ring.add_family("gate")
    key = ring.public("pipeline-gate")
    KeyRing(ring.folder).add_family("gate")
    assert KeyRing(ring.folder).public("pipeline-gate") == key


@pytest.mark.parametrize("content", ["", "[]", '{"keys": {"root1": {}}}', '{"keys": {"root1": {"public": "zz"}}}'])
def test_a_folder_without_a_sound_list_is_said(tmp_path: Path, content: str) -> None:
    (tmp_path / "public.json").write_text(content)
    with pytest.raises(ConfigError):
        KeyRing(tmp_path)
