"""What goes to one device class, written down: active model, fallbacks and floor as artifacts.

Decides nothing: what was chosen and measured comes in, `package` knows the format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.contract.artifact import Budget, Choice
from compressor import assess, evidence, package, select
from compressor.candidate import Candidate, Variant, Verdict
from compressor.evaluate import FaultLine
from compressor.recipe import DeviceClassTable, Recipe
from compressor.select import Lineup
from compressor.task import Role, Task


@dataclass(frozen=True, slots=True)
class Shipped:
    """What goes to one device class. `accuracy`: by artifact name, stream role.

    accuracy_new: the same on newcomers, with role, rows and what the first run had; empty in a first run.
    """

    device: DeviceClassTable
    lineup: Lineup
    faults: tuple[FaultLine, ...]
    accuracy: dict[str, float]
    accuracy_new: dict[str, Any]
    active_name: str
    watch: evidence.Watch

    @property
    def active(self) -> Candidate:
        return self.lineup.active

    @property
    def fallbacks(self) -> dict[str, Candidate]:
        return self.lineup.fallbacks

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        return self.lineup.verdicts

    @property
    def fallback_verdicts(self) -> tuple[Verdict, ...]:
        return self.lineup.fallback_verdicts


def floor_name(task: Task) -> str:
    return f"{task.service}-floor"


def write_artifacts(
    bench: assess.Bench, ship: Shipped, origin: package.Origin, folder: Path, parents: Mapping[str, str]
) -> None:
    """Write active, fallbacks and floor of one device class."""
    floor = floor_name(bench.task)
    plain = select.chosen(ship.verdicts).plain_reason
    order = (*ship.fallbacks, floor)
    active = artifact_of(
        bench,
        ship.active.variant,
        ship,
        origin,
        name=ship.active_name,
        fallbacks=order,
        reason=plain,
        watch=ship.watch,
        parent=parents.get(ship.active_name),
    )
    package.write_artifact(folder / ship.active_name, package.build_artifact(active))
    for verdict, (name, candidate) in zip(
        (v for v in ship.fallback_verdicts if v.chosen), ship.fallbacks.items(), strict=True
    ):
        content = artifact_of(
            bench, candidate.variant, ship, origin, name=name, fallbacks=(floor,), reason=verdict.plain_reason,
            watch=evidence.watch(bench, candidate.variant, detection_runs=0), parent=parents.get(name),
        )  # fmt: skip
        package.write_artifact(folder / name, package.build_artifact(content))
    package.write_artifact(
        folder / floor, package.build_artifact(floor_of(bench, ship, origin, parent=parents.get(floor)))
    )


def artifact_of(
    bench: assess.Bench, variant: Variant, ship: Shipped, origin: package.Origin, *, name: str,
    fallbacks: tuple[str, ...], reason: str, watch: evidence.Watch, parent: str | None = None,
) -> package.Content:  # fmt: skip
    """What an artifact with a model says."""
    recipe, device = bench.recipe, ship.device
    return package.Content(
        name=name,
        task=bench.task,
        package=recipe.package,
        origin=origin,
        budget=_budget(device, recipe),
        fallbacks=fallbacks,
        card=_card(bench, ship, origin, watch),
        choice=Choice(variant=variant.name, device_class=device.name, reason=reason),
        precision=variant.precision,
        reads=bench.task.channels_behind(variant.model.channels),
        model=variant.onnx,
        reference=watch.reference,
        golden=evidence.golden(bench, variant),
        scales=variant.scales,
        calibrator=recipe.quantise.calibrator,
        parent=parent,
    )


def floor_of(
    bench: assess.Bench, ship: Shipped, origin: package.Origin, *, parent: str | None = None
) -> package.Content:
    """The constant answer: each label's share of the training rows."""
    return package.Content(
        name=floor_name(bench.task),
        task=bench.task,
        package=bench.recipe.package,
        origin=origin,
        budget=_budget(ship.device, bench.recipe),
        fallbacks=(),
        card=_card(bench, ship, origin, None),
        choice=Choice(
            variant="class-prior", device_class=ship.device.name, reason="the answer when no model can give one"
        ),
        precision="constant",
        prior=evidence.class_prior(bench.task, bench.data),
        parent=parent,
    )


def _budget(device: DeviceClassTable, recipe: Recipe) -> Budget:
    return Budget(
        device_class=device.name,
        latency_p95_us=device.latency_p95_us,
        size_bytes=device.size_bytes,
        accuracy_drop=recipe.gates.accuracy_drop,
    )


def _card(
    bench: assess.Bench, ship: Shipped, origin: package.Origin, watch: evidence.Watch | None
) -> dict[str, object]:
    return package.make_card(
        accuracy=ship.accuracy,
        role=Role.STREAM,
        rows=len(bench.data.role(Role.STREAM)),
        faults=ship.faults,
        origin=origin,
        package=bench.recipe.package,
        device_class=ship.device.name,
        claim=watch.claim if watch else None,
        detectability=watch.detectability if watch else (),
        monitor=watch.monitor if watch else None,
        accuracy_new=ship.accuracy_new,
    )
