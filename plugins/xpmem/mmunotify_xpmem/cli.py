"""`mmunotify-xpmem`: run a partition that exports files, and look at its memory from elsewhere."""

from __future__ import annotations

import json as jsonlib
import os
import signal
import sys
import tempfile
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import anyio
from cyclopts import App, Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmunotify import PAGE_SIZE, MmuNotifyError

from .errors import RDONLY, RDWR
from .file_space import FileSpace
from .partition import Partition
from .segments import Fence  # noqa: TC001 - cyclopts reads the annotation
from .stream_engine import StreamEngine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

app = App(
    name="mmunotify-xpmem",
    help="Share memory across partitions: export files, attach them from another shell.",
    version_flags=(),
)

LOOK_EVERY: Final = 0.1
"""Seconds between two looks at whether an exported file has changed."""
CONNECTED_WITHIN: Final = 5.0
FAILED: Final = 1

Positive = Annotated[float, Parameter(validator=Number(gt=0))]


def default_address() -> str:
    """Where partitions of this user listen if nothing else is said."""
    folder = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return f"unix:{folder}/mmunotify-xpmem-{os.geteuid()}"


def _octal(mode: str) -> int:
    try:
        return int(mode, 8)
    except ValueError:
        raise ValueError(f"mode {mode!r}: expected octal digits, such as 640") from None


# ---------------------------------------------------------------------- serve


@app.command
def serve(
    *files: Path,
    model: Annotated[int, Parameter(validator=Number(gte=0))] = 0,
    listen: str | None = None,
    mode: str = "600",
    writable: Annotated[bool, Parameter(negative="")] = False,
    fence: Fence = "lease",
    lease: Positive = 5.0,
    heartbeat: Positive = 1.0,
) -> None:
    """Export files, and memory of the software model, until interrupted or terminated.

    Who has a file attached sees it change when it changes on disk. Interrupted, it recalls what it
    has exported before it ends.

    Parameters
    ----------
    files
        Export each of these, under its name.
    model
        Export that many pages of an address space of the software model, in which every page
        counts: once a second one of them is discarded and written anew.
    listen
        unix:PATH or tcp:HOST:PORT, on loopback only. By default a socket of this user's.
    mode
        Who may attach: octal permissions, as those of a file.
    writable
        Let importers write to the files.
    fence
        What becomes of an importer that is silent for longer than the lease: its permit is void
        (lease), it is killed once something waits for it (kill), or it is waited for (never).
    lease
        Seconds.
    heartbeat
        Seconds between two signs of life of an importer.
    """
    if not files and not model:
        raise ValueError("nothing to export: expected files, or --model PAGES")
    permissions = _octal(mode)

    async def main() -> None:
        engine = StreamEngine(listen or default_address())
        async with AsyncExitStack() as stack:
            partition = await stack.enter_async_context(
                Partition(engine, lease=lease, heartbeat=heartbeat)
            )
            tasks = await stack.enter_async_context(anyio.create_task_group())
            print(f"partition {partition.part} listens at {engine.listen}", flush=True)
            for file in files:
                space = await stack.enter_async_context(FileSpace(file, writable=writable))
                group = await partition.open(space.notifiers)
                segid = group.make(space.base, space.size, permissions, fence=fence, name=str(file))
                print(f"{segid:#x}  {space.length} bytes  {file}", flush=True)
                tasks.start_soon(_follow_file, file, space)
            if model:
                await _serve_model(stack, tasks, partition, model, permissions, fence)
            with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                await anext(signals)
            tasks.cancel_scope.cancel()

    _run(main)


async def _follow_file(file: Path, space: FileSpace) -> None:
    """Tell importers when the file has changed on disk."""
    known = None
    while True:
        try:
            found = os.stat(file)
        except FileNotFoundError:
            return
        now = found.st_mtime_ns
        if known is not None and now != known:
            await space.changed()
        known = now
        await anyio.sleep(LOOK_EVERY)


async def _serve_model(
    stack: AsyncExitStack,
    tasks: anyio.abc.TaskGroup,
    partition: Partition,
    pages: int,
    mode: int,
    fence: Fence,
) -> None:
    # numpy, which only who asks for the model needs.
    from mmunotify.model import Machine

    machine = await stack.enter_async_context(Machine(frames=2 * pages + 64, contents=True))
    mm = machine.new_mm("served")
    group = await partition.open(mm.notifiers)
    size = pages * PAGE_SIZE
    address = await mm.mmap(size)
    segid = group.make(address, size, mode, fence=fence, name="model")

    async def count() -> None:
        for turn in range(1 << 62):
            page = address + turn % pages * PAGE_SIZE
            await mm.madvise(page, PAGE_SIZE, "dontneed")
            await mm.write(page, b"page %d, turn %d\n" % (turn % pages, turn // pages))
            if turn >= pages:
                await anyio.sleep(1)

    tasks.start_soon(count)
    print(f"{segid:#x}  {size} bytes  the model's memory at {address:#x}", flush=True)


# ---------------------------------------------------------------------- attach


@app.command
def attach(
    segment: str,
    *,
    connect: str | None = None,
    offset: Annotated[int, Parameter(validator=Number(gte=0))] = 0,
    size: Annotated[int | None, Parameter(validator=Number(gte=0))] = None,
    write: str | None = None,
    output: Path | None = None,
    follow: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Attach a segment and print its bytes.

    Parameters
    ----------
    segment
        Its segid or its name, as `list` shows them.
    connect
        Where its partition listens.
    offset
        The first byte.
    size
        How many bytes; up to the end by default.
    write
        Store this text at the offset instead of reading.
    output
        Write here what is read, not to standard output.
    follow
        Print again whenever it has changed, until interrupted.
    """

    async def main() -> None:
        async with _connected(connect) as (partition, engine):
            segid = await _segid(partition, engine, segment)
            async with partition.opened() as group:
                apid = await group.get(segid, RDONLY if write is None else RDWR)
                attachment = group.attach(apid)
                if write is not None:
                    await attachment.write(offset, write.encode())
                    return
                end = attachment.size if size is None else offset + size
                before = None
                while True:
                    data = await attachment.read(offset, end - offset)
                    if data != before:
                        _put(data, output)
                    if not follow:
                        return
                    before = data
                    await anyio.sleep(LOOK_EVERY)

    _run(main)


def _put(data: bytes, output: Path | None) -> None:
    if output is not None:
        output.write_bytes(data)
        return
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


# ---------------------------------------------------------------------- list, status


@app.command(name="list")
def list_segments(
    *, connect: str | None = None, json: Annotated[bool, Parameter(negative="")] = False
) -> None:
    """Show what partitions export to this user.

    Parameters
    ----------
    connect
        Where they listen.
    json
        Print a JSON array instead of a table.
    """
    found = _ask(connect)
    rows = [
        {
            "segid": f"{segment['segid']:#x}",
            "partition": report["partition"],
            "name": segment["name"],
            "bytes": segment["size"],
            "mode": segment["mode"],
            "fence": segment["fence"],
            "importers": segment["attached"],
        }
        for report in found
        for segment in report["segments"]
    ]
    if json:
        print(jsonlib.dumps(rows, indent=2))
        return
    table = Table("segid", "partition", "name", "bytes", "mode", "fence", "importers", box=None)
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row.values()))
    Console().print(table)


@app.command
def status(
    *, connect: str | None = None, json: Annotated[bool, Parameter(negative="")] = False
) -> None:
    """Show importers and their leases, queues, and who waits for whom.

    Parameters
    ----------
    connect
        Where the partitions listen.
    json
        Print everything as a JSON array.
    """
    found = _ask(connect)
    if json:
        print(jsonlib.dumps(found, indent=2))
        return
    console = Console()
    for report in found:
        queues = report["queues"]
        console.print(
            f"partition {report['partition']} (pid {report['pid']}): lease {report['lease']:g} s, "
            f"heartbeat {report['heartbeat']:g} s, {report['pinned']} pages pinned"
        )
        waiting = ", ".join(report["waiting_for"]) or "nobody"
        console.print(f"  invalidations wait for: {waiting}")
        console.print(
            f"  batches of invalidations: {queues['batches_sent']} sent, "
            f"{queues['batches_resent']} sent again, {queues['batches_outstanding']} outstanding; "
            f"frames refused: {report['refused_frames']}"
        )
        for segment in report["segments"]:
            console.print(Text(f"  {segment['segid']:#x} {segment['name']} ({segment['state']})"))
            if segment["sharers"]:
                console.print(_sharers(segment["sharers"]))
            left_out = segment["attached"] - len(segment["sharers"])
            if left_out:
                console.print(f"  and {left_out} more")


def _sharers(sharers: list[dict[str, Any]]) -> Table:
    table = Table(
        *("partition", "peer", "pages", "unacknowledged", "requests waiting", "lease left"),
        box=None,
    )
    for sharer in sharers:
        table.add_row(
            str(sharer["partition"]),
            Text(sharer["peer"]),
            str(sharer["pages"]),
            str(sharer["unacknowledged"]),
            str(sharer["requests_waiting"]),
            f"{sharer['lease_left']:.1f} s",
        )
    return table


# ---------------------------------------------------------------------- inside


@asynccontextmanager
async def _connected(address: str | None) -> AsyncIterator[tuple[Partition, StreamEngine]]:
    """A partition that has a link to where `address` says."""
    engine = StreamEngine(connect=[address or default_address()])
    async with Partition(engine) as partition:
        with anyio.fail_after(CONNECTED_WITHIN):
            while not engine.partitions():  # noqa: ASYNC110 - it has no event for that
                await anyio.sleep(0.005)
        yield partition, engine


def _ask(connect: str | None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    async def main() -> None:
        async with _connected(connect) as (partition, engine):
            found.extend([await partition.ask(part) for part in engine.partitions()])

    _run(main)
    return found


async def _segid(partition: Partition, engine: StreamEngine, segment: str) -> int:
    """A segid as such, or looked up by name."""
    with suppress(ValueError):
        return int(segment, 0)
    known: list[str] = []
    for part in engine.partitions():
        for found in (await partition.ask(part))["segments"]:
            if found["name"] == segment or Path(found["name"]).name == segment:
                return int(found["segid"])
            known.append(found["name"])
    raise ValueError(f"no segment {segment!r}: there are {', '.join(known) or 'none'}")


def _run(main: Callable[[], Awaitable[None]]) -> None:
    try:
        anyio.run(main)
    except BaseExceptionGroup as group:
        _, rest = group.split(KeyboardInterrupt)
        if rest is not None:
            _, unexpected = rest.split((MmuNotifyError, OSError, ValueError))
            if unexpected is not None:
                raise unexpected from None
            error: BaseException = rest
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            _fail(error)
    except KeyboardInterrupt:
        pass
    except TimeoutError:
        _fail("whoever listens there is no partition")
    except (MmuNotifyError, OSError, ValueError) as error:
        _fail(error)


def _fail(why: object) -> NoReturn:
    print(f"mmunotify-xpmem: {why}", file=sys.stderr)
    sys.exit(FAILED)


def main() -> None:
    """Run the command line."""
    try:
        app()
    except ValueError as error:
        _fail(error)


if __name__ == "__main__":
    main()
