"""Training on several threads: how waiting threads of OpenMP wait, on an idle machine and beside other work.

libgomp lets a thread that waits for the others keep its core busy unless `OMP_WAIT_POLICY=PASSIVE`, which this project
sets where nothing runs on a GPU. Each contender trains the quickstart's model in a process of its own; "beside other
work", `--load` further processes keep a core busy each. Contenders take turns.

Example: python tools/bench/threads.py --repeats 5
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from subprocess import PIPE

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/, where _cli is

from _cli import command
from bench._machine import describe_machine
from megatron_bipe.runtime.child_processes import ChildProcess, run_command

CONFIG = Path("examples/quickstart.yaml")
POLICIES = {"libgomp's default": {}, "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"}}
WARM_UP_STEPS, STEPS = 3, 12
BUSY_LOOP = "while True: pass"


@command
def main(argv: Sequence[str] | None) -> None:
    """A line for each policy, idle and beside other work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="turns (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--load", type=int, default=2, metavar="N", help="busy processes (default: %(default)s)")
    parser.add_argument("--train-here", action="store_true", help=argparse.SUPPRESS)  # what each contender runs
    arguments = parser.parse_args(argv)
    if arguments.train_here:
        print(train())
        return
    os.environ.pop("OMP_WAIT_POLICY", None)  # which this process has by default, and would hand on
    print(describe_machine("torch"))
    print(f"{arguments.threads} threads, {arguments.repeats} turns; load before: {os.getloadavg()[0]:.1f}\n")
    for load in (0, arguments.load):
        with ExitStack() as others:
            for _ in range(load):
                others.enter_context(ChildProcess([sys.executable, "-c", BUSY_LOOP]))
            found: dict[str, list[float]] = {name: [] for name in POLICIES}
            for _ in range(arguments.repeats):
                for name, policy in POLICIES.items():
                    found[name].append(measure(policy, arguments.threads))
        first = statistics.median(next(iter(found.values())))
        for name, rates in found.items():
            median = statistics.median(rates)
            print(f"{load} busy processes  {name:26} {median:9,.0f} tokens/s {median / first:6.2f} x", flush=True)


def measure(policy: dict[str, str], threads: int) -> float:
    """Return the tokens/s of one contender, in a fresh process: libgomp reads its variables once."""
    env = {"OMP_NUM_THREADS": str(threads)} | policy
    command = [sys.executable, __file__, "--train-here"]
    return float(run_command(command, env=env, stdout=PIPE, check=True).stdout)


def train() -> float:
    """Return the tokens/s of forward, backward and AdamW with the quickstart's model in fp32."""
    import torch

    from megatron_bipe.config.load import load_run_config
    from megatron_bipe.model.loss import token_losses
    from megatron_bipe.model.transformer import build_model

    run = load_run_config(CONFIG)
    model = build_model(run.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    shape = (run.train.micro_batch, run.train.seq_len_tokens)
    tokens, places = torch.randint(0, run.model.vocab_size, shape), torch.arange(shape[1]).expand(shape)
    seconds = []
    for _ in range(WARM_UP_STEPS + STEPS):
        begin_s = time.perf_counter()
        token_losses(model((tokens, places % 14, places // 14)), tokens).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin_s)
    return tokens.numel() / statistics.median(seconds[WARM_UP_STEPS:])


if __name__ == "__main__":
    sys.exit(main())
