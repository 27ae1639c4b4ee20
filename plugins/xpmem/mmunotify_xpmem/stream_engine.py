"""The embedded engine: links over Unix or loopback TCP sockets, without any server between.

A link is one socket. Each end tells the other what it subscribes to, under a number; a frame is its
length, that number, and the message. Sockets are non-blocking, and what can be sent at once is sent
by the caller: nothing but `anyio.wait_readable` stands between the protocol and the kernel, which
costs a fraction of a stream. Short frames overtake long ones that wait, so that an invalidation is
not behind pages.

Who is at the other end of a Unix socket, the kernel says. TCP listens and connects on loopback
only, where nobody says it: permits of others apply, and a silent peer cannot be killed.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import stat
import struct
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.lowlevel
import attrs

from . import events as log_events
from .processes import ProcessSender
from .wire import MAX_MESSAGE, BadMessage

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from .engine import Events
    from .wire import Buffer

_MAGIC: Final = b"mmxpmem1"
_HEADER: Final = struct.Struct("<II")
_CONTROL: Final = 0
_SHORT: Final = 4096
_MAX_SUBJECT: Final = 256
_MAX_SUBJECTS: Final = 64
_QUEUE: Final = 64 << 20
_BURST: Final = 32
"""Full reads in a row after which others run."""
_BACKLOG: Final = 128
_SOCKET_BUFFER: Final = 1 << 20
"""Bytes, as far as the system permits: a batch of pages fits."""
_PAUSES: Final = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Seconds before each attempt to connect again."""


@attrs.frozen
class Address:
    """Where to listen or connect: unix:PATH, or tcp:HOST:PORT with a loopback host."""

    path: str | None
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises ValueError that says what was expected."""
        kind, _, rest = text.partition(":")
        if kind == "unix" and rest:
            return cls(rest)
        host, _, port = rest.rpartition(":")
        if kind != "tcp" or not host or not port.isdecimal() or int(port) > 0xFFFF:
            raise ValueError(f"{text!r}: expected unix:PATH or tcp:HOST:PORT")
        host = host.strip("[]")
        try:
            loopback = ipaddress.ip_address(host).is_loopback
        except ValueError:
            loopback = False
        if not loopback:
            raise ValueError(f"{text!r}: expected a loopback address (127.0.0.1, ::1): TCP is bare")
        return cls(None, host, int(port))

    def __str__(self) -> str:
        """As `parse` reads it."""
        if self.path is not None:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"

    @property
    def target(self) -> Any:
        """What a socket takes."""
        return self.path if self.path is not None else (self.host, self.port)

    def socket(self) -> socket.socket:
        """A non-blocking socket of the right kind."""
        if self.path is not None:
            family = socket.AF_UNIX
        else:
            family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setblocking(False)
        return made


class Link:
    """One socket to one other partition."""

    def __init__(self, engine: StreamEngine, sock: socket.socket, sender: ProcessSender) -> None:
        self.engine: Final = engine
        self.sock: Final = sock
        self.sender: Final = sender
        self.subjects: Final[dict[bytes, int]] = {}
        """What the other end subscribes to, and its number for it."""
        self.broken = False
        self.greeted = False
        self._rest: memoryview | None = None
        self._express: Final[deque[tuple[bytes, Buffer]]] = deque()
        self._bulk: Final[deque[tuple[bytes, Buffer]]] = deque()
        self._queued = 0
        self._wake: anyio.Event | None = None

    def __str__(self) -> str:
        return str(self.sender)

    # ------------------------------------------------------------------ out

    def send(self, number: int, header: bytes, body: Buffer = b"") -> None:
        """Send a frame now, or queue it, or lose it if too much is queued already."""
        head = _HEADER.pack(len(header) + len(body), number) + header
        if self._queued:
            if self._queued > _QUEUE:
                self.engine.dropped += 1
                return
            lane = self._express if len(head) + len(body) <= _SHORT else self._bulk
            lane.append((head, body))
            self._queued += len(head) + len(body)
        else:
            self._transmit(head, body)

    def _transmit(self, head: bytes, body: Buffer) -> None:
        """Send what the kernel takes; the rest is first in the queue."""
        try:
            sent = self.sock.sendmsg((head, body)) if body else self.sock.send(head)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.shut()
            return
        size = len(head) + len(body)
        if sent < size:
            at = sent - len(head)
            rest = memoryview(body)[at:] if at >= 0 else memoryview(b"".join((head[sent:], body)))
            self._rest = rest
            self._queued += size - sent
            if self._wake is not None:
                self._wake.set()

    async def write(self) -> None:
        """Send what is queued whenever the kernel takes more."""
        while True:
            while self._rest is not None:
                await anyio.wait_writable(self.sock)
                try:
                    sent = self.sock.send(self._rest)
                except BlockingIOError:
                    continue
                self._queued -= sent
                self._rest = self._rest[sent:] if sent < len(self._rest) else None
            lane = self._express or self._bulk
            if lane:
                head, body = lane.popleft()
                self._queued -= len(head) + len(body)
                self._transmit(head, body)
            else:
                self._wake = anyio.Event()
                await self._wake.wait()

    def shut(self) -> None:
        """The link is of no use any more: whoever reads it finds its end."""
        if not self.broken:
            self.broken = True
            with suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)

    # ------------------------------------------------------------------ in

    async def read(self, events: Events, own: dict[int, bytes]) -> None:
        """Take frames apart until the end; raises BadMessage for what is none."""
        buffer = bytearray(MAX_MESSAGE + (64 << 10))
        view = memoryview(buffer)
        sock = self.sock
        received = events.received
        sender = self.sender
        unpack, header = _HEADER.unpack_from, _HEADER.size
        start = end = burst = 0
        wanted = header
        while True:
            room = len(buffer) - end
            try:
                got = sock.recv_into(view[end:])
            except BlockingIOError:
                await anyio.wait_readable(sock)
                continue
            if not got:
                return
            end += got
            if not self.greeted:
                if end - start < len(_MAGIC) and _MAGIC.startswith(buffer[start:end]):
                    continue
                if buffer[start : start + len(_MAGIC)] != _MAGIC:
                    raise BadMessage("a greeting of another protocol")
                start += len(_MAGIC)
                self.greeted = True
            while end - start >= header:
                length, number = unpack(buffer, start)
                if length > MAX_MESSAGE:
                    raise BadMessage(f"a frame of {length} bytes: expected up to {MAX_MESSAGE}")
                at = start + header
                if end - at < length:
                    wanted = header + length
                    break
                wanted = header
                start = at + length
                if number in own:
                    received(sender, view[at:start])
                elif number == _CONTROL:
                    self._subscribed(bytes(view[at:start]))
                else:
                    raise BadMessage(f"a frame for subscription {number}, which there is not")
            if start == end:
                start = end = 0
            elif len(buffer) - start < wanted:
                view[: end - start] = bytes(view[start:end])
                start, end = 0, end - start
            if got < room:
                burst = 0
                await anyio.wait_readable(sock)
            else:
                burst += 1
                if burst == _BURST:
                    burst = 0
                    await anyio.lowlevel.checkpoint()

    def _subscribed(self, payload: bytes) -> None:
        if not 4 < len(payload) <= 4 + _MAX_SUBJECT or len(self.subjects) >= _MAX_SUBJECTS:
            raise BadMessage(f"a subscription of {len(payload)} bytes, {len(self.subjects)}th")
        subject = payload[4:]
        self.subjects[subject] = int.from_bytes(payload[:4], "little")
        self.engine.route(subject, self)


class StreamEngine:
    """Listens at one address, connects to any number, and connects again when a link is lost.

    `uids` are the users that may connect to a Unix socket: by default the one that runs this, and
    root. Permits are checked besides.
    """

    def __init__(
        self,
        listen: str | None = None,
        connect: Iterable[str] = (),
        *,
        uids: Collection[int] | None = None,
        logger: object = None,
    ) -> None:
        from mmunotify import Log

        self.listen: Address | None = None if listen is None else Address.parse(listen)
        """Where it listens; the port is known once it is open."""
        self.connect: Final = [Address.parse(text) for text in connect]
        self.uids: Final = frozenset({0, os.geteuid()} if uids is None else uids)
        self.links: Final[list[Link]] = []
        self.dropped = 0
        """Frames that were lost because too much was queued."""
        self.refused = 0
        """Links that were closed because of what came over them, or from whom."""
        self.log: Final = Log(logger)
        self._routes: Final[dict[bytes, list[tuple[Link, int]]]] = {}
        self._own: Final[dict[int, bytes]] = {}
        self._events: Events | None = None
        self._listener: socket.socket | None = None
        self._first: list[tuple[Address, socket.socket]] = []

    # ------------------------------------------------------------------ coming and going

    async def open(self, events: Events) -> None:
        """Listen, and connect to every address once. Raises OSError that names the address."""
        self._events = events
        try:
            if self.listen is not None:
                self._listener = await self._listening(self.listen)
                if self.listen.path is None:
                    host, port = self._listener.getsockname()[:2]
                    self.listen = Address(None, host, port)
            for address in self.connect:
                self._first.append((address, await _connected(address)))
        except BaseException:
            await self.aclose()
            raise

    async def _listening(self, address: Address) -> socket.socket:
        if address.path is not None:
            await _clear_path(address)
        made = address.socket()
        try:
            if address.path is None:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address.target)
            if address.path is not None:
                others = self.uids - {0, os.geteuid()}
                os.chmod(address.path, 0o666 if others else 0o600)
            made.listen(_BACKLOG)
        except OSError as error:
            made.close()
            raise OSError(error.errno, f"cannot listen at {address}: {error.strerror}") from error
        return made

    async def run(self) -> None:
        """Carry frames until cancelled."""
        async with anyio.create_task_group() as tasks:
            for address, sock in self._first:
                tasks.start_soon(self._keep_connected, address, sock)
            self._first = []
            if self._listener is not None:
                await self._accept(tasks, self._listener)
            else:
                await anyio.sleep_forever()

    async def aclose(self) -> None:
        """Close everything. Never suspends."""
        for _, sock in self._first:
            sock.close()
        self._first = []
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            if self.listen is not None and self.listen.path is not None:
                with suppress(FileNotFoundError):
                    os.unlink(self.listen.path)
        for link in list(self.links):
            link.sock.close()

    async def _accept(self, tasks: anyio.abc.TaskGroup, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                await anyio.wait_readable(listener)
                continue
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ECONNABORTED):
                    raise
                await anyio.sleep(_PAUSES[2])
                continue
            tasks.start_soon(self._serve, sock)
            await anyio.lowlevel.checkpoint()

    async def _keep_connected(self, address: Address, sock: socket.socket | None) -> None:
        attempt = 0
        while True:
            try:
                connected = sock or await _connected(address)
            except OSError:
                await anyio.sleep(_PAUSES[min(attempt, len(_PAUSES) - 1)])
                attempt += 1
                continue
            sock, attempt = None, 0
            await self._serve(connected)

    async def _serve(self, sock: socket.socket) -> None:
        """One link, from its beginning to its end."""
        events = self._events
        assert events is not None
        sock.setblocking(False)
        for size in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, size, _SOCKET_BUFFER)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with sock:
            sender = ProcessSender.of(sock)
            uid = sender.credentials.uid
            if sock.family == socket.AF_UNIX and uid not in self.uids:
                self._refuse(sender, f"user {uid} may not connect: expected {sorted(self.uids)}")
                return
            link = Link(self, sock, sender)
            self.links.append(link)
            self.log.emit(log_events.LINK, peer=str(sender), state="up")
            try:
                link._transmit(_MAGIC, b"")
                for number, subject in self._own.items():
                    link.send(_CONTROL, number.to_bytes(4, "little") + subject)
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(_quietly, link.write)
                    await _quietly(link.read, events, self._own)
                    tasks.cancel_scope.cancel()
            except BadMessage as error:
                self._refuse(sender, str(error))
            except BaseExceptionGroup as group:
                bad, rest = group.split(BadMessage)
                if bad is not None:
                    self._refuse(sender, str(bad.exceptions[0]))
                if rest is not None:
                    raise rest from None
            finally:
                link.broken = True
                self.links.remove(link)
                for routes in self._routes.values():
                    routes[:] = [route for route in routes if route[0] is not link]
                for subject in [name for name, routes in self._routes.items() if not routes]:
                    del self._routes[subject]
                self.log.emit(log_events.LINK, peer=str(sender), state="lost")
                events.gone(sender)

    def _refuse(self, sender: ProcessSender, reason: str) -> None:
        self.refused += 1
        self.log.emit(log_events.FRAME_REFUSED, peer=str(sender), reason=reason)

    # ------------------------------------------------------------------ subjects

    def subscribe(self, subject: bytes) -> None:
        """Have frames for `subject` given to `received`."""
        number = len(self._own) + 1
        self._own[number] = subject
        for link in self.links:
            link.send(_CONTROL, number.to_bytes(4, "little") + subject)

    def route(self, subject: bytes, link: Link) -> None:
        """The other end of a link subscribes: what was sent there before was lost."""
        routes = self._routes.setdefault(subject, [])
        # The newest link of a partition first: it may have lost the older one and not know.
        routes.insert(0, (link, link.subjects[subject]))
        if self._events is not None:
            self._events.lost()

    def partitions(self) -> list[int]:
        """The numbers of the partitions that links lead to."""
        return sorted(
            int(number)
            for prefix, _, number in (subject.partition(b".") for subject in self._routes)
            if prefix == b"p" and number.isdigit()
        )

    def send(self, subject: bytes, header: bytes, body: Buffer = b"") -> bool:
        """Send one frame; False if no link leads there."""
        routes = self._routes.get(subject)
        if not routes:
            return False
        link, number = routes[0]
        link.send(number, header, body)
        return True


async def _quietly(function: Any, *args: Any) -> None:
    """A link that breaks is over, and no error."""
    with suppress(OSError, anyio.ClosedResourceError):
        await function(*args)


async def _connected(address: Address) -> socket.socket:
    sock = address.socket()
    try:
        try:
            sock.connect(address.target)
        except BlockingIOError as error:
            if error.errno != errno.EINPROGRESS:
                raise
            await anyio.wait_writable(sock)
            number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number:
                raise OSError(number, os.strerror(number)) from None
    except BaseException as error:
        sock.close()
        if isinstance(error, OSError):
            raise OSError(error.errno, f"cannot connect to {address}: {error.strerror}") from error
        raise
    return sock


async def _clear_path(address: Address) -> None:
    """Remove a socket that nobody listens at any more."""
    assert address.path is not None
    try:
        if not stat.S_ISSOCK(os.stat(address.path).st_mode):
            raise OSError(errno.EADDRINUSE, f"cannot listen at {address}: it is no socket")
    except FileNotFoundError:
        return
    try:
        (await _connected(address)).close()
    except ConnectionRefusedError:
        os.unlink(address.path)
    else:
        raise OSError(errno.EADDRINUSE, f"cannot listen at {address}: somebody else does")
