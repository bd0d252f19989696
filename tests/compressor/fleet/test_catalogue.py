from __future__ import annotations

from pathlib import Path

import numpy as np

from agent.contract.artifact import Blob, View, sha256
from agent.contract.repository import blob_path, stored_path
from agent.drift import Claim, GuardStatistics, Reference, dump_reference
from compressor.fleet.catalogue import Catalogue
from compressor.fleet.samples import Shape
from tests.compressor.fleet.doubles import REFERENCE, FakePublisher, artifact_folder, manifest


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


def test_of_several_views_the_one_that_the_reference_is_about_is_named(tmp_path: Path) -> None:
    followed = ("one", "two")
    raw = dump_reference(Reference(
        followed, (), {}, ("x",), np.full(2, -1, np.int16), np.zeros(2, np.float32), np.ones(2, np.float32),
        np.ones(1, np.float32), 600, GuardStatistics({}, {}, {}), Claim(0, 0, 0, 0, 0, 0.95, ""),
    ))  # fmt: skip
    views = [View(name="channels", kind="channels", features=["ax.mean"]),
             View(name="latent", kind="hidden", features=list(followed))]  # fmt: skip
    blobs = manifest(1).blobs | {"reference": Blob(file="reference.npz", size=len(raw), sha256=sha256(raw))}
    folder = artifact_folder(tmp_path / "a", 1)
    (folder / "manifest.json").write_bytes(manifest(1).model_copy(update={"views": views, "blobs": blobs}).encode())
    FakePublisher(tmp_path / "repository").publish([folder])
    catalogue = Catalogue(tmp_path / "repository")
    assert catalogue.refresh()
    assert catalogue.features(sha256(raw)) == ()  # nobody knows which until the reference is there
    path = tmp_path / "repository" / "targets" / stored_path(blob_path("wrist", sha256(raw)), sha256(raw))
    path.parent.mkdir(parents=True)
    path.write_bytes(raw[:-1])
    assert catalogue.features(sha256(raw)) == ()
    path.write_bytes(raw)
    assert catalogue.features(sha256(raw)) == followed


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
