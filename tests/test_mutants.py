"""Tables of mutations fit the code, and a run says what it proves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from _pytest.mark import KeywordMatcher
from _pytest.mark.expression import Expression
from mutant_runs import KILLED, OF_THE_TABLE, SURVIVED, Result, outcome
from mutants import ROOT, Mutant, chooses, chosen, faults, tables

SOUND = Mutant(
    name="sound",
    file="tomepass/ops/merging/weighted_mean.py",
    old="((own - wide) * weight).sum(dim, keepdim=True)",
    new="(own - wide).mean(dim, keepdim=True)",
    tests="tests/ops/merging/test_weighted_mean.py -k mean",
)


def test_each_mutation_is_named_once_and_changes_what_is_there_once() -> None:
    assert faults(tables()) == []


def test_each_mutation_has_tests_among_those_collected(request: pytest.FixtureRequest) -> None:
    """Tests that were renamed, or left to deeper runs, see nothing any more."""
    config = request.config
    if config.option.keyword or any("::" in name for name in config.args):
        pytest.skip("only some tests are collected")
    items: dict[str, list[pytest.Item]] = {}
    for item in request.session.items:
        items.setdefault(item.nodeid.partition("::")[0], []).append(item)
    blind = []
    for mutant in (m for mutants in tables().values() for m in mutants):
        names, keyword = chooses(mutant.tests)
        asked = [name.partition("::")[0] for name in names]
        there = [file for file in items if any(file.startswith(name) for name in asked)]
        if not all(any(file.startswith(name) for file in there) for name in asked):
            continue  # a part of the suite alone was asked for
        wanted = Expression.compile(keyword) if keyword else None
        found = [
            item
            for file in there
            for item in items[file]
            if any(_is_named(item.nodeid, name) for name in names)
            and (wanted is None or wanted.evaluate(KeywordMatcher.from_item(item)))
        ]
        if not found:
            blind.append(f"{mutant.name}: {mutant.tests}")
    assert blind == []


def _is_named(nodeid: str, name: str) -> bool:
    return nodeid == name or nodeid.startswith((f"{name}::", f"{name}/", f"{name}["))


def test_there_are_many() -> None:
    assert sum(map(len, tables().values())) >= 60


def test_a_sound_table_has_no_faults() -> None:
    assert faults({"part": [SOUND]}) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"old": "no such text"}, "occurs 0 times"),
        ({"old": "size"}, "expected once"),
        ({"file": "tomepass/ops/nowhere.py"}, "occurs 0 times"),
        ({"new": SOUND.old}, "nothing is changed"),
        ({"file": "tests/zoo.py", "old": "def scaled_up("}, "no file of the package"),
        ({"tests": "tests/test_nowhere.py"}, "does not exist"),
        ({"tests": "tests/ops/merging/test_weighted_mean.py::test_nothing"}, "has no test_nothing"),
        ({"tests": "-k mean"}, "name no file"),
        ({"tests": "tests/test_zoo.py -m deep"}, "by a marker"),
    ],
)
def test_a_fault_of_a_table_is_told(change: dict[str, str], told: str) -> None:
    (fault,) = faults({"part": [replace(SOUND, **change)]})
    assert fault.startswith("part: sound: ")
    assert told in fault


def test_a_name_is_taken_once_in_all_tables() -> None:
    found = faults({"part": [SOUND], "other": [SOUND], "sound": []})
    assert len(found) == 3 - 1
    assert all("taken" in fault for fault in found[1:])


def test_arguments_are_files_and_a_keyword() -> None:
    assert chooses("tests/a.py tests/b.py::test_c") == (["tests/a.py", "tests/b.py::test_c"], "")
    assert chooses("tests/a.py -k 'one or two'") == (["tests/a.py"], "one or two")


def test_mutations_are_chosen_by_their_names_and_their_tables() -> None:
    other = replace(SOUND, name="other")
    found = {"a": [SOUND, other], "b": []}
    assert chosen(found, []) == found
    assert chosen(found, ["other"]) == {"a": [other], "b": []}
    assert chosen(found, ["a"]) == found
    with pytest.raises(SystemExit, match="nobody"):
        chosen(found, ["nobody"])


@pytest.mark.parametrize(
    ("clean", "tried", "expected"),
    [
        (0, 1, KILLED),
        (0, 0, SURVIVED),
        (0, -1, KILLED),  # out of time
        (0, -111, KILLED),  # a crash
        (0, 2, OF_THE_TABLE),
        (0, 4, OF_THE_TABLE),
        (0, 5, OF_THE_TABLE),
        (0, 90, OF_THE_TABLE),
        (1, 1, OF_THE_TABLE),
        (5, 1, OF_THE_TABLE),
        (-1, 1, OF_THE_TABLE),
    ],
)
def test_only_failing_tests_kill(clean: int, tried: int, expected: str) -> None:
    told = outcome(Result(clean, 1.0, ""), Result(tried, 1.0, ""))
    assert told.partition(":")[0] == expected


def test_a_table_file_that_is_not_one_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(AttributeError, match="MUTANTS"):
        tables(tmp_path)
    assert (ROOT / "tests" / "mutants.py").is_file()
