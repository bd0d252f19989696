"""May this device install that manifest? One pure rule; whose signatures there are was found out before.

    signed by pipeline-<family>                                     else Untrusted
    approved by targets, or policy `auto` and this device a canary  else NotApproved
    version at least the family's minimum for that name             else BelowMinimum
    newer than what is installed under that name, or a rollback     else Downgrade

So a stolen key can do this much at worst: director: choose among what others signed, not below the minimum;
pipeline (with the online keys): reach the canaries of `auto` families; snapshot or timestamp: withhold; targets
(with the online keys) or two root keys: everything. tests/agent/ota/test_stolen_keys.py plays each of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from agent.contract.errors import Incompatible, Untrusted
from agent.contract.repository import FamilyPolicy, pipeline_role
from agent.ota.errors import BelowMinimum, Downgrade, NotApproved


@dataclass(frozen=True, slots=True)
class Candidate:
    """A manifest somebody wants here. `signed_by`: the role its target was found in, "" = in none."""

    service: str
    engine: str
    digest: str
    name: str
    version: int
    signed_by: str
    approved: bool


@dataclass(frozen=True, slots=True)
class Wish:
    """Who wants it: this device, told by a director. `installed_version` 0 = nothing of that name is installed."""

    device: str
    installed_version: int = 0
    rollback: bool = False


def accept(candidate: Candidate, policy: FamilyPolicy | None, wish: Wish) -> None:
    """Return if the manifest may be installed. `policy` None: the family has none.

    Raises:
        Untrusted, NotApproved, BelowMinimum, Downgrade, Incompatible
    """
    what = f"'{candidate.name}' version {candidate.version} ({candidate.digest[:12]})"
    if candidate.signed_by != pipeline_role(candidate.service):
        raise Untrusted(
            f"{what} is signed by {candidate.signed_by or 'nobody'}, not by {pipeline_role(candidate.service)}"
        )
    if policy is None:
        raise Untrusted(f"{what}: the repository has no signed policy for the family '{candidate.service}'")
    if candidate.name != candidate.engine:
        raise Incompatible(f"{what} was asked for as engine '{candidate.engine}'")
    if not candidate.approved and not (policy.policy == "auto" and wish.device in policy.canary):
        raise NotApproved(
            f"{what} is not approved, and policy '{policy.policy}' does not let '{wish.device}' try it",
            hint="Approve it with the targets key: `edgewarden-compressor publish --approve`.",
        )
    check_version(candidate.name, candidate.version, policy, wish)


def check_version(name: str, version: int, policy: FamilyPolicy | None, wish: Wish) -> None:
    """The part of the rule that also holds for what is on the device already (the factory's artifacts).

    Raises:
        BelowMinimum, Downgrade
    """
    minimum = policy.minimum_version.get(name, 0) if policy else 0
    if version < minimum:
        raise BelowMinimum(f"'{name}' version {version} is below the allowed minimum {minimum}")
    if version <= wish.installed_version and not wish.rollback:
        raise Downgrade(
            f"'{name}' version {version} is not newer than version {wish.installed_version}, which is installed",
            hint="To go back, the director has to sign a rollback.",
        )
