"""Small named mutations of the package, each with the tests that must see it.

    python tests/mutants.py                      # all of tests/mutations, two at a time
    python tests/mutants.py matching cap_of_r    # a table, a mutation

Tables lie in ``tests/mutations``, a file a part, each with a list ``MUTANTS``. ``mutant_runs.py``
says how one is run, ``test_mutants.py`` holds the tables against the code as it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutant:
    """One small change of the package that some test must notice.

    Args:
        name: what is broken, unique.
        file: the file changed, from the repository's root.
        old: its text, which occurs there once.
        new: what stands in its place.
        tests: pytest's arguments for the quickest tests that see it.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


Tables = dict[str, list[Mutant]]


def tables(folder: Path = ROOT / "tests" / "mutations") -> Tables:
    """The mutations of each part, by the name of its file."""
    found: Tables = {}
    for path in sorted(folder.glob("*.py")):
        if path.stem != "__init__":
            spec = importlib.util.spec_from_file_location(f"mutations.{path.stem}", path)
            assert spec is not None
            assert spec.loader is not None
            table = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(table)
            found[path.stem] = list(table.MUTANTS)
    return found


def faults(found: Tables, root: Path = ROOT) -> list[str]:
    """What is wrong with tables as they stand, a sentence each."""
    seen: dict[str, str] = {}
    wrong = []
    for part, mutants in found.items():
        for mutant in mutants:
            where = f"{part}: {mutant.name}"
            if mutant.name in seen or mutant.name in found:
                other = seen.get(mutant.name, mutant.name)
                wrong.append(f"{where}: the name is taken by the table {other}.")
            seen[mutant.name] = part
            wrong.extend(f"{where}: {fault}" for fault in _faults(mutant, root))
    return wrong


def _faults(mutant: Mutant, root: Path) -> Iterator[str]:
    path = root / mutant.file
    count = path.read_text().count(mutant.old) if path.is_file() else 0
    if count != 1:
        yield f"its old text occurs {count} times in {mutant.file}, expected once."
    if mutant.old == mutant.new:
        yield "nothing is changed."
    if not mutant.file.startswith("tomepass/"):
        yield f"{mutant.file} is no file of the package."
    words = shlex.split(mutant.tests)
    if "-m" in words:  # the project's own leaves out what `make test` does not run
        yield "its tests are chosen by a marker: they may not be among those of `make test`."
    ids = [word for word in words if word.startswith("tests/")]
    if not ids:
        yield "its tests name no file, so that all of them would run."
    for word in ids:
        file, *names = word.partition("[")[0].split("::")
        text = (root / file).read_text() if (root / file).is_file() else None
        if text is None and not (root / file).is_dir():
            yield f"{file} does not exist."
        for name in names:
            if text is not None and not re.search(rf"\b(def|class) {re.escape(name)}\b", text):
                yield f"{file} has no {name}."


def chooses(tests: str) -> tuple[list[str], str]:
    """The files, folders and tests that pytest's arguments name, and their ``-k``."""
    words, names, keyword = iter(shlex.split(tests)), [], ""
    for word in words:
        if word == "-k":
            keyword = next(words, "")
        else:
            names.append(word)
    return names, keyword


def chosen(found: Tables, names: Sequence[str]) -> Tables:
    """The mutations of these names, those of whole tables among them; all where none is given."""
    if not names:
        return found
    known = {*found, *(mutant.name for mutants in found.values() for mutant in mutants)}
    if unknown := sorted(set(names) - known):
        raise SystemExit(f"no mutation or table is named {', '.join(unknown)}")
    return {
        part: [m for m in mutants if part in names or m.name in names]
        for part, mutants in found.items()
    }


def main() -> int:
    """Runs what the command line names; 1 unless all of it is killed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of mutations or tables")
    parser.add_argument("--processes", type=int, default=2, help="mutations tried at a time")
    arguments = parser.parse_args()
    found = tables()
    if wrong := faults(found):
        print("\n".join(wrong), file=sys.stderr)
        return 1
    from mutant_runs import run_all

    return run_all(chosen(found, arguments.names), arguments.processes)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    sys.exit(main())
