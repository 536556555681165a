"""The machine and the versions that figures were measured with."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from tomepass.measuring.values import Environment, Settings, threads_named


def environment() -> Environment:
    """What figures depend on: versions, processor, threads. No host names, no paths."""
    from importlib.metadata import version

    from tomepass.version import VERSION

    found: Environment = {
        "tomepass": VERSION,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_capability": _cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def describe(environment: Environment) -> str:
    """An environment in one line: ``torch 2.13.0, transformers 5.23.0, … AMD EPYC, 2 threads``."""
    versions = ("tomepass", "torch", "transformers", "python", "cuda")
    words = [f"{name} {environment[name]}" for name in versions if name in environment]
    words += [str(environment[name]) for name in ("gpu", "cpu") if name in environment]
    if "cpu_capability" in environment:
        words[-1] += f" ({environment['cpu_capability']})"
    if "threads" in environment:
        words.append(threads_named(environment["threads"]))
    return ", ".join(words)


def machine(settings: Settings, environment: Environment) -> str:
    """The processor a measurement was made on: ``AMD EPYC (AVX512), 2 threads, torch 2.13.0``."""
    if settings.device == "cpu":
        words = [environment.get("cpu", "cpu"), threads_named(settings.threads)]
        if "cpu_capability" in environment:
            words[0] += f" ({environment['cpu_capability']})"
    else:
        words = [environment.get("gpu", settings.device)]
    if "torch" in environment:
        words.append(f"torch {environment['torch']}")
    return ", ".join(words)


def _cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_capability() -> str:
    """The widest vector instructions there are, and whether there are matrix ones."""
    widest = torch.backends.cpu.get_cpu_capability()
    return f"{widest}, AMX" if torch.cpu._is_amx_tile_supported() else widest
