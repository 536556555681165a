"""Triton kernels of ``tome::match_triton``: which token goes where, with no N x N matrix in memory.

Where its metric fits one program, that makes all of an image's match (:func:`match_image`): keys
are read once, and nothing but the index map is written. Else there are three kernels, so that one
image fills more than one multiprocessor: metric, edges, index map.

Numbers that change from block to block are left unspecialised: each would compile a kernel again
where it is 1 or a multiple of 16. Protected positions are the constant ``HELD``, stretches as
``(start, stop, start, stop, ...)``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _held_before(position, HELD: tl.constexpr):
    """How many protected positions stand before each."""
    count = position * 0
    for i in tl.static_range(0, len(HELD), 2):
        count += tl.minimum(tl.maximum(position - HELD[i], 0), HELD[i + 1] - HELD[i])
    return count


@triton.jit
def _free(position, tokens, HELD: tl.constexpr):
    """Which positions are in the sequence and may merge or be merged into."""
    free = position < tokens
    for i in tl.static_range(0, len(HELD), 2):
        free = free & ((position < HELD[i]) | (position >= HELD[i + 1]))
    return free


@triton.jit
def _free_odd_before(position, HELD: tl.constexpr):
    """How many odd positions that may be merged into stand before each."""
    count = position // 2
    for i in tl.static_range(0, len(HELD), 2):
        stop = tl.minimum(position, HELD[i + 1])
        count -= tl.maximum(stop // 2 - HELD[i] // 2, 0)
    return count


@triton.jit
def _metric(
    keys,
    image,
    position,
    tokens,
    image_stride,
    head_stride,
    token_stride,
    width_stride,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The head mean of some tokens' keys at length one, ``[positions, BLOCK_D]`` float32."""
    channel = tl.arange(0, BLOCK_D)
    inside = (position < tokens)[:, None] & (channel < WIDTH)[None, :]
    # 64 bits: a batch of keys may hold more than 2^31 numbers, in any order.
    at = keys + image * image_stride + position.to(tl.int64)[:, None] * token_stride
    at += channel.to(tl.int64)[None, :] * width_stride
    total = tl.zeros([position.shape[0], BLOCK_D], tl.float32)
    for head in tl.static_range(HEADS):
        ahead = tl.cast(head, tl.int64) * head_stride
        total += tl.load(at + ahead, mask=inside, other=0.0).to(tl.float32)
    mean = total * (1.0 / HEADS)
    # Rounded as PyTorch rounds: a plain root or quotient is a device's approximation.
    length = tl.maximum(tl.sqrt_rn(tl.sum(mean * mean, 1)), 1e-12)
    return tl.div_rn(mean, length[:, None])


@triton.jit
def _draw(
    ours,
    theirs,
    our_padding,
    their_padding,
    first,
    open_,
    best,
    partner,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The best edge so far of each even token, after a block of odd ones from ``first`` on."""
    scores = tl.dot(ours, tl.trans(theirs), input_precision=PRECISION)
    scores = tl.where(scores != scores, -float("inf"), scores)
    if PADDED > 0:  # padding merges with padding alone
        apart = our_padding[:, None] != their_padding[None, :]
        scores = tl.where(apart, -float("inf"), scores)
    scores = tl.where(open_[None, :], scores, -float("inf"))
    # Of equals the leftmost, and an earlier block's before a later one's.
    top, place = tl.max(scores, 1, return_indices=True, return_indices_tie_break_left=True)
    nearer = top > best
    return tl.where(nearer, top, best), tl.where(nearer, first + 2 * place + 1, partner)


@triton.jit
def _write_map(
    best,
    partner,
    assign,
    image,
    tokens,
    r,
    first_odd,
    HELD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The index map of an image: its ``r`` best edges merge, ties by position.

    The r-th best is found bit by bit: an order without a sort, in 32 sums over the edges.
    """
    even = 2 * tl.arange(0, BLOCK)
    odd = even + 1
    free = _free(even, tokens, HELD)
    # Floats whose bits are ordered as integers; one zero alone; below all that is free the rest.
    bits = tl.where(best == 0.0, 0.0, best).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(free, order, -2147483648)
    rth = tl.where(tl.sum((order >= 0).to(tl.int32)) >= r, 0, -2147483648)
    for bit in tl.static_range(31):
        raised = rth | (1 << (30 - bit))
        rth = tl.where(tl.sum((order >= raised).to(tl.int32)) >= r, raised, rth)
    level = order == rth
    room = r - tl.sum((order > rth).to(tl.int32))
    merges = (order > rth) | (level & (tl.cumsum(level.to(tl.int32), 0) <= room))
    stays = (free & (merges == 0)).to(tl.int32)
    held = _held_before(even * 0 + tokens, HELD)
    into = first_odd + _free_odd_before(partner, HELD)
    index = tl.where(merges, into, held + tl.cumsum(stays, 0) - stays)
    index = tl.where(free, index, _held_before(even, HELD))
    row = assign + image * tokens
    tl.store(row + even, index.to(tl.int64), mask=even < tokens)
    index = first_odd + _free_odd_before(odd, HELD)
    index = tl.where(_free(odd, tokens, HELD), index, _held_before(odd, HELD))
    tl.store(row + odd, index.to(tl.int64), mask=odd < tokens)


@triton.jit(do_not_specialize=["r", "first_odd", "nearest_odd"])
def match_image(
    keys,
    size,
    assign,
    image_stride,
    head_stride,
    token_stride,
    width_stride,
    tokens,
    r,
    first_odd,
    nearest_odd,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HELD: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_EVEN: tl.constexpr,
    BLOCK_ODD: tl.constexpr,
):
    """A program an image: all of its even tokens against blocks of its odd ones."""
    image = tl.program_id(0).to(tl.int64)
    even = 2 * tl.arange(0, BLOCK_EVEN)
    ours = _metric(
        keys, image, even, tokens, image_stride, head_stride, token_stride, width_stride,
        HEADS, WIDTH, BLOCK_D,
    )  # fmt: skip
    our_padding = even < 0
    their_padding = 2 * tl.arange(0, BLOCK_ODD) < 0
    if PADDED > 0:
        our_padding = tl.load(size + image * tokens + even, mask=even < tokens, other=1.0) < PADDED
    paired = 0  # whether some odd token is padding
    best = tl.full([BLOCK_EVEN], -float("inf"), tl.float32)
    partner = tl.zeros([BLOCK_EVEN], tl.int32) + nearest_odd
    for first in range(0, tokens, 2 * BLOCK_ODD):
        odd = first + 2 * tl.arange(0, BLOCK_ODD) + 1
        theirs = _metric(
            keys, image, odd, tokens, image_stride, head_stride, token_stride, width_stride,
            HEADS, WIDTH, BLOCK_D,
        )  # fmt: skip
        if PADDED > 0:
            their_size = tl.load(size + image * tokens + odd, mask=odd < tokens, other=1.0)
            their_padding = their_size < PADDED
            pads = their_padding & _free(odd, tokens, HELD)
            paired = tl.maximum(paired, tl.max(pads.to(tl.int32), 0))
        best, partner = _draw(
            ours, theirs, our_padding, their_padding, first, _free(odd, tokens, HELD),
            best, partner, PADDED, PRECISION,
        )  # fmt: skip
    if PADDED > 0:  # it merges first, whatever it holds
        best = tl.where(our_padding & (paired > 0), float("inf"), best)
    _write_map(best, partner, assign, image, tokens, r, first_odd, HELD, BLOCK_EVEN)


@triton.jit
def metric_kernel(
    keys,
    metric,
    image_stride,
    head_stride,
    token_stride,
    width_stride,
    tokens,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program a block of tokens: their metric, ``[B, N, WIDTH]`` float32."""
    blocks = tl.cdiv(tokens, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    position = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    found = _metric(
        keys, image, position, tokens, image_stride, head_stride, token_stride, width_stride,
        HEADS, WIDTH, BLOCK_D,
    )  # fmt: skip
    channel = tl.arange(0, BLOCK_D)
    inside = (position < tokens)[:, None] & (channel < WIDTH)[None, :]
    row = (image * tokens + position)[:, None] * WIDTH
    tl.store(metric + row + channel[None, :], found, mask=inside)


@triton.jit(do_not_specialize=["nearest_odd"])
def edges_kernel(
    metric,
    size,
    best_edge,
    best_partner,
    tokens,
    nearest_odd,
    WIDTH: tl.constexpr,
    HELD: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_EVEN: tl.constexpr,
    BLOCK_ODD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program a block of even tokens: their best edge and its odd end, ``[B, ceil(N / 2)]``."""
    edges = (tokens + 1) // 2
    blocks = tl.cdiv(edges, BLOCK_EVEN)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    edge = tl.program_id(0) % blocks * BLOCK_EVEN + tl.arange(0, BLOCK_EVEN)
    even = 2 * edge
    channel = tl.arange(0, BLOCK_D)
    thin = (channel < WIDTH)[None, :]
    rows = metric + image * tokens * WIDTH + channel[None, :]
    ours = tl.load(rows + even[:, None] * WIDTH, mask=(even < tokens)[:, None] & thin, other=0.0)
    our_padding = even < 0
    their_padding = 2 * tl.arange(0, BLOCK_ODD) < 0
    if PADDED > 0:
        our_padding = tl.load(size + image * tokens + even, mask=even < tokens, other=1.0) < PADDED
    paired = 0  # whether some odd token is padding
    best = tl.full([BLOCK_EVEN], -float("inf"), tl.float32)
    partner = tl.zeros([BLOCK_EVEN], tl.int32) + nearest_odd
    for first in tl.range(0, tokens, 2 * BLOCK_ODD, num_stages=STAGES):
        odd = first + 2 * tl.arange(0, BLOCK_ODD) + 1
        there = (odd < tokens)[:, None] & thin
        theirs = tl.load(rows + odd[:, None] * WIDTH, mask=there, other=0.0)
        if PADDED > 0:
            their_size = tl.load(size + image * tokens + odd, mask=odd < tokens, other=1.0)
            their_padding = their_size < PADDED
            pads = their_padding & _free(odd, tokens, HELD)
            paired = tl.maximum(paired, tl.max(pads.to(tl.int32), 0))
        best, partner = _draw(
            ours, theirs, our_padding, their_padding, first, _free(odd, tokens, HELD),
            best, partner, PADDED, PRECISION,
        )  # fmt: skip
    if PADDED > 0:  # it merges first, whatever it holds
        best = tl.where(our_padding & (paired > 0), float("inf"), best)
    tl.store(best_edge + image * edges + edge, best, mask=edge < edges)
    tl.store(best_partner + image * edges + edge, partner, mask=edge < edges)


@triton.jit(do_not_specialize=["r", "first_odd"])
def map_kernel(
    best_edge,
    best_partner,
    assign,
    tokens,
    r,
    first_odd,
    HELD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program an image: from edges to the index map."""
    image = tl.program_id(0).to(tl.int64)
    edges = (tokens + 1) // 2
    edge = tl.arange(0, BLOCK)
    best = tl.load(best_edge + image * edges + edge, mask=edge < edges, other=-float("inf"))
    partner = tl.load(best_partner + image * edges + edge, mask=edge < edges, other=0)
    _write_map(best, partner, assign, image, tokens, r, first_odd, HELD, BLOCK)
