"""Mutations of the kernels for a CPU and of those in Triton."""

from mutants import Mutant

MUTANTS = [
    Mutant(
        name="cpp_edges_tie_the_other_way",
        file="tomepass/kernels/cpu.cpp",
        old="similarity[a] > similarity[b] : a < b;",
        new="similarity[a] > similarity[b] : a > b;",
        tests="tests/kernels/test_cpu.py -k ties",
    ),
    Mutant(
        name="cpp_partners_tie_the_other_way",
        file="tomepass/kernels/cpu.cpp",
        old="const Ints better = (score[i] > best[i])",
        new="const Ints better = (score[i] >= best[i])",
        tests="tests/kernels/test_cpu.py -k 'ties or maps'",
    ),
    Mutant(
        name="cpp_padding_merges_with_tokens",
        file="tomepass/kernels/cpu.cpp",
        old=" & (apart == even_apart[i]);",
        new=";",
        tests="tests/kernels/test_cpu.py -k maps",
    ),
    Mutant(
        name="cpp_bfloat16_is_cut_off",
        file="tomepass/kernels/cpu.cpp",
        old="(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16",
        new="bits >> 16",
        tests="tests/kernels/test_cpu.py -k 'padded or equals or biases'",
    ),
    Mutant(
        name="cpp_sizes_forgotten_in_the_mean",
        file="tomepass/kernels/cpu.cpp",
        old="const float weight = (sizes ? sizes[i] : 1.f) / total;",
        new="const float weight = 1.f / total;",
        tests="tests/kernels/test_cpu.py -k merged_tokens",
    ),
    Mutant(
        name="cpp_sizes_are_counts",
        file="tomepass/kernels/cpu.cpp",
        old="total += sizes ? sizes[i] : 1.f;",
        new="total += 1.f;",
        tests="tests/kernels/test_cpu.py -k merged_tokens",
    ),
    Mutant(
        name="cpp_offsets_of_images_in_32_bits",
        file="tomepass/kernels/cpu.cpp",
        old="metric_of(keys + b * strides[0] + at",
        new="metric_of(keys + int32_t(b * strides[0]) + at",
        tests="tests/kernels/gpu/test_far.py -k 'match_on_the_cpu'",
    ),
    Mutant(
        name="cpp_offsets_of_tokens_in_32_bits",
        file="tomepass/kernels/cpu.cpp",
        old="const T* from = x + b * strides[0] + i * strides[1];",
        new="const T* from = x + b * strides[0] + i * int32_t(strides[1]);",
        tests="tests/kernels/gpu/test_far.py -k merge_on_the_cpu",
    ),
    Mutant(
        name="cpp_a_bias_is_summed_over_queries",
        file="tomepass/kernels/cpu.cpp",
        old="own[j] - sum[j] / number",
        new="own[j] - sum[j]",
        tests="tests/kernels/test_cpu.py -k biases",
    ),
    Mutant(
        name="cpp_padded_keys_are_attended_to",
        file="tomepass/kernels/cpu.cpp",
        old="weight < PADDED ? lowest : std::log(weight)",
        new="n >= tokens ? 0.f : std::log(weight)",
        tests="tests/kernels/test_cpu.py -k padded_keys",
    ),
    Mutant(
        name="kernels_where_gradients_are_needed",
        file="tomepass/kernels/choose.py",
        old="    if not trains:\n",
        new="    if True:\n",
        tests="tests/kernels/test_choose.py -k trained",
    ),
    Mutant(
        name="kernels_for_every_dtype",
        file="tomepass/kernels/choose.py",
        old=' == "cpu" and not why_not(check, node, args)',
        new=' == "cpu"',
        tests="tests/kernels/test_choose.py -k dtype",
    ),
    Mutant(
        name="a_size_that_stands_before_its_tokens",
        file="tomepass/kernels/choose.py",
        old="together = size is not None and node < size",
        new="together = size is not None",
        tests="tests/kernels/test_choose.py -k size",
    ),
    Mutant(
        name="triton_blocks_tie_the_other_way",
        file="tomepass/kernels/gpu/triton_match.py",
        old="nearer = top > best",
        new="nearer = top >= best",
        tests="tests/kernels/gpu/test_gpu_holes.py -k tie",
    ),
    Mutant(
        name="triton_padding_merges_with_tokens",
        file="tomepass/kernels/gpu/triton_match.py",
        old="apart = our_padding[:, None] != their_padding[None, :]",
        new=("apart = our_padding[:, None] & (their_padding[None, :] != their_padding[None, :])"),
        tests="tests/kernels/gpu/test_gpu.py -k padding",
    ),
    Mutant(
        name="triton_offsets_of_tokens_in_32_bits",
        file="tomepass/kernels/gpu/triton_match.py",
        old="position.to(tl.int64)[:, None] * token_stride",
        new="position[:, None] * token_stride",
        tests="tests/kernels/gpu/test_far.py -k match_in_triton",
    ),
    Mutant(
        name="triton_offsets_of_heads_in_32_bits",
        file="tomepass/kernels/gpu/triton_match.py",
        old="ahead = tl.cast(head, tl.int64) * head_stride",
        new="ahead = tl.cast(head, tl.int32) * head_stride",
        tests="tests/kernels/gpu/test_far.py -k match_in_triton",
    ),
    Mutant(
        name="triton_offsets_of_images_in_32_bits",
        file="tomepass/kernels/gpu/triton_match.py",
        old=(
            "    blocks = tl.cdiv(tokens, BLOCK)\n"
            "    image = (tl.program_id(0) // blocks).to(tl.int64)"
        ),
        new=("    blocks = tl.cdiv(tokens, BLOCK)\n    image = tl.program_id(0) // blocks"),
        tests="tests/kernels/gpu/test_far.py -k match_in_triton",
    ),
    Mutant(
        name="triton_offsets_of_merged_images_in_32_bits",
        file="tomepass/kernels/gpu/triton_merge.py",
        old=(
            "    blocks = tl.cdiv(left, ROWS)\n"
            "    # 64 bits: a batch may hold more than 2^31 numbers.\n"
            "    image = (tl.program_id(0) // blocks).to(tl.int64)"
        ),
        new=("    blocks = tl.cdiv(left, ROWS)\n    image = tl.program_id(0) // blocks"),
        tests="tests/kernels/gpu/test_far.py -k merge_and_its_way_back",
    ),
    Mutant(
        name="triton_equal_tokens_move",
        file="tomepass/kernels/gpu/triton_merge.py",
        old="grown = tl.where(first, token, value - (value - token) * part)",
        new="grown = value * (1 - part) + token * part",
        tests="tests/kernels/gpu/test_gpu.py -k equal_tokens_stay",
    ),
    Mutant(
        name="triton_sums_are_not_rounded",
        file="tomepass/kernels/gpu/triton_merge.py",
        old="            token = token.to(merged.dtype.element_ty).to(WIDE)\n",
        new="            pass\n",
        tests="tests/kernels/gpu/test_gpu_holes.py -k rounded",
    ),
    Mutant(
        name="triton_a_norm_forgets_its_bias",
        file="tomepass/kernels/gpu/triton_merge.py",
        old="apart * scale[:, None] * gain[None, :] + shift[None, :]",
        new="apart * scale[:, None] * gain[None, :]",
        tests="tests/kernels/gpu/test_gpu.py -k layer_norm_in",
    ),
]
