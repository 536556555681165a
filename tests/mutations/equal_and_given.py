"""Mutations of kernels and operators: what each would break, and the tests that see it."""

from mutants import Mutant

_EQUAL = "tests/ops/merging/test_equal_tokens.py"
_GIVEN = "tests/kernels/test_given.py"

MUTANTS = [
    Mutant(
        name="equal_tokens_rounded_in_the_mean",
        file="tomepass/ops/merging/merge.py",
        old="        self.mean = own - self.weight @ self.offset\n",
        new="        self.mean = self.weight @ x\n",
        tests=f"{_EQUAL} -k themselves",
    ),
    Mutant(
        name="mean_counted_from_a_token_of_no_size",
        file="tomepass/ops/merging/merge.py",
        old="torch.where(sizes > 0, position, -1)",
        new="torch.where(sizes >= 0, position, -1)",
        tests=(
            "tests/ops/merging/test_merge.py tests/ops/merging/test_equal_tokens.py "
            "-k 'reference or themselves'"
        ),
    ),
    Mutant(
        name="mean_in_the_narrow_dtype",
        file="tomepass/ops/merging/merge.py",
        old="        self.wide = x.to(at_least_float32(x.dtype))\n",
        new="        self.wide = x\n",
        tests=f"{_EQUAL} -k rounded_once",
    ),
    Mutant(
        name="equal_tokens_rounded_by_their_norm",
        file="tomepass/ops/merging/combine.py",
        old="return torch.where(apart, made, means.mean).to(x.dtype)",
        new="return made.to(x.dtype)",
        tests=f"{_EQUAL} -k 'themselves and norm'",
    ),
    Mutant(
        name="pooled_tokens_rounded",
        file="tomepass/ops/merging/weighted_mean.py",
        old="own - ((own - wide) * weight).sum(dim, keepdim=True)",
        new="(wide * weight).sum(dim, keepdim=True)",
        tests=f"{_EQUAL} -k mean_of_equal",
    ),
    Mutant(
        name="equal_biases_through_the_logarithm",
        file="tomepass/ops/merging/side.py",
        old="torch.where(mean == one, gather(bias.expand(images), stands, 3), merged)",
        new="merged",
        tests=f"{_EQUAL} -k equal_biases",
    ),
    Mutant(
        name="equal_tokens_rounded_in_the_cpu_kernel",
        file="tomepass/kernels/cpu.cpp",
        old="narrow(widen(own[c]) - sum[c], to[c]);",
        new="narrow(widen(own[c]) - sum[c] * 1.0001f + 1e-7f, to[c]);",
        tests=f"{_EQUAL} -k 'themselves and kernel'",
    ),
    Mutant(
        name="sizes_of_a_shared_mask_for_one_image_alone",
        file="tomepass/ops/padding.py",
        old="    return size.expand(batch, tokens)\n",
        new="    return size\n",
        tests="tests/kernels/test_shared_masks.py -k whatever_the_rank",
    ),
    Mutant(
        name="kernel_takes_one_row_of_sizes_for_all",
        file="tomepass/kernels/given.py",
        old="    return each_image(size, batch, tokens).to(torch.float32).contiguous()\n",
        new="    return size.to(torch.float32).contiguous()\n",
        tests=f"{_GIVEN} -k sizes_of_one_image",
    ),
    Mutant(
        name="kernel_reads_sizes_of_another_dtype",
        file="tomepass/kernels/given.py",
        old="tokens).to(torch.float32).contiguous()\n",
        new="tokens).contiguous()\n",
        tests=f"{_GIVEN} -k any_dtype",
    ),
    Mutant(
        name="kernel_reads_a_map_of_int32",
        file="tomepass/kernels/given.py",
        old="    if operand.dtypes is not None and x.dtype not in operand.dtypes:\n",
        new="    if operand.dtypes is not None and x.dtype not in operand.dtypes and x.ndim > 2:\n",
        tests=f"{_GIVEN} -k another_dtype",
    ),
    Mutant(
        name="kernel_does_not_look_where_a_tensor_is",
        file="tomepass/kernels/given.py",
        old="    if x.device.type != device.type or",
        new="    if x.device.type != x.device.type or",
        tests=f"{_GIVEN} -k not_known_of",
    ),
    Mutant(
        name="values_padded_as_wide_as_keys",
        file="tomepass/kernels/cpu.py",
        old="*(batch, heads, tokens, width, values.shape[3], tokens + missing),",
        new="*(batch, heads, tokens, width, width, tokens + missing),",
        tests=f"{_GIVEN} -k wider_than_keys",
    ),
    Mutant(
        name="protected_positions_beside_the_sequence",
        file="tomepass/ops/arguments.py",
        old="    if held and not (held[0] >= 0 and held[-1] < tokens):\n",
        new="    if held and not held[0] >= 0:\n",
        tests=f"{_GIVEN} -k protected_positions",
    ),
    Mutant(
        name="unmerged_from_nowhere_as_zeros",
        file="tomepass/kernels/gpu/triton_merge.py",
        old='other=float("nan"))',
        new="other=0.0)",
        tests=f"{_GIVEN} -k no_index",
    ),
]
