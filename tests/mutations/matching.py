"""Mutations of what decides which token goes where."""

from mutants import Mutant

MUTANTS = [
    Mutant(
        name="edges_tie_the_other_way",
        file="tomepass/ops/order.py",
        old="(position[None, :] < position[:, None])",
        new="(position[None, :] > position[:, None])",
        tests="tests/ops/matching/test_match.py -k 'ties or equal_tokens'",
    ),
    Mutant(
        name="partners_tie_the_other_way",
        file="tomepass/ops/matching/match.py",
        old="        similarity, partner = scores.max(dim=-1)\n",
        new=(
            "        similarity, partner = scores.flip(-1).max(dim=-1)\n"
            "        partner = scores.shape[-1] - 1 - partner\n"
        ),
        tests="tests/ops/matching/test_match.py -k 'ties or equal_tokens'",
    ),
    Mutant(
        name="keys_compared_without_normalisation",
        file="tomepass/ops/matching/match.py",
        old="metric = torch.nn.functional.normalize(head_mean(keys), dim=-1)",
        new="metric = head_mean(keys)",
        tests="tests/ops/matching/test_match.py -k reference",
    ),
    Mutant(
        name="the_first_head_alone_is_compared",
        file="tomepass/ops/matching/similarity.py",
        old="features.to(at_least_float32(features.dtype)).mean(1)",
        new="features.to(at_least_float32(features.dtype))[:, 0]",
        tests="tests/ops/matching/test_match.py -k reference",
    ),
    Mutant(
        name="keys_of_float64_compared_in_float32",
        file="tomepass/ops/matching/similarity.py",
        old="features.to(at_least_float32(features.dtype)).mean(1)",
        new="features.float().mean(1)",
        tests="tests/ops/matching/test_match.py -k float64",
    ),
    Mutant(
        name="keys_compared_in_their_own_dtype",
        file="tomepass/ops/matching/similarity.py",
        old="features.to(at_least_float32(features.dtype)).mean(1)",
        new="features.mean(1)",
        tests="tests/ops/matching/test_match.py -k dtype",
    ),
    Mutant(
        name="autocast_reaches_the_metric",
        file="tomepass/ops/matching/match.py",
        old="with without_autocast(keys.device), torch.no_grad():",
        new="with torch.no_grad():",
        tests="tests/ops/matching/test_match.py -k autocast",
    ),
    Mutant(
        name="what_is_no_number_wins",
        file="tomepass/ops/matching/similarity.py",
        old="torch.where(scores.isnan(), unknown, scores)",
        new="torch.where(scores.isnan(), float('inf'), scores)",
        tests="tests/ops/matching/test_match.py -k nan",
    ),
    Mutant(
        name="padding_merges_with_tokens",
        file="tomepass/ops/matching/similarity.py",
        old=("return torch.where(ours.unsqueeze(2) != theirs.unsqueeze(1), apart, scores)"),
        new="return scores",
        tests="tests/ops/test_padding.py",
    ),
    Mutant(
        name="protected_tokens_are_merged_into",
        file="tomepass/ops/matching/match.py",
        old="odd = [i for i in range(1, tokens, 2) if i not in held]",
        new="odd = [i for i in range(1, tokens, 2) if i not in held or i == max(held)]",
        tests="tests/ops/matching/test_match.py -k 'reference or protected'",
    ),
    Mutant(
        name="what_stays_is_out_of_order",
        file="tomepass/ops/matching/match.py",
        old="torch.where(merged, first_odd + partner, len(held) + stays)",
        new="torch.where(merged, first_odd + partner, first_odd - 1 - stays)",
        tests="tests/ops/matching/test_match.py -k reference",
    ),
    Mutant(
        name="one_edge_too_many_merges",
        file="tomepass/ops/matching/match.py",
        old="merged = rank(padding_first(similarity, kinds)) < r\n        # A",
        new="merged = rank(padding_first(similarity, kinds)) <= r\n        # A",
        tests="tests/ops/matching/test_match.py -k reference",
    ),
    Mutant(
        name="neighbours_in_the_batch_decide",
        file="tomepass/ops/matching/match.py",
        old=("scores = comparable(take(metric, even) @ take(metric, odd).transpose(1, 2), kinds)"),
        new=(
            "scores = comparable(take(metric, even) @ take(metric[:1], odd).transpose(1, 2), kinds)"
        ),
        tests="tests/ops/matching/test_match.py -k 'neighbours or reference'",
    ),
    Mutant(
        name="importance_is_not_raised_to_its_power",
        file="tomepass/ops/matching/match_by.py",
        old="importance[:, sources].to(best.dtype) ** exponent",
        new="importance[:, sources].to(best.dtype)",
        tests="tests/ops/matching/test_match_by.py -k 'reference or importance'",
    ),
    Mutant(
        name="cosines_are_no_dissimilarities",
        file="tomepass/ops/matching/match_by.py",
        old='nearest = 1.0 if similarity == "cosine" else 0.0',
        new="nearest = 0.0",
        tests="tests/ops/matching/test_match_by.py -k 'reference or importance or looked_at'",
    ),
    Mutant(
        name="a_random_partition_has_one_seed",
        file="tomepass/ops/matching/match_by.py",
        old="shuffle(len(free), seed)",
        new="shuffle(len(free), 0)",
        tests="tests/ops/matching/test_match_by.py -k 'reference or seed'",
    ),
    Mutant(
        name="the_first_half_is_the_smaller",
        file="tomepass/ops/matching/match_by.py",
        old="half = len(free) - len(free) // 2",
        new="half = len(free) // 2",
        tests="tests/ops/matching/test_match_by.py -k reference",
    ),
    Mutant(
        name="kth_counts_from_the_first",
        file="tomepass/ops/matching/match_by.py",
        old="every = free[seed - 1 :: seed]",
        new="every = free[::seed]",
        tests="tests/methods/test_every_method.py -k 'plain_reference and kth'",
    ),
    Mutant(
        name="a_distance_forgets_one_length",
        file="tomepass/ops/matching/similarity.py",
        old="return 2 * products - lengths[0] - lengths[1]",
        new="return 2 * products - lengths[0]",
        tests="tests/ops/matching/test_match_by.py -k reference",
    ),
    Mutant(
        name="attention_as_a_measure_is_not_scaled",
        file="tomepass/ops/matching/similarity.py",
        old="scores = products * sources.shape[-1] ** -0.5",
        new="scores = products",
        tests="tests/ops/matching/test_match_by.py -k softmax_is",
    ),
    Mutant(
        name="greedy_pairs_share_a_token",
        file="tomepass/ops/matching/match_greedy.py",
        old="used = (position == low) | (position == high)",
        new="used = position == high",
        tests="tests/ops/matching/test_match_loops.py -k greedy",
    ),
    Mutant(
        name="greedy_keeps_the_later_of_a_pair",
        file="tomepass/ops/matching/match_greedy.py",
        old="into = torch.where(position == high, low, into)",
        new="into = torch.where(position == low, high, into)",
        tests="tests/ops/matching/test_match_loops.py -k greedy",
    ),
    Mutant(
        name="a_seed_leaves_its_cluster",
        file="tomepass/ops/matching/match_kmeans.py",
        old="nearest = torch.where(own, member, scores.argmax(-1))",
        new="nearest = scores.argmax(-1)",
        tests="tests/ops/matching/test_match_loops.py -k clusters",
    ),
    Mutant(
        name="centres_stop_moving",
        file="tomepass/ops/matching/match_kmeans.py",
        old="if step + 1 < iterations:",
        new="if step + 2 < iterations:",
        tests="tests/ops/matching/test_match_loops.py -k clusters",
    ),
    Mutant(
        name="protected_tokens_move_centres",
        file="tomepass/ops/matching/match_kmeans.py",
        old="goes = sent(nearest, clusters) & loose",
        new="goes = sent(nearest, clusters)",
        tests="tests/ops/matching/test_match_loops.py -k clusters",
    ),
    Mutant(
        name="sets_forget_padding",
        file="tomepass/ops/matching/match_sets.py",
        old=(
            "        kinds = None\n"
            "        if size is not None:\n"
            "            kinds = [(size < PADDED).gather"
        ),
        new=(
            "        kinds = None\n        if False:\n            kinds = [(size < PADDED).gather"
        ),
        tests="tests/ops/matching/test_match_sets.py -k padding",
    ),
    Mutant(
        name="sets_of_the_first_image",
        file="tomepass/ops/matching/match_sets.py",
        old="sides = gather(metric, sources, 1), gather(metric, destinations, 1)",
        new=(
            "sides = gather(metric, sources, 1), gather(metric, "
            "destinations[:1].expand_as(destinations), 1)"
        ),
        tests="tests/ops/matching/test_match_loops.py -k sets_of",
    ),
    Mutant(
        name="energy_counts_the_token_itself",
        file="tomepass/ops/matching/match_sets.py",
        old="other = (position != position[:, None]) & free_mask(",
        new="other = (position >= 0) & free_mask(",
        tests="tests/ops/matching/test_match_sets.py -k energy",
    ),
    Mutant(
        name="energy_counts_padding",
        file="tomepass/ops/matching/match_sets.py",
        old="counted = counted & (size >= PADDED).unsqueeze(1)",
        new="counted = counted & (size >= 0).unsqueeze(1)",
        tests="tests/ops/matching/test_match_sets.py -k energy",
    ),
    Mutant(
        name="a_threshold_merges_what_is_below_it",
        file="tomepass/ops/matching/match_threshold.py",
        old="(~idle & (similarity > tau))",
        new="(~idle & (similarity < tau))",
        tests="tests/ops/matching/test_match_threshold.py -k 'loops or above'",
    ),
    Mutant(
        name="a_threshold_takes_padding_for_tokens",
        file="tomepass/ops/matching/match_threshold.py",
        old="(size > 0).long() + (size >= PADDED).long()",
        new="(size > 0).long() * 2",
        tests="tests/ops/matching/test_match_threshold.py -k loops",
    ),
    Mutant(
        name="sequences_forget_where_tokens_stand",
        file="tomepass/ops/sequence.py",
        old="return goes[:, position.argsort()], stands",
        new="return goes, stands",
        tests="tests/ops/matching/test_match_by.py -k reference",
    ),
]
