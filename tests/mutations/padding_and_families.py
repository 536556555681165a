"""Mutations of what padding decides: what each would break, and the tests that see it."""

from mutants import Mutant

HIDES = "tests/methods/test_padding_hides.py"

MUTANTS = [
    Mutant(
        name="padding_ranked_by_what_it_holds",
        file="tomepass/ops/matching/similarity.py",
        old='return torch.where(ours & theirs.any(-1, keepdim=True), float("inf"), best)',
        new="return best",
        tests=f"{HIDES} -k tome_as_published",
    ),
    Mutant(
        name="padding_first_though_it_has_no_partner",
        file="tomepass/ops/matching/similarity.py",
        old="torch.where(ours & theirs.any(-1, keepdim=True),",
        new="torch.where(ours,",
        tests="tests/ops/matching/test_match_by.py -k maps_equal",
    ),
    Mutant(
        name="padding_takes_a_share_of_the_softmax",
        file="tomepass/ops/matching/similarity.py",
        old='scores = torch.where(ours.unsqueeze(2) != theirs.unsqueeze(1), -float("inf"), scores)',
        new="pass",
        tests=f"{HIDES} -k softmax_max",
    ),
    Mutant(
        name="padding_ranked_by_the_kernel_of_the_cpu",
        file="tomepass/kernels/cpu.cpp",
        old="if (even_apart[i]) best[i] =",
        new="if (false) best[i] =",
        tests="tests/kernels/test_cpu.py -k maps",
    ),
    Mutant(
        name="pairs_of_padding_taken_by_what_they_hold",
        file="tomepass/ops/matching/match_greedy.py",
        old='hidden[:, None], float("inf"), scores)',
        new="hidden[:, None], scores, scores)",
        tests=f"{HIDES} -k greedy",
    ),
    Mutant(
        name="padding_moves_the_centres_of_tokens",
        file="tomepass/ops/matching/match_kmeans.py",
        old="goes = goes & (kinds[0].unsqueeze(1) == kinds[1].unsqueeze(2))",
        new="pass",
        tests=f"{HIDES} -k centres",
    ),
    Mutant(
        name="padding_stands_for_what_is_seen",
        file="tomepass/ops/padding.py",
        old="return torch.where(stays, stands, other)",
        new="return stands",
        tests=f"{HIDES} -k 'stands_only or sequential_keep'",
    ),
    Mutant(
        name="padding_counts_in_a_plain_mean",
        file="tomepass/rewriting/carrying.py",
        old='if how == "mean" and hidden:',
        new="if False:",
        tests=f"{HIDES} -k dot_mean",
    ),
    Mutant(
        name="the_norm_of_padding_is_kept",
        file="tomepass/ops/merging/combine.py",
        old="goes = weight > PADDED**2",
        new="goes = weight > 0",
        tests=f"{HIDES} -k mlerp",
    ),
    Mutant(
        name="the_largest_of_padding_is_kept",
        file="tomepass/rewriting/carrying.py",
        old="told_apart = (merges.sizes[epoch],) if hidden else ()",
        new="told_apart: tuple[fx.Node, ...] = ()",
        tests=f"{HIDES} -k softmax_max",
    ),
    Mutant(
        name="padding_counts_in_the_budget",
        file="tomepass/handover/router.py",
        old="seen = size[:, free] >= PADDED",
        new="seen = size[:, free] >= 0",
        tests=f"{HIDES} -k budget",
    ),
]
