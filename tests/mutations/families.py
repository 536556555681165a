"""Mutations of what whole families rest on: rotary tables, and attention weights computed again."""

from mutants import Mutant

MUTANTS = [
    Mutant(
        name="a_merged_token_is_turned_like_a_source",
        file="tomepass/ops/merging/side.py",
        old="into = position % 2 == 1",
        new="into = position % 2 == 0",
        tests="tests/reading/test_rotary.py -k 'pooler and True'",
    ),
    Mutant(
        name="a_learned_query_forgets_the_sizes",
        file="tomepass/rewriting/attending.py",
        old="if not epoch or not (self.method.prop_attn or merges.masked):",
        new="if not epoch or not outcome.layout or not (self.method.prop_attn or merges.masked):",
        tests="tests/reading/test_rotary.py -k 'any_encoder and attention'",
    ),
    Mutant(
        name="duplicates_are_turned_by_their_own_places",
        file="tomepass/proof/duplicates.py",
        old='for s in outcome.sides if s.how == "kept"}',
        new='for s in outcome.sides if s.how == "rows"}',
        tests="tests/reading/test_rotary.py -k 'any_encoder and mean'",
    ),
    Mutant(
        name="a_rotary_table_is_zeroed_for_duplicates",
        file="tomepass/graphs/surgery.py",
        old="if (dim := places[node.name]) is None:",
        new="if (dim := places[node.name]) is None or dim:",
        tests="tests/graphs/test_surgery.py -k without_places",
    ),
    Mutant(
        name="weights_computed_again_are_not_scaled",
        file="tomepass/ops/attending/attention_to.py",
        old="scores = query @ key.transpose(-1, -2) * scale",
        new="scores = query @ key.transpose(-1, -2)",
        tests="tests/methods/test_reading_attention.py -k 'alike and vit'",
    ),
    Mutant(
        name="weights_computed_again_forget_the_sizes",
        file="tomepass/ops/attending/attention_to.py",
        old="scores = scores + log_size(size, scores)",
        new="scores = scores + 0",
        tests="tests/ops/matching/test_match_by.py -k attention_to_equals",
    ),
    Mutant(
        name="weights_read_off_a_softmax_are_those_of_all_tokens",
        file="tomepass/rewriting/reducing.py",
        old="rows = queries or list(range(self.tokens))",
        new="rows = list(range(self.tokens))",
        tests="tests/methods/test_reading_attention.py -k 'alike and vit'",
    ),
    Mutant(
        name="rotary_is_told_as_exact",
        file="tomepass/reporting/report.py",
        old="tokens alike but",
        new="tokens never",
        tests="tests/reading/test_rotary.py -k turned_by_their",
    ),
]
