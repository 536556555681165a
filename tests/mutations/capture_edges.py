"""Mutations of what captures are made of at their edges: what breaks, and the tests that see it."""

from __future__ import annotations

from mutants import Mutant

MUTANTS = [
    Mutant(
        name="regions_compiled_once_are_left_to_dynamo",
        file="tomepass/capture/exported.py",
        old="self.untraced.elsewhere(), regions_in_place(), self.twin",
        new="self.untraced.elsewhere(), self.twin",
        tests="tests/capture/test_regions.py -k compiled_once",
    ),
    Mutant(
        name="what_dynamo_traces_in_a_capture_is_not_guarded",
        file="tomepass/model/twin.py",
        old="        if self.unseen:\n",
        new="        if False:\n",
        tests="tests/capture/test_regions.py -k Loop",
    ),
    Mutant(
        name="noting_stands_in_dynamos_way",
        file="tomepass/model/twin.py",
        old="            if not torch.compiler.is_dynamo_compiling() and twin._thread == "
        "threading.get_ident():\n"
        '                held = object.__getattribute__(self, "__dict__")\n'
        "                reads = twin._reads.get(id(held))\n"
        "                if reads is not None and name",
        new="            if twin._thread == threading.get_ident():\n"
        '                held = object.__getattribute__(self, "__dict__")\n'
        "                reads = twin._reads.get(id(held))\n"
        "                if reads is not None and name",
        tests="tests/capture/test_regions.py -k Loop",
    ),
    Mutant(
        name="a_graph_that_cannot_be_read_raises_whatever_was_asked",
        file="tomepass/handover/compiling/backend.py",
        old='        if self.on_unmatched == "raise":\n            raise refusal or',
        new='        if refusal or self.on_unmatched == "raise":\n            raise refusal or',
        tests="tests/capture/test_capture_dynamo.py -k 'sizes or cannot_be_read'",
    ),
    Mutant(
        name="one_fault_is_told_for_each_graph",
        file="tomepass/handover/compiling/backend.py",
        old="        if not told:\n",
        new="        if True:\n",
        tests="tests/capture/test_capture_dynamo.py -k told_once",
    ),
    Mutant(
        name="a_branch_is_run_on_fake_values_of_merged_tokens",
        file="tomepass/rewriting/values.py",
        old="alone = next(bodies(node), None) is None",
        new="alone = True",
        tests="tests/capture/test_capture_dynamo.py -k 'behind_the_blocks and backend'",
    ),
    Mutant(
        name="settings_that_the_model_asks_for_are_forgotten",
        file="tomepass/model/guards.py",
        old="        asked = self.modes.answers()\n",
        new="        asked = []\n",
        tests="tests/model/test_modes.py -k 'under_each_setting and autocast'",
    ),
    Mutant(
        name="only_settings_asked_for_by_torchs_own_name_are_seen",
        file="tomepass/model/modes.py",
        old="        own = module in _HOMES\n        if not own and",
        new="        own = module in _HOMES\n        if not own or",
        tests="tests/model/test_modes.py -k 'a and helper'",
    ),
    Mutant(
        name="weights_that_want_gradients_are_not_asked_again",
        file="tomepass/model/guards.py",
        old="        if self.modes.gradients:\n",
        new="        if False:\n",
        tests="tests/model/test_modes.py -k 'result and wants'",
    ),
    Mutant(
        name="inputs_that_want_gradients_are_not_asked_again",
        file="tomepass/capture/captured.py",
        old="asked = self.wanted is None or self.wanted == gradients_wanted(call)",
        new="asked = True",
        tests="tests/model/test_modes.py -k input_that_wants",
    ),
    Mutant(
        name="what_the_model_does_not_take_two_of_is_not_compared",
        file="tomepass/capture/fidelity.py",
        old="    for given in (form.few(call), call, form.rows(call, slice(0, 1))):\n",
        new="    for given in (form.few(call),):\n",
        tests="tests/test_fidelity.py -k 'as_many_as'",
    ),
    Mutant(
        name="the_limit_of_captures_is_forgotten",
        file="tomepass/handover/merged.py",
        old="            captures = Captures(make, checker(method, on_unmatched), captures)\n",
        new="            captures = Captures(make, checker(method, on_unmatched))\n",
        tests="tests/test_fixed_batch.py -k no_more_captures",
    ),
    Mutant(
        name="a_fixed_batch_is_exported_as_an_open_one",
        file="tomepass/formats/exporting.py",
        old="    if dynamic_batch and form.size is not None:\n",
        new="    if False:\n",
        tests="tests/test_fixed_batch.py -k fixed_batch_is_exported",
    ),
    Mutant(
        name="autocast_of_a_cpu_is_taken_for_a_reason_not_to_fuse",
        file="tomepass/model/fast_paths.py",
        old='torch.is_autocast_enabled("cuda")',
        new='torch.is_autocast_enabled("cpu")',
        tests="tests/model/test_fast_paths.py -k autocast",
    ),
]
