"""Downloads against a real server that cuts, lies, ignores Range, refuses, never ends; and against a full disk."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.contract.errors import Corrupt, DiskFull, EdgewardenError, TooLarge, Unavailable
from agent.ota.download import Downloads, Wanted
from tests.agent.ota.server import Fault, Server, serving

BODY = bytes(range(256)) * 4000  # 1 MB
DIGEST = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "blob").write_bytes(BODY)
    with serving(tmp_path / "served") as server:
        yield server


@pytest.fixture
def downloads(tmp_path: Path) -> Downloads:
    return Downloads(tmp_path / "state", timeout_s=2.0, pause_s=0.01)


def wanted(server: Server, size: int = len(BODY), digest: str = DIGEST) -> Wanted:
    return Wanted(f"{server.url}/blob", digest, size)


def left(tmp_path: Path) -> list[str]:
    """Everything in the store."""
    return sorted(path.name for path in (tmp_path / "state").rglob("*") if path.is_file())


def test_a_blob_is_fetched_once(server: Server, downloads: Downloads) -> None:
    path = downloads.fetch(wanted(server))
    assert path.read_bytes() == BODY
    assert downloads.fetch(wanted(server)) == path
    assert downloads.statistics() == {"moved_bytes": len(BODY), "resumed": 0, "restarted": 0}
    assert len(server.asked) == 1


@pytest.mark.parametrize("cut", [1, 1000, 65536, 999_999, len(BODY) - 1])
def test_a_cut_download_goes_on_where_it_was_without_sending_a_byte_twice(
    server: Server, downloads: Downloads, cut: int
) -> None:
    server.faults = [Fault(cut_after=cut, times=1)]
    downloads.fetch(wanted(server))
    assert [asked.start for asked in server.asked] == [0, cut]
    assert server.sent() == downloads.moved_bytes == len(BODY)


def test_a_line_that_is_cut_again_and_again_gets_there_as_long_as_it_moves(
    server: Server, downloads: Downloads
) -> None:
    server.faults = [Fault(cut_after=100_000)]
    downloads.fetch(wanted(server))
    assert downloads.resumed == 10
    assert server.sent() == len(BODY)


def test_a_download_goes_on_in_another_process(server: Server, downloads: Downloads, tmp_path: Path) -> None:
    server.faults = [Fault(cut_after=300_000, times=1), Fault(status=503)]
    with pytest.raises(Unavailable):
        downloads.fetch(wanted(server))
    server.faults = []
    again = Downloads(tmp_path / "state")
    again.fetch(wanted(server))
    assert again.moved_bytes == len(BODY) - 300_000


def test_a_server_without_range_is_read_from_the_start(server: Server, downloads: Downloads) -> None:
    server.faults = [Fault(cut_after=400_000, times=1), Fault(ignore_range=True)]
    assert downloads.fetch(wanted(server)).read_bytes() == BODY
    assert downloads.restarted == 1
    assert downloads.moved_bytes == len(BODY) + 400_000


@pytest.mark.parametrize("status", [404, 403, 500, 503, 302])
def test_a_refusal_is_unavailable_after_a_few_tries(
    server: Server, downloads: Downloads, tmp_path: Path, status: int
) -> None:
    server.faults = [Fault(status=status)]
    with pytest.raises(Unavailable, match=str(status)):
        downloads.fetch(wanted(server))
    assert len(server.asked) == 3
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault(announce=10**9), TooLarge),
        (Fault(announce=1000, cut_after=1000), Corrupt),
        (Fault(extra=b"one byte more"), TooLarge),
        (Fault(endless=True), TooLarge),
        (Fault(body=b"x" * len(BODY)), Corrupt),
        (Fault(body=b"<html>log in first</html>"), Corrupt),
    ],
)
def test_a_lie_is_refused_and_leaves_nothing(
    server: Server, downloads: Downloads, tmp_path: Path, fault: Fault, error: type[EdgewardenError]
) -> None:
    server.faults = [fault]
    with pytest.raises(error):
        downloads.fetch(wanted(server))
    assert left(tmp_path) == []
    assert downloads.moved_bytes <= len(BODY) + 2 * 65536


def test_a_blob_that_was_replaced_between_two_parts_is_noticed(server: Server, downloads: Downloads) -> None:
    server.faults = [Fault(body=b"y" * len(BODY), cut_after=500_000, times=1)]
    with pytest.raises(Corrupt):
        downloads.fetch(wanted(server))
    assert downloads.fetch(wanted(server)).read_bytes() == BODY  # and the next try begins anew


def test_a_partial_file_longer_than_the_blob_is_thrown_away(
    server: Server, downloads: Downloads, tmp_path: Path
) -> None:
    (tmp_path / "state" / "partial" / DIGEST).write_bytes(BODY + b"?")
    assert downloads.fetch(wanted(server)).read_bytes() == BODY


def test_a_partial_file_beyond_what_the_server_has_is_thrown_away(
    server: Server, downloads: Downloads, tmp_path: Path
) -> None:
    (tmp_path / "state" / "partial" / DIGEST).write_bytes(b"z" * 500_000)
    server.faults = [Fault(status=416, times=1)]
    assert downloads.fetch(wanted(server)).read_bytes() == BODY


def test_a_finished_partial_file_needs_no_server(downloads: Downloads, tmp_path: Path) -> None:
    (tmp_path / "state" / "partial" / DIGEST).write_bytes(BODY)
    assert downloads.fetch(Wanted("http://127.0.0.1:1/blob", DIGEST, len(BODY))).read_bytes() == BODY
    assert downloads.moved_bytes == 0


def test_an_empty_blob_is_a_blob(downloads: Downloads) -> None:
    empty = Wanted("http://127.0.0.1:1/blob", hashlib.sha256(b"").hexdigest(), 0)
    assert downloads.fetch(empty).read_bytes() == b""


def test_nobody_there_is_unavailable(downloads: Downloads) -> None:
    with pytest.raises(Unavailable, match="cannot fetch"):
        downloads.fetch(Wanted("http://127.0.0.1:1/blob", DIGEST, len(BODY)))


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x", "http://[bad/x", "http://host:port/x"])
def test_other_addresses_are_not_asked(downloads: Downloads, url: str) -> None:
    with pytest.raises(Unavailable):
        downloads.fetch(Wanted(url, DIGEST, len(BODY)))


def test_a_server_that_says_nothing_is_given_up(server: Server, tmp_path: Path) -> None:
    server.faults = [Fault(silent=True)]
    with pytest.raises(Unavailable, match=r"timed out|too slow"):
        Downloads(tmp_path / "state", timeout_s=0.1, pause_s=0.01).fetch(wanted(server), deadline_s=0.05)


def test_a_cancelled_download_keeps_what_came(server: Server, downloads: Downloads, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="cancelled"):
        downloads.fetch(wanted(server), cancelled=lambda: downloads.moved_bytes > 200_000)
    kept = (tmp_path / "state" / "partial" / DIGEST).stat().st_size
    assert 200_000 < kept < len(BODY)
    downloads.fetch(wanted(server))
    assert server.asked[-1].start == kept


def test_what_is_not_wanted_any_more_is_forgotten(server: Server, downloads: Downloads, tmp_path: Path) -> None:
    (tmp_path / "state" / "partial" / "other").write_bytes(b"x")
    (tmp_path / "state" / "partial" / DIGEST).write_bytes(b"x")
    downloads.forget(keep=frozenset({DIGEST}))
    assert left(tmp_path) == [DIGEST]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Two megabytes of tmpfs."""
    place = tmp_path / "small"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)], capture_output=True)
    if made.returncode != 0:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_no_room_is_noticed_before_a_byte_is_asked(server: Server, small_disk: Path) -> None:
    downloads = Downloads(small_disk)
    with pytest.raises(DiskFull):
        downloads.fetch(wanted(server, size=5_000_000))
    assert server.asked == []


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_half_installed(
    server: Server, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads = Downloads(small_disk)
    monkeypatch.setattr("agent.ota.download.RESERVE_BYTES", -(10**9))  # somebody else takes the room in between
    (small_disk / "hog").write_bytes(b"h" * 1_300_000)
    with pytest.raises(DiskFull):
        downloads.fetch(wanted(server))
    assert [path.name for path in small_disk.rglob("*") if path.is_file()] == ["hog"]
    (small_disk / "hog").unlink()
    assert downloads.fetch(wanted(server)).read_bytes() == BODY


_FETCH = """
import sys
from pathlib import Path
from agent.ota.download import Downloads, Wanted
Downloads(Path(sys.argv[1])).fetch(Wanted(sys.argv[2], sys.argv[3], int(sys.argv[4])))
"""


@pytest.mark.system
def test_kill_at_random_moments_leaves_a_part_or_the_whole(server: Server, tmp_path: Path) -> None:
    blob = tmp_path / "state" / "blobs" / DIGEST
    arguments = [str(tmp_path / "state"), f"{server.url}/blob", DIGEST, str(len(BODY))]
    for round_ in range(10):
        started = len(server.asked)
        process = subprocess.Popen([sys.executable, "-c", _FETCH, *arguments])
        while len(server.asked) == started and process.poll() is None:
            time.sleep(0.002)
        time.sleep(round_ * 0.0005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if blob.exists():
            assert hashlib.sha256(blob.read_bytes()).hexdigest() == DIGEST
            blob.unlink()
    Downloads(tmp_path / "state").fetch(wanted(server))
    assert blob.read_bytes() == BODY
