"""Who is to blame when a lane dies: a picture that it had in hand, the lane itself, or nobody that could be named.

    suspect      was in hand when a lane died, among others. It is tried alone, one per chunk.
    accused      was alone in the hands of a lane that died. It is condemned once that lane has started again healthy,
                 and, where any other picture could have ended it so (it was killed, its device or its engine failed,
                 bytes never came), once it has got a picture from elsewhere through. Killed must happen twice: the
                 first time may be somebody's kill -9.
    condemned    is quarantined, and so are its copies: one verdict for each content.
    given up     a lane that dies again and again, and nobody is shown to be why. What it was accused of is open again.

Every kill of a lane leaves a count behind that only work done or a verdict takes back, so no run goes on for ever.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from pipeline.batch import Reason
from pipeline.lanes import Lane
from pipeline.store import Outcome, PendingItem

LANE_DEATHS_MAX = 3  # in a row, without a chunk done or a picture condemned: it is not the pictures
# Kills in a row where lanes are known to work: what a night has left to do may be just the pictures that take more
# memory than there is. At 1 to 2 s for each start of a CPU lane, less than a minute.
LANE_KILLS_MAX = 30
READ_CRASHES_MAX = 3  # rows of one container that take their reader down; then its others are not read


class Accused(NamedTuple):
    row: PendingItem
    dead: Lane  # which had this row alone


@dataclass
class Blame:
    """What the coordinator knows of deaths. It says what must be tried alone, and quarantines whom it condemns."""

    container_of: Callable[[bytes], bytes]  # of a locator, see `Source`
    quarantine: Callable[[Sequence[Outcome]], None]
    proven: bool = False  # lanes have done more than single rows here, in this run or an earlier one
    suspects: deque[PendingItem] = field(default_factory=deque)
    accused: dict[str, Accused] = field(default_factory=dict)  # by lane
    condemned: dict[bytes, tuple[Reason, str]] = field(default_factory=dict)  # by content
    killed_once: set[int] = field(default_factory=set)  # rows whose lane was killed when it had them alone
    bad_reads: defaultdict[bytes, list[Reason]] = field(default_factory=lambda: defaultdict(list))  # by container
    deaths: Counter[str] = field(default_factory=Counter)  # in a row, of each lane

    # ---- what has to be tried ----------------------------------------------------------------------------------------

    def wants(self, lane: Lane) -> bool:
        """Whether this lane is to have one row alone."""
        return bool(self.suspects) or lane.spec.name in self.accused

    def next_alone(self, lane: Lane, from_elsewhere: Callable[[], list[PendingItem]]) -> list[PendingItem]:
        """One row: a suspect, or one that shows whether the lane works without the row it is accused of.

        Other suspects show that only where no picture can be why: huge pictures lie, and wait, side by side. Nothing:
        there is no row that could show it, and the accused one is convicted without.
        """
        accused = self.accused.get(lane.spec.name)
        if accused is None:
            return [self.suspects.popleft()]
        if one := from_elsewhere():
            return one
        if self.suspects and not accused.dead.killed:
            return [self.suspects.pop()]
        self._convict(self.accused.pop(lane.spec.name))
        return []

    def spared(self, rows: list[PendingItem]) -> list[PendingItem]:
        """Without rows of containers that take their reader down: one does so with row after row."""
        for container, reasons in self.bad_reads.items():
            if len(reasons) >= READ_CRASHES_MAX:
                lost = [row for row in rows if self.container_of(row.locator) == container]
                if lost:
                    words = f"{len(reasons)} pictures beside it in the same file took their reader down"
                    self._condemn(lost, reasons[-1], words)
                    rows = [row for row in rows if self.container_of(row.locator) != container]
        return rows

    def settled(self, outcomes: list[Outcome]) -> list[Outcome]:
        """Copies of a condemned content are as bad as it is."""
        if not self.condemned:
            return outcomes
        return [self._as_condemned(one) if one.status == "copied" else one for one in outcomes]

    # ---- what lanes do ---------------------------------------------------------------------------------------------

    def died(self, lane: Lane, rows: list[PendingItem]) -> list[PendingItem]:
        """Of the rows that it had, those that nobody suspects."""
        name, in_hand = lane.spec.name, lane.board.in_hand()
        self.deaths[name] += 1
        suspects = [row for row in rows if lane.alone or any(first <= row.id <= last for first, last in in_hand)]
        blamed = {row.id for row in suspects}
        if lane.alone and name not in self.accused:
            self.accused[name] = Accused(suspects.pop(), lane)
        elif lane.alone and lane.killed:
            self.killed_once.update(blamed)
        self.suspects.extend(suspects)
        return [row for row in rows if row.id not in blamed]

    def lane_itself(self, dead: Lane) -> str:
        """Why it is to be given up, if it is."""
        accused = self.accused.get(dead.spec.name)
        open_question = accused is not None and accused.dead is dead  # its next row answers that
        patient = open_question or (dead.killed and self.proven)
        if self.deaths[dead.spec.name] < (LANE_KILLS_MAX if patient else LANE_DEATHS_MAX):
            return ""
        name, log_path = dead.spec.name, dead.spec.log_path
        times = f"{self.deaths[name]} times in a row"
        if dead.killed:
            return (
                f"{name} was killed {times}, unless by somebody then by the kernel for want of memory (the system log "
                "tells): raise the limit, run fewer lanes (--devices) or end what else runs here, or let "
                "python -m pipeline.tune --max-memory SIZE find a setting that takes less"
            )
        why = f"with no picture to blame: out of memory, or a fault of the engine; see the system log and {log_path}"
        if dead.hung == "read":
            why = f"waiting for bytes of {dead.spec.source.root}: is it there, and does it answer?"
        return f"{name} died {times} (exit code {dead.process.exitcode}) {why}"

    def given_up(self, lane: Lane) -> None:
        if accused := self.accused.pop(lane.spec.name, None):
            self.suspects.append(accused.row)

    def started(self, lane: Lane) -> None:
        """A device that starts again and gives right pixels is not what crashed in a decoder's hands."""
        name = lane.spec.name
        if name in self.accused and not self.accused[name].dead.may_be_why:
            self._convict(self.accused.pop(name))
            del self.deaths[name]

    def finished(self, lane: Lane) -> None:
        """A chunk. One suspect alone that came through says nothing of what the lane can do."""
        name = lane.spec.name
        shown = name in self.accused
        if shown:
            self._convict(self.accused.pop(name))
        if shown or not lane.alone:
            del self.deaths[name]
        self.proven = self.proven or not lane.alone

    # ---- verdicts --------------------------------------------------------------------------------------------------

    def _convict(self, accused: Accused) -> None:
        """Its lane works without it, as far as can be seen."""
        row, dead = accused
        if dead.killed and row.id not in self.killed_once:
            self.killed_once.add(row.id)
            self.suspects.appendleft(row)
            return
        reading, in_hand = dead.board.reading(), bool(dead.board.in_hand())
        reason: Reason = "timeout" if dead.hung else "decoder_crash"
        words = f"took its {'reader' if reading else 'decoder'} process down twice, the second time alone"
        if not in_hand:
            words = "the engine died twice with it, the second time with it alone, after it was decoded"
        if dead.killed:
            words = "its process was killed twice with it alone, mostly for want of memory: see the system log"
        if dead.killed or dead.hung == "read" or not in_hand:  # not surely the picture: tried again in the next run
            reason = "read_error"
        if reading and (container := self.container_of(row.locator)):
            self.bad_reads[container].append(reason)
        self._condemn([row], reason, f"{words} (exit code {dead.process.exitcode})", dead.content)

    def _condemn(self, rows: list[PendingItem], reason: Reason, words: str, content: bytes | None = None) -> None:
        if content is not None:
            self.condemned[content] = reason, words
        self.quarantine([Outcome(row.id, "quarantined", content, reason, words=words) for row in rows])

    def _as_condemned(self, copy: Outcome) -> Outcome:
        if copy.content_hash not in self.condemned:
            return copy
        reason, words = self.condemned[copy.content_hash]
        return msgspec.structs.replace(copy, status="quarantined", reason=reason, words=words)
