"""Fused attention however its heads stand: none, folded into the batch, in groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import functional
import pytest
import torch
import torch.nn.functional as F
from depth import at_hand
from encoders import Attention, Encoder, duplicates, make, near, pixels, with_zero_positions
from torch import Tensor, nn
from zoo import relative_error

import tomepass
from tomepass import Prune, ToMe, TomeBackend
from tomepass.planning.plan_graph import plan_graph
from tomepass.rewriting.sweep import rewrite

COUNTS = [9, 7]


class OneHead(Attention):
    """Queries, keys and values of three dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attended(self.q(x), self.k(x), self.v(x)))

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Biased(OneHead):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.position_table = nn.Parameter(2 * torch.randn(37, 37))

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.position_table[None])


class Folded(Attention):
    """Heads folded into the batch."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = (t.flatten(0, 1) for t in (q, k, v))
        return F.scaled_dot_product_attention(*parts, scale=0.5).view(q.shape)


class Grouped(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = (t.unsqueeze(1) for t in (q, k, v))
        return F.scaled_dot_product_attention(*parts).squeeze(1)


class Wide(OneHead):
    """Values of another width than keys."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.v, self.out = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)


FORMS = {form.__name__: form for form in (OneHead, Biased, Folded, Grouped, Wide)}


@torch.no_grad()
@pytest.mark.parametrize("name", FORMS)
def test_they_are_merged_and_lossless(name: str) -> None:
    model = with_zero_positions(make(blocks=[near(FORMS[name])] * 3, readout="dense"))
    x = duplicates(3)
    plain = model(x)
    merged = tomepass.apply(model, r=COUNTS, example_inputs=x)
    assert [block.tokens_out for block in merged.report(x).blocks] == [28, 21, 21]
    assert relative_error(merged(x), plain) < 1e-4
    unweighted = tomepass.apply(model, ToMe(COUNTS, prop_attn=False), example_inputs=x)
    assert relative_error(unweighted(x), plain) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", ["OneHead", "Folded"])
def test_merging_nothing_is_the_model_and_both_doors_agree(name: str) -> None:
    model, x = make(blocks=[near(FORMS[name])] * 2), pixels(3)
    assert torch.equal(tomepass.apply(model, r=0, example_inputs=x)(x), model(x))
    for method in (ToMe(COUNTS), Prune(COUNTS)):
        backend = TomeBackend(method, inner="eager")
        ours = tomepass.apply(model, method, example_inputs=x)(x)
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), ours)


class Padded(Encoder):
    """One head, and a dimension for it or none."""

    heads = False

    def forward(self, pixels: Tensor, keep: Tensor) -> Any:
        x, mask = self.embed(pixels), keep[:, None]
        mask = mask.unsqueeze(1) if self.heads else mask
        for block in self.blocks:
            y, one = block.norm1(x), block.attention
            parts = [one.q(y), one.k(y), one.v(y)]
            if self.heads:
                parts = [part.unsqueeze(1) for part in parts]
            y = F.scaled_dot_product_attention(*parts, attn_mask=mask)
            x = x + one.out(y.squeeze(1) if self.heads else y)
            x = x + block.mlp(block.norm2(x))
        return self.read(self.final(x))


class PaddedHeads(Padded):
    heads = True


@torch.no_grad()
def test_padding_without_heads_merges_with_padding_alone() -> None:
    x, keep = pixels(3), torch.ones(3, 37, dtype=torch.bool)
    keep[:, 31:] = False
    without, one = make(Padded, depth=3), make(PaddedHeads, depth=3)
    merged = [tomepass.apply(m, r=[4, 3], example_inputs=(x, keep)) for m in (without, one)]
    torch.testing.assert_close(merged[0](x, keep), merged[1](x, keep), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged[0](x, keep), merged[0](x, ~keep), atol=1e-2)


# ---- other layouts in memory -------------------------------------------------------------------


class Viewed(Attention):
    """A view behind attention, which one kernel's layout in memory lets pass."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(*self.heads(x)).transpose(1, 2).contiguous().view(x.shape))


@pytest.mark.parametrize("grad", [True, False])
def test_gradients_or_none_the_model_merges(grad: bool) -> None:
    """Without gradients ``contiguous`` does nothing behind flash attention: no node is left."""

    class Returning(Encoder):
        def forward(self, pixels: Tensor) -> Any:
            x = self.embed(pixels)
            for block in self.blocks:
                x = block(x)
            # Behind the last merge all tokens are there again, for an attention with a mask.
            q, k, v = self.blocks[0].attention.heads(x.roll(1, 1))
            y = F.scaled_dot_product_attention(q, k, v)
            return self.head(y.transpose(1, 2).contiguous().view(x.shape))

    model, x = make(Returning, blocks=[near(Viewed)] * 2, readout="dense"), pixels(2)
    with torch.set_grad_enabled(grad):
        merged = tomepass.apply(model, r=4, example_inputs=x)
        assert merged(x).shape == model(x).shape


def test_views_of_what_has_changed_take_any_layout() -> None:
    """Three projections are viewed as heads before the merge, three behind it."""
    block = functional.block
    graph = functional.captured(lambda x, valid, weight: block(block(x, weight), weight))
    module = rewrite(graph, plan_graph(graph, ToMe(2))).module
    aten = torch.ops.aten
    assert len(graph.graph.find_nodes(op="call_function", target=aten.view.default)) == 6
    assert len(module.graph.find_nodes(op="call_function", target=aten.view.default)) == 3


Reader = Callable[[Tensor], Tensor]
READERS: dict[str, Reader] = {
    "linear": lambda x: F.linear(x, torch.ones(16)),
    "linear of a matrix": lambda x: F.linear(x[:, 0], torch.ones(16)),
    "matmul": lambda x: x @ torch.ones(16),
    "mv": lambda x: torch.mv(x[:, 0], torch.ones(16)),
    "mv over all": lambda x: torch.mv(x.reshape(-1, 16), torch.ones(16)),
    "dot": lambda x: torch.dot(x[0, 0], torch.ones(16)),
    "outer": lambda x: torch.outer(x[:, 0, 0], torch.ones(4)),
    "inner": lambda x: torch.inner(x, torch.ones(16)),
    "einsum": lambda x: torch.einsum("bnc,c->bn", x, torch.ones(16)),
    "einsum over tokens": lambda x: torch.einsum("bnc,n->bc", x, torch.ones(37)),
    "einsum of rows": lambda x: torch.einsum("bnc,nc->bn", x, torch.ones(37, 16)),
    "a matrix a token": lambda x: x[:, :, None] @ torch.ones(37, 16, 4),
    "tensordot": lambda x: torch.tensordot(x, torch.ones(16), dims=1),
    "bilinear": lambda x: F.bilinear(x, x, torch.ones(2, 16, 16)),
    "norm of vectors": lambda x: x.norm(dim=-1),
}


@torch.no_grad()
@pytest.mark.parametrize(
    "reader", at_hand(READERS, ["linear of a matrix", "bilinear", *[*READERS][::2]])
)
def test_products_with_vectors_read_tokens(reader: str) -> None:
    """Each merges, and what it reads is what it would have read unmerged, up to the merge."""

    class Read(Encoder):
        def read(self, x: Tensor) -> Any:
            return READERS[reader](x)

    model, x = with_zero_positions(make(Read, depth=2)), duplicates(2)
    merged = tomepass.apply(model, r=[9, 7], example_inputs=x)
    assert [block.tokens_out for block in merged.report(x).blocks] == [28, 21]
    assert relative_error(merged(x), model(x)) < 1e-4
