"""Mutations of the methods: what each reads, and what it says of itself."""

from mutants import Mutant

MUTANTS = [
    Mutant(
        name="margins_stay",
        file="tomepass/methods/merging/pitome.py",
        old="margin = self.margin * (1 - block.index / block.depth)",
        new="margin = self.margin",
        tests="tests/methods/test_every_method.py -k 'plain_reference and pitome'",
    ),
    Mutant(
        name="all_take_part_in_late_blocks",
        file="tomepass/methods/merging/pitome.py",
        old="taking_part = 2 * block.r\n",
        new="taking_part = 2 * block.r + 2\n",
        tests="tests/methods/test_every_method.py -k 'plain_reference and pitome'",
    ),
    Mutant(
        name="early_blocks_merge_and_late_ones_prune",
        file="tomepass/methods/merging/tofu.py",
        old='return "prune" if index < depth // 2 else "merge"',
        new='return "merge" if index < depth // 2 else "prune"',
        tests="tests/methods/test_every_method.py -k 'plain_reference and tofu'",
    ),
    Mutant(
        name="shares_pruned_are_rounded_up",
        file="tomepass/methods/dropping/diffrate.py",
        old="else int(pruned * r)",
        new="else -int(-pruned * r // 1)",
        tests="tests/methods/test_every_method.py -k 'plain_reference and diffrate'",
    ),
    Mutant(
        name="what_is_pruned_is_merged",
        file="tomepass/methods/dropping/diffrate.py",
        old='weight = block.call("counted", block.size, dropped, block.tokens)',
        new="weight = block.size",
        tests="tests/methods/test_every_method.py -k 'plain_reference and diffrate'",
    ),
    Mutant(
        name="the_package_is_a_plain_mean",
        file="tomepass/methods/dropping/evit.py",
        old='weight = block.call("weights_of", score, block.size)',
        new="weight = None",
        tests=("tests/methods/test_every_method.py -k 'plain_reference and (evit or spvit)'"),
    ),
    Mutant(
        name="no_room_for_the_fused_token",
        file="tomepass/methods/dropping/evit.py",
        old="return int(self.fuse)",
        new="return 0",
        tests="tests/methods/test_base.py -k evit",
    ),
    Mutant(
        name="importance_without_a_class_token",
        file="tomepass/rewriting/reducing.py",
        old="return self.attention_to(self.protected[:1])",
        new="return self.attention_to([])",
        tests="tests/reading/test_weights_read.py -k weights_are_those",
    ),
    Mutant(
        name="the_last_protected_token_is_the_class_token",
        file="tomepass/rewriting/reducing.py",
        old="return self.attention_to(self.protected[:1])",
        new="return self.attention_to(self.protected[-1:])",
        tests=(
            "tests/methods/test_every_method.py -k 'plain_reference and (prune or evit)"
            " and (ast or dinov2_registers)'"
        ),
    ),
    Mutant(
        name="heads_side_by_side_are_one_head",
        file="tomepass/methods/block.py",
        old="x = self.call(aten.flatten.using_ints, turned, 2, 3)",
        new="x = self.call(aten.select.int, turned, 2, 0)",
        tests=(
            "tests/methods/test_every_method.py -k 'options_are_the_plain_reference and all_heads'"
        ),
    ),
    Mutant(
        name="json_loses_the_protected",
        file="tomepass/methods/base.py",
        old="if own.name in common or value != own.default:",
        new=('if own.name != "protected" and (own.name in common or value != own.default):'),
        tests="tests/methods/test_every_method.py -k 'json and tome_as_published'",
    ),
    Mutant(
        name="a_rate_does_not_take_the_place_of_counts",
        file="tomepass/methods/base.py",
        old='            del fields["r"]\n',
        new="            changes = {}\n",
        tests="tests/methods/test_base.py -k 'takes_the_place'",
    ),
    Mutant(
        name="queries_are_keys",
        file="tomepass/rewriting/reducing.py",
        old="return self._heads(self._block.attention.query, 0)",
        new="return self._heads(self._block.attention.key, 0)",
        tests=(
            "tests/methods/test_every_method.py -k 'options_are_the_plain_reference and queries'"
        ),
    ),
    Mutant(
        name="combine_is_ignored",
        file="tomepass/rewriting/carrying.py",
        old='if how == "mean":\n            weight = None',
        new='if how == "never":\n            weight = None',
        tests="tests/methods/merging/test_combine.py -k mean",
    ),
    Mutant(
        name="seeds_and_ks_are_swapped",
        file="tomepass/methods/merging/tome.py",
        old='self.k if self.partition == "kth" else self.seed',
        new='self.seed if self.partition == "kth" else self.k',
        tests=(
            "tests/methods/test_every_method.py -k 'options_are_the_plain_reference and"
            " random or kth_loses'"
        ),
    ),
    Mutant(
        name="keep_rates_round_down",
        file="tomepass/methods/base.py",
        old="math.ceil(free * rate)",
        new="math.floor(free * rate)",
        tests="tests/methods/test_base.py -k 'evit or keep_rates'",
    ),
    Mutant(
        name="keep_rates_reduce_in_other_blocks",
        file="tomepass/methods/base.py",
        old="3 * depth // 4}",
        new="3 * depth // 4 - 1}",
        tests="tests/methods/test_base.py -k 'evit or keep_rates'",
    ),
    Mutant(
        name="blocks_left_out_lose_tokens",
        file="tomepass/methods/base.py",
        old="count if i in places else 0",
        new="count",
        tests="tests/methods/test_base.py -k blocks",
    ),
    Mutant(
        name="json_loses_a_field",
        file="tomepass/methods/base.py",
        old="if own.name in common or value != own.default:",
        new="if own.name in common:",
        tests="tests/handover/test_config.py tests/methods/test_every_method.py -k 'json'",
    ),
    Mutant(
        name="two_methods_of_a_name",
        file="tomepass/methods/base.py",
        old=('            raise TypeError(f"a method named {name!r} is there already: {other!r}")'),
        new="            pass",
        tests="tests/methods/test_base.py -k 'name_is_taken'",
    ),
    Mutant(
        name="nonsense_is_not_refused",
        file="tomepass/methods/merging/tome.py",
        old="if against and value != type(self).__dataclass_fields__[name].default:",
        new="if False:",
        tests="tests/handover/test_choices.py -k no_sense",
    ),
]
