"""Mutations of the backend, of errors and of what Dynamo tells: what each would break."""

from mutants import Mutant

MUTANTS = [
    Mutant(
        name="attention_inside_an_operator_goes_unseen",
        file="tomepass/reading/attention.py",
        old="or hides_attention(n)]",
        new="]",
        tests="tests/handover/test_dynamo.py -k 'inside_an_operator and my_attention'",
    ),
    Mutant(
        name="a_foreign_error_comes_through",
        file="tomepass/errors.py",
        old="        raise TomeError(told, advice=advice) from error\n",
        new="        raise\n",
        tests="tests/test_foreign_errors.py -k errors_about_arguments",
    ),
    Mutant(
        name="a_foreign_error_loses_its_cause",
        file="tomepass/errors.py",
        old="        raise TomeError(told, advice=advice) from error\n",
        new="        raise TomeError(told, advice=advice) from None\n",
        tests="tests/test_foreign_errors.py -k 'nobody_foresaw and plan_graph and backend'",
    ),
    Mutant(
        name="any_type_error_counts_as_one_about_an_argument",
        file="tomepass/errors.py",
        old="isinstance(error, (TypeError, ValueError)) and _on_purpose(error.__traceback__)",
        new="isinstance(error, (TypeError, ValueError))",
        tests="tests/test_foreign_errors.py -k errors_about_arguments",
    ),
    Mutant(
        name="memory_that_ran_out_is_told_as_a_fault",
        file="tomepass/errors.py",
        old='_OUT_OF_MEMORY = {"MemoryError", "OutOfMemoryError"}',
        new="_OUT_OF_MEMORY: set[str] = set()",
        tests="tests/test_foreign_errors.py -k no_fault_passes",
    ),
    Mutant(
        name="the_last_graph_goes_untold",
        file="tomepass/handover/compiling/dynamo.py",
        old="number + 1 >= limit",
        new="number > limit",
        tests="tests/handover/test_dynamo.py -k last_graph_that_dynamo",
    ),
    Mutant(
        name="a_bucket_is_taken_for_a_graph_break",
        file="tomepass/handover/compiling/dynamo.py",
        old='.startswith("DDPOptimizer")',
        new='.startswith("nothing")',
        tests="tests/handover/test_dynamo.py -k ddps_buckets",
    ),
    Mutant(
        name="nothing_merged_is_told_each_time",
        file="tomepass/handover/compiling/backend.py",
        old="        _WARNED.add(call.subject)\n",
        new="",
        tests="tests/handover/test_dynamo.py -k without_attention_is_told_once",
    ),
    Mutant(
        name="fragments_beside_merged_ones_are_told",
        file="tomepass/handover/compiling/backend.py",
        old="if call.subject in _SEEN or call.subject in _WARNED:",
        new="if call.subject in _WARNED:",
        tests="tests/handover/test_dynamo.py -k fragments_without_attention",
    ),
    Mutant(
        name="a_static_input_is_taken_for_a_buffer",
        file="tomepass/capture/dynamo.py",
        old="return marked and (source is None or _in_a_module(source))",
        new="return marked",
        tests="tests/handover/test_dynamo.py -k address_is_static",
    ),
    Mutant(
        name="a_checkpointed_region_is_not_computed_again",
        file="tomepass/capture/regions.py",
        old='marks = {"recompute": policy, "ac_graph_id": next(self.numbers)}',
        new="marks = {}",
        tests="tests/handover/test_dynamo.py -k marked_to_be_computed",
    ),
    Mutant(
        name="a_choice_of_tokens_is_made_again_in_the_backward",
        file="tomepass/handover/compiling/backend.py",
        old='            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE\n',
        new="            pass\n",
        tests="tests/handover/test_dynamo.py -k marked_to_be_computed",
    ),
]
