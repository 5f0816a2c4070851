"""Facts that the ranks of a preflight report, their grouping by host for reports, and verdicts about them.

Every function is pure: `preflight_steps.py` collects the facts, and `preflight.py` has the table of checks.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

_NAMED_HOSTS = 4  # hosts of a group that are listed by name; more are counted

OK, FAILED, NOT_CHECKED, SEEN = "ok", "FAILED", "not checked", "-"  # verdicts; SEEN: there is no rule


class Fact(NamedTuple):
    """What one rank found about one subject: a JSON value, or why there is none."""

    value: Any = None
    problem: str = ""  # the measurement failed, and with it the check
    skipped: str = ""  # reason why it was not made


class Bounded(NamedTuple):
    """A number with its limits; None: no limit."""

    seen: float
    least: float | None = None
    most: float | None = None

    @property
    def is_kept(self) -> bool:
        return (self.least is None or self.seen >= self.least) and (self.most is None or abs(self.seen) <= self.most)


class Finding(NamedTuple):
    """The text that shows the values of all ranks, and the ranks that break the rule."""

    text: str
    broken: Collection[int]


Hosts = Mapping[int, str]  # by rank
Judge = Callable[[Mapping[int, Any], Hosts], Finding]


class Check(NamedTuple):
    """A check of the fact with the same name."""

    name: str
    rule: str  # "": for information
    judge: Judge
    remedy: str


class Result(NamedTuple):
    """The outcome of a check."""

    name: str
    verdict: str
    seen: str
    rule: str
    remedy: str
    by_rank: dict[int, Any]


def run_check(check: Check, facts: Mapping[int, Fact], hosts: Hosts) -> Result:
    """Return the result of a check; a failure on one rank is never hidden by other ranks.

    Args:
        check: the check.
        facts: facts of this name by rank; ranks that do not measure it are missing.
        hosts: host of every rank.
    """
    values = {rank: fact.value for rank, fact in facts.items() if not fact.problem and not fact.skipped}
    problems = {rank: fact.problem for rank, fact in facts.items() if fact.problem}
    skipped = {rank: fact.skipped for rank, fact in facts.items() if fact.skipped}
    found = check.judge(values, hosts) if values else Finding("", ())
    parts = [group_text(problems, hosts, facts), found.text, group_text(skipped, hosts, facts)]
    verdict = FAILED if problems or found.broken else OK if values and check.rule else SEEN if values else NOT_CHECKED
    seen = "; ".join(part for part in parts if part) or "no rank measured it"
    by_rank = {rank: fact.value or fact.problem or fact.skipped for rank, fact in facts.items()}
    return Result(check.name, verdict, seen, check.rule, check.remedy if verdict == FAILED else "", by_rank)


def same(show: Callable[[Any], str] = str) -> Judge:
    """Return a judge that requires equal values; ranks outside the largest group break the rule."""

    def judge(values: Mapping[int, Any], hosts: Hosts) -> Finding:
        texts = {rank: show(value) for rank, value in values.items()}
        return Finding(group_text(texts, hosts), _minority(texts))

    return judge


def listed(show: Callable[[Any], str] = str) -> Judge:
    """Return a judge that accepts any value."""
    return lambda values, hosts: Finding(group_text({rank: show(value) for rank, value in values.items()}, hosts), ())


def same_entries(show: Callable[[Mapping[str, str]], str]) -> Judge:
    """Return a judge of mappings that must be equal; only entries that differ are shown."""

    def judge(values: Mapping[int, Mapping[str, str]], hosts: Hosts) -> Finding:
        names = list(dict.fromkeys(name for entries in values.values() for name in entries))
        shown, broken = [], set[int]()
        for name in names:
            texts = {rank: entries.get(name, "missing") for rank, entries in values.items()}
            if minority := _minority(texts):
                broken |= minority
                shown.append(f"{name} {group_text(texts, hosts)}")
        return Finding("; ".join(shown) or show(next(iter(values.values()))), broken)

    return judge


def bounded(show: Callable[[float], str]) -> Judge:
    """Return a judge of `Bounded` numbers; those within their limits are shown as a range."""

    def judge(values: Mapping[int, Sequence[float | None]], hosts: Hosts) -> Finding:
        numbers = {rank: Bounded(*value) for rank, value in values.items()}  # type: ignore[arg-type]
        broken = {rank: number for rank, number in numbers.items() if not number.is_kept}
        kept = [number.seen for rank, number in numbers.items() if rank not in broken]
        limits = Counter(_limit_text(number, show) for number in (broken or numbers).values())
        outside = group_text({rank: show(number.seen) for rank, number in broken.items()}, hosts, numbers)
        ends = list(dict.fromkeys(show(end) for end in (min(kept), max(kept)))) if kept else []
        inside = " to ".join(ends) + (" on the others" if broken else "")
        limit = limits.most_common(1)[0][0]
        return Finding(", ".join(part for part in (outside, inside if kept else "", limit) if part), set(broken))

    return judge


def bounded_entries(show: Callable[[float], str]) -> Judge:
    """Return a judge of mappings to `Bounded` numbers."""

    def judge(values: Mapping[int, Mapping[str, Sequence[float | None]]], hosts: Hosts) -> Finding:
        names = dict.fromkeys(name for entries in values.values() for name in entries)
        found = {
            name: bounded(show)({rank: entries[name] for rank, entries in values.items() if name in entries}, hosts)
            for name in names
        }
        text = "; ".join(f"{name}: {finding.text}" for name, finding in found.items())
        return Finding(text, {rank for finding in found.values() for rank in finding.broken})

    return judge


def group_text(texts: Mapping[int, str], hosts: Hosts, among: Collection[int] = ()) -> str:
    """Return texts with the ranks that have them: "2.13.0 on 7 hosts, 2.12.0 on node3 (ranks 24-31)".

    Args:
        texts: text by rank.
        hosts: host of every rank.
        among: ranks that were asked; (): those that have a text. A text that all of them have is returned alone.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for rank, text in sorted(texts.items()):
        members[text].append(rank)
    by_size = sorted(members.items(), key=lambda item: (-len(item[1]), item[1][0]))
    if len(by_size) == 1 and len(texts) == len(among or texts):
        return by_size[0][0]
    reporting: dict[str, set[int]] = defaultdict(set)
    for rank in among or texts:
        reporting[hosts[rank]].add(rank)
    return ", ".join(f"{text} on {_members_text(ranks, hosts, reporting)}" for text, ranks in by_size)


def _members_text(ranks: Sequence[int], hosts: Hosts, reporting: Mapping[str, set[int]]) -> str:
    """Return the hosts of a group: a count if they are many and complete, else names with their ranks."""
    by_host: dict[str, list[int]] = defaultdict(list)
    for rank in ranks:
        by_host[hosts[rank]].append(rank)
    is_complete = all(set(own) == reporting[host] for host, own in by_host.items())
    if len(by_host) > _NAMED_HOSTS:
        return f"{len(by_host)} hosts" if is_complete else f"{len(ranks)} ranks of {len(by_host)} hosts"
    return " and ".join(f"{host} ({ranks_text(own)})" for host, own in by_host.items())


def ranks_text(ranks: Sequence[int]) -> str:
    """Return sorted ranks with consecutive ones joined: "ranks 0-3, 8"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    listed = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' * (len(ranks) > 1)} {listed}"


def _minority(texts: Mapping[int, str]) -> set[int]:
    """Return the ranks whose text is not the most frequent one; of equally frequent ones, that of the lowest rank."""
    counts = Counter(text for _, text in sorted(texts.items()))
    usual = counts.most_common(1)[0][0]
    return {rank for rank, text in texts.items() if text != usual}


def _limit_text(number: Bounded, show: Callable[[float], str]) -> str:
    if number.least is not None:
        return f"at least {show(number.least)} needed"
    return f"at most {show(number.most)} allowed" if number.most is not None else ""
