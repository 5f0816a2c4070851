"""The line every benchmark starts with: figures mean nothing without the machine."""

import importlib.metadata
import os
import platform

from megatron_bipe.runtime.environment import cpu_facts


def describe_machine(*packages: str) -> str:
    """CPU model, cores, Python and the versions of `packages`, in one line."""
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    return f"{cpu_facts().name}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"
