"""Mutations of how a graph is read: masks, attention weights, sizes, counts, walks."""

from __future__ import annotations

from mutants import Mutant

MUTANTS = [
    Mutant(
        name="position_bias_left_out_of_class_attention",
        file="tomepass/rewriting/reducing.py",
        old="*(() if bias is None else (bias,))",
        new="*()",
        tests="tests/reading/test_weights_read.py -k weights_are_those",
    ),
    Mutant(
        name="bias_not_added_to_the_scores_that_are_read",
        file="tomepass/ops/attending/attention_to.py",
        old="scores = scores + bias.to(wide)",
        new="scores = scores + 0 * bias.to(wide)",
        tests="tests/reading/test_weights_read.py -k bias_is_added",
    ),
    Mutant(
        name="a_bias_of_minus_a_hundred_hides_nothing",
        file="tomepass/reading/masks.py",
        old="_WIDE = 10.0",
        new="_WIDE = 1e4",
        tests="tests/reading/test_hidden_keys.py -k hides_a_key",
    ),
    Mutant(
        name="any_bias_hides_something",
        file="tomepass/reading/masks.py",
        old="_WIDE = 10.0",
        new="_WIDE = 0.1",
        tests="tests/reading/test_hidden_keys.py -k hides_none",
    ),
    Mutant(
        name="masks_that_multiply_tokens_are_taken_for_tables",
        file="tomepass/planning/plan_graph.py",
        old='if side.how == "kept" and comes_from_a_mask(side.node):',
        new='if side.how == "mask" and comes_from_a_mask(side.node):',
        tests="tests/reading/test_hidden_keys.py -k multiplies_tokens",
    ),
    Mutant(
        name="operands_of_an_einsum_have_no_rows",
        file="tomepass/reading/layouts.py",
        old='return any(letters & set(terms.split(",")[place]) for place in places)',
        new="return False",
        tests="tests/reading/test_hidden_keys.py -k einsum",
    ),
    Mutant(
        name="constants_worked_out_again_for_each_node",
        file="tomepass/reading/masks.py",
        old="if (constant := self.constants.value(node)) is not None:",
        new="if (constant := constant_value(node, up_to_broadcast=True)) is not None:",
        tests="tests/graphs/test_walks.py -k mask",
    ),
    Mutant(
        name="sums_within_sums_walked_on_every_path",
        file="tomepass/reading/structure.py",
        old="                and operand not in seen\n",
        new="",
        tests="tests/graphs/test_walks.py -k foreign",
    ),
    Mutant(
        name="unmerged_anew_for_every_path",
        file="tomepass/rewriting/values.py",
        old="return answered(operand, self._whole, needs, answer)",
        new="return answered(operand, self._whole.copy(), needs, answer)",
        tests="tests/graphs/test_walks.py -k folded",
    ),
    Mutant(
        name="the_batch_is_whatever_comes_first",
        file="tomepass/planning/macs.py",
        old="(symbolic or sizes or [1])[0]",
        new="(sizes or [1])[0]",
        tests="tests/capture/test_scalar_inputs.py -k not_fixed",
    ),
    Mutant(
        name="a_scalar_has_a_batch",
        file="tomepass/planning/macs.py",
        old="return [value.shape[0] for value in given if value.ndim]",
        new="return [value.shape[0] for value in given]",
        tests="tests/capture/test_scalar_inputs.py -k beside",
    ),
    Mutant(
        name="sizes_that_data_decide_differ_after_a_rewrite",
        file="tomepass/rewriting/writer.py",
        old="env._rename_unbacked_to(pair[1], pair[0])",
        new="pass",
        tests='tests/capture/test_data_sizes.py -k "result and indexed"',
    ),
    Mutant(
        name="views_ask_for_the_captured_layout",
        file="tomepass/rewriting/writer.py",
        old="node.target = _ANY_LAYOUT.get(node.target, node.target)",
        new="pass",
        tests="tests/reading/test_attention_layouts.py -k any_layout",
    ),
    Mutant(
        name="dropout_that_nobody_reads_runs_on",
        file="tomepass/rewriting/sweep.py",
        old="return node.target is FUSED or dropout",
        new="return node.target is FUSED",
        tests="tests/planning/test_counting_alike.py -k nobody",
    ),
    Mutant(
        name="one_and_one_point_nought_are_the_same_number",
        file="tomepass/capture/subexpressions.py",
        old="return type(argument), repr(argument)",
        new="return argument",
        tests="tests/capture/test_subexpressions.py -k stay_apart",
    ),
    Mutant(
        name="what_is_written_is_shared",
        file="tomepass/capture/subexpressions.py",
        old="if not _repeatable(node) or not written.isdisjoint((node, *node.all_input_nodes)):",
        new="if not _repeatable(node):",
        tests="tests/capture/test_subexpressions.py -k written",
    ),
]
