"""What is written where: traces of hot events, the log of rare ones, and the catalogue of both."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import structlog
from structlog.testing import LogCapture, capture_logs

import mmunotify as mn
from mmunotify import log
from recorders import Atomic, Deferred, Sleepable, Stop
from steps import settle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

pytestmark = pytest.mark.usefixtures("both_forms")


OF_THE_CORE = {name: spec for name, spec in log.CATALOGUE.items() if name in vars(log).values()}
"""Without those of plugins, which other tests may have imported."""


def page(number: int = 1) -> mn.Range:
    return mn.Range(number << 12, number + 1 << 12)


def explode() -> None:
    raise OSError("no such device")


def check_against_catalogue(lines: Iterable[Mapping[str, object]]) -> None:
    """Each line is a flat object of a known event with keys of that event's."""
    for line in lines:
        spec = log.CATALOGUE[str(line["event"])]
        assert set(line) - {"event", "seq", "ts_ns", "log_level"} <= set(spec.keys)
        assert {"seq", "ts_ns"} <= set(line)
        if "log_level" in line:
            assert line["log_level"] == spec.level
        for value in line.values():
            assert not isinstance(value, dict)


# ------------------------------------------------------------------ traces


async def traced(
    *drivers: mn.AnyDriver, listen: Callable[[log.Record], object] | None = None
) -> tuple[mn.Notifiers[mn.RwSems], mn.Ring]:
    notifiers = mn.Notifiers(name="mm[1]")
    for driver in drivers:
        await notifiers.register(driver)
    ring = mn.Ring()
    notifiers.trace = listen or ring.append
    return notifiers, ring


def shape(ring: mn.Ring) -> list[tuple[str | None, str]]:
    """Who and which phase; None is the section."""
    return [(record.callback, record.phase) for record in ring]


async def test_nothing_is_recorded_while_nobody_listens() -> None:
    notifiers, ring = await traced(Atomic("a"))
    notifiers.trace = None
    await notifiers.invalidate(page())
    assert len(ring) == 0
    assert notifiers.trace is None


async def test_a_section_and_its_callbacks_are_spans_inside_each_other() -> None:
    notifiers, ring = await traced(Sleepable("s"))
    async with notifiers.invalidating(mn.Range(0x1000, 0x3000, mn.Event.CLEAR)):
        pass
    records = list(ring)
    assert shape(ring) == [
        (None, "start"),
        ("invalidate_range_start", "start"),
        ("invalidate_range_start", "end"),
        ("invalidate_range_end", "start"),
        ("invalidate_range_end", "end"),
        (None, "end"),
    ]
    section = records[0].span_id
    assert {record.span_id for record in records if record.callback is None} == {section}
    assert {record.parent_id for record in records if record.callback} == {section}
    starts, ends = records[1:3], records[3:5]
    assert {record.span_id for record in starts} != {record.span_id for record in ends}
    for first, second in (starts, ends):
        assert first.span_id == second.span_id
    for record in records:
        assert (record.mm, record.start, record.end) == ("mm[1]", 0x1000, 0x3000)
        assert record.reason == "CLEAR"
        assert record.driver == ("Sleepable" if record.callback else None)


async def test_seq_and_time_never_go_back_and_ends_say_how_long_it_took() -> None:
    notifiers, ring = await traced(Sleepable("s"), Atomic("a"))
    async with notifiers.invalidating(page(1)), notifiers.invalidating(page(2)):
        pass
    records = list(ring)
    seqs = [record.seq for record in records]
    assert seqs == sorted(set(seqs))
    times = [record.ts_ns for record in records]
    assert times == sorted(times)
    begun = {record.span_id: record for record in records if record.phase == "start"}
    for record in records:
        if record.phase == "start":
            assert record.duration_ns is None
        else:
            assert record.duration_ns is not None
            assert 0 <= record.duration_ns <= record.ts_ns - begun[record.span_id].ts_ns + 10**6
    assert Counter(record.span_id for record in records) == dict.fromkeys(begun, 2)


async def test_nested_sections_are_told_apart() -> None:
    notifiers, ring = await traced(Atomic("a"))
    async with notifiers.invalidating(page(1)), notifiers.invalidating(page(2)):
        pass
    spans = {record.start: record.span_id for record in ring if record.callback is None}
    assert len(set(spans.values())) == 2
    for record in ring:
        if record.callback is not None:
            assert record.parent_id == spans[record.start]


async def test_sections_carry_the_operation_that_they_belong_to() -> None:
    notifiers, ring = await traced(Atomic("a"))
    operation = log.spans()
    token = log.current_span.set(operation)
    try:
        async with notifiers.invalidating(page()):
            pass
        notifiers.invalidate_page_atomic(0x1000)
    finally:
        log.current_span.reset(token)
    async with notifiers.invalidating(page()):
        pass
    parents = [record.parent_id for record in ring if record.callback in (None, "invalidate_page")]
    assert parents == [operation, operation, operation, operation, None, None]


@pytest.mark.parametrize(
    "form", ["section", "atomic", "nonblock", "invalidate", "invalidate_atomic", "bare pair"]
)
async def test_every_form_of_a_section_is_recorded(form: str) -> None:
    notifiers, ring = await traced(Atomic("a"))
    match form:
        case "section":
            async with notifiers.invalidating(page()):
                pass
        case "atomic":
            with notifiers.invalidating_atomic(page()):
                pass
        case "nonblock":
            with notifiers.invalidating_nonblock(page()):
                pass
        case "invalidate":
            await notifiers.invalidate(page())
        case "invalidate_atomic":
            notifiers.invalidate_atomic(page())
        case _:
            rng = page()
            await notifiers.invalidate_range_end(rng, await notifiers.invalidate_range_start(rng))
    assert shape(ring) == [
        (None, "start"),
        ("invalidate_range_start", "start"),
        ("invalidate_range_start", "end"),
        ("invalidate_range_end", "start"),
        ("invalidate_range_end", "end"),
        (None, "end"),
    ]


async def test_syncs_pages_and_ageing_are_recorded() -> None:
    class Ages(Deferred):
        def clear_flush_young(self, start: int, end: int) -> bool:
            return True

        def test_young(self, address: int) -> bool:
            return True

    notifiers, ring = await traced(Ages("d"))
    assert notifiers.clear_flush_young(0x1000, 0x3000)
    assert notifiers.test_young(0x1234)
    await notifiers.invalidate_page(0x1234)
    async with notifiers.invalidating(page(7)):
        pass
    starts = [
        (record.callback, record.start, record.end, record.reason)
        for record in ring
        if record.phase == "start"
    ]
    assert starts == [
        ("clear_flush_young", 0x1000, 0x3000, None),
        ("test_young", 0x1000, 0x2000, None),
        ("invalidate_page", 0x1000, 0x2000, None),
        ("invalidate_range_sync", 0x1000, 0x2000, "CLEAR"),
        (None, 0x7000, 0x8000, "UNMAP"),
        ("invalidate_range", 0x7000, 0x8000, "UNMAP"),
        ("invalidate_range_sync", 0x7000, 0x8000, "UNMAP"),
    ]
    section = next(record.span_id for record in ring if record.callback is None)
    parents = {record.start: record.parent_id for record in ring if record.callback}
    assert parents == {0x1000: None, 0x7000: section}


async def test_a_callback_that_raises_has_an_end_too() -> None:
    notifiers, ring = await traced(Atomic("a", start=explode))
    with capture_logs():
        await notifiers.invalidate(page())
    assert shape(ring) == [
        (None, "start"),
        ("invalidate_range_start", "start"),
        ("invalidate_range_start", "end"),
        (None, "end"),
    ]


async def test_a_start_that_is_undone_has_an_end() -> None:
    async def interrupt() -> None:
        raise Stop

    notifiers, ring = await traced(Sleepable("bad", start=interrupt), Atomic("a"))
    with pytest.raises(Stop):
        await notifiers.invalidating(page()).__aenter__()
    assert shape(ring)[-1] == (None, "end")
    spans = Counter(record.span_id for record in ring)
    assert set(spans.values()) == {2}


async def test_a_refused_section_has_an_end() -> None:
    notifiers, ring = await traced(Sleepable("s"), Atomic("a"))
    with capture_logs(), pytest.raises(mn.WouldBlock):
        notifiers.invalidating_nonblock(page()).__enter__()
    assert shape(ring)[0] == (None, "start")
    assert shape(ring)[-1] == (None, "end")
    assert set(Counter(record.span_id for record in ring).values()) == {2}


async def test_a_trace_that_begins_or_ends_inside_a_section_takes_none_of_it_or_all() -> None:
    notifiers = mn.Notifiers()
    await notifiers.register(Atomic("a"))
    ring = mn.Ring()
    async with notifiers.invalidating(page()):
        notifiers.trace = ring.append
    assert len(ring) == 0
    async with notifiers.invalidating(page()):
        notifiers.trace = None
    assert set(Counter(record.span_id for record in ring).values()) == {2}


async def test_a_trace_may_be_changed_while_drivers_come_and_go() -> None:
    notifiers = mn.Notifiers()
    ring = mn.Ring()
    notifiers.trace = ring.append
    assert notifiers.armed  # a call site that tests it must not hide sections from the trace
    async with notifiers.attached(Atomic("a")):
        await notifiers.invalidate(page())
    await notifiers.invalidate(page())
    assert Counter(record.event for record in ring) == {"invalidate_range": 4, "callback": 4}


@pytest.mark.parametrize("broken", ["invalidate_range", "callback"])
@pytest.mark.parametrize("phase", ["start", "end"])
async def test_a_listener_that_raises_is_heard_of_and_changes_nothing(
    broken: str, phase: str
) -> None:
    """No driver is blamed for it or left without its end, and the operation completes."""
    told: list[str] = []
    driver, other = Atomic("a", told), Sleepable("s", told)
    heard: list[log.Record] = []

    def listen(record: log.Record) -> None:
        heard.append(record)
        if (record.event, record.phase) == (broken, phase):
            raise ZeroDivisionError

    notifiers, _ = await traced(driver, other, listen=listen)
    with capture_logs() as lines:
        async with notifiers.invalidating(page()) as section:
            assert told == ["s start", "a start"]
    assert told[2:] == ["s end", "a end"]
    assert section.failed == ()
    assert notifiers.trace is None
    await notifiers.invalidate(page())
    assert [(record.event, record.phase) for record in heard].count((broken, phase)) == 1
    (line,) = lines
    assert (line["event"], line["error"]) == ("trace_failed", "ZeroDivisionError()")
    check_against_catalogue(lines)
    assert notifiers.statistics() == mn.NotifiersStatistics(
        subscriptions=2, quarantined=0, open_sections=0, srcu_readers=0
    )


# ------------------------------------------------------------------ rings


async def test_a_ring_keeps_the_latest() -> None:
    notifiers, _ = await traced(Atomic("a"))
    ring = mn.Ring(4)
    notifiers.trace = ring.append
    await notifiers.invalidate(page(1))
    await notifiers.invalidate(page(2))
    assert len(ring) == 4
    assert {record.start for record in ring} == {0x2000}
    ring.clear()
    assert len(ring) == 0


async def test_drain_takes_the_records_out_as_flat_objects_without_what_does_not_apply() -> None:
    notifiers, ring = await traced(Sleepable("s"))
    async with notifiers.invalidating(page()):
        pass
    notifiers.test_young(0x1000)
    lines = list(ring.drain())
    assert len(ring) == 0
    assert len(lines) == 6
    check_against_catalogue(lines)
    first = lines[0]
    assert set(first) == {
        *("seq", "ts_ns", "event", "mm", "span_id"),
        *("phase", "start", "end", "reason"),
    }
    assert lines[1]["parent_id"] == first["span_id"]


async def test_write_is_newline_delimited_json() -> None:
    notifiers, ring = await traced(Sleepable("s"))
    await notifiers.invalidate(mn.Range(0, mn.ADDRESS_END))
    wanted = [
        {key: value for key, value in record._asdict().items() if value is not None}
        for record in ring
    ]
    file = io.StringIO()
    assert ring.write(file) == 6
    lines = file.getvalue().splitlines(keepends=True)
    assert all(line.endswith("\n") for line in lines)
    assert [json.loads(line) for line in lines] == wanted
    assert wanted[0]["end"] == 2**64
    assert ring.write(file) == 0


# ------------------------------------------------------------------ the log


async def a_life(notifiers: mn.Notifiers[mn.RwSems]) -> None:
    """One of everything that is logged."""
    gate = anyio.Event()
    sub = await notifiers.register(Atomic("a"))
    shared = await notifiers.get(Atomic, lambda: Atomic("shared"))
    await notifiers.register(Sleepable("slow", start=gate.wait))
    await notifiers.register(Atomic("bad", start=explode))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(notifiers.invalidate, page())
        await settle()
        tasks.start_soon(notifiers.unregister, sub)
        await settle()
        gate.set()
    with pytest.raises(mn.WouldBlock):
        notifiers.invalidating_nonblock(page()).__enter__()
    notifiers.srcu.call(explode)
    notifiers.put(shared)
    await notifiers.release()


async def test_whatever_is_logged_is_in_the_catalogue() -> None:
    notifiers = mn.Notifiers(name="mm[1]")
    with capture_logs() as lines:
        await a_life(notifiers)
    check_against_catalogue(lines)
    assert {line["event"] for line in lines} == set(OF_THE_CORE) - {
        *(log.INVALIDATE_RANGE, log.CALLBACK),  # traced
        *(log.PLUGIN_QUARANTINED, log.TRACE_FAILED),
    }
    seqs = [line["seq"] for line in lines]
    assert seqs == sorted(set(seqs))
    assert {line["mm"] for line in lines if "mm" in line} == {"mm[1]"}


async def test_who_comes_and_goes_is_logged() -> None:
    with capture_logs() as lines:
        notifiers = mn.Notifiers(name="mm[1]")
        async with notifiers.attached(Atomic("a")):
            pass
        await notifiers.register(Sleepable("s"))
        await notifiers.register(Deferred("d"))
        await notifiers.release()
    said = [(line["event"], line.get("driver")) for line in lines]
    assert said == [
        ("driver_registered", "Atomic"),
        ("driver_unregistered", "Atomic"),
        ("driver_registered", "Sleepable"),
        ("driver_registered", "Deferred"),
        ("address_space_released", None),
    ]
    assert lines[-1]["drivers"] == ["Deferred", "Sleepable"]
    assert lines[-1]["duration_ns"] >= 0
    check_against_catalogue(lines)


async def test_what_get_registers_and_put_ends_is_logged_once_each() -> None:
    with capture_logs() as lines:
        notifiers = mn.Notifiers()
        first = await notifiers.get(Atomic, lambda: Atomic("a"))
        assert await notifiers.get(Atomic) is first
        notifiers.put(first)
        notifiers.put(first)
    assert [(line["event"], line["driver"]) for line in lines] == [
        ("driver_registered", "Atomic"),
        ("driver_unregistered", "Atomic"),
    ]


async def test_what_cannot_be_registered_is_not_logged() -> None:
    with capture_logs() as lines:
        notifiers = mn.Notifiers()
        async with anyio.create_task_group() as tasks, notifiers.invalidating(page()):
            tasks.start_soon(notifiers.register, Atomic("a"))
            await settle()
            tasks.cancel_scope.cancel()
    assert lines == []


async def test_a_logger_of_the_applications_own_is_used() -> None:
    """Also for what is below a warning, whether or not structlog is configured."""
    structlog.reset_defaults()
    capture = LogCapture()
    logger = structlog.wrap_logger(None, processors=[capture]).bind(tenant=7)
    notifiers = mn.Notifiers(name="mm[1]", logger=logger)
    async with notifiers.attached(Atomic("a")):
        pass
    assert [line["event"] for line in capture.entries] == [
        "driver_registered",
        "driver_unregistered",
    ]
    assert {(line["tenant"], line["mm"]) for line in capture.entries} == {(7, "mm[1]")}


async def test_structlog_may_be_configured_after_the_notifiers_were_made() -> None:
    structlog.reset_defaults()
    notifiers = mn.Notifiers()
    capture = LogCapture()
    structlog.configure(processors=[capture])
    await notifiers.register(Atomic("a"))
    assert [line["event"] for line in capture.entries] == ["driver_registered"]


async def test_nothing_below_a_warning_is_written_while_structlog_is_unconfigured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    structlog.reset_defaults()
    notifiers = mn.Notifiers()
    async with notifiers.attached(Sleepable("s")):
        await notifiers.invalidate(page())
    await notifiers.release()
    assert capsys.readouterr() == ("", "")


async def test_warnings_are_written_even_so(capsys: pytest.CaptureFixture[str]) -> None:
    structlog.reset_defaults()
    notifiers = mn.Notifiers()
    await notifiers.register(Sleepable("s"))
    with pytest.raises(mn.WouldBlock):
        notifiers.invalidating_nonblock(page()).__enter__()
    assert "section_refused" in capsys.readouterr().out


async def test_the_library_configures_nothing() -> None:
    structlog.reset_defaults()
    notifiers = mn.Notifiers()
    notifiers.trace = mn.Ring().append
    await a_life(notifiers)
    assert not structlog.is_configured()


def test_the_catalogue_says_what_its_events_are() -> None:
    for name, spec in log.CATALOGUE.items():
        assert name == spec.name == name.lower()
        assert spec.level in {"debug", "info", "warning", "error"}
        assert spec.summary.endswith(".")
        assert len(set(spec.keys)) == len(spec.keys)
        assert not {"seq", "ts_ns", "event"} & set(spec.keys)
    record_keys = set(log.Record._fields) - {"seq", "ts_ns", "event"}
    assert set(log.CATALOGUE[log.CALLBACK].keys) == record_keys
    assert set(log.CATALOGUE[log.INVALIDATE_RANGE].keys) == record_keys - {"driver", "callback"}


def test_the_page_of_events_names_them_all() -> None:
    page_of_events = subprocess.run(
        [sys.executable, "-m", "mmunotify.log"], capture_output=True, text=True, check=True
    ).stdout
    for name, spec in OF_THE_CORE.items():
        assert f"| `{name}` | {spec.level} |" in page_of_events


async def test_a_plugin_may_define_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "CATALOGUE", dict(log.CATALOGUE))
    event = log.define_event("kvm_zapped", "info", "mm pages", "Shadow pages were dropped.")
    capture = LogCapture()
    writer = log.Log(structlog.wrap_logger(None, processors=[capture]), mm="mm[1]")
    writer.emit(event, pages=3)
    (line,) = capture.entries
    found: dict[str, Any] = {key: line[key] for key in ("event", "mm", "pages", "log_level")}
    assert found == {"event": "kvm_zapped", "mm": "mm[1]", "pages": 3, "log_level": "info"}
    check_against_catalogue([line])


def test_one_name_means_one_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "CATALOGUE", dict(log.CATALOGUE))
    for _ in range(2):  # a module may be imported again
        log.define_event("kvm_zapped", "info", "mm pages", "Shadow pages were dropped.")
    with pytest.raises(ValueError, match=r"'kvm_zapped' is defined already.*Shadow pages"):
        log.define_event("kvm_zapped", "debug", "mm", "Something else.")
    assert log.CATALOGUE["kvm_zapped"].level == "info"
