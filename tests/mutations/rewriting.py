"""Mutations of what is written into a graph, and of how it runs."""

from mutants import Mutant

MUTANTS = [
    Mutant(
        name="sizes_forgotten_in_attention",
        file="tomepass/rewriting/attending.py",
        old="if not epoch or not (self.method.prop_attn or merges.masked):",
        new="if True:",
        tests="tests/test_property.py -k 'these_are_merged and gathered'",
    ),
    Mutant(
        name="sizes_forgotten_in_attention_written_out",
        file="tomepass/rewriting/sweep.py",
        old="scores = self.writer.emit(node, aten.add.Tensor, scores, bias)",
        new="pass",
        tests="tests/test_property.py -k 'these_are_merged and folded'",
    ),
    Mutant(
        name="sizes_count_though_nobody_asked",
        file="tomepass/rewriting/attending.py",
        old="if not epoch or not (self.method.prop_attn or merges.masked):",
        new="if not epoch:",
        tests="tests/rewriting/test_sweep.py -k without_proportional",
    ),
    Mutant(
        name="sizes_start_anew_in_each_block",
        file="tomepass/rewriting/merging.py",
        old="after = self.writer.emit(node, merge_size, size, assign, plan.tokens_out)",
        new="after = self.writer.emit(node, merge_size, None, assign, plan.tokens_out)",
        tests="tests/handover/test_merged.py -k equals_the_plain",
    ),
    Mutant(
        name="tokens_weigh_alike_in_the_merge",
        file="tomepass/rewriting/carrying.py",
        old=("weight = merges.sizes[epoch] if reduction.weight is None else reduction.weight"),
        new="weight = reduction.weight",
        tests="tests/handover/test_merged.py -k equals_the_plain",
    ),
    Mutant(
        name="a_position_bias_is_left_out",
        file="tomepass/rewriting/attending.py",
        old=(
            "        bias = self.position_bias(node, outcome, merges, epoch)\n        if not epoch"
        ),
        new="        bias = None\n        if not epoch",
        tests="tests/reading/test_beside_tokens.py -k bias",
    ),
    Mutant(
        name="a_position_bias_is_that_of_the_first_merge",
        file="tomepass/rewriting/carrying.py",
        old="self._bias(node, table, side.factor, merges.holds[epoch], length)",
        new="self._bias(node, table, side.factor, merges.holds[1], length)",
        tests="tests/reading/test_beside_tokens.py -k bias",
    ),
    Mutant(
        name="a_mean_forgets_sizes",
        file="tomepass/rewriting/sweep.py",
        old=("return self.writer.emit(node, weighted_mean, x, size, outcome.dim, outcome.keepdim)"),
        new=("return self.writer.emit(node, aten.mean.dim, x, [outcome.dim], outcome.keepdim)"),
        tests="tests/test_property.py -k 'these_are_merged and mean'",
    ),
    Mutant(
        name="a_readout_takes_another_token",
        file="tomepass/rewriting/epochs.py",
        old="indices = [held.index(p) for p in positions if p in held]",
        new="indices = [p for p in positions if p in held]",
        tests="tests/test_property.py -k 'these_are_merged and end'",
    ),
    Mutant(
        name="source_maps_start_anew",
        file="tomepass/rewriting/merging.py",
        old="compose, merges.sources[epoch], assign",
        new="compose, None, assign",
        tests="tests/rewriting/test_sweep.py -k 'source_map or hidden_states_of_every'",
    ),
    Mutant(
        name="unmerged_by_the_last_merge",
        file="tomepass/rewriting/carrying.py",
        old="return self._narrowed(node, merges, merges.sources[epoch], layout)",
        new="return self._narrowed(node, merges, merges.sources[-1], layout)",
        tests="tests/rewriting/test_sweep.py -k 'hidden_states_of_every'",
    ),
    Mutant(
        name="merged_weights_are_not_shared_out",
        file="tomepass/rewriting/values.py",
        old="        if not layout.weights:\n            return x",
        new="        if True:\n            return x",
        tests="tests/handover/test_merged.py -k attention_weights",
    ),
    Mutant(
        name="rotary_rows_are_not_followed_through_merges",
        file="tomepass/rewriting/carrying.py",
        old="known = self.writer.emit(node, keep, before, assign, tokens, held)",
        new="known = self.writer.emit(node, keep, None, assign, tokens, held)",
        tests="tests/test_zoo.py -k 'rotary_attention and dinov3'",
    ),
    Mutant(
        name="positions_added_again_are_those_of_one_token",
        file="tomepass/rewriting/carrying.py",
        old="made = self.writer.emit(node, merge_rows, table, holds, length)",
        new=(
            "made = self.writer.emit(node, rows, table, self._kept(node, merges, epoch), 1, 3, [])"
        ),
        tests="tests/reading/test_beside_tokens.py -k again",
    ),
    Mutant(
        name="joined_parts_stay_as_they_were",
        file="tomepass/rewriting/sweep.py",
        old="pieces.sort(key=lambda piece: piece[0])",
        new="pieces.sort(key=lambda piece: -piece[0][0])",
        tests="tests/test_property.py -k 'these_are_merged and rotary and folded'",
    ),
    Mutant(
        name="merged_outputs_are_long",
        file="tomepass/rewriting/sweep.py",
        old=(
            "return self.new[operand] if self.keep_short else self.values.unmerged(node, operand)"
        ),
        new="return self.values.unmerged(node, operand)",
        tests="tests/rewriting/test_sweep.py -k merged_outputs",
    ),
    Mutant(
        name="outputs_stay_short",
        file="tomepass/rewriting/sweep.py",
        old=(
            "return self.new[operand] if self.keep_short else self.values.unmerged(node, operand)"
        ),
        new="return self.new[operand]",
        tests="tests/rewriting/test_sweep.py -k merged_outputs",
    ),
    Mutant(
        name="nothing_merged_is_not_the_original",
        file="tomepass/rewriting/sweep.py",
        old="if plan.r or every:",
        new="if True:",
        tests="tests/handover/test_merged.py -k r_0",
    ),
    Mutant(
        name="padding_is_counted_in_a_mean",
        file="tomepass/rewriting/sweep.py",
        old="if counted and merges.planned.padding is not None:",
        new="if False:",
        tests="tests/planning/test_padded_readouts.py -k counts_padding",
    ),
    Mutant(
        name="without_sizes_padding_is_attended_to",
        file="tomepass/rewriting/attending.py",
        old="if not epoch or not (self.method.prop_attn or merges.masked):",
        new="if not epoch or not self.method.prop_attn:",
        tests=("tests/methods/test_every_method.py -k 'plain_reference and threshold_unweighted'"),
    ),
    Mutant(
        name="without_sizes_some_still_count",
        file="tomepass/rewriting/attending.py",
        old="log = self.writer.emit(node, aten.clamp.default, log, None, 0.0)",
        new="pass",
        tests=("tests/methods/test_every_method.py -k 'plain_reference and threshold_unweighted'"),
    ),
    Mutant(
        name="lengths_are_not_compared_with_the_plan",
        file="tomepass/rewriting/writer.py",
        old=("            if not same(shape[axis.dim], axis.before * length * axis.after):"),
        new="            if False:",
        tests="tests/rewriting/test_writer.py",
    ),
    Mutant(
        name="the_source_line_is_lost",
        file="tomepass/rewriting/writer.py",
        old=(
            "        node = self.graph.call_function(target, args, kwargs)\n"
            "        carry_origin(node, like)"
        ),
        new="        node = self.graph.call_function(target, args, kwargs)",
        tests="tests/rewriting/test_sweep.py -k source_line",
    ),
    Mutant(
        name="metadata_is_stale",
        file="tomepass/rewriting/writer.py",
        old='node.meta["val"] = self._result(',
        new='node.meta["val"] = node.meta.get("val") or self._result(',
        tests="tests/rewriting/test_sweep.py -k metadata",
    ),
    Mutant(
        name="squares_of_the_batch_are_taken_for_multiples",
        file="tomepass/rewriting/any_batch.py",
        old="if rest or abs(start) >= _BATCHES[0] or batch is None:",
        new="if rest or batch is None:",
        tests="tests/rewriting/test_any_batch.py -k square",
    ),
    Mutant(
        name="one_batch_tells_of_any",
        file="tomepass/rewriting/any_batch.py",
        old="        if calls[0] != calls[1]:",
        new="        if False:",
        tests="tests/rewriting/test_any_batch.py -k folded",
    ),
    Mutant(
        name="what_was_returned_under_autocast_is_returned_without",
        file="tomepass/rewriting/any_batch.py",
        old="torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)",
        new="kind",
        tests="tests/rewriting/test_any_batch.py -k modes",
    ),
]
