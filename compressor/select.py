"""Which candidate ships to which device class, and why, in sentences.

Pure. Never chooses an 8 bit file that is not faster than its float parent. The choice rests on accuracies and
sizes, which are the same in every run; measured times only admit or refuse, with a margin, so that two runs on
one machine choose alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compressor.candidate import Candidate, Gate, Verdict
from compressor.errors import GateFailed
from compressor.gates import class_gates, failed, refuse
from compressor.recipe import DeviceClassTable, SelectTable

RANK = "varied"


@dataclass(frozen=True, slots=True)
class Lineup:
    """What was chosen for one device class. `fallbacks`: by artifact name, best first."""

    verdicts: tuple[Verdict, ...]
    active: Candidate
    fallbacks: dict[str, Candidate]
    fallback_verdicts: tuple[Verdict, ...]


def choose_lineup(
    candidates: Sequence[Candidate], device: DeviceClassTable, rules: SelectTable, *, service: str,
    kept: Sequence[Candidate] = (),
) -> Lineup:  # fmt: skip
    """Active model and fallbacks of one device class. `kept`: fallbacks that stay where no candidate passes.

    Raises:
        GateFailed
    """
    ranked = [one for one in candidates if one.variant.model.role != "fallback"]
    verdicts = choose(ranked, device, rules, kind="model")
    fallbacks: dict[str, Candidate] = {}
    told: list[Verdict] = []
    spare = [one for one in candidates if one.variant.model.role == "fallback"]
    for name in dict.fromkeys(one.variant.model.name for one in spare):
        own = [one for one in spare if one.variant.model.name == name]
        former = next((one for one in kept if one.variant.model.name == name), None)
        made = _fallback(own, former, device, rules)
        told += made
        fallbacks[f"{service}-{name}"] = _named([*own, *kept], chosen(made).candidate)
    return Lineup(verdicts, _named(ranked, chosen(verdicts).candidate), fallbacks, tuple(told))


def _fallback(
    own: Sequence[Candidate], former: Candidate | None, device: DeviceClassTable, rules: SelectTable
) -> tuple[Verdict, ...]:
    try:
        return choose(own, device, rules, kind="fallback")
    except GateFailed:
        if former is None:
            raise
    slower = _all_slower(own, rules)
    refused = [
        Verdict(one.name, device.name, False, _refusals(failed(gates)) or slower[one.name].text, "", gates)  # noqa: FBT003
        for one in own
        for gates in (_gates(one, device),)
    ]
    why = "kept as it was: no successor passes every gate"
    return (*refused, Verdict(former.name, device.name, True, why, why))  # noqa: FBT003


def _named(candidates: Sequence[Candidate], name: str) -> Candidate:
    return next(candidate for candidate in candidates if candidate.name == name)


def choose(
    candidates: Sequence[Candidate], device: DeviceClassTable, rules: SelectTable, *, kind: str
) -> tuple[Verdict, ...]:
    """One verdict for each candidate; exactly one is chosen. `kind` names them in errors: "model", "fallback".

    Raises:
        GateFailed: no candidate passes every gate of this device class.
    """
    gates = {candidate.name: _gates(candidate, device) for candidate in candidates}
    slower = _all_slower(candidates, rules)
    eligible = [c for c in candidates if not failed(gates[c.name]) and c.name not in slower]
    if not eligible:
        raise refuse(device, kind, tuple(candidates), slower={name: found.gate for name, found in slower.items()})
    left_out = [c.name for c in candidates if not failed(gates[c.name]) and c.name in slower]
    winner = _best(eligible, device, rules)
    verdicts = []
    for candidate in candidates:
        chosen = candidate is winner
        if chosen:
            reason, plain = _why_chosen(candidate, eligible, left_out, device, rules)
        else:
            reason, plain = _why_not(candidate, winner, gates[candidate.name], slower, device, rules), ""
        verdicts.append(Verdict(candidate.name, device.name, chosen, reason, plain, gates[candidate.name]))
    return tuple(verdicts)


def chosen(verdicts: Sequence[Verdict]) -> Verdict:
    return next(verdict for verdict in verdicts if verdict.chosen)


def pareto_front(candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """Names of the candidates no other one beats in accuracy, latency and size at once."""
    return tuple(c.name for c in candidates if not any(_dominates(other, c) for other in candidates))


def _dominates(left: Candidate, right: Candidate) -> bool:
    pairs = (
        (-left.accuracy[RANK], -right.accuracy[RANK]),
        (left.latency.cpu_p20_us, right.latency.cpu_p20_us),
        (left.variant.size_bytes, right.variant.size_bytes),
    )
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _gates(candidate: Candidate, device: DeviceClassTable) -> tuple[Gate, ...]:
    return candidate.gates + class_gates(
        device, latency_us=candidate.latency.cpu_p20_us, size_bytes=candidate.variant.size_bytes
    )


@dataclass(frozen=True, slots=True)
class _Slower:
    """An 8 bit variant that is not clearly faster than its float parent."""

    candidate: Candidate
    parent: Candidate
    min_speedup: float

    @property
    def gate(self) -> Gate:
        limit_us = self.parent.latency.cpu_p20_us / self.min_speedup
        return Gate("speed", self.candidate.latency.cpu_p20_us, limit_us, "us of CPU per row")

    @property
    def text(self) -> str:
        mine_us, theirs_us = self.candidate.latency.cpu_p20_us, self.parent.latency.cpu_p20_us
        smaller = "smaller, but " if self.candidate.variant.size_bytes < self.parent.variant.size_bytes else ""
        if mine_us > theirs_us:
            how = f"slower than its float parent by {_percent(mine_us / theirs_us - 1)}"
        else:
            how = f"not faster than its float parent by {_percent(self.min_speedup - 1)}"
        return f"{smaller}{how}: not shipped ({mine_us:.1f} against {theirs_us:.1f} us of CPU)"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "less than 1 %"


def _all_slower(candidates: Sequence[Candidate], rules: SelectTable) -> dict[str, _Slower]:
    return {c.name: found for c in candidates if (found := _slower(c, candidates, rules))}


def _slower(candidate: Candidate, candidates: Sequence[Candidate], rules: SelectTable) -> _Slower | None:
    if candidate.variant.precision == "float32":
        return None
    parents = [
        c for c in candidates
        if c.variant.model.name == candidate.variant.model.name and c.variant.precision == "float32"
    ]  # fmt: skip
    if not parents or candidate.latency.cpu_p20_us * rules.min_speedup <= parents[0].latency.cpu_p20_us:
        return None
    return _Slower(candidate, parents[0], rules.min_speedup)


def _best(eligible: Sequence[Candidate], device: DeviceClassTable, rules: SelectTable) -> Candidate:
    if device.prefer == "size":
        return min(eligible, key=lambda c: (c.variant.size_bytes, -c.accuracy[RANK], c.name))
    top = max(c.accuracy[RANK] for c in eligible)
    equals = [c for c in eligible if c.accuracy[RANK] >= top - rules.tie]
    return min(equals, key=lambda c: (c.variant.size_bytes, -c.accuracy[RANK], c.name))


def _why_chosen(
    winner: Candidate, eligible: Sequence[Candidate], left_out: Sequence[str], device: DeviceClassTable,
    rules: SelectTable,
) -> tuple[str, str]:  # fmt: skip
    """(sentence with measured times, sentence without). `left_out`: within budget, refused for speed."""
    budget = f"within the budget of '{device.name}'"
    if left_out:
        parents = "its float parent" if len(left_out) == 1 else "their float parents"
        budget += f", {', '.join(left_out)} left aside (not clearly faster than {parents})"
    if len(eligible) == 1:
        plain = f"the only candidate {budget}"
    elif device.prefer == "size":
        plain = f"the smallest of {len(eligible)} candidates {budget}"
    else:
        top = max(c.accuracy[RANK] for c in eligible)
        if winner.accuracy[RANK] >= top:
            plain = f"the most accurate of {len(eligible)} candidates {budget}"
        else:
            plain = f"the smallest of those within {rules.tie:g} of the most accurate {budget}"
    facts = f"accuracy {_share(winner.accuracy[RANK])} over harmless variations, {winner.variant.size_bytes:,} bytes"
    return f"{plain}: {facts}, {winner.latency.cpu_p20_us:.0f} us of CPU", f"{plain}: {facts}"


def _why_not(
    candidate: Candidate, winner: Candidate, gates: tuple[Gate, ...], slower: dict[str, _Slower],
    device: DeviceClassTable, rules: SelectTable,
) -> str:  # fmt: skip
    if broken := failed(gates):
        return _refusals(broken)
    if candidate.name in slower:
        return slower[candidate.name].text
    if device.prefer == "size":
        return f"larger than '{winner.name}' ({candidate.variant.size_bytes:,} against {winner.variant.size_bytes:,})"
    difference = winner.accuracy[RANK] - candidate.accuracy[RANK]
    if difference > rules.tie:
        return f"less accurate than '{winner.name}' by {difference:.3f}"
    if candidate.variant.size_bytes > winner.variant.size_bytes:
        return f"not clearly more accurate than '{winner.name}', but larger ({candidate.variant.size_bytes:,} bytes)"
    return f"less accurate than '{winner.name}' by {difference:.4f}, and below the best by more than {rules.tie:g}"


def _refusals(gates: Sequence[Gate]) -> str:
    return "; ".join(_refusal(gate) for gate in gates)


def _refusal(gate: Gate) -> str:
    relation = "below" if gate.at_least else "above"
    unit = f" {gate.unit}" if gate.unit else ""
    return f"{gate.name} {figure(gate.measured)}{unit} is {relation} {figure(gate.limit)}"


def _share(accuracy: float) -> str:
    """As tables have it: reports keep four digits, of which people are shown three."""
    return f"{round(accuracy, 4):.3f}"


def figure(value: float) -> str:
    """A number for people: whole from a thousand on, else four digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
