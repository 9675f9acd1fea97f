"""Ledger: the promises that the workers were given, and the figures of a replay."""

from __future__ import annotations

from dataclasses import dataclass, field

from replaying.reports import COMMITS, Report


@dataclass(slots=True)
class Ledger:
    """All reports. Each is a promise by the store, and is compared with its files at the end.

    Attributes:
        messages: (session id, message id) of every message whose verb has returned -> a revision that holds it.
        seen: session id -> (revision, number of messages) of every look at it, in the course of the replay. A lost
            message is missing at the end, or it was missing once. In that case the next worker would send it again and
            hide the loss.
        titles: (session id, prompt id) of the turn -> the revision at which its title was seen to be durable.
        unsure: (session id, prompt id) of turns whose worker was killed. It may have saved a title and not reported it.
        commits_s: seconds that each commit took.
        cleared: the stale streams that were cleared on purpose.
        taken_over: the stale streams that a new stream found.
    """

    messages: dict[tuple[str, str], int] = field(default_factory=dict)
    seen: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    titles: dict[tuple[str, str], int] = field(default_factory=dict)
    unsure: set[tuple[str, str]] = field(default_factory=set)
    commits_s: list[float] = field(default_factory=list)
    cleared: set[str] = field(default_factory=set)
    taken_over: set[str] = field(default_factory=set)
    killed: set[str] = field(default_factory=set)
    merged: int = 0
    conflicts: int = 0
    busy: int = 0

    def take(self, report: Report) -> None:
        """Enter a report."""
        if report.verb in COMMITS:
            self.commits_s.append(report.took_s)
        match report.verb:
            case "title":
                self._take_title(report)
            case "append" | "start" | "finish" if report.item is not None:
                place = (report.session_id, report.item)
                self.messages[place] = min(report.revision, self.messages.get(place, report.revision))
            case "seen":
                self.seen.setdefault(report.session_id, []).append((report.revision, report.count))
            case "cleared" if report.item is not None:
                self.cleared.add(report.item)
            case "taken-over" if report.item is not None:
                self.taken_over.add(report.item)
            case "busy":
                self.busy += 1
            case "conflict":
                self.conflicts += 1

    def _take_title(self, report: Report) -> None:
        place = (report.session_id, report.item or "")
        self.titles[place] = max(report.revision, self.titles.get(place, 0))
        self.merged += report.has_merged

    @property
    def stale_cleared(self) -> int:
        """The number of dead streams that were cleared: by a sweep, by a load, or by the start of the next one.

        It may be smaller than the number of kills. A worker that was killed after the commit of its `finish` and before
        its report left no stream.
        """
        return len(self.cleared | (self.taken_over & self.killed))

    def commit_ms(self, quantile: float) -> float:
        """Return the time below which this part of all commits stayed, in milliseconds."""
        ranked = sorted(self.commits_s)
        return 1000 * ranked[min(int(quantile * len(ranked)), len(ranked) - 1)] if ranked else 0.0
