"""Mutations of schedules and plans: how many tokens go where."""

from mutants import Mutant

MUTANTS = [
    Mutant(
        name="the_cap_rounds_up",
        file="tomepass/counts/schedule.py",
        old="min(r, free // 2, sources)",
        new="min(r, (free + 1) // 2, sources)",
        tests="tests/counts/test_schedule.py -k 'cap or half'",
    ),
    Mutant(
        name="the_cap_forgets_the_sources",
        file="tomepass/counts/schedule.py",
        old="min(r, free // 2, sources)",
        new="min(r, free // 2)",
        tests="tests/counts/test_schedule.py -k 'cap or half'",
    ),
    Mutant(
        name="protected_tokens_are_counted_as_free",
        file="tomepass/counts/schedule.py",
        old="free = tokens - len(held)\n",
        new="free = tokens\n",
        tests="tests/counts/test_schedule.py -k 'cap or half'",
    ),
    Mutant(
        name="linear_counts_are_rounded",
        file="tomepass/counts/schedule.py",
        old="low + (high - low) * i // (blocks - 1)",
        new="low + round((high - low) * i / (blocks - 1))",
        tests="tests/counts/test_schedule.py -k 'reference or form or published'",
    ),
    Mutant(
        name="the_inflection_has_the_other_sign",
        file="tomepass/counts/schedule.py",
        old="low = int(r * (1 - inflection))",
        new="low = int(r * (1 + inflection))",
        tests="tests/counts/test_schedule.py -k 'reference or form'",
    ),
    Mutant(
        name="the_mean_of_a_schedule_is_not_r",
        file="tomepass/counts/schedule.py",
        old="high = 2 * r - low",
        new="high = 2 * r",
        tests="tests/counts/test_schedule.py -k 'reference or form'",
    ),
    Mutant(
        name="a_list_repeats_its_last_count",
        file="tomepass/counts/schedule.py",
        old="return counts + (0,) * (blocks - len(counts))",
        new="return counts + counts[-1:] * (blocks - len(counts))",
        tests="tests/counts/test_schedule.py -k 'form or reference'",
    ),
    Mutant(
        name="a_bool_is_a_count",
        file="tomepass/counts/schedule.py",
        old=('if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):'),
        new="if False:",
        tests="tests/counts/test_schedule.py -k refused",
    ),
    Mutant(
        name="a_speedup_is_a_share",
        file="tomepass/counts/schedule.py",
        old='return self.values[0] if self.kind == "macs" else 1.0 / self.values[0]',
        new="return self.values[0]",
        tests=(
            "tests/planning/test_plan_graph.py tests/handover/test_config.py -k 'speedup or target'"
        ),
    ),
    Mutant(
        name="counts_are_rounded_up",
        file="tomepass/counts/blocks.py",
        old="goal -= exact % multiple_of",
        new="goal += exact % multiple_of",
        tests="tests/planning/test_plan_graph.py -k round",
    ),
    Mutant(
        name="rounding_starts_before_any_merge",
        file="tomepass/counts/blocks.py",
        old="if exact < tokens and exact >= multiple_of:",
        new="if exact >= multiple_of:",
        tests="tests/planning/test_plan_graph.py -k round",
    ),
    Mutant(
        name="protected_tokens_stay_where_they_were",
        file="tomepass/counts/blocks.py",
        old="return protected if current == tokens else tuple(range(len(protected)))",
        new="return protected",
        tests="tests/planning/test_plan_graph.py tests/reading/test_structure.py -k cap",
    ),
    Mutant(
        name="given_positions_may_lie_outside",
        file="tomepass/planning/plan_graph.py",
        old="if outside := [p for p in method.protected if p >= tokens]:",
        new="if outside := [p for p in method.protected if p > tokens]:",
        tests="tests/reading/test_origins.py -k outside",
    ),
    Mutant(
        name="fragments_are_trusted",
        file="tomepass/planning/plan_graph.py",
        old="if origins.given and captured.fragment:",
        new="if False:",
        tests="tests/reading/test_origins.py -k compiled_graph",
    ),
    Mutant(
        name="given_positions_are_ignored",
        file="tomepass/planning/plan_graph.py",
        old="        return method.protected\n",
        new="        return tuple(range(len(method.protected)))\n",
        tests=(
            "tests/reading/test_origins.py tests/rewriting/test_sweep.py "
            "-k 'given_positions or given_protected'"
        ),
    ),
    Mutant(
        name="text_beside_images_is_merged",
        file="tomepass/planning/plan_graph.py",
        old="return texts if len(texts) < len(planned) else []",
        new="return []",
        tests="tests/test_zoo_models.py -k text_beside",
    ),
    Mutant(
        name="blocks_that_see_some_tokens_are_merged",
        file="tomepass/planning/plan_graph.py",
        old="if not isinstance(seen, Layout) or seen.positions != layout.positions:",
        new="if not isinstance(seen, Layout):",
        tests="tests/test_property.py -k 'a_near_miss and (ClassQueries or DroppedClass)'",
    ),
    Mutant(
        name="keys_from_elsewhere_are_accepted",
        file="tomepass/planning/plan_graph.py",
        old="if block.attention.key not in flow.layouts:",
        new="if False:",
        tests="tests/reading/test_refused_attentions.py -k EinsumHeads",
    ),
    Mutant(
        name="costs_of_a_branch_are_forgotten",
        file="tomepass/planning/costs.py",
        old="if macs[node.name]:\n                products",
        new="if macs[node.name] and reached < 2:\n                products",
        tests="tests/methods/test_every_method.py -k 'macs_are_as_planned'",
    ),
    Mutant(
        name="attention_costs_fall_with_the_keys_alone",
        file="tomepass/planning/costs.py",
        old=("held = [outcome.keys] if outcome.layout is None else [outcome.keys, outcome.layout]"),
        new="held = [outcome.keys]",
        tests="tests/methods/test_every_method.py -k 'macs_are_as_planned'",
    ),
    Mutant(
        name="a_merge_saves_in_its_own_attention",
        file="tomepass/planning/costs.py",
        old="left = (plan.tokens, *(block.tokens_out for block in plan.blocks))",
        new=("left = (*(block.tokens_out for block in plan.blocks), plan.blocks[-1].tokens_out)"),
        tests="tests/methods/test_every_method.py -k 'macs_are_as_planned'",
    ),
    Mutant(
        name="values_cost_nothing",
        file="tomepass/planning/macs.py",
        old="key[-2] * (query[-1] + value[-1])",
        new="key[-2] * query[-1]",
        tests="tests/planning/test_macs.py",
    ),
    Mutant(
        name="groups_cost_as_much",
        file="tomepass/planning/macs.py",
        old="return prod(_shape(node)) * prod(_shape(node.args[1])[1:])",
        new=(
            "return prod(_shape(node)) * prod(_shape(node.args[1])[2:]) * _shape(node.args[0])[1]"
        ),
        tests="tests/planning/test_macs.py -k torch",
    ),
    Mutant(
        name="what_nobody_reads_costs",
        file="tomepass/planning/macs.py",
        old="node_macs(node) // batch if node in read else 0",
        new="node_macs(node) // batch",
        tests="tests/planning/test_macs.py -k no_output_reads",
    ),
    Mutant(
        name="matching_costs_nothing",
        file="tomepass/planning/macs.py",
        old="return batch * (free // 2) * (free - free // 2) * width",
        new="return 0",
        tests="tests/planning/test_macs.py -k overhead",
    ),
]
