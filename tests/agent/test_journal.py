import io
import json
import os

from agent.journal import BURST, Journal, Severity, choose_style, json_style, systemd_style, text_style


def test_a_line_is_time_severity_event_fields_and_a_sentence() -> None:
    stream = io.StringIO()
    journal = Journal(stream, style=text_style, clock=lambda: 0.25)
    journal.warning("worker.lost", "the worker\nwas killed", generation=2, reason="signal 9", share=0.5, empty="")
    assert stream.getvalue() == (
        '1970-01-01T00:00:00.250Z warning worker.lost generation=2 reason="signal 9" share=0.5'
        " | the worker was killed\n"
    )


def test_systemd_gets_the_severity_as_a_prefix_and_no_time() -> None:
    stream = io.StringIO()
    Journal(stream, style=systemd_style).say("error", "link.refused", "not authorized", code=135)
    assert stream.getvalue() == "<3>link.refused code=135 | not authorized\n"


def test_json_lines_hold_the_fields() -> None:
    stream = io.StringIO()
    Journal(stream, style=json_style, clock=lambda: 0.0).info("a.b", "text", n=1)
    assert json.loads(stream.getvalue()) == {
        "at": "1970-01-01T00:00:00.000Z", "severity": "info", "event": "a.b", "text": "text", "n": 1
    }  # fmt: skip


def test_below_the_least_severity_nothing_is_written_but_notices_are_kept() -> None:
    stream = io.StringIO()
    journal = Journal(stream, style=text_style, least=Severity.ERROR)
    journal.debug("a", "x")
    journal.info("b", "x")
    journal.notice("c", "x")
    assert stream.getvalue() == ""
    assert [line.event for line in journal.recent()] == ["c"]


def test_an_event_that_repeats_itself_is_limited_and_counted() -> None:
    stream, now = io.StringIO(), [0.0]
    journal = Journal(stream, style=text_style, clock=lambda: now[0])
    for _ in range(BURST + 5):
        journal.warning("same", "again")
    journal.warning("other", "once")
    assert stream.getvalue().count("same") == BURST
    assert "other" in stream.getvalue()
    assert journal.statistics()["suppressed"] == 5
    now[0] = 60.0
    journal.warning("same", "again")
    assert stream.getvalue().count("same") == BURST + 1


def test_a_closed_stream_does_not_stop_the_agent() -> None:
    stream = io.StringIO()
    stream.close()
    Journal(stream, style=text_style).error("a", "x")


def test_the_journal_is_recognised_by_its_descriptor() -> None:
    read, write = os.pipe()
    status = os.fstat(write)
    environment = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
    assert choose_style("auto", descriptor=write, environment=environment) is systemd_style
    assert choose_style("auto", descriptor=0, environment=environment) is text_style
    assert choose_style("text", descriptor=write, environment=environment) is text_style
    assert choose_style("json", descriptor=write, environment=environment) is json_style
    os.close(read)
    os.close(write)
    assert choose_style("auto", descriptor=write, environment=environment) is text_style
