"""What devices would refuse as not approved, from a really signed repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.contract.repository import FamilyPolicy
from compressor.fleet.approval import SignedRepository
from compressor.keys import KeyRing
from tests.compressor.fleet.doubles import DEVICES, artifact_folder


@pytest.mark.parametrize(
    "policy", [FamilyPolicy("approve"), FamilyPolicy("approve", DEVICES), FamilyPolicy("auto", DEVICES[:2])]
)
def test_what_some_device_would_refuse_waits_for_a_person(policy: FamilyPolicy, tmp_path: Path) -> None:
    repository, digests = published(tmp_path, policy)
    assert repository.unapproved("wrist", digests, DEVICES) == digests
    repository.approve(digests[:1])
    assert repository.unapproved("wrist", digests, DEVICES) == digests[1:]
    repository.approve(digests)
    assert repository.unapproved("wrist", digests, DEVICES) == []


def test_canaries_of_an_automatic_family_wait_for_nobody(tmp_path: Path) -> None:
    repository, digests = published(tmp_path, FamilyPolicy("auto", DEVICES))
    assert repository.unapproved("wrist", digests, DEVICES) == []


def published(folder: Path, policy: FamilyPolicy) -> tuple[SignedRepository, list[str]]:
    ring = KeyRing.create(folder / "keys", ["wrist"])
    SignedRepository.init(folder / "repository", ring, {"wrist": policy})
    repository = SignedRepository(folder / "repository", ring)
    artifacts = [artifact_folder(folder / name, 1, name) for name in ("wrist", "wrist-accel")]
    return repository, repository.publish(artifacts)
