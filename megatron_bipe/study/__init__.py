"""Comparisons of many runs: a grid of settings and seeds, trained one by one, and the statistics of the results."""

from megatron_bipe.study.definition import Study
from megatron_bipe.study.members import Job, Member, Plan, base_folders, check_runs, load_plan, rule_folder

__all__ = ["Job", "Member", "Plan", "Study", "base_folders", "check_runs", "load_plan", "rule_folder"]
