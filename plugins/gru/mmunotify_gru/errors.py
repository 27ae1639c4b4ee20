"""What can go wrong with a GRU, beyond what mmunotify itself raises."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmunotify import MmuNotifyError

if TYPE_CHECKING:
    from .hardware.instructions import Cause, Instruction, Substatus


class GruError(MmuNotifyError):
    """Every exception of mmunotify_gru."""


class NoResources(GruError):
    """A request that no chiplet of this GRU could ever serve."""


class ContextClosed(GruError, RuntimeError):
    """A context was used after it was closed, or after its address space exited."""


class InstructionException(GruError):
    """A control block stopped in EXCEPTION: `cause` says why, `address` where if it was a TLB miss.

    The elements before `progress` are done, the others are not.
    """

    def __init__(
        self, instruction: Instruction, cause: Cause, address: int | None, progress: int
    ) -> None:
        where = "" if address is None else f" at {address:#x}"
        super().__init__(
            f"{instruction.opcode.name} stopped with {cause!r}{where} after {progress} elements: "
            f"{instruction}"
        )
        self.instruction = instruction
        self.cause = cause
        self.address = address
        self.progress = progress


class MessageQueueError(GruError):
    """A message could not be sent or received; `substatus` is what the hardware said last."""

    def __init__(self, message: str, substatus: Substatus | None = None) -> None:
        super().__init__(message)
        self.substatus = substatus


class QueueFull(MessageQueueError, BlockingIOError):
    """MQE_QUEUE_FULL: the receiver has to free messages first."""


class Congestion(MessageQueueError):
    """MQE_CONGESTION: somebody else is turning the queue round, or a buffer was full; try again."""


class UseAfterFree(GruError):
    """A context was used after its last reference was dropped."""


class GruInvariantViolated(GruError, AssertionError):
    """The checker saw the driver break one of its rules."""
