"""The update half of an agent in one small process: table, installer and pointer, state on disk. Made to be killed.

python -m tests.agent.ota.agent_double STATE ROOT URL FACTORY DIGEST...
"""

from __future__ import annotations

import sys
from pathlib import Path

from agent.contract.artifact import open_artifact
from agent.decisions.lifecycle import RESTING, Lifecycle, Limits
from agent.decisions.updates import (
    Choice,
    Commit,
    DesiredArrived,
    Effect,
    PersistUpdate,
    Report,
    Restarted,
    Rollback,
    State,
    StepDone,
    StepFailed,
    Swap,
    Target,
    Tick,
    Update,
    UpdateCommand,
    digests,
    load_update,
)
from agent.ota.files import read_document, write_document
from agent.ota.installer import Installer, Site
from tests.agent.ota.world import DEVICE, FAMILY, LIMITS, NOW_S

RESTARTS = Limits(probation_s=0.0, restarts=1000, trial_restarts=1000, probation_restarts=1000, attempts=1000)


class AgentDouble:
    """Time stands still: what ends a try here is not its deadline but its work."""

    def __init__(self, state: Path, root: Path, factory: Path) -> None:
        digest = open_artifact(factory).digest
        self.installer = Installer(Site(DEVICE, state, root, factory={digest: factory}, trial_limits=LIMITS))
        self._file = state / "update.json"
        saved = read_document(self._file)
        installed = {FAMILY: Choice({"wrist": digest}, ("wrist",))}
        self.life = Lifecycle(RESTARTS, load_update(saved) if saved else Update(installed=installed))
        self._fresh = saved is None

    def run(self, target: Target) -> State:
        """To the end of the update."""
        effects = self._handled(DesiredArrived(target) if self._fresh else Restarted())
        while self.life.update.state not in RESTING or effects:
            while effects:
                effects = self._handled(self._executed(effects[-1]))
            effects = self._handled(Tick())
        return self.life.update.state

    def _handled(self, event: object) -> list[Effect]:
        commands: tuple[UpdateCommand, ...] = () if event is None else self.life.handle(event, NOW_S)  # type: ignore[arg-type]
        effects: list[Effect] = []
        for command in commands:
            match command:
                case PersistUpdate(state):
                    write_document(self._file, {**state, "steps": 0})  # a hundred kills are one try here
                case Report():
                    print(command.state, command.code, command.text, flush=True)  # noqa: T201 - its test reads this
                case _:
                    effects.append(command)
        self.life.update = load_update({**self.life.update.document(), "steps": 0})
        return effects

    def _executed(self, effect: Effect) -> StepDone | StepFailed | None:
        slots = self.installer.slots
        match effect:
            case Swap():
                slots.point(effect.target.services)
                return StepDone(effect.ticket)
            case Rollback():
                slots.point(effect.to)
                return StepDone(effect.ticket)
            case Commit():
                slots.collect(keep=digests(effect.previous))
                return None
            case _:
                return self.installer.execute(effect, installed=self.life.update.installed, wall_s=NOW_S)


def main(words: list[str]) -> None:
    state, root, url, factory, digest = words
    target = Target(1, {FAMILY: Choice({"wrist": digest}, ("wrist",))}, url)
    print(AgentDouble(Path(state), Path(root), Path(factory)).run(target), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
