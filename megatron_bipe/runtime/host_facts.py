"""Facts about a rank and its host that all ranks of a launch must have in common, or that must suffice for a run."""

import hashlib
import os
import platform
import re
import resource
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import psutil
import torch

import megatron_bipe
from megatron_bipe.config import RunConfig
from megatron_bipe.data.prompt_answer import open_dataset
from megatron_bipe.io import fsync_path
from megatron_bipe.parallel import Mesh
from megatron_bipe.runtime.hardware import device_name
from megatron_bipe.runtime.preflight_facts import Bounded
from megatron_bipe.runtime.preflight_steps import SkippedError

_PACKAGES = ("torch", "deepspeed", "numpy", "transformers", "megatron-bipe")
# Variables that change how ranks communicate or compute; they must be equal on all ranks.
_VARIABLES = re.compile(
    r"(NCCL|GLOO|TORCH_NCCL|TORCH_GLOO|UCX|FI|CUBLAS|CUDNN)_|PYTORCH_\w*ALLOC_CONF$|TORCH_CUDNN_|NVIDIA_TF32_OVERRIDE$"
    r"|CUDA_DEVICE_MAX_CONNECTIONS$|CUDA_LAUNCH_BLOCKING$|OMP_NUM_THREADS$|BIPE_DEVICE$|DS_ACCELERATOR$"
)
_INTERFACES = ("_SOCKET_IFNAME", "_IB_HCA")  # hosts may have other names for them
_DRIVER = Path("/proc/driver/nvidia/version")
_CGROUP = Path("/sys/fs/cgroup")
_SHARED_MEMORY = Path("/dev/shm")
# NVIDIA's advice for containers (NCCL user guide, troubleshooting): --shm-size=1g; Docker's default is 64 MiB.
_SHARED_MEMORY_BYTES = 2**30
_FREE_SHARE = 0.9  # of a GPU's memory; contexts and libraries of the rank itself take less than a tenth
# An estimate: a gloo group that is connected in full has a socket to each other rank, and there are up to four.
_FILES, _FILES_PER_RANK = 512, 4
_CHUNK_BYTES = 2**24


def device_fact(mesh: Mesh) -> str:
    """Return the name of the device, and of a GPU its memory and driver."""
    if mesh.device.type != "cuda":
        return f"CPU {device_name(mesh.device)}"
    driver = re.search(r"\d+\.\d+[.\d]*", _DRIVER.read_text(encoding="utf-8")) if _DRIVER.exists() else None
    total_gib = torch.cuda.get_device_properties(mesh.device).total_memory / 2**30
    return f"{device_name(mesh.device)}, {total_gib:.1f} GiB, driver {driver[0] if driver else 'unknown'}"


def free_device_memory(mesh: Mesh) -> Bounded:
    """Return the free memory of the GPU, and the least that a GPU without other processes has."""
    if mesh.device.type != "cuda":
        raise SkippedError("there is no GPU")
    free_bytes, total_bytes = torch.cuda.mem_get_info(mesh.device)
    return Bounded(free_bytes, _FREE_SHARE * total_bytes)


def versions() -> dict[str, str]:
    """Return the versions of Python, of packages, of NVIDIA's libraries, and of this project's source."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    if torch.cuda.is_available():
        found["CUDA"], found["cuDNN"] = str(torch.version.cuda), str(torch.backends.cudnn.version())
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found | {"source": source_hash(Path(megatron_bipe.__file__).parent)}


def source_hash(folder: Path) -> str:
    """Return a hash of the Python files below a folder, with their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def relevant_environment(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that must be equal on all ranks; of those that name interfaces, only that they are set."""
    found = {name: env[name] for name in sorted(env) if _VARIABLES.match(name)}
    return {name: "is set" if name.endswith(_INTERFACES) else value for name, value in found.items()}


def data_fingerprints(run: RunConfig) -> dict[str, str]:
    """Return the fingerprint of each dataset of a run; the sizes of its files are compared with the manifest.

    Raises:
        DataError: a dataset is missing or incomplete on this host.
    """
    folders = [*run.data.folders, *run.data.valid_sets.values()]
    return {str(folder): open_dataset(folder).manifest.fingerprint[:12] for folder in folders}


def shared_memory(mesh: Mesh) -> Bounded:
    """Return the size of /dev/shm, through which NCCL's ranks of a host exchange data."""
    if not _SHARED_MEMORY.is_dir():
        raise SkippedError(f"there is no {_SHARED_MEMORY}")
    is_needed = mesh.device.type == "cuda" and mesh.num_local_ranks > 1
    return Bounded(shutil.disk_usage(_SHARED_MEMORY).total, _SHARED_MEMORY_BYTES if is_needed else None)


def open_files(mesh: Mesh) -> Bounded:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = float(2**31)
    return Bounded(unlimited if limit == resource.RLIM_INFINITY else limit, _FILES + _FILES_PER_RANK * mesh.num_ranks)


def host_memory(run: RunConfig, mesh: Mesh, checkpoint_bytes: int) -> Bounded:
    """Return the available memory of this host, and what the copies for background saves will need there."""
    share = mesh.num_local_ranks / mesh.num_ranks
    return Bounded(_available_memory(), checkpoint_bytes * share if run.checkpoint.asynchronous else 0)


def _available_memory() -> int:
    """Return the available memory, within the limit of the control group (version 2) if this process has one."""
    available: int = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # there is no such file, or no limit
        limit = int((_CGROUP / "memory.max").read_text())
        available = min(available, limit - int((_CGROUP / "memory.current").read_text()))
    return available


def write_rate(folder: Path, num_bytes: int) -> float:
    """Return the bytes per second at which this process writes a new file of `num_bytes`, synced to disk."""
    path, chunk = folder / f"rate-{os.getpid()}", os.urandom(_CHUNK_BYTES)
    try:
        began_s = time.perf_counter()
        with path.open("wb") as stream:
            for start in range(0, num_bytes, _CHUNK_BYTES):
                stream.write(chunk[: num_bytes - start])
        fsync_path(path)
        return num_bytes / (time.perf_counter() - began_s)
    finally:
        path.unlink(missing_ok=True)
