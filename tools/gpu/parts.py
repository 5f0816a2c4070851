"""The parts of the GPU check with their time limits and criteria, in the order in which they run."""

from gpu.check import Criterion, Part

# The limits leave room for a slow disk. All parts together have `TOTAL_S`, less than the sum of the limits, and a part
# that is out of time does not start: so parts with criteria come first, and figures that are only reported last.
TOTAL_S = 720.0
CPU_PATIENCE = 5  # factor of all limits on a CPU, which may be busy with other work


def _exit_codes(codes: dict[str, int]) -> tuple[Criterion, ...]:
    return tuple(Criterion(f"{name}: exit code", "==", code) for name, code in codes.items())


def _errors() -> tuple[Criterion, ...]:
    names = [f"heads {width}, {tokens} tokens" for width in (64, 128) for tokens in (1024, 8192, 32768)]
    return tuple(Criterion(f"{name}: largest ratio of errors", "<=", 1.5, gpu_only=True) for name in names)


def _waits() -> tuple[Criterion, ...]:
    names = [f"ZeRO 1, {encoding}" for encoding in ("bipe_rope", "bipe_alibi")]
    return tuple(
        Criterion(f"{name}: waits per {unit}", "<=", limit, gpu_only=True)
        for name in names
        for unit, limit in (("micro-batch", 0), ("update", 3))
    )


def _aim(figure: str, limit: float) -> Criterion:
    return Criterion(figure, ">=", limit, gpu_only=True, is_aim=True)


PARTS = (
    Part("versions", 40, "gpu.kernels:versions"),
    Part("dry-run", 60, "gpu.commands:dry_runs", _exit_codes({"dry run of 151m": 0, "dry run of 1.6b": 0})),
    Part("attention", 60, "gpu.kernels:attention", _errors()),
    Part(
        "parity",
        90,
        "gpu.correctness:parity",
        (
            Criterion("fp32: largest loss difference", "<=", 2e-6),
            Criterion("fp32: engines that a NaN changed", "==", 0),
            Criterion("bf16: largest loss difference", "<=", 2e-2, gpu_only=True),
            Criterion("bf16: engines that a NaN changed", "==", 0, gpu_only=True),
        ),
    ),
    Part("synchronizations", 60, "gpu.correctness:synchronizations", _waits()),
    Part(
        "checkpoint",
        120,
        "gpu.commands:checkpoint",
        (
            *_exit_codes({"undisturbed": 0, "killed": -9, "stopped": 75, "resumed": 0}),
            Criterion("killed: step of its checkpoint", ">=", 5),
            Criterion("disturbed: largest loss difference", "<=", 1e-3),
        ),
    ),
    Part(
        "memory",
        60,
        "gpu.commands:memory",
        (
            Criterion("out of memory: exit code", "==", 1, gpu_only=True),
            Criterion("out of memory: message names train.micro_batch", "==", 1, gpu_only=True),
            Criterion("out of memory: message names parallel.recompute", "==", 1, gpu_only=True),
            Criterion("out of memory: GiB still used after it", "<=", 1, gpu_only=True),
        ),
    ),
    Part(
        "evaluation",
        90,
        "gpu.commands:evaluation",
        _exit_codes({"training": 0, "perplexity": 0, "export": 0, "generation": 0}),
    ),
    Part("tests", 120, "gpu.commands:tests", (Criterion("tests failed", "==", 0), Criterion("tests passed", ">=", 1))),
    Part(
        "speed-151m",
        180,
        "gpu.speed:speed_151m",
        (
            _aim("151M bipe_rope, compile on: MFU", 0.35),
            _aim("151M, compile on: speed of bipe_alibi over rope", 0.95),
        ),
    ),
    Part(
        "speed-1.6b",
        220,
        "gpu.speed:speed_1_6b",
        (
            _aim("1.6B bipe_rope, micro-batch 8, ZeRO 1: MFU", 0.5),
            _aim("1.6B bipe_rope, micro-batch 16, ZeRO 1: MFU", 0.5),
            _aim("1.6B: speed of bipe_alibi over bipe_rope", 0.95),
        ),
    ),
    Part("peers", 90, "gpu.speed:peers"),
)
