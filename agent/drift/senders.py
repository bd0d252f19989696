"""What the inputs of one sender say when taken together: the same one again and again, or data at another rate.

A sensor's windows never repeat bit for bit; a buffer that nobody fills any more does. Views stand for inputs: a view
of float32 numbers is the same bits where the input was, and as good as never where it was not, so the worker spends
nothing on the comparison. A sender is a stream, or a client that gives its data time; all others count as one, whose
rows may come from up to REMEMBERED senders in turn. Retries and doubled requests repeat an input now and then; only
REPEATS in a row mean anything.

The rate: over SPAN requests the data's time must advance by one hop for each window. Both halves of the history must
agree on how far it is off, which a pause, a gap or a restart does not do. A stream whose samples do not fit their
time is brought to its rate by making up or dropping samples; doing so for PATCHED_ROWS windows in a row is the same
fault.

Knows nothing of channels (`counters`) or of what is done about a finding. Mutable, owned by one thread.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from agent.drift.findings import Finding

KINDS: Final = ("repeated", "rate")
REMEMBERED: Final = 8
REPEATS: Final = 8
SPAN: Final = 16
PATCHED_ROWS: Final = 8
TOLERANCE: Final = 0.1  # of the rate; a timestamp that jitters by a whole hop is off by 1/16 over a span
CLEAR_ROWS: Final = 8
MAX_SENDERS: Final = 64
FORGOTTEN_ROWS: Final = 1024  # of all senders together; whoever was silent for so long has left
_MASK: Final = (1 << REPEATS) - 1


@dataclass(slots=True)
class _Sender:
    newest_row: int = 0
    seen: deque[bytes] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    repeats: int = 0  # bit 0 = its newest row was one
    windows: int = 0
    request: int = -1  # of its newest window
    times_s: deque[float] = field(default_factory=lambda: deque(maxlen=2 * SPAN + 1))  # first window of each request
    begun_at: deque[int] = field(default_factory=lambda: deque(maxlen=2 * SPAN + 1))  # windows before it
    patched: int = 0  # rows in a row
    right: int = 0  # rows in a row
    ratio: float = math.nan  # how fast its time goes, 1 = as it should
    odd: set[str] = field(default_factory=set)


class SenderCounters:
    """Follows the senders of one service."""

    def __init__(self, hop_s: float) -> None:
        """`hop_s`: from one window to the next; 0 = nobody says, and no rate is judged."""
        self._hop_s = hop_s
        self._senders: OrderedDict[int, _Sender] = OrderedDict()
        self._rows = 0
        self._odd = dict.fromkeys(KINDS, 0)  # senders by kind
        self.repeated = 0
        """Rows that repeated one of the last of their sender."""

    def update(
        self, source: int, *, view: bytes = b"", time_s: float = math.nan, patched: bool = False, request: int = -1
    ) -> tuple[Finding, ...]:
        """One row -> what began or ended, usually nothing.

        `source`: the sender's number, 0 = unknown. `view`: its bits; empty = there is none, or what is wrong with it
        is known. `time_s`: its data time; NaN = none. `patched`: its samples' time did not fit, and some
        were made up or left out. `request`: tells apart the requests that windows came in, -1 = each in its own.
        """
        before = dict(self._odd)
        sender = self._of(source)
        if view:
            self._compare(sender, view)
        if self._hop_s and not math.isnan(time_s):
            self._time(sender, time_s, request, patched=patched)
        return () if before == self._odd else tuple(self._edges(before, sender))

    def statistics(self) -> dict[str, int]:
        """Kind -> senders that are odd now."""
        return dict(self._odd)

    def state(self) -> dict[str, Any]:
        """What a restart needs, as JSON: who is odd. Histories begin anew."""
        return {str(source): sorted(one.odd) for source, one in self._senders.items() if one.odd}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        for source, kinds in list(state.items())[:MAX_SENDERS]:
            sender = self._of(int(source))
            for kind in KINDS if self._hop_s else KINDS[:1]:
                self._mark(sender, kind, odd=kind in kinds)
            sender.repeats = _MASK if "repeated" in sender.odd else 0

    def _of(self, source: int) -> _Sender:
        self._rows += 1
        sender = self._senders.get(source)
        if sender is None:
            sender = self._senders[source] = _Sender()
        sender.newest_row = self._rows
        self._senders.move_to_end(source)
        oldest = next(iter(self._senders.values()))
        if len(self._senders) > MAX_SENDERS or self._rows - oldest.newest_row > FORGOTTEN_ROWS:
            _, left = self._senders.popitem(last=False)
            for kind in tuple(left.odd):
                self._mark(left, kind, odd=False)
        return sender

    def _mark(self, sender: _Sender, kind: str, *, odd: bool) -> None:
        if odd != (kind in sender.odd):
            (sender.odd.add if odd else sender.odd.discard)(kind)
            self._odd[kind] += 1 if odd else -1

    def _compare(self, sender: _Sender, view: bytes) -> None:
        again = view in sender.seen
        sender.seen.append(view)
        sender.repeats = (sender.repeats << 1 | again) & _MASK
        self.repeated += again
        if sender.repeats in (0, _MASK):
            self._mark(sender, "repeated", odd=sender.repeats == _MASK)

    def _time(self, sender: _Sender, time_s: float, request: int, *, patched: bool) -> None:
        sender.windows += 1
        sender.patched = sender.patched + 1 if patched else 0
        if request == sender.request >= 0:
            return  # within a request times are reckoned from the rate that should be
        sender.request = request
        if sender.times_s and time_s < sender.times_s[-1]:  # it began anew
            sender.times_s.clear()
            sender.begun_at.clear()
        sender.times_s.append(time_s)
        sender.begun_at.append(sender.windows)
        wrong, right = self._judge(sender)
        if wrong or sender.patched >= PATCHED_ROWS:
            self._mark(sender, "rate", odd=True)
            sender.ratio = self._ratio(sender, -1 - SPAN, -1) if wrong else math.nan
        sender.right = sender.right + 1 if right and not patched else 0
        if sender.right >= CLEAR_ROWS:
            self._mark(sender, "rate", odd=False)

    def _judge(self, sender: _Sender) -> tuple[bool, bool]:
        """(two spans agree that the rate is another, the newest span is as it should be)."""
        if len(sender.times_s) <= SPAN:
            return False, False
        later = self._ratio(sender, -1 - SPAN, -1)
        right = abs(later - 1.0) <= TOLERANCE
        if right or len(sender.times_s) <= 2 * SPAN:
            return False, right
        earlier = self._ratio(sender, 0, SPAN)
        off = abs(earlier - 1.0) > TOLERANCE
        return off and abs(later - earlier) <= TOLERANCE * max(later, earlier), False

    def _ratio(self, sender: _Sender, first: int, last: int) -> float:
        """How fast the data's time went between two requests; 1 = as it should."""
        hops = sender.begun_at[last] - sender.begun_at[first]
        return (sender.times_s[last] - sender.times_s[first]) / (hops * self._hop_s)

    def _edges(self, before: dict[str, int], sender: _Sender) -> Iterator[Finding]:
        now = self._odd
        for kind in KINDS:
            if now[kind] and not before[kind]:
                yield self._began(kind, sender)
            elif before[kind] and not now[kind]:
                text = {"repeated": "inputs no longer repeat", "rate": "the data's time goes at its rate again"}[kind]
                yield Finding(kind, raised=False, text=f"{text}: {CLEAR_ROWS} rows in a row")

    def _began(self, kind: str, sender: _Sender) -> Finding:
        if kind == "repeated":
            numbers = {"rows": float(REPEATS), "rows_since_change": float(REPEATS)}
            return Finding(
                kind, raised=True, numbers=numbers, text=f"the last {REPEATS} inputs repeat earlier ones bit for bit"
            )
        if math.isnan(sender.ratio):
            text = f"samples were made up or left out by their time in {PATCHED_ROWS} windows in a row"
            return Finding(
                kind, raised=True, numbers={"rows": float(PATCHED_ROWS), "rows_since_change": float(PATCHED_ROWS)},
                text=f"{text}: they come at another rate than the model's",
            )  # fmt: skip
        hop_s = sender.ratio * self._hop_s
        return Finding(
            kind, raised=True, numbers={"rows": 2.0 * SPAN, "ratio": sender.ratio, "hop_s": hop_s},
            text=f"windows follow each other every {hop_s:.4g} s of the data's time, not every {self._hop_s:.4g} s",
        )  # fmt: skip
