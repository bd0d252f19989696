from __future__ import annotations

from pathlib import Path

from agent.contract.artifact import sha256
from compressor.fleet.catalogue import Catalogue
from compressor.fleet.samples import Shape
from tests.compressor.fleet.doubles import REFERENCE, FakePublisher, artifact_folder


def published(tmp_path: Path, *versions: int) -> list[str]:
    folders = [artifact_folder(tmp_path / f"a{version}", version) for version in versions]
    return FakePublisher(tmp_path / "repository").publish(folders)


def test_what_is_published_has_names_shapes_and_features(tmp_path: Path) -> None:
    digests = published(tmp_path, 1, 2)
    catalogue = Catalogue(tmp_path / "repository")
    assert catalogue.refresh()
    assert [catalogue.label(digest) for digest in digests] == ["wrist v1", "wrist v2"]
    assert catalogue.features(sha256(REFERENCE[2])) == ("ax.mean", "ax.log_sd")
    assert catalogue.shape("wrist") == Shape(length=128, channels=6, labels=7, ranges=((-16, 16),) * 6)
    assert (catalogue.next_version("wrist"), catalogue.next_version("other")) == (3, 1)
    assert not catalogue.refresh()


def test_an_unknown_digest_is_shown_by_its_beginning(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "nowhere")
    assert not catalogue.refresh()
    assert catalogue.label("ab" * 32) == "abababababab"
    assert catalogue.features("x") == ()
    assert catalogue.shape("wrist") == Shape()
    assert not Catalogue(None).refresh()


def test_odd_files_are_passed_over(tmp_path: Path) -> None:
    (digest,) = published(tmp_path, 1)
    folder = tmp_path / "repository" / "targets" / "wrist" / "manifests"
    (folder / f"{'00' * 32}.{'00' * 32}").write_bytes(b"{}")  # does not have that digest
    (folder / f"{'11' * 32}.{'11' * 32}").write_bytes(b"x" * 300_000)
    (folder / "readme").write_bytes(b"hello")
    catalogue = Catalogue(tmp_path / "repository")
    assert catalogue.refresh()
    assert catalogue.find(digest) is not None
    assert catalogue.find("00" * 32) is None


def test_what_most_devices_carry_is_what_is_deployed(tmp_path: Path) -> None:
    one, two, three = published(tmp_path, 1, 2, 3)
    catalogue = Catalogue(tmp_path / "repository")
    catalogue.refresh()
    assert catalogue.deployed("wrist", [{"wrist": one}, {"wrist": one}, {"wrist": three}]) == {"wrist": one}
    assert catalogue.deployed("wrist", [{"wrist": one}, {"wrist": two}]) == {"wrist": two}
    lies = [{"wrist": "ab" * 32}, {"wrist-accel": one}, {"x": ""}, {}]
    assert catalogue.deployed("wrist", lies) == {}
    assert catalogue.deployed("other", [{"wrist": one}]) == {}
