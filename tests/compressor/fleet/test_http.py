"""The device side over a real socket: what is served, what is taken, what is refused."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from compressor.fleet import http as device_side
from compressor.fleet.database import Database, devices, plans, timeline
from compressor.fleet.http import Doors
from compressor.fleet.samples import Shape
from compressor.fleet.tokens import hash_token, new_token
from tests.compressor.fleet.doubles import NOW, recording, wait_until

BLOB = bytes(range(256)) * 40
DIGEST = "ab" * 32


@dataclass
class Served:
    port: int
    database: Database
    folder: Path
    changes: list[int]
    now: float = NOW

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body=body, headers=headers or {})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def error(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, str]:
        status, _, answer = self.ask(method, path, body, headers)
        document = json.loads(answer)
        assert list(document) == ["error"]
        return status, document["error"]

    def ask_for_sample(self, name: str = "s1", *, max_bytes: int = 1 << 20) -> dict[str, str]:
        token = new_token()
        with self.database.writing() as tx:
            plans.add_sample(
                tx, id=name, device="w1", service="wrist", reference="r", decision=1, token_sha256=hash_token(token),
                max_bytes=max_bytes, asked_at=NOW,
            )  # fmt: skip
        return {"authorization": f"Bearer {token}"}

    def sample(self, name: str = "s1") -> Any:
        with self.database.reading() as tx:
            return plans.sample(tx, name)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    repository = tmp_path / "repository"
    (repository / "metadata").mkdir(parents=True)
    (repository / "targets" / "wrist" / "blobs").mkdir(parents=True)
    (repository / "metadata" / "timestamp.json").write_text("{}")
    (repository / "metadata" / "1.root.json").write_text('{"root": 1}')
    (repository / "targets" / "wrist" / "blobs" / f"{DIGEST}.{DIGEST}").write_bytes(BLOB)
    (tmp_path / "secret").write_text("no")
    (repository / "metadata" / "2.root.json").symlink_to(tmp_path / "secret")
    served = Served(0, Database(tmp_path / "host"), tmp_path, [])
    doors = Doors(
        database=served.database, repository=repository, uploads=tmp_path / "host" / "samples", fleet="demo",
        public_url=lambda: "http://host:1", max_samples_bytes=10 << 20,
        shape_of=lambda _service: Shape(length=128, channels=6, labels=7), on_change=lambda: served.changes.append(1),
        clock=lambda: served.now,
    )  # fmt: skip
    server = uvicorn.Server(uvicorn.Config(device_side.make_app(doors), port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    served.port = server.servers[0].sockets[0].getsockname()[1]
    yield served
    server.should_exit = True
    thread.join()
    served.database.close()


BLOB_PATH = f"/repository/targets/wrist/blobs/{DIGEST}.{DIGEST}"


def test_a_blob_comes_whole_in_ranges_and_for_ever(served: Served) -> None:
    status, headers, body = served.ask("GET", BLOB_PATH)
    assert (status, body) == (200, BLOB)
    assert headers["cache-control"] == "public, max-age=31536000, immutable"
    assert headers["accept-ranges"] == "bytes"
    status, headers, body = served.ask("GET", BLOB_PATH, headers={"range": "bytes=10000-"})
    assert (status, body, headers["content-range"]) == (206, BLOB[10000:], f"bytes 10000-{len(BLOB) - 1}/{len(BLOB)}")
    assert served.ask("GET", BLOB_PATH, headers={"range": "bytes=20000-"})[0] == 416
    assert served.ask("HEAD", BLOB_PATH)[1]["content-length"] == str(len(BLOB))


def test_a_range_of_a_blob_that_changed_meanwhile_is_the_whole_one(served: Served) -> None:
    status, _, body = served.ask("GET", BLOB_PATH, headers={"range": "bytes=5-", "if-range": '"other"'})
    assert (status, body) == (200, BLOB)


def test_the_timestamp_is_always_asked_for_and_versioned_metadata_never_again(served: Served) -> None:
    assert served.ask("GET", "/repository/metadata/timestamp.json")[1]["cache-control"] == "no-cache"
    assert "immutable" in served.ask("GET", "/repository/metadata/1.root.json")[1]["cache-control"]


@pytest.mark.parametrize(
    "path",
    [
        "/repository/metadata/../../secret", "/repository/metadata/%2e%2e/%2e%2e/secret", "/repository//etc/passwd",
        "/repository/metadata/2.root.json", "/repository/metadata/9.root.json", "/repository/lock",
        "/repository/targets/wrist/blobs/", "/repository/", "/nothing", "/repository/metadata/.hidden.json",
    ],
)  # fmt: skip
def test_nothing_outside_the_repository_is_served(served: Served, path: str) -> None:
    assert served.error("GET", path)[0] == 404


def test_an_asked_for_recording_is_taken_once(served: Served) -> None:
    headers = served.ask_for_sample()
    status, _, body = served.ask("PUT", "/samples/w1/s1", recording(12), headers)
    assert (status, json.loads(body)["rows"]) == (201, 12)
    kept = served.sample()
    assert (kept.state, kept.rows) == ("accepted", 12)
    assert Path(kept.path).read_bytes() == recording(12)
    assert served.changes
    assert served.error("PUT", "/samples/w1/s1", recording(12), headers)[0] == 409
    with served.database.reading() as tx:
        assert "recording accepted: 12 windows of 2 recordings" in timeline.newest(tx)[0].text


def test_of_two_uploads_at_once_the_first_that_is_whole_is_kept_as_it_came(served: Served) -> None:
    """A device that lost patience sends again while its first try is still being read."""
    headers, slow = served.ask_for_sample(), recording(18, seed=1)
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    connection.putrequest("PUT", "/samples/w1/s1")
    for name, value in {**headers, "content-length": str(len(slow))}.items():
        connection.putheader(name, value)
    connection.endheaders(slow[:1000])
    wait_until(lambda: served.sample().attempts == 1)
    assert served.ask("PUT", "/samples/w1/s1", recording(12), headers)[0] == 201
    connection.send(slow[1000:])
    assert connection.getresponse().status == 409
    connection.close()
    kept = served.sample()
    assert (kept.rows, Path(kept.path).read_bytes()) == (12, recording(12))
    assert [path.name for path in Path(kept.path).parent.iterdir()] == ["s1.npz"]


def test_without_the_token_of_this_request_nothing_is_taken(served: Served) -> None:
    headers = served.ask_for_sample()
    served.ask_for_sample("s2")
    assert served.error("PUT", "/samples/w1/s1", b"x")[0] == 401
    assert served.error("PUT", "/samples/w1/s1", b"x", {"authorization": "Bearer wrong"})[0] == 401
    assert served.error("PUT", "/samples/w2/s1", b"x", headers)[0] == 401
    assert served.error("PUT", "/samples/w1/s2", b"x", headers)[0] == 401
    assert served.error("PUT", "/samples/w1/unknown", b"x", headers)[0] == 401
    assert served.sample().attempts == 0


def test_an_upload_over_its_bound_is_cut_off_announced_or_not(served: Served) -> None:
    headers = served.ask_for_sample(max_bytes=1000)
    assert served.error("PUT", "/samples/w1/s1", b"x" * 1001, headers)[0] == 413
    status, text = served.error("PUT", "/samples/w1/s1", iter([b"x" * 600, b"x" * 600]), headers)
    assert (status, text) == (413, "a recording may have 1000 bytes")
    assert list((served.folder / "host" / "samples").glob("*")) == []


def test_a_poisoned_recording_is_refused_told_and_not_kept(served: Served) -> None:
    import numpy as np

    headers = served.ask_for_sample()
    poisoned = recording(windows=np.full((12, 128, 6), np.nan, np.float32))
    assert served.error("PUT", "/samples/w1/s1", poisoned, headers) == (
        400, "the recording holds values that are not finite",
    )  # fmt: skip
    assert served.sample().state == "rejected"
    assert list((served.folder / "host" / "samples").glob("*")) == []


def test_an_upload_that_breaks_off_can_be_tried_again_a_few_times(served: Served) -> None:
    headers = served.ask_for_sample()
    for tries in range(1, device_side.MAX_ATTEMPTS + 1):
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
        connection.putrequest("PUT", "/samples/w1/s1")
        for name, value in {**headers, "content-length": "5000"}.items():
            connection.putheader(name, value)
        connection.endheaders(b"half")
        connection.close()
        wait_until(lambda wanted=tries: served.sample().attempts == wanted)
    assert served.sample().state == "asked"
    assert served.error("PUT", "/samples/w1/s1", recording(), headers)[0] == 429


def test_the_host_holds_a_bounded_amount_of_recordings(served: Served) -> None:
    headers = served.ask_for_sample(max_bytes=11 << 20)
    assert served.error("PUT", "/samples/w1/s1", recording(), headers)[0] == 507


def test_enrolment_takes_a_token_once(served: Served) -> None:
    token = new_token()
    with served.database.writing() as tx:
        devices.add_token(tx, hash_token(token), "w9", now_s=NOW, lifetime_s=60)
    wish = json.dumps({"device": "w9", "token": token, "public_key": "cd" * 32})
    assert served.error("POST", "/enrol", wish.replace("w9", "w8"))[0] == 403
    status, _, body = served.ask("POST", "/enrol", wish)
    assert (status, json.loads(body)) == (
        200, {"fleet": "demo", "device": "w9", "repository": "http://host:1/repository"},
    )  # fmt: skip
    assert served.error("POST", "/enrol", wish.replace("cd", "ab"))[0] == 403
    with served.database.reading() as tx:
        assert devices.known(tx) == {"w9"}
        found = devices.find(tx, "w9")
    assert found is not None
    assert found.public_key == "cd" * 32


def test_a_device_whose_answer_was_lost_hears_it_again(served: Served) -> None:
    token, later = new_token(), new_token()
    with served.database.writing() as tx:
        devices.add_token(tx, hash_token(token), "w9", now_s=NOW, lifetime_s=60)
        devices.add_token(tx, hash_token(later), "w9", now_s=NOW, lifetime_s=60)

    def ask(token: str, key: str = "cd" * 32, device: str = "w9") -> tuple[int, bytes]:
        wish = json.dumps({"device": device, "token": token, "public_key": key})
        status, _, body = served.ask("POST", "/enrol", wish)
        return status, body

    def row() -> Any:
        with served.database.reading() as tx:
            return devices.find(tx, "w9"), timeline.last(tx)

    first = ask(token)
    before = row()
    served.now += 30
    assert (first[0], ask(token)) == (200, first)
    assert row() == before  # hearing it again changes nothing
    for other in (ask(token, "ab" * 32), ask(token, ""), ask(token, device="w8"), ask(new_token())):
        assert other[0] == 403
    assert ask(later, "ab" * 32)[0] == 200  # somebody gave the device a new key
    assert ask(token)[0] == 403  # what its old self was told is over
    served.now += 31
    assert ask(later, "ab" * 32)[0] == 403


def test_a_device_without_a_key_enrols_once(served: Served) -> None:
    token = new_token()
    with served.database.writing() as tx:
        devices.add_token(tx, hash_token(token), "w9", now_s=NOW, lifetime_s=60)
    wish = json.dumps({"device": "w9", "token": token})
    assert served.ask("POST", "/enrol", wish)[0] == 200
    assert served.error("POST", "/enrol", wish)[0] == 403


@pytest.mark.parametrize("body", ["", "{", "[]", '{"device": "W", "token": "0123456789abcdef"}', '{"device": "w1"}'])
def test_a_malformed_enrolment_is_refused(served: Served, body: str) -> None:
    assert served.error("POST", "/enrol", body)[0] == 400


def test_other_methods_and_large_bodies_are_refused(served: Served) -> None:
    assert served.error("DELETE", BLOB_PATH)[0] == 405
    assert served.error("POST", "/enrol", b"x" * 5000)[0] == 413
    assert served.ask("GET", "/healthz")[0] == 200


def test_cut_off_uploads_are_swept_and_recordings_stay(tmp_path: Path) -> None:
    for name in ("s1.npz", "s2.0a0a0a0a.part"):
        (tmp_path / name).write_bytes(b"x")
    device_side.sweep(tmp_path)
    device_side.sweep(tmp_path / "not there")
    assert [path.name for path in tmp_path.iterdir()] == ["s1.npz"]
