"""How mutations are tried: each in a copy of the package, by pytest in a process of its own.

What takes long is importing PyTorch and transformers. One process does that once and forks: a
child puts its copy first on the path, imports tomepass from there and runs the tests in it.
"""

from __future__ import annotations

import compileall
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mutants import ROOT, Mutant, Tables

KILLED, SURVIVED = "killed", "survived"
OF_THE_TABLE = "fault of the table"
# A mutation may make a loop endless. Others may take longer than the code as it is, but not so.
LEAST_SECONDS, TIMES = 180.0, 12.0
_TIMED_OUT, _ELSEWHERE = -1, 90
# pytest's exit codes other than 0 and 1, which say nothing of the mutation.
_CODES = {
    2: "the tests cannot be collected",
    3: "pytest failed",
    4: "pytest does not take these arguments",
    5: "no tests were chosen",
    _ELSEWHERE: "the copy cannot be imported",
}


@dataclass(frozen=True)
class Job:
    """Tests to be run on a copy: with a mutation, or as it is.

    Args:
        tests: pytest's arguments.
        mutant: None for the code as it is.
        limit: seconds after which it is ended.
    """

    tests: str
    mutant: Mutant | None = None
    limit: float = 1200.0


@dataclass(frozen=True)
class Result:
    """How that ended.

    Args:
        code: pytest's exit code, or one of this file's.
        seconds: of wall time.
        tail: the last lines of what was printed.
    """

    code: int
    seconds: float
    tail: str


def run_all(tables: Tables, processes: int) -> int:
    """Tries all, prints a table; 0 if each is killed and its tests pass without it."""
    mutants = [mutant for table in tables.values() for mutant in table]
    preload()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        return _run_all(tables, mutants, Runner(Path(folder), processes))


def _run_all(tables: Tables, mutants: list[Mutant], runner: Runner) -> int:
    clean_jobs = [Job(tests) for tests in dict.fromkeys(m.tests for m in mutants)]
    print(f"{len(mutants)} mutations, {len(clean_jobs)} sets of tests", flush=True)
    clean = {job.tests: result for job, result in runner.run(clean_jobs)}
    jobs = [
        Job(m.tests, m, max(LEAST_SECONDS, TIMES * clean[m.tests].seconds))
        for m in mutants
        if clean[m.tests].code == 0
    ]
    tried = {job.mutant: result for job, result in runner.run(jobs) if job.mutant}
    outcomes = {m.name: outcome(clean[m.tests], tried.get(m)) for m in mutants}
    _print(tables, outcomes, clean, tried)
    return 0 if all(told == KILLED for told in outcomes.values()) else 1


def outcome(clean: Result, tried: Result | None) -> str:
    """What two runs of the same tests say about a mutation, without it and with it."""
    if clean.code != 0 or tried is None:
        told = _CODES.get(clean.code, "tests fail without it")
        return f"{OF_THE_TABLE}: {told}"
    if tried.code == 0:
        return SURVIVED
    if tried.code in (1, _TIMED_OUT):
        return KILLED
    told = _CODES.get(tried.code, f"the process ended with {tried.code}")
    # A crash is seen by whoever runs the tests; what could not even start says nothing.
    return KILLED if tried.code < 0 else f"{OF_THE_TABLE}: with it {told}"


def preload() -> None:
    """Imports what tests import and what does not change: everything but tomepass."""
    import importlib

    # Read when PyTorch and Triton are imported. A thread a process: two would wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("TRITON_INTERPRET", "1")  # as tests/conftest.py does
    for name in (
        "torch._dynamo",
        "torch._inductor.compile_fx",
        "torch.export",
        "torch.fx.experimental.proxy_tensor",
        "hypothesis.strategies",
        "networkx",
        "numpy",
        "PIL.Image",
        "pytest",
        "rich.table",
        "safetensors.torch",
        "transformers",
        "typer.testing",
    ):
        importlib.import_module(name)
    # transformers imports a model's file when it is first asked for.
    from zoo import FAMILIES

    for family in FAMILIES.values():
        family.make()
    import torch

    torch.set_num_threads(1)
    # Operators are registered once a process: a child could not register those of its copy.
    if "tomepass.ops" in sys.modules:
        raise RuntimeError("tomepass.ops is imported already: children would not read their copy")


class Runner:
    """Runs jobs, some at a time, in copies made in a folder.

    Args:
        folder: an empty one.
        processes: how many at a time.
    """

    def __init__(self, folder: Path, processes: int) -> None:
        self.folder, self.processes = folder, processes
        # Compiled once: a copy keeps the times of its files, by which Python knows what is.
        self.template = folder / "template"
        made = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "site", "*.egg-info")
        shutil.copytree(ROOT, self.template, ignore=made)
        compileall.compile_dir(self.template, quiet=2)

    def run(self, jobs: Iterable[Job]) -> list[tuple[Job, Result]]:
        """The results in order of ending."""
        waiting, running, ended = list(jobs), dict[int, "_Running"](), list[tuple[Job, Result]]()
        try:
            while waiting or running:
                while waiting and len(running) < self.processes:
                    started = _Running(waiting.pop(0), self.template, self.folder)
                    running[started.pid] = started
                for pid, run in list(running.items()):
                    if (result := run.ended()) is not None:
                        del running[pid]
                        ended.append((run.job, result))
                        print("." if result.code == 0 else "x", end="", flush=True)
                time.sleep(0.05)
        finally:
            for run in running.values():
                run.end()
        print()
        return ended


class _Running:
    """One forked process with its own copy of the repository."""

    def __init__(self, job: Job, template: Path, folder: Path) -> None:
        self.job, self.start = job, time.monotonic()
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        copy = self.folder / "copy"
        shutil.copytree(template, copy)
        if job.mutant is not None:
            apply(job.mutant, copy)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _child(copy, self.folder, job.tests)

    def ended(self) -> Result | None:
        """Its result once it has ended or run out of time, its folder removed."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        seconds = time.monotonic() - self.start
        if pid:
            code = os.waitstatus_to_exitcode(status)
            # What a signal ended is told by its number, below every code of this file's own.
            return self._clean(code if code >= 0 else code - 100, seconds)
        if seconds > self.job.limit:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            return self._clean(_TIMED_OUT, seconds)
        return None

    def end(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _clean(self, code: int, seconds: float) -> Result:
        log = self.folder / "log"
        tail = log.read_text(errors="replace")[-3000:] if log.is_file() else ""
        shutil.rmtree(self.folder, ignore_errors=True)
        return Result(code, seconds, tail)


def apply(mutant: Mutant, root: Path) -> None:
    """Puts the mutation into a copy."""
    path = root / mutant.file
    path.write_text(path.read_text().replace(mutant.old, mutant.new))
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
        compiled.unlink()


def _child(copy: Path, folder: Path, tests: str) -> None:
    """Runs pytest in a copy and never returns."""
    code = _ELSEWHERE
    try:
        os.setsid()
        log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(copy)
        _import_from(copy)
        import pytest

        options = ["-x", "-p", "no:cacheprovider", "--rootdir", str(copy)]
        temporary = ["--basetemp", str(folder / "temporary")]
        code = int(pytest.main([*options, *temporary, *shlex.split(tests)]))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _import_from(copy: Path) -> None:
    """The copy's files come first, here and in what tests start; those of the original are gone."""
    original = {"", *(str(path) for path in (ROOT, *(ROOT / "tests").glob("**/")))}
    sys.path[:] = [str(copy), *(p for p in sys.path if p not in original)]
    os.environ["PYTHONPATH"] = str(copy)
    ours = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {"tomepass", "tests"}
    for name in [n for n in sys.modules if n.partition(".")[0] in ours]:
        del sys.modules[name]
    import tomepass

    if not Path(tomepass.__file__).is_relative_to(copy):
        raise ImportError(f"tomepass comes from {tomepass.__file__}, expected from {copy}")


def _print(
    tables: Tables,
    outcomes: dict[str, str],
    clean: dict[str, Result],
    tried: dict[Mutant, Result],
) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table("part", "mutation", "outcome", "seconds", "tests")
    for part, mutants in tables.items():
        for m in mutants:
            seconds = f"{tried[m].seconds:.1f}" if m in tried else ""
            shown.add_row(part, m.name, outcomes[m.name], seconds, m.tests)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(shown)
    told = _counts(outcomes.values())
    for m in (m for table in tables.values() for m in table):
        if outcomes[m.name].startswith(OF_THE_TABLE):
            run = tried.get(m, clean[m.tests])
            console.print(f"\n--- {m.name}: {outcomes[m.name]}\n{run.tail}", markup=False)
    console.print(told)


def _counts(outcomes: Iterable[str]) -> str:
    found: Sequence[str] = [told.partition(":")[0] for told in outcomes]
    return ", ".join(
        f"{found.count(kind)} {kind}" for kind in (KILLED, SURVIVED, OF_THE_TABLE) if kind in found
    )
