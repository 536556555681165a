"""Triton kernels of merging and its way back: each token is read once and written once.

What is sent where is turned into a list of sources by place first (:func:`sources_kernel`): sums
then need no atomic addition, whose order changes from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _index(given, places):
    """Indices in 32 bits: -1 and ``places`` are what is below and above all there are."""
    return tl.minimum(tl.maximum(given, -1), places).to(tl.int32)


@triton.jit
def sources_kernel(assign, order, start, tokens, left, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """The tokens sorted by the place they are sent to, then by position; where each place starts.

    A token's place in this order is the number of tokens before it: counted, not sorted.
    """
    blocks = tl.cdiv(tl.maximum(tokens, left + 1), BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    here = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = assign + image * tokens
    mine = _index(tl.load(row + here, mask=here < tokens, other=0), left)
    before = tl.zeros([BLOCK], tl.int32)
    below = tl.zeros([BLOCK], tl.int32)
    for first in range(0, tokens, CHUNK):
        position = first + tl.arange(0, CHUNK)
        other = _index(tl.load(row + position, mask=position < tokens, other=left), left)
        other = tl.where(position < tokens, other, 0x7FFFFFFF)
        earlier = (other[None, :] == mine[:, None]) & (position[None, :] < here[:, None])
        earlier = earlier | (other[None, :] < mine[:, None])
        before += tl.sum(earlier.to(tl.int32), 1)
        below += tl.sum((other[None, :] < here[:, None]).to(tl.int32), 1)
    tl.store(order + image * tokens + before, here, mask=here < tokens)
    tl.store(start + image * (left + 1) + here, below, mask=here <= left)


@triton.jit
def merge_kernel(
    x,
    added,
    size,
    order,
    start,
    weight,
    bias,
    merged,
    merged_size,
    normed,
    mean,
    deviation,
    tokens,
    left,
    width,
    eps,
    x_image,
    x_row,
    added_image,
    added_row,
    ADDED: tl.constexpr,
    SIZED: tl.constexpr,
    MEAN: tl.constexpr,
    NORM: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program some places: the weighted mean (or sum) of what is sent there, and its LayerNorm.

    Most places have one source; the loop runs as often as the fullest of a program has.
    """
    blocks = tl.cdiv(left, ROWS)
    # 64 bits: a batch may hold more than 2^31 numbers.
    image = (tl.program_id(0) // blocks).to(tl.int64)
    place = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    there = place < left
    starts = start + image * (left + 1) + place
    # Whatever these say, nothing is read beside the image's own tokens.
    begin = tl.maximum(tl.load(starts, mask=there, other=0), 0)
    count = tl.minimum(tl.load(starts + 1, mask=there, other=0), tokens) - begin
    channel = tl.arange(0, BLOCK_C)
    inside = channel < width
    total = tl.zeros([ROWS], tl.float32)
    value = tl.zeros([ROWS, BLOCK_C], WIDE)
    for step in range(tl.max(count, 0)):
        on = step < count
        source = tl.load(order + image * tokens + begin + step, mask=on, other=0).to(tl.int64)
        source = tl.minimum(tl.maximum(source, 0), tokens - 1)
        if SIZED:
            share = tl.load(size + image * tokens + source, mask=on, other=0.0)
        else:
            share = on.to(tl.float32)
        wanted = on[:, None] & inside[None, :]
        at = x + image * x_image + source[:, None] * x_row + channel[None, :]
        token = tl.load(at, mask=wanted, other=0.0).to(WIDE)
        if ADDED:
            at = added + image * added_image + source[:, None] * added_row + channel[None, :]
            token += tl.load(at, mask=wanted, other=0.0).to(WIDE)
            # As a sum of its own would be rounded.
            token = token.to(merged.dtype.element_ty).to(WIDE)
        total += share
        if MEAN:
            # A mean that grows: a token by itself, and equal ones, stay as they are to the bit.
            # Sizes are compared, as a device's quotient of equal ones need not be 1.
            whole = tl.where(total > 0, total, 1.0)
            part = (share.to(WIDE) / whole.to(WIDE))[:, None]
            first = ((share == whole) & (whole < float("inf")))[:, None]
            grown = tl.where(first, token, value - (value - token) * part)
            value = tl.where(on[:, None], grown, value)
        else:
            value += token * share.to(WIDE)[:, None]
    made = value.to(merged.dtype.element_ty)
    row = (image * left + place)[:, None] * width + channel[None, :]
    kept = there[:, None] & inside[None, :]
    tl.store(merged + row, made, mask=kept)
    if MEAN:
        tl.store(merged_size + image * left + place, total, mask=there)
    if NORM:
        value = made.to(WIDE)
        middle = tl.sum(value, 1) / width
        apart = tl.where(inside[None, :], value - middle[:, None], 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(apart * apart, 1) / width + eps)
        gain = tl.load(weight + channel, mask=inside, other=0.0).to(WIDE)
        shift = tl.load(bias + channel, mask=inside, other=0.0).to(WIDE)
        result = apart * scale[:, None] * gain[None, :] + shift[None, :]
        tl.store(normed + row, result.to(normed.dtype.element_ty), mask=kept)
        tl.store(mean + image * left + place, middle, mask=there)
        tl.store(deviation + image * left + place, scale, mask=there)


@triton.jit
def gather_kernel(
    x,
    index,
    weight,
    result,
    tokens,
    places,
    width,
    x_image,
    x_row,
    WEIGHTED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program some tokens: each gets the value at its index, times a weight of its own."""
    blocks = tl.cdiv(tokens, ROWS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    there = token < tokens
    source = tl.load(index + image * tokens + token, mask=there, other=0).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    kept = there[:, None] & (channel < width)[None, :]
    at = x + image * x_image + source[:, None] * x_row + channel[None, :]
    # There is nothing to be had at what is no index: nothing else is read, and it shows.
    inside = (source >= 0) & (source < places)
    value = tl.load(at, mask=kept & inside[:, None], other=float("nan"))
    if WEIGHTED:
        share = tl.load(weight + image * tokens + token, mask=there, other=0.0).to(WIDE)
        value = value.to(WIDE) * share[:, None]
    row = (image * tokens + token)[:, None] * width + channel[None, :]
    tl.store(result + row, value.to(result.dtype.element_ty), mask=kept)
