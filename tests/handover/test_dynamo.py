"""What the backend says of a whole call: nothing merged, the last graph, a piece of a model."""

from __future__ import annotations

import dataclasses
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.config
import torch.distributed
from depth import at_hand
from encoders import GRID, PATCH, Attention, Block, Causal, Encoder, make, near, pixels
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.fsdp import fully_shard
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

import tomepass
from tomepass import ToMe, TomeBackend, TomeError

MATCH = torch.ops.tome.match.default
BACKEND = TomeBackend(ToMe(4), inner="eager")


def said(run: Callable[[], Any]) -> list[str]:
    """What the pass warned of while something ran."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    ours = ("nothing is merged", "Dynamo compiles for one function", "left unmerged")
    return [str(w.message) for w in caught if any(text in str(w.message) for text in ours)]


def refusal(run: Callable[[], Any]) -> str:
    """The TomeError that Dynamo wraps."""
    with pytest.raises(BackendCompilerFailed) as failed:
        run()
    assert isinstance(failed.value.inner_exception, TomeError)
    return str(failed.value)


def failing(compiled: Any, error: type[Exception]) -> None:
    """A call that must fail."""
    with pytest.raises(error):
        compiled(pixels())


# Nothing merged


class Convolutions(nn.Module):
    """No attention; ``broken`` puts a graph break in its middle."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.broken = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), broken

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        if self.broken:
            torch._dynamo.graph_break()
        return self.second(x).mean((2, 3))


class Broken(Encoder):
    """Graph breaks before and behind its blocks."""

    def read(self, x: Tensor) -> Any:
        torch._dynamo.graph_break()
        return super().read(x)


@pytest.mark.parametrize("broken", [False, True])
def test_a_model_without_attention_is_told_once(broken: bool) -> None:
    model = Convolutions(broken)
    compiled = torch.compile(model, backend=BACKEND)
    (told,) = said(lambda: compiled(pixels()))
    assert told.startswith("nothing is merged in Convolutions: no graph")
    assert said(lambda: compiled(pixels())) == []
    assert said(lambda: compiled(torch.ones(2, 3, 30, 30))) == [], "another graph of the same"
    assert BACKEND.reports(model) == ()


def test_a_compiled_function_is_told_by_its_name() -> None:
    def plain(x: Tensor) -> Tensor:
        return x.relu()

    (told,) = said(lambda: torch.compile(plain, backend=BACKEND)(pixels()))
    assert told.startswith("nothing is merged in plain")


def test_fragments_without_attention_beside_one_with_are_not_told() -> None:
    model = make(Broken)
    compiled = torch.compile(model, backend=BACKEND, dynamic=False)
    for batch in (2, 3):
        assert said(lambda batch=batch: compiled(pixels(batch))) == []  # type: ignore[misc]
    assert [report.ok for report in BACKEND.reports(compiled)] == [True, True]


def test_a_new_fragment_of_a_merged_model_is_not_told() -> None:
    """The graph with attention is there already, compiled for another object."""
    model = make(Broken)
    torch.compile(model, backend=BACKEND, dynamic=False)(pixels())
    model.head.double()  # Dynamo compiles what follows the break anew, and nothing else
    model.final.double()
    again = torch.compile(model, backend=BACKEND, dynamic=False)
    assert said(lambda: failing(again, RuntimeError)) == []


def test_a_call_that_fails_says_nothing_of_merging() -> None:
    def fails(x: Tensor) -> Tensor:
        x = x.relu()
        torch._dynamo.graph_break()
        raise ValueError(x.shape)

    compiled = torch.compile(fails, backend=BACKEND)
    assert said(lambda: failing(compiled, ValueError)) == []


def test_without_a_method_nothing_is_asked_for_and_nothing_told() -> None:
    compiled = torch.compile(Convolutions(), backend=TomeBackend(None, inner="eager"))
    assert said(lambda: compiled(pixels())) == []


# Reports


def test_reports_are_those_of_explain() -> None:
    model = make()
    compiled = torch.compile(model, backend=BACKEND)
    assert BACKEND.reports(compiled) == ()
    compiled(pixels())
    (report,) = BACKEND.reports(compiled)
    assert BACKEND.reports(model) == (report,)
    told = tomepass.explain(model, r=4, example_inputs=pixels())
    assert [b.tokens_out for b in report.blocks] == [b.tokens_out for b in told.blocks]
    assert (report.protected, report.macs) == (told.protected, told.macs)
    assert dataclasses.replace(BACKEND).reports(model) == (report,), "of equal backends"
    assert TomeBackend(ToMe(5), inner="eager").reports(model) == ()


def test_reports_tell_what_is_left_unmerged() -> None:
    model = make(blocks=[near(Causal)])
    backend = dataclasses.replace(BACKEND, on_unmatched="warn")
    assert len(said(lambda: torch.compile(model, backend=backend)(pixels()))) == 1
    (report,) = backend.reports(model)
    assert not report.ok
    assert "causal" in report.refused[0].reason


def test_reports_of_a_function_and_of_a_module_of_torchs_own() -> None:
    model = make()
    compiled = torch.compile(lambda x: model(x), backend=BACKEND)
    compiled(pixels())
    assert [r.ok for r in BACKEND.reports(compiled)] == [True]
    torch._dynamo.reset()
    chain = nn.Sequential(make())
    torch.compile(chain, backend=BACKEND)(pixels())
    assert [r.ok for r in BACKEND.reports(chain)] == [True]


@pytest.mark.deep
def test_reports_keep_no_model_alive() -> None:
    model = make()
    torch.compile(model, backend=BACKEND)(pixels())
    gone = weakref.ref(model)
    torch._dynamo.reset()
    del model
    gc.collect()
    assert gone() is None


# The last graph that Dynamo compiles


class AnySize(Encoder):
    """Takes images of any height; without positions."""

    def embed(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        return torch.cat([self.first.expand(x.shape[0], -1, -1), x], dim=1)


@pytest.fixture
def limit_of_two() -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=2):
        yield


@pytest.mark.usefixtures("limit_of_two")
def test_the_last_graph_that_dynamo_compiles_is_told() -> None:
    model = make(AnySize, depth=1)
    compiled = torch.compile(model, backend=BACKEND, dynamic=False)

    def at(rows: int) -> Tensor:
        return torch.ones(2, 3, rows * PATCH, GRID * PATCH)

    assert said(lambda: compiled(at(4))) == []
    (told,) = said(lambda: compiled(at(5)))
    assert told.startswith("this is graph 2 of 2 that Dynamo compiles for one function")
    assert "torch._dynamo.config.recompile_limit" in told
    # And that is what happens.
    x = torch.randn(2, 3, 6 * PATCH, GRID * PATCH)
    assert torch.equal(compiled(x), model(x))
    assert len(BACKEND.reports(model)) == 2


@pytest.mark.usefixtures("limit_of_two")
def test_where_nothing_merges_the_last_graph_is_not_told() -> None:
    compiled = torch.compile(Convolutions(), backend=BACKEND, dynamic=False)
    compiled(pixels())
    assert said(lambda: compiled(torch.ones(2, 3, 30, 30))) == []


# Attention that cannot be seen


class Flex(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v)


class Branches(Attention):
    """The branches of ``torch.cond`` hold attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attend = super().attend
        return torch.cond(q.sum() > 0, lambda q: attend(q, k, v), lambda q: attend(-q, k, v), (q,))


@torch.library.custom_op("tomepass_tests::my_attention", mutates_args=())
def my_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v)


my_attention.register_fake(lambda q, k, v: torch.empty_like(q))


class Foreign(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return my_attention(q, k, v)


class Internal(Attention):
    """PyTorch's own operator below the one everyone calls."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


HIDDEN = {
    "flex_attention": Flex,
    "cond": Branches,
    "my_attention": Foreign,
    "_scaled_dot_product_flash_attention_for_cpu": Internal,
}


@pytest.mark.parametrize("name", at_hand(HIDDEN, ["my_attention"]))
def test_attention_inside_an_operator_is_refused_by_the_operators_name(name: str) -> None:
    model = make(blocks=[near(HIDDEN[name])] * 2)
    with torch.no_grad():
        with pytest.raises(TomeError, match=f"computed inside .*{name}") as caught:
            tomepass.apply(model, r=4, example_inputs=pixels())
        assert "sdpa" in str(caught.value)
        assert f"{name}, where it cannot" in refusal(
            lambda: torch.compile(model, backend=BACKEND)(pixels())
        )


def test_an_operator_that_mixes_no_tokens_may_be_called_as_it_likes() -> None:
    model = make(MaskedByAnOperator)
    merged = tomepass.apply(model, r=4, example_inputs=pixels())(pixels())
    assert torch.allclose(torch.compile(model, backend=BACKEND)(pixels()), merged, atol=1e-6)


@torch.library.custom_op("tomepass_tests::attention_scale", mutates_args=())
def attention_scale(x: Tensor) -> Tensor:
    return x.mean((1, 2, 3), keepdim=True)


attention_scale.register_fake(lambda x: x.new_empty(x.shape[0], 1, 1, 1))


class MaskedByAnOperator(Encoder):
    """An operator with attention in its name, before there are tokens."""

    def embed(self, pixels: Tensor) -> Tensor:
        return super().embed(pixels * attention_scale(pixels))


# Regions


class Nested(Block):
    """Compiled once for all blocks."""

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_regions_compiled_once_are_merged() -> None:
    model, plain = make(blocks=[Nested] * 3), make(blocks=[Block] * 3)
    merged = tomepass.apply(plain, r=4, example_inputs=pixels())(pixels())
    got = torch.compile(model, backend=BACKEND)(pixels())
    assert torch.allclose(got, merged, atol=1e-6)
    assert not torch.allclose(got, model(pixels()), atol=1e-4)


class Checkpointed(Block):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class TwiceCheckpointed(Checkpointed):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize("block", at_hand([Checkpointed, TwiceCheckpointed], [Checkpointed]))
def test_checkpointed_blocks_merge_and_train(block: type[Block]) -> None:
    model, plain = make(blocks=[block] * 2), make(blocks=[Block] * 2)
    plain.load_state_dict(model.state_dict())
    got = torch.compile(model, backend=BACKEND)(pixels())
    wanted = tomepass.apply(plain, r=4, example_inputs=pixels())(pixels())
    assert torch.allclose(got, wanted, atol=1e-6)
    got.sum().backward()
    wanted.sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        if ours.grad is not None:
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_checkpointed_blocks_are_marked_to_be_computed_again() -> None:
    graphs = []

    def inner(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return gm

    model = make(blocks=[Checkpointed, Block, Checkpointed])
    torch.compile(model, backend=TomeBackend(ToMe(4), inner=inner))(pixels())
    marks: dict[Any, list[Any]] = {}
    for node in graphs[0].graph.nodes:
        mark = (node.meta.get("recompute"), node.meta.get("ac_graph_id"))
        marks.setdefault(node.target, []).append(mark)
    prefer, save = CheckpointPolicy.PREFER_RECOMPUTE, CheckpointPolicy.MUST_SAVE
    wanted = [(prefer, 0), (None, None), (prefer, 1)]
    assert marks[torch.ops.aten.scaled_dot_product_attention.default] == wanted
    assert marks[torch.ops.aten.gelu.default] == wanted
    # Computed again, a match might decide a tie otherwise.
    assert marks[MATCH] == [(save, 0), (None, None), (save, 1)]
    assert marks[torch.ops.tome.merge.default] == wanted


@pytest.mark.deep
def test_checkpointed_blocks_keep_as_little_as_unmerged_ones() -> None:
    """What AOTAutograd keeps between the forward and the backward."""

    def kept(block: type[Block], backend: Any) -> tuple[int, int]:
        torch._dynamo.reset()
        model, count, whole = make(blocks=[block] * 3), 0, 0
        compiled = torch.compile(model, backend=backend)
        compiled(pixels())  # compiling runs it too

        def pack(value: Tensor) -> Tensor:
            nonlocal count, whole
            owned = any(value.data_ptr() == p.data_ptr() for p in model.parameters())
            count += 0 if owned else value.numel()
            whole += value.dtype == torch.int64
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            compiled(pixels())
        return count, whole

    aot = "aot_eager_decomp_partition"
    merging = TomeBackend(ToMe(4), inner=aot)
    (all_kept, _), (unmerged, _) = kept(Block, merging), kept(Checkpointed, aot)
    merged, chosen = kept(Checkpointed, merging)
    assert merged < 0.5 * all_kept
    assert merged < 1.2 * unmerged
    assert chosen >= 2, "which tokens were chosen is kept"


def test_a_refused_checkpointed_model_keeps_its_regions() -> None:
    regions: list[bool] = []
    marks: list[fx.Node] = []

    def inner(gm: Any, inputs: Any) -> Any:
        # As they are handed over: torch 2.11 marks them itself when it runs them.
        regions.extend(str(n.target) == "tag_activation_checkpoint" for n in gm.graph.nodes)
        bodies = [m for m in gm.modules() if isinstance(m, fx.GraphModule) and m is not gm]
        marks.extend(n for m in bodies for n in m.graph.nodes if "recompute" in n.meta)
        return gm

    class CausalCheckpointed(Checkpointed):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.attention = Causal(width)

    backend = TomeBackend(ToMe(4), inner=inner, on_unmatched="warn")
    model = make(blocks=[CausalCheckpointed])
    with pytest.warns(UserWarning, match="causal"):
        torch.compile(model, backend=backend)(pixels())
    assert any(regions)
    assert marks == []


# What is an input


@pytest.mark.parametrize("as_parameter", [False, True])
def test_an_input_whose_address_is_static_is_still_an_input(as_parameter: bool) -> None:
    model, x = make(), pixels()
    wanted = tomepass.apply(model, r=4, example_inputs=x)(x)
    if as_parameter:
        x = nn.Parameter(x)
    else:
        torch._dynamo.mark_static_address(x)
    got = torch.compile(model, backend=BACKEND)(x)
    assert torch.allclose(got, wanted, atol=1e-6)
    (report,) = BACKEND.reports(model)
    assert report.protected == (0,)


class WithBuffer(Encoder):
    """Its class token is a buffer: a static input to Dynamo, and no input to us."""

    def __init__(self, **choices: Any) -> None:
        super().__init__(**choices)
        first = self.first.detach()
        del self.first
        self.register_buffer("first", first)


def test_a_buffer_is_no_input() -> None:
    model = make(WithBuffer)
    torch.compile(model, backend=BACKEND)(pixels())
    (report,) = BACKEND.reports(model)
    assert report.protected == (0,)


# A model spread over processes


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_ddps_buckets_are_named_and_the_advice_works() -> None:
    model = make(depth=3, width=160)  # more parameters than fit the first bucket
    wanted = tomepass.apply(model, r=4, example_inputs=pixels())(pixels())
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1)
    told = refusal(lambda: torch.compile(wrapped, backend=BACKEND)(pixels()))
    assert "DistributedDataParallel" in told
    assert "torch._dynamo.config.optimize_ddp = False" in told
    assert "graph break" not in told.split("While executing")[0]
    torch._dynamo.reset()
    with torch._dynamo.config.patch(optimize_ddp=False):
        got = torch.compile(wrapped, backend=BACKEND)(pixels())
    assert torch.allclose(got, wanted, atol=1e-6)


@pytest.mark.usefixtures("process_group")
def test_a_model_in_one_bucket_of_ddp_is_merged() -> None:
    model = make()
    wanted = tomepass.apply(model, r=4, example_inputs=pixels())(pixels())
    got = torch.compile(DistributedDataParallel(model), backend=BACKEND)(pixels())
    assert torch.allclose(got, wanted, atol=1e-6)


def shard(model: nn.Module, parts: Any = ()) -> Any:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for part in parts:
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.deep
@pytest.mark.usefixtures("process_group")
def test_a_sharded_model_is_named_and_the_advice_works() -> None:
    whole = make()
    wanted = tomepass.apply(whole, r=4, example_inputs=pixels())(pixels())
    model = make()
    sharded = shard(model, model.blocks)
    for entry in (tomepass.apply, tomepass.explain):
        with pytest.raises(TomeError, match=r"sharded by fully_shard \(FSDP2\)") as caught:
            entry(sharded, r=4, example_inputs=pixels())
        assert "fully_shard(tomepass.apply(model" in str(caught.value)
    told = refusal(lambda: torch.compile(sharded, backend=BACKEND)(pixels()))
    assert "sharded one by one by fully_shard (FSDP2)" in told
    # Both ways that are advised.
    torch._dynamo.reset()
    after = shard(tomepass.apply(make(), r=4, example_inputs=pixels()))
    compiled = torch.compile(shard(make()), backend=BACKEND)
    for ours in (after(pixels()), compiled(pixels())):
        assert torch.allclose(ours, wanted, atol=1e-6)
