"""Grouping of facts by host, and verdicts."""

import pytest

from megatron_bipe.runtime.preflight_checks import CHECKS, Report
from megatron_bipe.runtime.preflight_facts import (
    Bounded,
    Check,
    Fact,
    bounded,
    bounded_entries,
    group_text,
    listed,
    ranks_text,
    run_check,
    same,
    same_entries,
)

HOSTS = {rank: f"node{rank // 8}" for rank in range(64)}  # 8 hosts of 8 ranks


def checked(judge, values, rule="the rule", hosts=HOSTS):
    facts = {rank: value if isinstance(value, Fact) else Fact(value) for rank, value in values.items()}
    return run_check(Check("name", rule, judge, "the remedy"), facts, hosts)


def test_ranks_are_written_as_ranges():
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([0, 1, 2, 3, 8, 10, 11]) == "ranks 0-3, 8, 10-11"


def test_groups_are_complete_hosts_where_they_can_be():
    texts = dict.fromkeys(range(64), "2.13.0")
    assert group_text(texts, HOSTS) == "2.13.0"
    one = texts | dict.fromkeys(range(24, 32), "2.12.0")
    assert group_text(one, HOSTS) == "2.13.0 on 7 hosts, 2.12.0 on node3 (ranks 24-31)"
    part = texts | {27: "2.12.0"}
    assert group_text(part, HOSTS) == "2.13.0 on 63 ranks of 8 hosts, 2.12.0 on node3 (rank 27)"


def test_a_text_that_only_some_ranks_have_names_them():
    assert group_text({1: "no answer"}, HOSTS, range(64)) == "no answer on node0 (rank 1)"
    assert group_text(dict.fromkeys(range(64), "no answer"), HOSTS, range(64)) == "no answer"


def test_the_minority_breaks_a_rule_of_equality_and_rank_0_decides_ties():
    assert checked(same(), {0: "a", 1: "a", 2: "b"}).verdict == "FAILED"
    assert checked(same(), {0: "a", 1: "a"}).verdict == "ok"
    assert same()({0: "b", 1: "a"}, HOSTS).broken == {1}
    assert same()({0: "a", 1: "b", 2: "b"}, HOSTS).broken == {0}


def test_only_entries_that_differ_are_shown():
    judge = same_entries(lambda entries: f"{len(entries)} entries")
    found = judge({0: {"a": "1", "b": "2"}, 1: {"a": "1"}}, HOSTS)
    assert found.broken == {1} and found.text == "b 2 on node0 (rank 0), missing on node0 (rank 1)"
    assert judge({0: {"a": "1"}, 1: {"a": "1"}}, HOSTS).text == "1 entries"


@pytest.mark.parametrize(
    ("number", "is_kept"),
    [
        (Bounded(1.0), True),
        (Bounded(1.0, least=1.0), True),
        (Bounded(0.9, least=1.0), False),
        (Bounded(-1.0, most=1.0), True),
        (Bounded(-1.1, most=1.0), False),
        (Bounded(1.1, most=1.0), False),
    ],
)
def test_numbers_are_compared_with_their_limits(number, is_kept):
    assert number.is_kept == is_kept
    assert checked(bounded(str), {0: list(number)}).verdict == ("ok" if is_kept else "FAILED")


def test_numbers_outside_their_limits_are_named_and_the_others_are_a_range():
    values = {rank: [rank + 1.0, 2.0, None] for rank in range(4)}
    found = bounded("{:g} GB".format)(values, HOSTS)
    assert found.broken == {0}
    assert found.text == "1 GB on node0 (rank 0), 2 GB to 4 GB on the others, at least 2 GB needed"
    entries = bounded_entries(str)({0: {"1 MiB": [1.0, None, None], "8 MiB": [2.0, 3.0, None]}}, HOSTS)
    assert entries.broken == {0} and entries.text == "1 MiB: 1.0; 8 MiB: 2.0, at least 3.0 needed"


def test_a_rank_that_could_not_measure_fails_the_check_whatever_the_others_saw():
    found = checked(same(), {0: "a", 1: Fact(problem="no answer"), 2: "a"})
    assert found.verdict == "FAILED" and found.remedy
    assert found.seen == "no answer on node0 (rank 1); a"
    assert found.by_rank == {0: "a", 1: "no answer", 2: "a"}


def test_a_check_that_was_not_made_says_why_and_never_hides_a_failure():
    skipped = Fact(skipped="there is no GPU")
    assert checked(same(), {0: skipped, 1: skipped})[1:3] == ("not checked", "there is no GPU")
    assert checked(same(), {})[1:3] == ("not checked", "no rank measured it")
    assert checked(same(), {0: skipped, 1: Fact(problem="broken")}).verdict == "FAILED"
    assert checked(listed(), {0: "a"}, rule="").verdict == "-"


def test_a_report_has_one_row_a_check_and_the_remedies_of_failures():
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert all(check.remedy for check in CHECKS if check.rule)
    results = [checked(same(), {0: "a", 1: "b"}), checked(same(), {0: "word " * 60})]
    report = Report(results, {0: "node0", 1: "unknown host"}, 2, 3.2)
    lines = str(report).splitlines()
    assert report.code == 1 and "2 ranks on 1 host," in lines[0]
    assert lines[-1] == "name: the rule is: the rule. the remedy."
    assert max(map(len, lines)) <= 120
    assert Report(results[1:], HOSTS, 64, 3.2).code == 0
