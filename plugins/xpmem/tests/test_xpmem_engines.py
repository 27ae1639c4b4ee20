"""What any engine must do, and how the embedded one keeps strangers out."""

from __future__ import annotations

import errno
import gc
import os
import signal
import socket
import struct
import subprocess
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import attrs
import pytest
import structlog
from structlog.testing import LogCapture

from mmunotify_xpmem import (
    RDONLY,
    Credentials,
    ExporterGone,
    FileSpace,
    MemoryHub,
    Partition,
    StreamEngine,
    XpmemError,
    stream_engine,
)
from mmunotify_xpmem.memory_engine import LocalSender
from mmunotify_xpmem.processes import ProcessSender
from mmunotify_xpmem.wire import MAX_MESSAGE, BadMessage, Get, encode
from mmunotify_xpmem.wire import Fault as FaultMessage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

PAGE = 4096
HEADER = struct.Struct("<II")
MAGIC = b"mmxpmem1"


@attrs.define(eq=False)
class User:
    """Whoever uses an engine: keeps what it is told."""

    frames: list[bytes] = attrs.field(factory=list)
    lost_count: int = 0
    left: int = 0

    def received(self, sender: Any, frame: memoryview) -> None:
        if bytes(frame[:3]) == b"bad":
            raise BadMessage("as it says")
        self.frames.append(bytes(frame))

    def room(self, size: int) -> memoryview:
        return memoryview(bytearray(size))

    def lost(self) -> None:
        self.lost_count += 1

    def gone(self, sender: Any) -> None:
        self.left += 1

    async def has(self, count: int) -> list[bytes]:
        with anyio.fail_after(30):
            while len(self.frames) < count:  # noqa: ASYNC110
                await anyio.sleep(0.001)
        return self.frames


@asynccontextmanager
async def running(*engines: Any) -> AsyncIterator[list[User]]:
    """The engines, open, each with a user that subscribes to its number."""
    users = [User() for _ in engines]
    try:
        async with anyio.create_task_group() as tasks:
            for number, (engine, user) in enumerate(zip(engines, users, strict=True)):
                engine.subscribe(b"s%d" % number)
                await engine.open(user)
                tasks.start_soon(engine.run)
            try:
                yield users
            finally:
                tasks.cancel_scope.cancel()
    finally:
        for engine in engines:
            await engine.aclose()


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(30):
        while not condition():  # noqa: ASYNC110
            await anyio.sleep(0.001)


Pair = tuple[Any, Any, list[User]]


@pytest.fixture(params=["memory", "unix", "tcp", "unwatched"])
def pair(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], AbstractAsyncContextManager[Pair]]:
    @asynccontextmanager
    async def made() -> AsyncIterator[Pair]:
        if request.param == "memory":
            hub = MemoryHub()
            one, other = hub.engine(), hub.engine()
            async with running(one, other) as users:
                yield one, other, users
            return
        if request.param == "unwatched":  # as where there is no epoll
            monkeypatch.setattr(stream_engine, "select", None)
        where = "tcp:127.0.0.1:0" if request.param == "tcp" else f"unix:{tmp_path / 's'}"
        listening = StreamEngine(where)
        async with running(listening) as users:
            connecting = StreamEngine(connect=[str(listening.listen)])
            connecting.subscribe(b"s1")
            other_user = User()
            await connecting.open(other_user)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(connecting.run)
                await until(lambda: users[0].lost_count and other_user.lost_count)
                yield listening, connecting, [users[0], other_user]
                tasks.cancel_scope.cancel()
            await connecting.aclose()

    return made


async def test_frames_arrive_in_both_directions(pair: Any) -> None:
    """Whole, whatever their size, and only at who subscribes; nobody there is said."""
    sizes = (0, 1, 100, PAGE, 64 * PAGE, MAX_MESSAGE - 4)
    async with pair() as (one, other, (first, second)):
        for size in sizes:
            body = os.urandom(size)
            assert one.send(b"s1", b"head", body)
            assert other.send(b"s0", b"HEAD", body)
        assert not one.send(b"nobody", b"head")
        assert [len(frame) - 4 for frame in sorted(await second.has(6), key=len)] == list(sizes)
        assert {frame[:4] for frame in await first.has(6)} == {b"HEAD"}


async def test_subscriptions_can_come_later(pair: Any) -> None:
    """What is subscribed to while links are up is known at the other end."""
    async with pair() as (one, other, (first, _)):
        one.subscribe(b"later")
        await until(lambda: other.send(b"later", b"now"))
        assert await first.has(1) == [b"now"]


class Asked:
    """A request that is answered as soon as a user has so many frames."""

    def __init__(self, user: User, count: int) -> None:
        self.user = user
        self.count = count

    @property
    def done(self) -> bool:
        return len(self.user.frames) >= self.count


async def test_who_waits_may_receive(pair: Any) -> None:
    """An answer arrives whether somebody pumps its link, or several do, or one gives up; and what
    else comes over it does, too."""
    async with pair() as (one, other, (_, second)):

        async def answer(count: int) -> None:
            with anyio.fail_after(30):
                await other.pump(b"s0", Asked(second, count))
                await second.has(count)

        for turn in range(1, 21):
            async with anyio.create_task_group() as tasks:
                for _ in range(turn % 3 + 1):
                    tasks.start_soon(answer, 3 * turn)
                await anyio.lowlevel.checkpoint()
                for size in (1, PAGE, 40 * PAGE):
                    one.send(b"s1", b"answer", bytes(size))
            with anyio.move_on_after(0.001):
                await other.pump(b"s0", Asked(second, 1 << 30))
        one.send(b"s1", b"last")
        assert (await second.has(61))[-1] == b"last"


@pytest.mark.parametrize("end", ["link", "engine", "frame"])
async def test_link_ends_while_it_is_pumped(tmp_path: Path, end: str) -> None:
    """Whoever pumps it goes on without an answer, and no descriptor is left."""
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    engine = StreamEngine(f"unix:{tmp_path / 's'}")
    async with running(engine) as (user,):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(tmp_path / "s"))
            subscription = (1).to_bytes(4, "little") + b"peer"
            peer.send(MAGIC + HEADER.pack(len(subscription), 0) + subscription)
            await until(lambda: engine._routes)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(engine.pump, b"peer", Asked(user, 1))
                await until(lambda: engine.links[0].pumped)
                if end == "link":
                    peer.close()
                elif end == "frame":
                    peer.send(HEADER.pack(3, 99) + b"abc")
                else:
                    engine.links[0].close()
            await until(lambda: not engine.links)
            assert engine.refused == (end == "frame")
            assert user.left == 1
    gc.collect()  # senders, whose pidfd goes with them
    assert len(os.listdir("/proc/self/fd")) == before


async def test_send_never_suspends_and_may_lose(tmp_path: Path) -> None:
    """A receiver that does not read makes nobody wait: what is too much for it is lost."""
    engine = StreamEngine(f"unix:{tmp_path / 's'}")
    async with running(engine):
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.connect(str(tmp_path / "s"))
            subscription = (1).to_bytes(4, "little") + b"deaf"
            deaf.send(MAGIC + HEADER.pack(len(subscription), 0) + subscription)
            await until(lambda: engine._routes)
            body = bytes(1 << 19)
            for _ in range(200):
                assert engine.send(b"deaf", b"", body)
            assert engine.dropped > 50


async def test_short_frames_overtake_long_ones(tmp_path: Path) -> None:
    """An invalidation is not behind the pages that wait."""
    engine = StreamEngine(f"unix:{tmp_path / 's'}")
    async with running(engine):
        with socket.socket(socket.AF_UNIX) as slow:
            slow.connect(str(tmp_path / "s"))
            subscription = (5).to_bytes(4, "little") + b"slow"
            slow.send(MAGIC + HEADER.pack(len(subscription), 0) + subscription)
            await until(lambda: engine._routes)
            for _ in range(100):
                engine.send(b"slow", b"", bytes(1 << 18))
            engine.send(b"slow", b"short")
            slow.setblocking(False)
            data = bytearray()
            with anyio.fail_after(30):
                while data.count(b"short") == 0:
                    await anyio.wait_readable(slow)
                    data += slow.recv(1 << 16)
            assert len(data) < 50 << 18


@pytest.mark.parametrize(
    "attack",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        MAGIC + HEADER.pack(MAX_MESSAGE + 1, 1),
        MAGIC + HEADER.pack(0xFFFFFFFF, 1) + bytes(100),
        MAGIC + HEADER.pack(3, 77) + b"abc",
        MAGIC + HEADER.pack(4, 0) + b"abcd",
        MAGIC + HEADER.pack(400, 0) + bytes(400),
        MAGIC + HEADER.pack(3, 1) + b"bad",
        MAGIC + b"".join(HEADER.pack(6, 0) + struct.pack("<IH", n, n) for n in range(70)),
    ],
    ids=["foreign", "oversized", "huge", "unknown", "empty", "subject", "malformed", "flood"],
)
async def test_bad_frames_cost_the_link(tmp_path: Path, attack: bytes) -> None:
    """They are counted, logged and dropped with their link; others are served on."""
    log = LogCapture()
    logger = structlog.wrap_logger(None, processors=[log])
    engine = StreamEngine(f"unix:{tmp_path / 's'}", logger=logger)
    async with running(engine) as (user,):
        with socket.socket(socket.AF_UNIX) as attacker, socket.socket(socket.AF_UNIX) as good:
            good.connect(str(tmp_path / "s"))
            attacker.connect(str(tmp_path / "s"))
            attacker.send(attack)
            await until(lambda: engine.refused)
            await until(lambda: len(engine.links) == 1)
            good.send(MAGIC + HEADER.pack(4, 1) + b"good")
            assert await user.has(1) == [b"good"]
            assert engine.refused == 1
    (line,) = [entry for entry in log.entries if entry["event"] == "xpmem_frame_refused"]
    assert line["peer"] == f"pid {os.getpid()} of user {os.geteuid()}"
    assert line["reason"]


@pytest.mark.parametrize(
    "address", ["tcp:0.0.0.0:0", "tcp:10.1.2.3:99", "tcp:example.org:1", "tcp:[::]:1"]
)
@pytest.mark.parametrize("way", ["listen", "connect"])
def test_tcp_is_loopback_only(address: str, way: str) -> None:
    """Anything else is refused before a socket is made."""
    with pytest.raises(ValueError, match="loopback"):
        StreamEngine(address) if way == "listen" else StreamEngine(connect=[address])


@pytest.mark.parametrize(
    "address", ["", "unix:", "tcp:127.0.0.1", "udp:127.0.0.1:1", "tcp:127.0.0.1:99999"]
)
def test_addresses_say_what_they_should_be(address: str) -> None:
    with pytest.raises(ValueError, match="expected unix:PATH or tcp:HOST:PORT"):
        StreamEngine(address)


async def test_unix_socket_is_for_its_users(tmp_path: Path) -> None:
    """The kernel says who connects; who may not is turned away, and the file says so, too."""
    path = tmp_path / "s"
    engine = StreamEngine(f"unix:{path}", uids={0xDEAD})
    async with running(engine) as (user,):
        assert path.stat().st_mode & 0o777 == 0o666
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(path))
            await until(lambda: engine.refused)
        assert not engine.links
        assert not user.frames
    private = StreamEngine(f"unix:{path}")
    async with running(private):
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()


async def test_peer_credentials(tmp_path: Path) -> None:
    """Of a Unix socket: uid, gid, pid; of TCP nothing, so only the bits of others count."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "s"))
    server.listen()
    with server, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))
        accepted, _ = server.accept()
        with accepted:
            sender = ProcessSender.of(accepted)
    assert (sender.credentials.uid, sender.credentials.gid) == (os.geteuid(), os.getegid())
    assert sender.pid == os.getpid()
    assert not sender.killable, "it would kill itself"
    engine = StreamEngine("tcp:127.0.0.1:0")
    async with AsyncExitStack() as stack:
        exporting = await stack.enter_async_context(Partition(engine, 1))
        importing = await stack.enter_async_context(
            Partition(StreamEngine(connect=[str(engine.listen)]), 2)
        )
        space = await stack.enter_async_context(FileSpace(size=PAGE))
        group = await exporting.open(space.notifiers)
        importer = await importing.open()
        with pytest.raises(XpmemError) as refused:
            await importer.get(group.make(space.base, PAGE, 0o660), RDONLY)
        assert refused.value.errno == errno.EACCES
        assert await importer.get(group.make(space.base, PAGE, 0o664), RDONLY)


async def test_address_in_use(tmp_path: Path) -> None:
    """A path that somebody listens at is refused, a left-over of the dead is replaced."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with running(StreamEngine(f"unix:{path}")):
        with pytest.raises(OSError, match="somebody else does"):
            await StreamEngine(f"unix:{path}").open(User())
    path.write_text("precious")
    with pytest.raises(OSError, match="is no socket"):
        await StreamEngine(f"unix:{path}").open(User())
    assert path.read_text() == "precious"
    with pytest.raises(OSError, match="cannot connect"):
        await StreamEngine(connect=[f"unix:{tmp_path / 'nobody'}"]).open(User())


async def test_link_is_made_again(tmp_path: Path) -> None:
    """A link that breaks is a hint on both sides, and is made again; nothing is lost for good."""
    engine = StreamEngine(f"unix:{tmp_path / 's'}")
    async with AsyncExitStack() as stack:
        exporting = await stack.enter_async_context(Partition(engine, 1))
        importing = await stack.enter_async_context(
            Partition(StreamEngine(connect=[str(engine.listen)]), 2)
        )
        space = await stack.enter_async_context(FileSpace(size=8 * PAGE))
        group = await exporting.open(space.notifiers)
        importer = await importing.open()
        attachment = importer.attach(await importer.get(group.make(space.base, 8 * PAGE)))
        for turn in range(5):
            await space.update(turn * PAGE, b"%d" % turn)
            engine.links[0].shut()
            with anyio.fail_after(30):
                assert await attachment.read(turn * PAGE, 1) == b"%d" % turn
        assert len(exporting.exporter.sharers) == 1


def has_refused(partition: Partition, frames: int) -> bool:
    return partition.refused >= frames


async def test_malformed_messages_of_a_partition(tmp_path: Path) -> None:
    """Frames that the engine carries, and that are no messages, or of somebody else."""
    engine = StreamEngine(f"unix:{tmp_path / 's'}")
    async with Partition(engine, 1) as exporting, FileSpace(size=PAGE) as space:
        group = await exporting.open(space.notifiers)
        group.make(space.base, PAGE)
        no_text = b"\x26\0\x94\x03\xc4\x10" + bytes(16) + b"\x02\xae" + b"\xff" * 14 + bytes(9)
        noise = os.urandom(50)
        for attack in (b"", b"\0", b"\xff\xff\xff", noise, encode(Fault)[:-3], no_text):
            with socket.socket(socket.AF_UNIX) as attacker:
                expected = exporting.refused + 1
                attacker.connect(str(tmp_path / "s"))
                attacker.send(MAGIC + HEADER.pack(len(attack), 1) + attack)
                await until(partial(has_refused, exporting, expected))
        assert not exporting.exporter.peers
        await group.close()


async def test_reports_fit_into_a_message(tmp_path: Path) -> None:
    """However many there are to report: the others are counted."""
    engine = StreamEngine(f"unix:{tmp_path / 's'}")
    async with Partition(engine, 1) as exporting, FileSpace(size=PAGE) as space:
        group = await exporting.open(space.notifiers)
        segid = group.make(space.base, PAGE)
        sender = LocalSender(Credentials.mine())
        for part in range(3, 6003):
            get = Get(part, bytes(16), part.to_bytes(16, "little"), segid, False)
            exporting.exporter.receive(sender, get, memoryview(b""), exporting.clock())
        exporting.exporter.outbox.clear()
        async with Partition(StreamEngine(connect=[str(engine.listen)]), 2) as asking:
            (segment,) = (await asking.ask(1))["segments"]
        assert segment["attached"] == 6000
        assert 1000 < len(segment["sharers"]) < 6000
        await group.close()


Fault = FaultMessage(3, bytes(16), bytes(16), bytes(16), 1, 0, 1, 1)

SILENT = """
import anyio, sys
from mmunotify_xpmem import Partition, StreamEngine
async def main():
    async with Partition(StreamEngine(connect=[sys.argv[1]])) as xpmem:
        group = await xpmem.open()
        attachment = group.attach(await group.get(int(sys.argv[2])))
        await attachment.read(0, 1)
        print("ready", flush=True)
        import os, signal
        os.kill(os.getpid(), signal.SIGSTOP)
        await anyio.sleep_forever()
anyio.run(main)
"""


@pytest.mark.parametrize("fence", ["lease", "kill", "dead", "never"])
async def test_policies_and_a_real_process(tmp_path: Path, fence: Any) -> None:
    """A process that stops is fenced, killed, or waited for until it goes on; of one that dies the
    kernel says so at once."""
    engine = StreamEngine(f"unix:{tmp_path / 's'}")
    lease = 0.2 if fence != "dead" else 600.0
    policy: Any = "lease" if fence == "dead" else fence
    async with (
        Partition(engine, 1, lease=lease, heartbeat=0.05) as exporting,
        FileSpace(size=PAGE) as space,
    ):
        group = await exporting.open(space.notifiers)
        segid = group.make(space.base, PAGE, fence=policy)
        process = subprocess.Popen(  # noqa: ASYNC220 - it does not block
            [sys.executable, "-c", SILENT, str(engine.listen), str(segid)], stdout=subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            with anyio.fail_after(60):
                await anyio.wait_readable(process.stdout)
                # Stopped, without a word; whoever invalidates its page waits for it.
                if fence == "dead":
                    process.kill()
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(space.update, 0, b"x")
                    if fence == "never":
                        await anyio.sleep(3 * lease)
                        assert exporting.status()["waiting_for"] == [str(process.pid)]
                        process.send_signal(signal.SIGCONT)
            assert not group.table.holders
            if fence == "kill":
                assert process.wait(30) == -9
        finally:
            process.kill()
            process.wait(30)
            assert process.stdout is not None
            process.stdout.close()
        await group.close()


async def read_on(attachment: Any) -> None:
    with anyio.fail_after(30):
        while True:
            await attachment.read()
            await anyio.sleep(0.01)


async def test_exporter_that_dies_is_given_up(tmp_path: Path) -> None:
    """Reads fail once it was silent for as long as the importer is patient, and say so."""
    hub = MemoryHub()
    async with Partition(hub.engine(), 2, patience=0.3) as importing:
        importer = await importing.open()
        with pytest.raises(ExporterGone, match="partition 1 has been silent"):
            await importer.get(1 << 32 | 1)
        async with FileSpace(size=PAGE) as space:
            engine = hub.engine(Credentials.mine())
            async with Partition(engine, 1, lease=0.2, heartbeat=0.05) as exporting:
                group = await exporting.open(space.notifiers)
                attachment = importer.attach(await importer.get(group.make(space.base, PAGE)))
                await attachment.read()
                await engine.aclose()
                with pytest.raises(ExporterGone):
                    await read_on(attachment)
