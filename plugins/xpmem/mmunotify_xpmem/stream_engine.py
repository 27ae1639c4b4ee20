"""The embedded engine: links over Unix or loopback TCP sockets, without any server between.

A link is one socket. Each end tells the other what it subscribes to, under a number; a frame is its
length, that number, and the message. Sockets are non-blocking, and what can be sent at once is sent
by the caller: nothing but `anyio.wait_readable` stands between the protocol and the kernel, which
costs a fraction of a stream. Short frames overtake long ones that wait, so that an invalidation is
not behind pages.

One task reads all links: it waits for an epoll that has them all, so that answers of many cost one
turn of the event loop. And whoever waits for an answer reads its link meanwhile (`pump`), which
costs no turn at all; the epoll leaves that link out as long. Where there is no epoll, each link has
a task that reads it.

Who is at the other end of a Unix socket, the kernel says. TCP listens and connects on loopback
only, where nobody says it: permits of others apply, and a silent peer cannot be killed.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import select
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

    from .engine import Answerable, Events
    from .wire import Buffer

_MAGIC: Final = b"mmxpmem1"
_HEADER: Final = struct.Struct("<II")
_CONTROL: Final = 0
_SHORT: Final = 4096
_MAX_SUBJECT: Final = 256
_MAX_SUBJECTS: Final = 64
_QUEUE: Final = 64 << 20
_BURST: Final = 8
"""Full reads in a row after which others run."""
_BUFFER: Final = 16 << 10
"""Bytes of a link's buffer. A frame that is longer than that is received where its user says."""
_AGAIN: Final = 8
"""Times in a row that a link is read before others are."""
_EAGER: Final = 32
"""Answers in a row that are taken without letting others run."""
_READY: Final = 64
"""Links that are read in one turn."""
_BACKLOG: Final = 128
SOCKET_BUFFER: Final = 2 << 20
"""Bytes, as far as the system permits: a long read's batches under way fit."""
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

    def __init__(
        self, engine: StreamEngine, events: Events, sock: socket.socket, sender: ProcessSender
    ) -> None:
        self.engine: Final = engine
        self.events: Final = events
        self.sock: Final = sock
        self.sender: Final = sender
        self.subjects: Final[dict[bytes, int]] = {}
        """What the other end subscribes to, and its number for it."""
        self.broken = False
        self.over: Final = anyio.Event()
        """Nothing will be received any more."""
        self.error: BadMessage | None = None
        """Why not, if it is the other end's fault."""
        self.pumped = False
        """Somebody who waits for an answer reads it."""
        self._greeted = False
        self._buffer: Final = memoryview(bytearray(_BUFFER))
        self._end = 0
        """The beginning of a frame is here, up to there."""
        self._long: memoryview | None = None
        """A frame that the buffer is too short for; `_filled` bytes of it have arrived."""
        self._filled = 0
        self._number = 0
        self._rest: memoryview | None = None
        self._express: Final[deque[tuple[bytes, Buffer]]] = deque()
        self._bulk: Final[deque[tuple[bytes, Buffer]]] = deque()
        self._queued = 0
        self._wake: anyio.Event | None = None
        self.fd: Final = sock.fileno()

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
        if 0 < len(body) <= _SHORT:  # copying costs less than a vector
            head, body = b"".join((head, body)), b""
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

    def close(self) -> None:
        """Close the socket, unless somebody pumps it: then he does, who finds its end."""
        self.shut()
        if not self.pumped:
            self.sock.close()

    # ------------------------------------------------------------------ in

    async def read(self) -> None:
        """Receive until the link is over."""
        while not self.broken:
            await anyio.wait_readable(self.sock)
            self.receive()

    def receive(self) -> bool:
        """Take what has arrived, and hand its frames on; whether there was anything.

        The link may be over then.
        """
        try:
            for _ in range(_BURST):
                if not (self._receive() if self._long is None else self._receive_long()):
                    break
            return True
        except BlockingIOError:
            pass
        except (EOFError, OSError):
            self._finish(None)
        except BadMessage as error:
            self._finish(error)
        return False

    def _finish(self, error: BadMessage | None) -> None:
        self.error = error
        self.shut()
        self.engine.unwatch(self)
        self.over.set()

    def _receive(self) -> bool:
        """Receive into the buffer; whether there may be more."""
        buffer, end = self._buffer, self._end
        got = self.sock.recv_into(buffer[end:] if end else buffer)
        if not got:
            raise EOFError
        end += got
        start = 0
        if not self._greeted:
            if end < len(_MAGIC) and _MAGIC.startswith(bytes(buffer[:end])):
                self._end = end
                return False
            if bytes(buffer[: len(_MAGIC)]) != _MAGIC:
                raise BadMessage("a greeting of another protocol")
            self._greeted = True
            start = len(_MAGIC)
        own, received, sender = self.engine.own, self.events.received, self.sender
        full = end == _BUFFER
        while end - start >= _HEADER.size:
            length, number = _HEADER.unpack_from(buffer, start)
            at = start + _HEADER.size
            if end - at < length:
                if _HEADER.size + length > _BUFFER:
                    self._begin_long(length, number, buffer[at:end])
                    return True
                break
            start = at + length
            if number in own:
                received(sender, buffer[at:start])
            elif number == _CONTROL:
                self._subscribed(bytes(buffer[at:start]))
            else:
                raise BadMessage(f"a frame for subscription {number}, which there is not")
        if start and start < end:
            buffer[: end - start] = bytes(buffer[start:end])
        self._end = end - start
        return full

    def _begin_long(self, length: int, number: int, here: memoryview) -> None:
        if length > MAX_MESSAGE:
            raise BadMessage(f"a frame of {length} bytes: expected up to {MAX_MESSAGE}")
        if number not in self.engine.own:
            raise BadMessage(f"a frame of {length} bytes for subscription {number}")
        self._long = self.events.room(length)
        self._long[: len(here)] = here
        self._filled, self._number, self._end = len(here), number, 0

    def _receive_long(self) -> bool:
        """Receive more of a long frame; whether there may be more."""
        frame = self._long
        assert frame is not None
        got = self.sock.recv_into(frame[self._filled :])
        if not got:
            raise EOFError
        self._filled += got
        if self._filled < len(frame):
            return False
        self._long = None
        self.events.received(self.sender, frame)
        return True

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
        self.own: Final[dict[int, bytes]] = {}
        """What this end subscribes to, by number."""
        self._watched: Final[dict[int, Link]] = {}
        self._epoll: select.epoll | None = None
        self._eager = 0
        self._events: Events | None = None
        self._listener: socket.socket | None = None
        self._first: list[tuple[Address, socket.socket]] = []

    # ------------------------------------------------------------------ coming and going

    async def open(self, events: Events) -> None:
        """Listen, and connect to every address once. Raises OSError that names the address."""
        self._events = events
        try:
            if hasattr(select, "epoll"):
                self._epoll = select.epoll()
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
            if self._epoll is not None:
                tasks.start_soon(self._read, self._epoll)
            if self._listener is not None:
                await self._accept(tasks, self._listener)
            else:
                await anyio.sleep_forever()

    async def _read(self, epoll: select.epoll) -> None:
        """Read all links but those that are pumped."""
        number = epoll.fileno()
        while True:
            await anyio.wait_readable(number)
            self._eager = 0
            self._receive(epoll)

    def _receive(self, epoll: select.epoll) -> None:
        for fd, _ in epoll.poll(0, _READY):
            link = self._watched.get(fd)
            if link is not None and not link.pumped:
                # The kernel may let the other end run when it is answered, and it ask again.
                for _ in range(_AGAIN):
                    if not link.receive():
                        break

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
            link.close()
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None

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
            sock.setsockopt(socket.SOL_SOCKET, size, SOCKET_BUFFER)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sender = ProcessSender.of(sock)
        uid = sender.credentials.uid
        if sock.family == socket.AF_UNIX and uid not in self.uids:
            sock.close()
            self._refuse(sender, f"user {uid} may not connect: expected {sorted(self.uids)}")
            return
        link = Link(self, events, sock, sender)
        self.links.append(link)
        self.log.emit(log_events.LINK, peer=str(sender), state="up")
        try:
            link._transmit(_MAGIC, b"")
            for number, subject in self.own.items():
                link.send(_CONTROL, number.to_bytes(4, "little") + subject)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_quietly, link.write)
                if self._epoll is None:
                    await _quietly(link.read)
                else:
                    self._watch(link)
                    await link.over.wait()
                tasks.cancel_scope.cancel()
            if link.error is not None:
                self._refuse(sender, str(link.error))
        finally:
            self.unwatch(link)
            link.close()
            self.links.remove(link)
            for routes in self._routes.values():
                routes[:] = [route for route in routes if route[0] is not link]
            for subject in [name for name, routes in self._routes.items() if not routes]:
                del self._routes[subject]
            self.log.emit(log_events.LINK, peer=str(sender), state="lost")
            events.gone(sender)

    def _watch(self, link: Link) -> None:
        self._watched[link.fd] = link
        assert self._epoll is not None
        self._epoll.register(link.fd, select.EPOLLIN)

    def unwatch(self, link: Link) -> None:
        """Nothing will come over it any more."""
        if self._watched.get(link.fd) is link:
            del self._watched[link.fd]
            if self._epoll is not None:
                self._epoll.unregister(link.fd)

    def _refuse(self, sender: ProcessSender, reason: str) -> None:
        self.refused += 1
        self.log.emit(log_events.FRAME_REFUSED, peer=str(sender), reason=reason)

    # ------------------------------------------------------------------ subjects

    def subscribe(self, subject: bytes) -> None:
        """Have frames for `subject` given to `received`."""
        number = len(self.own) + 1
        self.own[number] = subject
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

    def take(self) -> None:
        """Receive what has arrived already."""
        if self._epoll is not None and self._eager < _EAGER:
            self._eager += 1
            self._receive(self._epoll)

    async def pump(self, subject: bytes, request: Answerable) -> None:
        """Read the link to `subject` until the request is done, if nobody else does."""
        routes = self._routes.get(subject)
        epoll = self._epoll
        if not routes or epoll is None:
            return
        link = routes[0][0]
        if link.pumped or link.broken:
            return
        if self._eager < _EAGER:
            # The kernel has often let the other end run already.
            self._eager += 1
            link.receive()
            if request.done or link.broken:
                return
        self._eager = 0
        link.pumped = True
        epoll.modify(link.fd, 0)
        try:
            while not (request.done or link.broken):
                await anyio.wait_readable(link.fd)
                link.receive()
        finally:
            link.pumped = False
            if self._watched.get(link.fd) is link:
                epoll.modify(link.fd, select.EPOLLIN)
            elif link not in self.links:
                link.close()


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
