"""Frames in a stream of bytes: they come out as they went in, however it was cut, and whatever
else comes costs no more than the link."""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Any

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st

from mmunotify_xpmem import Credentials, StreamEngine
from mmunotify_xpmem.processes import ProcessSender
from mmunotify_xpmem.stream_engine import Link
from mmunotify_xpmem.wire import MAX_MESSAGE

HEADER = struct.Struct("<II")
MAGIC = b"mmxpmem1"
OWN = {1: b"one", 2: b"two"}


@attrs.define
class Pipe:
    """The socket of a link: what comes in each time it is read."""

    chunks: list[bytes]

    def recv_into(self, view: memoryview) -> int:
        while self.chunks and not self.chunks[0]:
            del self.chunks[0]
        if not self.chunks:
            return 0
        first = self.chunks[0][: len(view)]
        self.chunks[0] = self.chunks[0][len(first) :]
        view[: len(first)] = first
        return len(first)

    def fileno(self) -> int:
        return -1

    def shutdown(self, how: int) -> None: ...


@attrs.define
class User:
    frames: list[bytes] = attrs.field(factory=list)

    def received(self, sender: Any, frame: memoryview) -> None:
        self.frames.append(bytes(frame))

    def room(self, size: int) -> memoryview:
        return memoryview(bytearray(size))

    def lost(self) -> None: ...

    def gone(self, sender: Any) -> None: ...


def read(chunks: list[bytes]) -> tuple[list[bytes], Link, bool]:
    """The frames that a link takes out of them; and whether it has refused something."""
    sender = ProcessSender(Credentials(1, 1), None, -1, "somebody")
    pipe: Any = Pipe(chunks)
    user, engine = User(), StreamEngine()
    for subject in OWN.values():
        engine.subscribe(subject)
    link = Link(engine, user, pipe, sender)
    while not link.broken:
        link.receive()
    return user.frames, link, link.error is not None


def cut(data: bytes, places: list[int]) -> list[bytes]:
    bounds = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[low:high] for low, high in pairwise(bounds)]


places = st.lists(st.integers(0, 1 << 22), max_size=12)
payloads = st.one_of(
    st.binary(max_size=60),
    st.sampled_from([4096, 262144, MAX_MESSAGE]).map(lambda size: b"\x5a" * size),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(OWN)), payloads), max_size=6), places)
def test_frames_come_out_as_they_went_in(frames: list[tuple[int, bytes]], at: list[int]) -> None:
    """In order, wherever the stream was cut."""
    stream = MAGIC + b"".join(HEADER.pack(len(data), number) + data for number, data in frames)
    found, _, refused = read(cut(stream, at))
    assert found == [data for _, data in frames]
    assert not refused


pieces = st.one_of(
    st.binary(max_size=40),
    st.builds(HEADER.pack, st.integers(0, 80), st.integers(0, 4)),
    st.builds(HEADER.pack, st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 32) - 1)),
    st.builds(lambda data: HEADER.pack(len(data), 0) + data, st.binary(max_size=300)),
)


@settings(max_examples=60, deadline=None)
@given(st.booleans(), st.lists(pieces, max_size=90), places)
def test_any_bytes_are_survived(greets: bool, stream: list[bytes], at: list[int]) -> None:
    """What comes out was in there, and what is remembered is bounded."""
    data = MAGIC * greets + b"".join(stream)
    found, link, _ = read(cut(data, at))
    assert sum(map(len, found)) <= len(data)
    assert greets or not found
    assert len(link.subjects) <= 64
    assert all(len(subject) <= 256 for subject in link.subjects)
