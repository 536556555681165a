"""Mutations of scores, of pruning and of what is out of use."""

from mutants import Mutant

MUTANTS = [
    Mutant(
        name="attention_paid_is_not_scaled",
        file="tomepass/ops/attending/attention_to.py",
        old="query @ key.transpose(-1, -2) * scale",
        new="query @ key.transpose(-1, -2)",
        tests="tests/ops/matching/test_match_by.py -k attention_to",
    ),
    Mutant(
        name="attention_paid_forgets_sizes",
        file="tomepass/ops/attending/attention_to.py",
        old="scores = scores + log_size(size, scores)",
        new="scores = scores + 0 * log_size(size, scores)",
        tests="tests/ops/matching/test_match_by.py -k attention_to",
    ),
    Mutant(
        name="key_heads_are_dealt_out",
        file="tomepass/ops/attending/attention_to.py",
        old="key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)",
        new="key.repeat(1, query.shape[1] // key.shape[1], 1, 1)",
        tests="tests/ops/matching/test_match_by.py -k attention_to",
    ),
    Mutant(
        name="padding_pays_attention",
        file="tomepass/ops/attending/attention_to.py",
        old="pays = (each_image(size, *paid.shape[:2]) >= PADDED)",
        new="pays = (each_image(size, *paid.shape[:2]) >= 0)",
        tests=(
            "tests/ops/dropping/test_sample.py tests/ops/matching/test_match_by.py "
            "-k 'pays or attention_to'"
        ),
    ),
    Mutant(
        name="padding_is_selected",
        file="tomepass/ops/dropping/prune.py",
        old='return torch.where(size < PADDED, -float("inf"), number)',
        new='return torch.where(size < 0, -float("inf"), number)',
        tests="tests/ops/dropping/test_prune.py -k padding",
    ),
    Mutant(
        name="protected_tokens_stand_in",
        file="tomepass/ops/dropping/prune.py",
        old="scores = torch.where(held, -4.0, scores)",
        new="scores = torch.where(held, scores, scores)",
        tests="tests/ops/dropping/test_prune.py -k nearest",
    ),
    Mutant(
        name="padding_stands_in",
        file="tomepass/ops/dropping/prune.py",
        old="scores = torch.where((size < PADDED).unsqueeze(1), -3.0, scores)",
        new="scores = torch.where((size < 0).unsqueeze(1), -3.0, scores)",
        tests=(
            "tests/ops/dropping/test_prune.py tests/ops/dropping/test_sample.py "
            "-k 'nearest or found'"
        ),
    ),
    Mutant(
        name="the_second_highest_stands_for_the_rest",
        file="tomepass/ops/dropping/prune.py",
        old="(own < 0) & (order == 0)",
        new="(own < 0) & (order == 1)",
        tests="tests/ops/dropping/test_prune.py -k fused",
    ),
    Mutant(
        name="what_is_out_of_use_holds_tokens",
        file="tomepass/ops/dropping/prune.py",
        old="here = here & (size != 0).unsqueeze(-1)",
        new="here = here & (size >= 0).unsqueeze(-1)",
        tests=(
            "tests/ops/dropping/test_sample.py tests/ops/dropping/test_prune.py -k 'found or turn'"
        ),
    ),
    Mutant(
        name="every_block_draws_the_same",
        file="tomepass/methods/dropping/prune.py",
        old="block.tokens, seed + block.index)",
        new="block.tokens, seed)",
        tests="tests/methods/test_every_method.py -k 'plain_reference and prune_random'",
    ),
    Mutant(
        name="samples_start_at_nothing",
        file="tomepass/ops/dropping/sample.py",
        old="(2 * torch.arange(count, device=score.device) + 1) / (2 * count)",
        new="torch.arange(count, device=score.device) / count",
        tests="tests/ops/dropping/test_sample.py -k samples",
    ),
    Mutant(
        name="a_token_is_kept_as_often_as_sampled",
        file="tomepass/ops/dropping/sample.py",
        old="(found != before).float()",
        new="(found >= 0).float()",
        tests="tests/ops/dropping/test_sample.py -k kept_once",
    ),
    Mutant(
        name="lengths_of_values_are_left_out",
        file="tomepass/ops/dropping/sample.py",
        old="return attention.to(wide.dtype) * wide.square().sum((1, 3)).sqrt()",
        new="return attention.to(wide.dtype)",
        tests="tests/ops/dropping/test_sample.py -k significance",
    ),
    Mutant(
        name="halting_starts_anew_in_each_block",
        file="tomepass/ops/dropping/halt.py",
        old="return score if before is None else before + score",
        new="return score",
        tests="tests/ops/dropping/test_sample.py -k scores_add_up",
    ),
    Mutant(
        name="a_token_halts_above_the_limit_alone",
        file="tomepass/ops/dropping/halt.py",
        old="(total < limit), size, 0.0)",
        new="(total <= limit), size, 0.0)",
        tests="tests/ops/dropping/test_sample.py -k halts",
    ),
    Mutant(
        name="all_tokens_may_halt",
        file="tomepass/ops/dropping/halt.py",
        old="stays = ~free.scatter(1, last, False)",
        new="stays = ~free",
        tests="tests/ops/dropping/test_sample.py -k halt",
    ),
    Mutant(
        name="sums_do_not_follow_their_tokens",
        file="tomepass/methods/dropping/avit.py",
        old='block.memory[_TOTAL] = block.call("gather_size", total, stands)',
        new="block.memory[_TOTAL] = block.slice(total, 0, block.left)",
        tests="tests/methods/test_every_method.py -k 'plain_reference and avit'",
    ),
    Mutant(
        name="a_policy_averages_unweighted",
        file="tomepass/ops/dropping/keep_score.py",
        old="size is None else size.to(wide)",
        new="size is None else (size * 0 + 1).to(wide)",
        tests=(
            "tests/methods/learned/test_learned.py tests/methods/test_every_method.py -k "
            "'dynamicvit and (plain_reference or used)'"
        ),
    ),
    Mutant(
        name="tokens_kept_are_counted_with_holes",
        file="tomepass/reporting/kept.py",
        old="used = [(size >= PADDED).sum(-1) for size in sizes]",
        new="used = [(size >= 0).sum(-1) for size in sizes]",
        tests="tests/methods/test_input_dependent.py -k 'kept_counts'",
    ),
    Mutant(
        name="holes_are_averaged",
        file="tomepass/rewriting/sweep.py",
        old="holes = planned.method.holes",
        new="holes = False",
        tests="tests/methods/test_input_dependent.py -k 'left_out_exactly'",
    ),
]
