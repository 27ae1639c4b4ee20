"""The messages of the protocol, and how they are written.

A message is a header, two bytes of length and msgpack, and a body of bytes: pages, which are not
copied into the header. Every message of an importer says which incarnation of which partition sent
it, since a permit is bound to one. Ids are random (128 bits) and compared for equality only: `inc`
names one incarnation of a partition, `aid` one permit. Pages are counted from the segment's first.

Decoding checks types and sizes, allocates no more than the frame holds, and raises BadMessage.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, TypeAlias

import msgspec
from msgspec import Meta

from mmunotify import PAGE_SIZE

Buffer: TypeAlias = bytes | bytearray | memoryview
MAX_MESSAGE: Final = 1 << 20
"""Bytes, header and body: what every engine carries."""
MAX_PAGES: Final = 64
"""Of one fault or store."""
MAX_RANGES: Final = 4096
"""Of one batch of invalidations; more are made fewer by covering what is between them."""

Id = Annotated[bytes, Meta(min_length=16, max_length=16)]
Part = Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Pages = Annotated[int, Meta(ge=1, le=MAX_PAGES)]
Seconds = Annotated[float, Meta(ge=0.001, le=1e9)]
Text = Annotated[str, Meta(max_length=1024)]
Runs = Annotated[list[Count], Meta(min_length=2, max_length=2 * MAX_RANGES)]


class BadMessage(ValueError):
    """What arrived is no message of this protocol."""


class Message(msgspec.Struct, array_like=True, gc=False):
    """Any of them."""


class Request(Message):
    """From an importer."""

    part: Part
    me: Id
    """The sender's incarnation."""


class Get(Request, tag=1):
    """Ask for a permit. The same `rid` gets the same permit again."""

    rid: Id
    segid: Count
    write: bool


class Granted(Message, tag=2):
    """The permit `aid`, for `pages` pages; it lapses after `ttl` seconds of silence."""

    rid: Id
    aid: Id
    part: Part
    inc: Id
    pages: Count
    base: Count
    """The number of the first page in the exporter, for error messages."""
    ttl: Seconds
    heartbeat: Seconds


class Refused(Message, tag=3):
    """No permit: an errno, and why."""

    rid: Id
    code: int
    text: Text


class Fault(Request, tag=4):
    """Pages [first, first + need), and up to `count` if they are at hand."""

    aid: Id
    inc: Id
    """The exporter's."""
    fid: Count
    first: Count
    need: Pages
    count: Pages


class Page(Message, tag=5):
    """The answer: the body has the bytes of as many pages as it is long."""

    aid: Id
    inc: Id
    fid: Count


class Broken(Message, tag=6):
    """The answer to a fault or store that would kill the exporter's process by this signal."""

    aid: Id
    inc: Id
    fid: Count
    signal: Text
    code: int
    page: Count
    text: Text


class Retry(Message, tag=7):
    """Too much is waiting already: ask again later."""

    aid: Id
    inc: Id
    fid: Count


class Fenced(Message, tag=8):
    """There is no such permit (any more): drop everything that was got with it."""

    aid: Id


class Inv(Message, tag=9):
    """Drop ranges. Per permit: its aid, the numbers (from, upto) that this is, and the ranges."""

    inc: Id
    batch: Annotated[list[tuple[Id, Count, Count, Runs]], Meta(max_length=MAX_RANGES)]


class Ack(Request, tag=10):
    """Dropped, cumulative: per permit, every number up to this one."""

    inc: Id
    upto: Annotated[list[tuple[Id, Count]], Meta(max_length=MAX_RANGES)]


class Detach(Request, tag=11):
    """Nobody here wants [first, last) any longer: recall it, please."""

    aid: Id
    inc: Id
    first: Count
    last: Count


class Release(Request, tag=12):
    """Everything was dropped, and `aid` will not be used any more. Answered by Fenced."""

    aid: Id
    inc: Id


class Heartbeat(Request, tag=13):
    """Alive, and still using these permits."""

    inc: Id
    sent: float
    aids: Annotated[list[Id], Meta(max_length=1 << 15)]


class HeartbeatAck(Message, tag=14):
    """Heard what was `sent`; these permits are void."""

    part: Part
    inc: Id
    sent: float
    fenced: Annotated[list[Id], Meta(max_length=1 << 15)]


class Store(Request, tag=15):
    """Write the body at a byte of the segment, once. Answered by Stored or Broken."""

    aid: Id
    inc: Id
    fid: Count
    offset: Count


class Stored(Message, tag=16):
    """It is written, and no importer has the page as it was before."""

    aid: Id
    inc: Id
    fid: Count


class Ask(Request, tag=17):
    """What is exported, and how is it going?"""

    rid: Id


class Report(Message, tag=18):
    """The answer: the body is JSON."""

    rid: Id


_Any: TypeAlias = (
    Get | Granted | Refused | Fault | Page | Broken | Retry | Fenced | Inv | Ack | Detach | Release
    | Heartbeat | HeartbeatAck | Store | Stored | Ask | Report
)  # fmt: skip

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Any).decode


def encode(message: Message) -> bytes:
    """The header of a message; its body, if any, follows it on the wire."""
    header = _encode(message)
    length = len(header)
    if length > 0xFFFF:
        return b"\0\0" + length.to_bytes(4, "little") + header
    return length.to_bytes(2, "little") + header


def decode(frame: memoryview) -> tuple[Any, memoryview]:
    """The message and the body of a frame, which is not copied; raises BadMessage."""
    size = len(frame)
    if size < 2:
        raise BadMessage(f"a frame of {size} bytes: expected at least 2")
    at, length = 2, frame[0] | frame[1] << 8
    if not length:
        at, length = 6, int.from_bytes(frame[2:6], "little")
    if at + length > size:
        raise BadMessage(f"a header of {length} bytes in a frame of {size}")
    try:
        return _decode(frame[at : at + length]), frame[at + length :]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage(str(error)) from None


def pages_in(body: memoryview) -> int:
    """How many pages a body holds; raises BadMessage if it is not whole pages, or too many."""
    count, rest = divmod(len(body), PAGE_SIZE)
    if rest or not 1 <= count <= MAX_PAGES:
        raise BadMessage(f"a body of {len(body)} bytes: expected 1 to {MAX_PAGES} pages")
    return count
