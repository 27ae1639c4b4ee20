"""What was recorded against what the model did, field by field.

The fields: `r` result, `ev` announcements, `fl` page faults, `mf` fault counts, `gf` and `gm` what
a guest faulted on and what its hypervisor mapped, `vma` mappings,
`smaps` their counters, `pg` page codes, `fr` which pages share a frame and which kept theirs. Those
of a child have "@" and its name behind. Left out is what a recording cannot know for sure: the
order of ageing calls and of reclaim, the Referenced counter, the recording program's own faults (it
forks, it raises exceptions, reclaim takes its memory too), and what a second run had otherwise.
"""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any, Final

import attrs

from .guest import Guest
from .harness import PARENT, Harness
from .observe import FrameKey, Outcome, ProcessState, VmaState, group

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping

    from mmunotify.drivers import AnyDriver

    from .observe import Announcement
    from .recordings import Excuses, Operation, Sequence

UNRELIABLE_COUNTS: Final = frozenset({"y"})
INEXACT_FAULTS: Final = frozenset({"fork", "reclaim", "pmadvise", "gdirty", "exit"})
# The recording program raised an exception where these failed, and faulted while it did.
INEXACT_FAILURES: Final = frozenset({"poke", "uffd", "gtouch"})
UNORDERED: Final = frozenset({"reclaim"})
_PAGES: Final = re.compile(r"(\d+)\+(\d+)(.*)")
_LONGEST: Final = 600


@attrs.frozen
class Disagreement:
    """One field in which an operation came out otherwise, as text."""

    field: str
    expected: str
    got: str


@attrs.define
class Verdict:
    """How one operation came out."""

    sequence: str
    operation: Operation | None
    """None: what was announced when the processes exited."""
    compared: list[str] = attrs.Factory(list)
    disagreements: list[Disagreement] = attrs.Factory(list)
    announcements: int = 0
    announcements_agree: int = 0
    excuse: str | None = None

    @property
    def agrees(self) -> bool:
        """Whether nothing came out otherwise."""
        return not self.disagreements


async def check_sequence(
    sequence: Sequence, excuses: Excuses, guest: Callable[[], AnyDriver] = Guest
) -> AsyncIterator[Verdict]:
    """Replay a sequence, with a guest made by `guest`; a verdict per operation and for the exit.

    The replay goes on after a disagreement, so later ones may be mere consequences of the first.
    """
    expectation = _Expectation(sequence)
    async with Harness(sequence, guest) as harness:
        for operation in sequence.operations:
            outcome = await harness.do(operation)
            expectation.advance(operation)
            excuse = excuses.reason(operation)
            if excuse is None:
                yield expectation.judge(operation, outcome)
            else:
                yield Verdict(sequence.id, operation, excuse=excuse)
        outcome = await harness.finish()
    verdict = Verdict(sequence.id, None)
    if outcome.problem:
        verdict.disagreements.append(Disagreement("problem", "exit", outcome.problem))
    recorded = {PARENT: _announcements(sequence.exit_announcements)}
    _judge_announcements(verdict, recorded, outcome.announcements, ordered=True)
    yield verdict


class _Expectation:
    """The recorded state, carried from operation to operation: only changes are recorded."""

    def __init__(self, sequence: Sequence) -> None:
        self._sequence = sequence.id
        self._guest = sequence.guest
        self._states: dict[str, ProcessState] = {PARENT: ProcessState()}
        self._doubtful: set[str] = set()
        self._before: dict[tuple[str, int], int] = {}
        self._frames: dict[int, FrameKey] = {}
        self._files: dict[str, Any] = {}
        self._faults_inexact: set[str] = set()

    def advance(self, operation: Operation) -> None:
        """Take over what was recorded of the state after an operation."""
        self._before = {
            (name, page): label
            for name, state in self._states.items()
            for page, label in state.frames.items()
        }
        if operation.kind == "fork" and operation.arguments.get("stay"):
            self._states[operation.arguments["id"]] = ProcessState()
        elif operation.kind == "exit":
            del self._states[operation.arguments["in"]]
        elif operation.kind == "reclaim":
            # Children find out at their next operation that their own memory is gone as well.
            self._faults_inexact = self._states.keys() - {PARENT}
        for key in ("vma", "pg", "fr"):
            for name, state in self._states.items():
                field = _field(key, name)
                if field in operation.alternatives:
                    self._doubtful.add(field)
                elif field in operation.recorded:
                    self._doubtful.discard(field)
                if field in operation.recorded:
                    _take_over(state, key, operation.recorded[field])

    def judge(self, operation: Operation, outcome: Outcome) -> Verdict:
        """Compare an operation whose recorded state was taken over with what the model did."""
        verdict = Verdict(self._sequence, operation)
        ordered = operation.kind not in UNORDERED
        recorded = self._announced(operation)
        if outcome.problem:
            verdict.compared.append("problem")
            verdict.disagreements.append(Disagreement("problem", "done", outcome.problem))
            verdict.announcements = sum(len(_canonical(each)) for each in recorded.values())
            return verdict
        self._judge_result(verdict, operation, outcome)
        if "ev" in operation.alternatives:
            recorded = self._nearest(operation, recorded, outcome)
        _judge_announcements(verdict, recorded, outcome.announcements, ordered=ordered)
        self._judge_faults(verdict, operation, outcome)
        if self._guest:
            _judge_guest(verdict, operation, "gf", outcome.guest_faults)
            _judge_guest(verdict, operation, "gm", outcome.guest_mappings)
        for name, state in self._states.items():
            got = outcome.states.get(name, ProcessState())
            self._judge_vmas(verdict, name, state, got)
            self._judge_codes(verdict, name, state, got)
        self._judge_frames(verdict, operation, outcome)
        return verdict

    def _announced(self, operation: Operation) -> dict[str, list[Announcement]]:
        recorded = {PARENT: _announcements(operation.recorded["ev"])}
        for name, announcements in operation.recorded.get("evk", {}).items():
            recorded[name] = _announcements(announcements)
            if self._guest:
                for announcement in recorded[PARENT]:
                    recorded[name].remove(announcement)
        return recorded

    def _nearest(
        self, operation: Operation, recorded: dict[str, list[Announcement]], outcome: Outcome
    ) -> dict[str, list[Announcement]]:
        got = outcome.announcements.get(PARENT, [])
        for other in operation.alternatives["ev"]:
            if _canonical(_announcements(other)) == _canonical(got):
                return {**recorded, PARENT: _announcements(other)}
        return recorded

    def _judge_result(self, verdict: Verdict, operation: Operation, outcome: Outcome) -> None:
        allowed = [operation.recorded["r"], *operation.alternatives.get("r", ())]
        verdict.compared.append("r")
        if outcome.result not in allowed:
            verdict.disagreements.append(Disagreement("r", str(allowed[0]), str(outcome.result)))

    def _judge_faults(self, verdict: Verdict, operation: Operation, outcome: Outcome) -> None:
        name = operation.arguments.get("in", PARENT)
        recorded = operation.recorded
        allowed = [recorded.get("fl", []), *operation.alternatives.get("fl", ())]
        faults = [_faults(each) for each in allowed]
        verdict.compared.append("fl")
        if outcome.faults not in faults:
            verdict.disagreements.append(
                Disagreement("fl", _show_faults(faults[0]), _show_faults(outcome.faults))
            )
        if name in self._faults_inexact:
            self._faults_inexact.discard(name)
            return
        result = recorded["r"]
        failed = isinstance(result, dict) or (isinstance(result, int) and result < 0)
        if operation.kind in INEXACT_FAULTS or (operation.kind in INEXACT_FAILURES and failed):
            return
        if {"mf", "Mf"} & operation.alternatives.keys():
            return
        expected = recorded.get("mf", 0), recorded.get("Mf", 0)
        got = outcome.minor, outcome.major
        verdict.compared.append("mf")
        if got != expected:
            verdict.disagreements.append(
                Disagreement(
                    "mf", "minor {} major {}".format(*expected), "minor {} major {}".format(*got)
                )
            )

    def _judge_vmas(
        self, verdict: Verdict, name: str, state: ProcessState, got: ProcessState
    ) -> None:
        field = _field("vma", name)
        if field in self._doubtful:
            return
        self._name_files(state.vmas, got.vmas)
        names = {id(file): label for label, file in self._files.items()}
        expected_lines = [_line(vma, vma.file) for vma in state.vmas]
        got_lines = [
            _line(vma, vma.file and names.get(id(vma.file), "another file")) for vma in got.vmas
        ]
        verdict.compared.append(field)
        if expected_lines != got_lines:
            verdict.disagreements.append(
                Disagreement(
                    field,
                    _lines(expected_lines, without=got_lines),
                    _lines(got_lines, without=expected_lines),
                )
            )
            return
        field = _field("smaps", name)
        expected_counts = [_counts(vma) for vma in state.vmas]
        got_counts = [_counts(vma) for vma in got.vmas]
        verdict.compared.append(field)
        if expected_counts != got_counts:
            verdict.disagreements.append(
                Disagreement(
                    field,
                    _lines(expected_counts, without=got_counts),
                    _lines(got_counts, without=expected_counts),
                )
            )

    def _name_files(self, expected: list[VmaState], got: list[VmaState]) -> None:
        """Learn which file of the model a recorded label means, where they are first seen."""
        files = {(vma.start, vma.end): vma.file for vma in got if vma.file}
        known = {id(file) for file in self._files.values()}
        for vma in expected:
            file = files.get((vma.start, vma.end))
            if vma.file and vma.file not in self._files and file and id(file) not in known:
                self._files[vma.file] = file
                known.add(id(file))

    def _judge_codes(
        self, verdict: Verdict, name: str, state: ProcessState, got: ProcessState
    ) -> None:
        field = _field("pg", name)
        if field in self._doubtful:
            return
        verdict.compared.append(field)
        if state.codes != got.codes:
            pages = {
                page
                for page in state.codes.keys() | got.codes.keys()
                if state.codes.get(page) != got.codes.get(page)
            }
            verdict.disagreements.append(
                Disagreement(
                    field,
                    _show_pages({page: state.codes.get(page, "none") for page in pages}),
                    _show_pages({page: got.codes.get(page, "none") for page in pages}),
                )
            )

    def _judge_frames(self, verdict: Verdict, operation: Operation, outcome: Outcome) -> None:
        """Recorded labels and the model's frames must be one to one, now and since the last time.

        A label that has gone may come back for another frame: the kernel gave the same one out
        again. It may do so within the operation, but not at the very page that it was taken from
        (unless that was mapped anew).
        """
        known = self._frames
        labels = {key: label for label, key in known.items()}
        now: dict[int, FrameKey] = {}
        owners: dict[FrameKey, int] = {}
        mapped = {key for state in outcome.states.values() for key in state.frames.values()}
        for name, state in self._states.items():
            field = _field("fr", name)
            frames = outcome.states.get(name, ProcessState()).frames
            wrong: set[int] = set()
            for page, label in state.frames.items():
                key = frames.get(page)
                if key is None:
                    wrong.add(page)
                    continue
                fits = now.setdefault(label, key) == key and owners.setdefault(key, label) == label
                if known.get(label, key) != key:
                    stayed = self._before.get((name, page)) == label and operation.kind != "mmap"
                    fits = fits and known[label] not in mapped and not stayed
                fits = fits and labels.get(key, label) == label
                if not fits:
                    wrong.add(page)
            if field in self._doubtful:
                continue
            verdict.compared.append(field)
            if wrong:
                verdict.disagreements.append(
                    Disagreement(
                        field,
                        _show_frames({page: state.frames[page] for page in wrong}, labels),
                        _show_frames({page: frames.get(page) for page in wrong}, labels),
                    )
                )
        self._frames = now


def _field(key: str, name: str) -> str:
    return key if name == PARENT else f"{key}@{name}"


def _take_over(state: ProcessState, key: str, recorded: Any) -> None:
    if key == "vma":
        state.vmas = [
            VmaState(start, end, permissions, file, offset, flags, counts)
            for start, end, permissions, file, offset, counts, flags in recorded
        ]
    elif key == "pg":
        state.codes = {
            page: code
            for first, count, code in _parse(recorded)
            for page in range(first, first + count)
        }
    else:
        state.frames = {
            first + at: int(label[1:]) + at
            for first, count, label in _parse(recorded)
            for at in range(count)
        }


def _parse(text: str) -> Iterable[tuple[int, int, str]]:
    for word in text.split():
        match = _PAGES.fullmatch(word)
        assert match is not None
        yield int(match[1]), int(match[2]), match[3]


def _announcements(recorded: list[list[Any]] | None) -> list[Announcement]:
    """Without the task that caused them, which nobody who listens is told."""
    return [(each[0], each[1], each[2] if each[0] != "t" else "") for each in recorded or ()]


def _canonical(announcements: list[Announcement]) -> list[Announcement]:
    """Invalidations in their order, then the ageing calls as a set."""
    ageing = {each for each in announcements if each[0] != "u"}
    return [each for each in announcements if each[0] == "u"] + sorted(ageing, key=str)


def _judge_guest(verdict: Verdict, operation: Operation, field: str, got: list[list[Any]]) -> None:
    allowed = [operation.recorded.get(field, [])]
    allowed += [other or [] for other in operation.alternatives.get(field, ())]
    verdict.compared.append(field)
    if got not in allowed:
        expected, found = (
            _show_faults([(page, access, PARENT) for page, access in each])
            for each in (allowed[0], got)
        )
        verdict.disagreements.append(Disagreement(field, expected, found))


def _judge_announcements(
    verdict: Verdict,
    recorded: Mapping[str, list[Announcement]],
    heard: Mapping[str, list[Announcement]],
    *,
    ordered: bool,
) -> None:
    for name in dict.fromkeys([*recorded, *heard]):
        expected = _canonical(recorded.get(name, []))
        got = _canonical(heard.get(name, []))
        if not ordered:
            expected.sort(key=str)
            got.sort(key=str)
        field = _field("ev", name)
        verdict.compared.append(field)
        if expected == got:
            verdict.announcements += len(expected)
            verdict.announcements_agree += len(expected)
            continue
        blocks = SequenceMatcher(None, expected, got, autojunk=False).get_matching_blocks()
        agree = sum(block.size for block in blocks)
        verdict.announcements += len(expected) + len(got) - agree
        verdict.announcements_agree += agree
        verdict.disagreements.append(
            Disagreement(field, _show_announcements(expected), _show_announcements(got))
        )


# ---------------------------------------------------------------------- as text


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _show_announcements(announcements: list[Announcement]) -> str:
    words: list[str] = []
    run: list[Announcement] = []
    for each in [*announcements, ("", 0, 0)]:
        if run and each[0] == run[0][0] and each[1] == run[-1][2] and _one_page(each, run[0]):
            run.append(each)
            continue
        if run:
            step = " page by page" if len(run) > 1 else ""
            words.append(f"{run[0][0]} {run[0][1]}..{run[-1][2]}{step}")
        run = [each]
    return _cut(", ".join(words)) or "nothing"


def _one_page(*announcements: Announcement) -> bool:
    return all(
        isinstance(start, int) and isinstance(end, int) and end == start + 1
        for _, start, end in announcements
    )


def _faults(recorded: list[list[Any]] | None) -> list[tuple[int, str, str]]:
    return [(each[0], each[1], each[2] if len(each) > 2 else PARENT) for each in recorded or ()]


def _show_faults(faults: list[tuple[int, str, str]]) -> str:
    words: list[str] = []
    at = 0
    while at < len(faults):
        page, access, name = faults[at]
        count = 1
        while faults[at + count : at + count + 1] == [(page + count, access, name)]:
            count += 1
        words.append(f"{page}+{count}{access}" + (f" by {name}" if name != PARENT else ""))
        at += count
    return _cut(", ".join(words)) or "none"


def _line(vma: VmaState, file: str) -> str:
    backing = f" {file}+{vma.offset}" if file else ""
    flags = f" {vma.flags}" if vma.flags else ""
    return f"{vma.start}..{vma.end} {vma.permissions}{backing}{flags}"


def _counts(vma: VmaState) -> str:
    words = [
        f"{key}={vma.counts[key]}"
        for key in sorted(vma.counts)
        if key not in UNRELIABLE_COUNTS and vma.counts[key]
    ]
    return f"{vma.start}..{vma.end} " + " ".join(words)


def _lines(lines: list[str], *, without: list[str]) -> str:
    return _cut("; ".join(line for line in lines if line not in without)) or "nothing"


def _show_pages(codes: dict[int, str]) -> str:
    return _cut(" ".join(f"{first}+{count}{code}" for first, count, code in group(codes)))


def _show_frames(
    frames: Mapping[int, int | FrameKey | None], labels: Mapping[FrameKey, int]
) -> str:
    """Recorded labels, or those that the model's frames had before this operation."""
    shown: dict[int, Any] = {}
    for page, frame in frames.items():
        shown[page] = (
            frame if isinstance(frame, int) else labels.get(frame, "new") if frame else "none"
        )
    return _cut(
        " ".join(f"{first}+{count}:{value}" for first, count, value in group(shown, counting=True))
    )
