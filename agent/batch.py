"""Answers a list of files, several at once if wanted: one that cannot be answered does not stop the others.

Who is asked is given; what becomes of the answers is the caller's.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from agent.clock import sleep
from agent.contract.errors import Disconnected, EdgewardenError, Overloaded
from agent.contract.tensors import Array
from agent.inputs import Wanted, are_rows, read_inputs, rows
from agent.outputs import Piece

ROWS_AT_ONCE = 64
MAX_ASKED = 4  # times one request is asked when the server says that it is full and when to come again
LONGEST_WAIT_S = 5.0


class Asker(Protocol):
    """Answers one request at a time."""

    def ask(self, inputs: dict[str, Array]) -> Piece:
        """Raises: EdgewardenError: it cannot be answered."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class FileResult:
    """What became of one file: its answers in order, or the error."""

    file: Path
    pieces: tuple[Piece, ...] = ()
    error: EdgewardenError | None = None


class Batch:
    """One run over files. `advance` is told, from any thread, which share of a file was done."""

    def __init__(
        self, wanted: Sequence[Wanted], make_asker: Callable[[], Asker], *, advance: Callable[[float], None]
    ) -> None:
        self._wanted = wanted
        self._make_asker = make_asker
        self._advance = advance
        self._local = threading.local()
        self._askers: list[Asker] = []
        self._stopped = threading.Event()
        self._broken = Disconnected("stopped")  # why nothing more is answered

    def run(self, files: Sequence[Path], *, concurrency: int = 1) -> Iterator[FileResult]:
        """Results in the order of `files`; a result that nobody takes is waited with.

        Raises:
            Disconnected: there is nobody to ask any more.
        """
        try:
            if concurrency == 1:
                yield from map(self._answer, files)
            else:
                yield from self._side_by_side(files, concurrency)
        finally:
            self._stopped.set()
            for asker in self._askers:
                asker.close()

    def _side_by_side(self, files: Sequence[Path], concurrency: int) -> Iterator[FileResult]:
        executor = ThreadPoolExecutor(concurrency, "batch")
        under_way: deque[Future[FileResult]] = deque()
        try:
            for file in files:
                under_way.append(executor.submit(self._answer, file))
                if len(under_way) >= 2 * concurrency:  # results are held in memory until their turn
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            self._stopped.set()
            executor.shutdown(cancel_futures=True)

    def _answer(self, file: Path) -> FileResult:
        pieces: list[Piece] = []
        try:
            inputs = read_inputs(file, self._wanted)
            batched = are_rows(self._wanted)
            total = len(next(iter(inputs.values()))) if batched else 1
            for piece in rows(inputs, ROWS_AT_ONCE) if batched else [inputs]:
                if self._stopped.is_set():
                    raise self._broken
                count = len(next(iter(piece.values()))) if batched else None
                pieces.append(replace(self._ask(piece), rows=count))
                self._advance((count or 1) / total)
        except Disconnected as error:
            if not self._stopped.is_set():
                self._broken = error
                self._stopped.set()
            raise
        except EdgewardenError as error:
            self._advance(1.0)
            return FileResult(file, error=error)
        return FileResult(file, tuple(pieces))

    def _ask(self, inputs: dict[str, Array]) -> Piece:
        asker: Asker | None = getattr(self._local, "asker", None)
        if asker is None:
            asker = self._local.asker = self._make_asker()
            self._askers.append(asker)
        for _ in range(MAX_ASKED - 1):
            try:
                return asker.ask(inputs)
            except Overloaded as error:
                if error.retry_after_s is None:
                    raise
                sleep(min(error.retry_after_s, LONGEST_WAIT_S))
        return asker.ask(inputs)
