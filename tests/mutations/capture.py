"""Mutations of captures: what each would break, and the tests that see it."""

from __future__ import annotations

from mutants import Mutant

MUTANTS = [
    Mutant(
        name="the_model_is_captured_and_not_its_twin",
        file="tomepass/model/twin.py",
        old="        self.model: nn.Module = self.copy(model)\n",
        new="        self.model: nn.Module = model\n",
        tests="tests/handover/test_captures.py -k failed_capture_leaves",
    ),
    Mutant(
        name="captures_are_not_asked_whether_they_hold",
        file="tomepass/handover/captures.py",
        old="if kept.applied.capture.stands_for(call):\n                    kept.used",
        new="if True:\n                    kept.used",
        tests="tests/model/test_guards.py -k merged_tokens_follow",
    ),
    Mutant(
        name="empty_containers_are_not_looked_at_again",
        file="tomepass/model/guards.py",
        old="                and not any(self._empty)\n",
        new="",
        tests="tests/model/test_guards.py -k 'change_is_seen and hook'",
    ),
    Mutant(
        name="containers_are_not_looked_into_again",
        file="tomepass/model/guards.py",
        old="_alike(items_of(held), then) for held, then in self._contents",
        new="True for held, then in self._contents",
        tests="tests/model/test_guards.py -k closes_over",
    ),
    Mutant(
        name="what_a_function_closes_over_is_not_seen",
        file="tomepass/model/guards.py",
        old="_alike((cell.cell_contents,), (then,)) for cell, then in self._cells",
        new="True for cell, then in self._cells",
        tests="tests/model/test_guards.py -k closes_over",
    ),
    Mutant(
        name="state_from_call_to_call_is_not_seen",
        file="tomepass/capture/exported.py",
        old="    if first.graph_module.code != second.graph_module.code:\n",
        new="    if False:\n",
        tests="tests/model/test_guards.py -k kept_from_call_to_call",
    ),
    Mutant(
        name="no_capture_is_ever_forgotten",
        file="tomepass/handover/captures.py",
        old="        for kept in used[: max(self.limit, 1)]:\n",
        new="        for kept in used:\n",
        tests="tests/handover/test_captures.py -k longest_out_of_use",
    ),
    Mutant(
        name="a_capture_is_not_held_against_the_model",
        file="tomepass/capture/exported.py",
        old="            if can_be_held(kwargs):\n",
        new="            if False:\n",
        tests="tests/handover/test_captures.py -k another_function",
    ),
    Mutant(
        name="the_first_real_inputs_do_not_count",
        file="tomepass/handover/captures.py",
        old="    checks: int = 1\n",
        new="    checks: int = 0\n",
        tests="tests/handover/test_captures.py -k first_real_inputs",
    ),
    Mutant(
        name="no_batch_is_ever_fixed",
        file="tomepass/model/batches.py",
        old="    return [ANY, ALONE, fixed] if doubtful else [ANY, fixed]\n",
        new="    return [ANY, ALONE] if doubtful else [ANY]\n",
        tests="tests/handover/test_captures.py -k size_by_size",
    ),
    Mutant(
        name="whatever_is_as_long_as_the_batch_is_batched",
        file="tomepass/model/batches.py",
        old="    return [ANY, ALONE, fixed] if doubtful else [ANY, fixed]\n",
        new="    return [ANY, fixed]\n",
        tests="tests/handover/test_captures.py -k as_long_as_the_batch",
    ),
    Mutant(
        name="compiled_code_does_not_ask",
        file="tomepass/handover/captures.py",
        old="        _recompile_unless(applied.capture.guards.hold)\n",
        new="",
        tests="tests/model/test_guards.py -k compiled_code_asks",
    ),
]
