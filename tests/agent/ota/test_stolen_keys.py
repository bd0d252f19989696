"""Each key stolen: what is the worst a device does? Real signed repositories, attacked by who holds which keys."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner, SSlibKey
from tuf.api.metadata import Metadata, Root

from agent.contract.errors import EdgewardenError, Untrusted
from agent.contract.repository import FamilyPolicy, approval_path, policy_path
from agent.contract.signed import key_id
from agent.ota import trust
from agent.ota.acceptance import Candidate, Wish, accept
from tests.agent.ota.server import serving
from tests.agent.ota.world import DEVICE, FAMILY, NOW_S, Thief, World, make_artifact

AUTO = FamilyPolicy("auto", (DEVICE,), {"wrist": 1})
ONLINE = ("snapshot", "timestamp")


def outcome(world: World, folder: Path, digest: str, wish: Wish | None = None) -> str:
    """What a device that has seen the honest repository does about `digest` in the attacked one: "" or a code.

    TUF's cache is deleted between: what the device remembers itself has to be enough.
    """
    cache = world.folder / "cache"
    request = trust.Request(str(cache), str(world.root), "", NOW_S, {}, ((FAMILY, digest),))
    with serving(world.repository.folder) as honest:
        marks = trust.consult(replace(request, repository=honest.url)).marks
    shutil.rmtree(cache)
    with serving(folder) as attacked:
        try:
            answer = trust.consult(replace(request, repository=attacked.url, marks=marks))
            policy = answer.policies[FAMILY]
            accept(
                _candidate(answer, digest),
                FamilyPolicy(policy["policy"], tuple(policy["canary"]), policy["minimum_version"]),
                wish or Wish(DEVICE, 1),
            )
        except EdgewardenError as error:
            return error.code
    return ""


def _candidate(answer: trust.Answer, digest: str) -> Candidate:
    entry = answer.manifests.get(digest)
    if entry is None:
        return Candidate(FAMILY, "wrist", digest, "wrist", 9, "", approved=False)
    custom = entry["custom"]
    return Candidate(
        FAMILY, "wrist", digest, custom["name"], custom["version"], entry["role"], approved=entry["approved"]
    )


@pytest.fixture
def evil(tmp_path: Path) -> tuple[Path, str]:
    """An artifact nobody at home built: folder and digest."""
    return tmp_path / "evil", make_artifact(tmp_path / "evil", version=9, scale=3.0)


@pytest.mark.parametrize(
    ("stolen", "policy", "device", "code"),
    [
        # nothing stolen: every signature is by a stranger's key
        ((), AUTO, DEVICE, "untrusted"),
        # one online key, or both: nothing new can be vouched for
        (("timestamp",), AUTO, DEVICE, "untrusted"),
        (("snapshot",), AUTO, DEVICE, "untrusted"),
        (ONLINE, AUTO, DEVICE, "untrusted"),
        # the pipeline's key alone is not enough to publish
        (("pipeline-wrist",), AUTO, DEVICE, "untrusted"),
        (("pipeline-wrist", "timestamp"), AUTO, DEVICE, "untrusted"),
        (("pipeline-wrist", "snapshot"), AUTO, DEVICE, "untrusted"),
        # a stolen publisher (pipeline and online keys): canaries of `auto` families, nobody else
        (("pipeline-wrist", *ONLINE), AUTO, DEVICE, ""),
        (("pipeline-wrist", *ONLINE), AUTO, "gateway-2", "not_approved"),
        (("pipeline-wrist", *ONLINE), FamilyPolicy("approve", (DEVICE,)), DEVICE, "not_approved"),
        # the offline targets key alone, or a director's, a root's: nothing
        (("targets",), AUTO, DEVICE, "untrusted"),
        (("director",), AUTO, DEVICE, "untrusted"),
        (("root1", "director"), AUTO, DEVICE, "untrusted"),
    ],
)
def test_forged_pipeline_output(
    tmp_path: Path, evil: tuple[Path, str], stolen: tuple[str, ...], policy: FamilyPolicy, device: str, code: str
) -> None:
    world = World(tmp_path / "world", policy)
    world.publish()
    thief = Thief(world.copy("attacked"), world.keys, stolen)
    thief.add("pipeline-wrist", *evil, version=9)
    thief.sign("pipeline-wrist")
    assert outcome(world, thief.folder, evil[1], Wish(device, 1)) == code


def test_a_stolen_publisher_cannot_approve_its_own_work(tmp_path: Path, evil: tuple[Path, str]) -> None:
    world = World(tmp_path / "world")
    world.publish()
    thief = Thief(world.copy("attacked"), world.keys, ("pipeline-wrist", *ONLINE))
    thief.add("pipeline-wrist", *evil, version=9)
    thief.put(thief.pipeline, approval_path(FAMILY, evil[1]), b"{}")
    thief.put(
        thief.pipeline, policy_path(FAMILY), b'{"canary": ["gateway-1"], "minimum_version": {}, "policy": "auto"}'
    )
    thief.sign("pipeline-wrist")
    assert outcome(world, thief.folder, evil[1]) == "not_approved"


def test_a_stolen_publisher_cannot_speak_for_another_family(tmp_path: Path, evil: tuple[Path, str]) -> None:
    world = World(tmp_path / "world", AUTO)
    world.keys.add_family("door")
    world.repository.set_policy("door", FamilyPolicy("auto", (DEVICE,)), now_s=NOW_S)
    thief = Thief(world.copy("attacked"), world.keys, ("pipeline-wrist", *ONLINE))
    data = (evil[0] / "manifest.json").read_bytes()
    thief.put(thief.pipeline, f"door/manifests/{evil[1]}", data, {"name": "wrist", "version": 9})
    thief.sign("pipeline-wrist")
    request = trust.Request(str(tmp_path / "cache"), str(world.root), "", NOW_S, {}, (("door", evil[1]),))
    with serving(thief.folder) as attacked:
        assert trust.consult(replace(request, repository=attacked.url)).manifests == {}


def test_a_stolen_publisher_cannot_hand_its_paths_to_a_role_of_its_own(
    tmp_path: Path, evil: tuple[Path, str]
) -> None:
    world = World(tmp_path / "world", AUTO)
    thief = Thief(world.copy("attacked"), world.keys, ("pipeline-wrist", *ONLINE))
    assert thief.targets.delegations is not None
    assert thief.targets.delegations.roles is not None
    delegations = copy.deepcopy(thief.targets.delegations)
    assert delegations.roles is not None
    sub = delegations.roles.pop("pipeline-wrist")
    sub.name = "sub"
    delegations.roles["sub"] = sub
    thief.add("pipeline-wrist", *evil, version=9)
    hidden = copy.deepcopy(thief.pipeline)
    thief.pipeline.targets, thief.pipeline.delegations = {}, delegations
    thief.write_role("sub", hidden, key="pipeline-wrist")
    thief.sign("pipeline-wrist")
    request = trust.Request(str(tmp_path / "cache"), str(world.root), "", NOW_S, {}, ((FAMILY, evil[1]),))
    with serving(thief.folder) as attacked:
        answer = trust.consult(replace(request, repository=attacked.url))
    assert answer.manifests[evil[1]]["role"] == ""  # TUF would follow; we do not
    with pytest.raises(Untrusted):
        accept(_candidate(answer, evil[1]), AUTO, Wish(DEVICE))


def test_targets_with_the_online_keys_can_do_everything_a_publisher_and_approver_can(
    tmp_path: Path, evil: tuple[Path, str]
) -> None:
    """Stated, not defended: this is why targets.pem is kept offline."""
    world = World(tmp_path / "world")
    thief = Thief(world.copy("attacked"), world.keys, ("targets", "pipeline-wrist", *ONLINE))
    thief.add("pipeline-wrist", *evil, version=9)
    thief.put(thief.targets, approval_path(FAMILY, evil[1]), b"{}")
    thief.sign("targets", "pipeline-wrist")
    assert outcome(world, thief.folder, evil[1]) == ""


def test_a_manifest_signed_by_targets_itself_is_not_a_pipelines(tmp_path: Path, evil: tuple[Path, str]) -> None:
    world = World(tmp_path / "world", AUTO)
    thief = Thief(world.copy("attacked"), world.keys, ("targets", *ONLINE))
    thief.add("targets", *evil, version=9)
    thief.sign("targets")
    assert outcome(world, thief.folder, evil[1]) == "untrusted"


@pytest.mark.parametrize(
    ("wish", "minimum", "code"),
    [
        (Wish(DEVICE, 1), 1, ""),  # forward, as signed
        (Wish(DEVICE, 2), 1, "downgrade"),  # again
        (Wish(DEVICE, 3), 1, "downgrade"),  # back, unsigned
        (Wish(DEVICE, 3, rollback=True), 1, ""),  # back, signed by a director
        (Wish(DEVICE, 3, rollback=True), 3, "below_minimum"),  # the same, below what targets allows
    ],
)
def test_a_stolen_director_chooses_among_signed_versions_not_below_the_minimum(
    tmp_path: Path, wish: Wish, minimum: int, code: str
) -> None:
    world = World(tmp_path / "world", FamilyPolicy("approve", (), {"wrist": minimum}))
    digest = world.publish(version=2)
    assert outcome(world, world.copy("same"), digest, wish) == code


@pytest.mark.parametrize("stolen", [("timestamp",), ONLINE])
def test_stolen_online_keys_cannot_bring_back_an_older_pipeline_state(
    tmp_path: Path, stolen: tuple[str, ...]
) -> None:
    world = World(tmp_path / "world", AUTO)
    digest = world.publish(version=1)
    old = world.copy("old")
    world.publish(version=2)
    thief = Thief(old, world.keys, stolen)
    thief.snapshot.version += 5
    thief.timestamp.version += 5
    thief.sign()
    assert outcome(world, old, digest, Wish(DEVICE, rollback=True)) == "untrusted"


def test_two_root_keys_are_everything_and_one_is_nothing(tmp_path: Path) -> None:
    """The threshold itself: a root signed by one key is refused."""
    world = World(tmp_path / "world", AUTO)
    digest = world.publish(version=1)
    attacked = world.copy("attacked")
    root: Metadata[Root] = Metadata.from_file(str(attacked / "metadata" / "1.root.json"))
    root.signed.version = 2
    root.signatures.clear()
    root.sign(CryptoSigner(world.keys.private("root1"), _key(root, world, "root1")))
    root.to_file(str(attacked / "metadata" / "2.root.json"))
    assert outcome(world, attacked, digest, Wish(DEVICE)) == "untrusted"
    root.sign(CryptoSigner(world.keys.private("root2"), _key(root, world, "root2")), append=True)
    root.to_file(str(attacked / "metadata" / "2.root.json"))
    assert outcome(world, attacked, digest, Wish(DEVICE)) == ""


def _key(root: Metadata[Root], world: World, name: str) -> SSlibKey:
    return root.signed.keys[key_id(world.keys.public(name))]
