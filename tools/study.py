"""Train every combination of a grid with several seeds, evaluate, and compare: tables, a plot and a page.

Every step is a command of this project. It is shown before it runs, and finished steps are skipped, so an interrupted
study resumes, and seeds or values that are added later are added to what is done. Ends with exit code 1 while runs are
missing. docs/studies.md describes the file of a study; examples/studies/ has some.

Example: python tools/study.py examples/studies/encodings.yaml --output studies/encodings --only rope bipe_rope
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from _cli import command
from _steps import FREE_PORT, FROM_TEXT_TO_DATA, Pace, Stage, Step, fill, run_steps
from megatron_bipe.data.manifest import MANIFEST_NAME
from megatron_bipe.errors import FAILED, BipeError, ConfigError
from megatron_bipe.eval.document_losses import DOCUMENTS_NAME
from megatron_bipe.io import write_atomically
from megatron_bipe.runtime.environment import has_gpu_driver, requested_device
from megatron_bipe.study import Job, Plan, base_folders, check_runs, load_plan, rule_folder

SPLITS = {"train": "training", "valid": "held-out"}


@command
def main(argv: Sequence[str] | None) -> None:
    given = _parse(argv)
    plan = load_plan(given.study, given.set, given.only)
    jobs = plan.jobs(given.output)
    check_runs(plan, jobs)
    at_once = given.at_once or runs_at_once(plan)
    preparation = data_stages(plan, given.output)
    if given.dry_run:
        show([*preparation, *run_stages(plan, jobs)], plan)
    elif given.member is not None:
        run_one(plan, [job for job in jobs if job.name == given.member], given)
    else:
        failure = None
        try:
            if given.slurm is not None:
                run_steps(preparation, given.output)
                submit_pending(jobs, given)
            else:
                pending = [] if given.no_train else [*preparation, [train_step(plan, job) for job in jobs]]
                trained = [job for job in jobs if not given.no_train or job.checkpoint.exists()]
                stages = [*pending, [evaluate_step(plan, job) for job in trained]]
                run_steps([stage for stage in stages if stage], given.output, Pace(at_once, keep_going=True))
        except BipeError as error:
            failure = error
        missing = write_results(plan, given.output)
        if failure:
            raise failure
        if missing:
            sys.exit(FAILED)


def data_stages(plan: Plan, folder: Path) -> list[Stage]:
    """Return the steps that make the datasets of all segment rules; none if the base run's datasets are used."""
    if not plan.makes_data:
        return []
    first, corpus = plan.rules[0], plan.study.data.corpus
    stages, rules = list[Stage](), plan.rules
    made = [rule_folder(folder, first) / split for split in SPLITS]
    sources = dict(zip(SPLITS, made if corpus else base_folders(plan.members[0].run), strict=True))
    if corpus:
        options = (("max-bytes", corpus.max_bytes), ("valid-share", corpus.valid_share))
        values: dict[str, object] = {
            "corpus": " ".join(f"--{name} {value}" for name, value in options if value is not None),
            "vocab": corpus.vocab_size or plan.members[0].run.model.vocab_size,
            "data": rule_folder(Path(), first),
            "segments": "" if first == "reference" else f"--segments {shlex.quote(first)}",
        }
        stages, rules = fill(FROM_TEXT_TO_DATA, folder, values, ()), rules[1:]
    for rule in rules:
        for split, source in sources.items():
            output = rule_folder(folder, rule) / split
            words = ["python", "tools/inspect_data.py", "resegment", str(source), "--segments", rule]
            title = f"Mark the segments of the {SPLITS[split]} text by the rule {rule}"
            stages.append([Step(title, [*words, "--output", str(output)], output / MANIFEST_NAME)])
    return stages


def run_stages(plan: Plan, jobs: Sequence[Job]) -> list[Stage]:
    """Return the stage that trains all runs, and the one that evaluates them."""
    return [[train_step(plan, job) for job in jobs], [evaluate_step(plan, job) for job in jobs]]


def train_step(plan: Plan, job: Job) -> Step:
    launch = plan.study.launch
    launcher = ["OMP_NUM_THREADS=1", "python"]
    if launch.command is not None:
        launcher = shlex.split(launch.command)
    elif uses_gpu() or launch.ranks > 1:
        launcher = ["deepspeed", "--quiet", "--num_accelerators", str(launch.ranks), "--master_port", FREE_PORT]
    train, valid = plan.data_folders(job.member, job.folder)
    folders = [f"data.path={train}", f"data.valid_path={valid}"] if plan.makes_data else []
    settings = [f"run_dir={job.run_dir}", *job.member.settings, f"train.seed={job.seed}", *folders]
    words = [*launcher, "pretrain.py", "--ds_config", str(launch.ds_config), "--config", str(plan.base)]
    words += [word for setting in settings for word in ("--set", setting)]
    title = f"Train {job.member.name}, seed {job.seed}"
    # The configuration of an existing run was compared by `check_runs`; its launcher may be that of another machine.
    return Step(title, words, job.checkpoint, job.name, needs=train / MANIFEST_NAME, compares_command=False)


def evaluate_step(plan: Plan, job: Job) -> Step:
    evaluate, member = plan.study.evaluate, job.member
    words = ["OMP_NUM_THREADS=1", "python", "tools/evaluate.py", "extrapolation"]
    words += ["--models", f"{job.run_dir}@{member.run.train.steps}"]
    words += ["--data", str(plan.data_folders(member, job.folder)[1])]
    words += ["--lengths", ",".join(map(str, member.lengths)), "--protocol", evaluate.protocol]
    words += [] if evaluate.max_tokens is None else ["--max-tokens", str(evaluate.max_tokens)]
    words += ["--documents", "--overwrite", "--output", str(job.evaluation)]
    title = f"Evaluate {member.name}, seed {job.seed}"
    return Step(title, words, job.evaluation / DOCUMENTS_NAME, job.name, needs=job.checkpoint)


def run_one(plan: Plan, chosen: Sequence[Job], given: argparse.Namespace) -> None:
    """Train and evaluate one run, as a task of an array does; tasks at the same time share no file but the data."""
    if not chosen:
        names = ", ".join(job.name for job in plan.jobs(given.output)[:3])
        remedy = f"Name a run as --dry-run lists them: {names}, ..."
        raise ConfigError(f"{given.member} is not a run of the study", remedy=remedy, location="--member")
    times_file = Path("logs") / f"times-{given.member.replace('/', '-')}.json"
    run_steps(run_stages(plan, chosen), given.output, Pace(times_file=times_file))


def submit_pending(jobs: Sequence[Job], given: argparse.Namespace) -> None:
    """Submit the runs without an evaluation as a job array, unless the last array is still queued."""
    from megatron_bipe.study.slurm import queued_job, submit

    pending = [job.name for job in jobs if not (job.evaluation / DOCUMENTS_NAME).is_file()]
    if not pending:
        return
    if job := queued_job(given.output):
        print(f"SLURM job {job} of this study is still queued or running; nothing is submitted")
        return
    words = [sys.executable, "tools/study.py", str(given.study), "--output", str(given.output)]
    words += [word for setting in given.set for word in ("--set", setting)]
    words += ["--only", *given.only] if given.only else []
    options = [f"--{option.lstrip('-')}" for option in given.slurm]
    job = submit(pending, [*words, "--member"], given.output, options, given.at_once)
    print(f"Submitted {len(pending)} runs as SLURM job {job}. Run this again when they are done.")


def write_results(plan: Plan, folder: Path) -> list[str]:
    """Write tables, plot and page of all evaluated runs, and print the table; return the runs without results."""
    from megatron_bipe.study import result_page as pages
    from megatron_bipe.study import results as found

    results = found.read_results(plan, folder)
    if results.losses:
        text = found.tables(results)
        contents: dict[str, str | bytes] = {
            found.RESULTS_NAME: found.results_csv(results),
            found.DIFFERENCES_NAME: found.differences_csv(results),
            found.TABLE_NAME: text,
            **pages.plots(results),
            pages.PAGE_NAME: pages.study_page(results, folder),
        }
        print(f"\nPerplexity on held-out text, by sequence length in tokens\n\n{text}")
        for name, content in contents.items():
            write_atomically(folder / name, content if isinstance(content, bytes) else content.encode())
        print("Written:", *(folder / name for name in contents))
    if results.missing:
        print(f"\nWithout results: {', '.join(results.missing)}")
    return results.missing


def show(stages: Sequence[Stage], plan: Plan) -> None:
    """Print the members and all commands, with those whose result exists marked as done."""
    for member in plan.members:
        reference = plan.reference_of(member)
        compared = f", compared with {reference.name}" if reference else ""
        print(f"{member.name}: lengths {', '.join(map(str, member.lengths))}{compared}")
    for step in (step for stage in stages for step in stage):
        print(f"\n{step.title}{' (done)' if step.result.exists() else ''}\n$ {shlex.join(step.command)}")


def uses_gpu() -> bool:
    return requested_device() != "cpu" and has_gpu_driver()


def runs_at_once(plan: Plan) -> int:
    """Return how many runs this machine trains at the same time: one on GPUs, else one for each set of cores."""
    return 1 if uses_gpu() else max(1, len(os.sched_getaffinity(0)) // plan.study.launch.ranks)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("study", type=Path, metavar="STUDY.yaml", help="base run, grid, seeds, data and evaluation")
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the data, the runs and the results")
    add("--at-once", type=int, metavar="N", help="runs at the same time (default: cores / ranks; 1 on a GPU)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of all members")
    add("--only", nargs="+", default=[], metavar="MEMBER", help="keep these members only")
    add("--member", metavar="MEMBER/seed-N", help="train and evaluate this run alone, as a task of a job array does")
    options = "submit the runs as a SLURM job array, with these options of sbatch, such as partition=gpu time=4:00:00"
    add("--slurm", nargs="*", metavar="OPTION", help=options)
    add("--no-train", action="store_true", help="evaluate and compare the runs that are done; train none")
    add("--dry-run", action="store_true", help="check the study, and show its members and commands")
    given = parser.parse_args(argv)
    if given.at_once is not None and given.at_once < 1:
        parser.error("--at-once must be 1 or more")
    return given


if __name__ == "__main__":
    sys.exit(main())
