"""A network in memory that may lose, duplicate and reorder messages, as the schedule says."""

from __future__ import annotations

from collections import deque
from typing import Any

import anyio
import anyio.lowlevel
import attrs
from anyio.abc import ObjectStream

from .hooks import choose


@attrs.define
class NetworkStatistics:
    """An object containing debugging information about a network."""

    sent: int = 0
    received: int = 0
    lost: int = 0
    duplicated: int = 0
    reordered: int = 0
    """Messages that were received before one that was sent earlier."""


class Network:
    """Links in memory, on any event loop of anyio.

    In an explored run a message may be lost, arrive twice, or be overtaken; `loss`, `duplication`
    and `reordering` say how often each may happen in one execution, on all links together, which
    is what keeps the number of schedules finite. Outside an exploration nothing of it happens.
    Messages are any objects, and are not copied. Each message is a choice while something is left
    of the budgets: small numbers go a long way.
    """

    def __init__(self, *, loss: int = 0, duplication: int = 0, reordering: int = 0) -> None:
        self._left = {"lose": loss, "duplicate": duplication, "reorder": reordering}
        self._statistics = NetworkStatistics()

    def link(self, one: str = "a", other: str = "b") -> tuple[Endpoint, Endpoint]:
        """The two ends of a new link, named for reports."""
        ends = Endpoint(self, one), Endpoint(self, other)
        ends[0]._peer, ends[1]._peer = ends[1], ends[0]
        return ends

    def statistics(self) -> NetworkStatistics:
        """A snapshot for debugging."""
        return attrs.evolve(self._statistics)

    def _choose(self, what: str, otherwise: str, *options: str) -> str:
        """One of `options` that there is something left of, or `otherwise`."""
        possible = [option for option in options if self._left[option]]
        chosen = choose(otherwise, *possible, what=what)
        if chosen != otherwise:
            self._left[chosen] -= 1
        return chosen


class Endpoint(ObjectStream[Any]):
    """One end of a link: an anyio object stream of messages, with no limit to what is under way."""

    _peer: Endpoint

    def __init__(self, network: Network, name: str) -> None:
        self.name = name
        self._network = network
        self._inbox: deque[Any] = deque()
        self._arrived: anyio.Event | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<Endpoint {self.name!r} with {len(self._inbox)} messages>"

    async def send(self, item: Any) -> None:
        """Send a message, which is then under way; a checkpoint, after it has been sent.

        Raises `anyio.ClosedResourceError` on a closed end, and `anyio.BrokenResourceError` when the
        other end is closed.
        """
        self.send_nowait(item)
        await anyio.lowlevel.checkpoint()

    def send_nowait(self, item: Any) -> None:
        """`send` without the checkpoint; never suspends."""
        if self._closed:
            raise anyio.ClosedResourceError
        if self._peer._closed:
            raise anyio.BrokenResourceError
        network, counts = self._network, self._network._statistics
        counts.sent += 1
        fate = network._choose(f"{self.name} sends {item!r}", "deliver", "lose", "duplicate")
        if fate == "lose":
            counts.lost += 1
            return
        counts.duplicated += fate == "duplicate"
        self._peer._arrive([item] * (2 if fate == "duplicate" else 1))

    async def receive(self) -> Any:
        """The next message; waits for one, and is a checkpoint when there is one.

        Raises `anyio.ClosedResourceError` on a closed end, and `anyio.EndOfStream` when the other
        end is closed and nothing is under way.
        """
        if self._inbox:
            await anyio.lowlevel.checkpoint()
        while not self._inbox:
            if self._closed:
                raise anyio.ClosedResourceError
            if self._peer._closed:
                raise anyio.EndOfStream
            if self._arrived is None:
                self._arrived = anyio.Event()
            await self._arrived.wait()
        return self._take()

    def receive_nowait(self) -> Any:
        """The next message, or `anyio.WouldBlock`; never suspends."""
        if self._closed:
            raise anyio.ClosedResourceError
        if not self._inbox:
            raise anyio.EndOfStream if self._peer._closed else anyio.WouldBlock
        return self._take()

    def _take(self) -> Any:
        network, inbox = self._network, self._inbox
        place = 0
        while place + 1 < len(inbox):
            what = f"{self.name} receives {inbox[place]!r}"
            if network._choose(what, "in order", "reorder") != "reorder":
                break
            place += 1
        network._statistics.received += 1
        network._statistics.reordered += place > 0
        item = inbox[place]
        del inbox[place]
        return item

    def _arrive(self, items: list[Any]) -> None:
        self._inbox.extend(items)
        self._wake()

    def _wake(self) -> None:
        if self._arrived is not None:
            self._arrived.set()
            self._arrived = None

    async def send_eof(self) -> None:
        """Close this end; what is under way from the other is lost."""
        await self.aclose()

    async def aclose(self) -> None:
        """Close this end; what it has sent still arrives. Never suspends."""
        self._closed = True
        self._wake()
        self._peer._wake()
