import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent import samples
from agent.contract.errors import ArtifactError, Unavailable, Untrusted
from agent.samples import deliver, find_recording, upload

SHAPE = (16, 3)


def save(path: Path, rows: int = 5, **changes: Any) -> Path:
    arrays: dict[str, Any] = {
        "windows": np.ones((rows, *SHAPE), np.float32), "labels": np.zeros(rows, np.int64),
        "recordings": np.zeros(rows, np.int64),
    }  # fmt: skip
    np.savez(path, **{name: value for name, value in (arrays | changes).items() if value is not None})
    return path


def test_the_newest_recording_is_found(tmp_path: Path) -> None:
    import os

    for number, name in enumerate(("new", "old")):
        os.utime(save(tmp_path / f"{name}.npz", rows=4 + number), (1000 - number, 1000 - number))
    (tmp_path / "notes.txt").write_text("no recording")
    (tmp_path / "link.npz").symlink_to(tmp_path / "old.npz")
    found = find_recording(tmp_path, max_bytes=10**6, shape=SHAPE)
    assert (found.path.name, found.rows, found.size_bytes) == ("new.npz", 4, (tmp_path / "new.npz").stat().st_size)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"windows": np.full((5, *SHAPE), np.nan, np.float32)}, "corrupt"),
        ({"windows": np.full((5, *SHAPE), np.inf, np.float32)}, "corrupt"),
        ({"windows": np.ones((5, 8, 3), np.float32)}, "corrupt"),
        ({"windows": np.ones((5, 3), np.float32)}, "corrupt"),
        ({"windows": np.ones((0, *SHAPE), np.float32)}, "corrupt"),
        ({"windows": np.array([{"a": 1}] * 5, dtype=object)}, "corrupt"),
        ({"windows": np.zeros((5, 2000, 3), np.float32)}, "corrupt"),
        ({"labels": np.zeros(4, np.int64)}, "corrupt"),
        ({"labels": np.zeros(5)}, "corrupt"),
        ({"recordings": None}, "corrupt"),
        ({"windows": np.ones((9000, *SHAPE), np.float32)}, "too_large"),
    ],
)
def test_what_is_not_a_sound_recording_never_leaves(tmp_path: Path, changes: dict[str, Any], code: str) -> None:
    save(tmp_path / "a.npz", **changes)
    with pytest.raises(ArtifactError) as caught:
        find_recording(tmp_path, max_bytes=200_000, shape=SHAPE)
    assert caught.value.code == code


def test_a_file_that_unpacks_to_far_more_is_refused_unread(tmp_path: Path) -> None:
    rows = 100_000
    np.savez_compressed(
        tmp_path / "bomb.npz", windows=np.zeros((rows, *SHAPE), np.float32), labels=np.zeros(rows, np.int64),
        recordings=np.zeros(rows, np.int64),
    )  # fmt: skip
    with pytest.raises(ArtifactError, match="unpacks to more"):
        find_recording(tmp_path, max_bytes=10**6, shape=SHAPE)


def test_an_empty_or_missing_folder_is_unavailable(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(Unavailable, match="no recording"):
            find_recording(folder, max_bytes=10**6)


class Host(BaseHTTPRequestHandler):
    got: tuple[str, str, bytes] = ("", "", b"")
    status = 201

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).got = (self.path, self.headers["Authorization"], body)
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(b'{"rows": 5}' if self.status == 201 else b'{"error": "no"}')

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def host() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Host) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_recording_is_put_with_its_token(tmp_path: Path, host: str) -> None:
    path = save(tmp_path / "a.npz")
    Host.status = 201
    recording = find_recording(tmp_path, max_bytes=10**6)
    assert upload(recording, f"{host}/samples/d/1", "secret")["rows"] == 5
    assert Host.got == ("/samples/d/1", "Bearer secret", path.read_bytes())


@pytest.mark.parametrize(("status", "kind"), [(401, Untrusted), (413, Untrusted), (503, Unavailable)])
def test_a_host_that_says_no_is_told(tmp_path: Path, host: str, status: int, kind: type[Exception]) -> None:
    save(tmp_path / "a.npz")
    Host.status = status
    with pytest.raises(kind, match=f"answered {status}.*no"):
        upload(find_recording(tmp_path, max_bytes=10**6), f"{host}/samples/d/1", "secret")


def test_a_host_that_is_away_for_a_moment_still_gets_the_recording_and_one_that_refuses_is_not_pressed(
    tmp_path: Path, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "a.npz")
    recording = find_recording(tmp_path, max_bytes=10**6)
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        Host.status = 201 if len(pauses) == 3 else 503

    monkeypatch.setattr(samples, "sleep", pause)
    Host.status = 503
    assert deliver(recording, f"{host}/samples/d/1", "secret")["rows"] == 5
    assert pauses == [2.0, 6.0, 18.0]
    Host.status = 401
    with pytest.raises(Untrusted):
        deliver(recording, f"{host}/samples/d/1", "secret")
    with pytest.raises(Unavailable):
        deliver(recording, "http://127.0.0.1:1/x", "secret", patience_s=1.0)
    assert len(pauses) == 3


def test_an_address_that_is_none_or_nobody_answers_is_unavailable(tmp_path: Path) -> None:
    save(tmp_path / "a.npz")
    recording = find_recording(tmp_path, max_bytes=10**6)
    for url in ("file:///etc/passwd", "ftp://h/x", "http://127.0.0.1:1/x", "nonsense"):
        with pytest.raises(Unavailable):
            upload(recording, url, "secret")
