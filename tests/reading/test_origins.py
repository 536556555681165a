"""Which tokens come from the input: read off the graph, wherever the others stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from encoders import PATCHES, Encoder, compiled, exported, make, pixels, report_on
from torch import Tensor, nn
from zoo import make_inputs

import tomepass
from tomepass import ToMe, TomeError
from tomepass.planning.plan_graph import plan_graph
from tomepass.reading.origins import position_terms
from tomepass.reading.structure import Ancestry


def protected(model: nn.Module, **inputs: Tensor) -> tuple[int, ...]:
    """What is found to be protected in an encoder."""
    return report_on(exported(model, inputs or {"pixels": pixels()}), ToMe(4)).protected


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 0, ()),
        (1, 0, (0,)),
        (3, 0, (0, 1, 2)),
        (0, 2, (36, 37)),
        (1, 2, (0, 37, 38)),
    ],
)
def test_tokens_of_the_models_own_are_protected_at_both_ends(
    start: int, end: int, expected: tuple[int, ...]
) -> None:
    assert protected(make(start=start, end=end, readout="mean")) == expected


def embedded(embed: Callable[[Encoder, Tensor], Tensor]) -> Encoder:
    """An encoder that puts its tokens together in another way."""

    class Other(Encoder):
        def embed(self, pixels: Tensor) -> Tensor:
            return embed(self, self.patches(pixels).flatten(2).transpose(1, 2))

    model: Encoder = make(Other, readout="mean", start=2, end=1)
    return model


def own(model: Encoder, x: Tensor) -> tuple[Tensor, Tensor]:
    batch = x.shape[0]
    return model.first.expand(batch, -1, -1), model.last.expand(batch, -1, -1)


def in_the_middle(model: Encoder, x: Tensor) -> Tensor:
    first, last = own(model, x)
    return torch.cat([x[:, :10], first, x[:, 10:], last], dim=1)


def one_after_the_other(model: Encoder, x: Tensor) -> Tensor:
    # As DINOv2 puts registers in: the class token first, then they go between.
    first, last = own(model, x)
    x = torch.cat([last, x], dim=1) + model.positions[:, 2:]
    return torch.cat([x[:, :1], first, x[:, 1:]], dim=1)


def cut_off(model: Encoder, x: Tensor) -> Tensor:
    first, last = own(model, x)
    return torch.cat([first, x, last], dim=1)[:, 1:]


def normalised(model: Encoder, x: Tensor) -> Tensor:
    first, last = own(model, x)
    x = model.final(torch.cat([first, x, last], dim=1) + model.positions)
    return nn.functional.dropout(x, 0.1, model.training).contiguous()


def channels_first(model: Encoder, x: Tensor) -> Tensor:
    first, last = own(model, x)
    return torch.cat([first.mT, x.mT, last.mT], dim=2).transpose(1, 2)


def beside_each_other(model: Encoder, x: Tensor) -> Tensor:
    # A cat along the channels: half of every token is the model's own, no token is.
    return torch.cat([x[..., :8], model.positions[:, :PATCHES, 8:].expand(x.shape[0], -1, -1)], -1)


@pytest.mark.parametrize(
    ("embed", "expected"),
    [
        (in_the_middle, (10, 11, 38)),
        (one_after_the_other, (0, 1, 2)),
        (cut_off, (0, 37)),
        (normalised, (0, 1, 38)),
        (channels_first, (0, 1, 38)),
        (beside_each_other, ()),
    ],
)
def test_protected_tokens_are_found_wherever_they_stand(
    embed: Callable[[Encoder, Tensor], Tensor], expected: tuple[int, ...]
) -> None:
    assert protected(embedded(embed)) == expected


def flipped(model: Encoder, x: Tensor) -> Tensor:
    return normalised(model, x).flip(1)


def shuffled(model: Encoder, x: Tensor) -> Tensor:
    return normalised(model, x)[:, torch.randperm(39)]


@pytest.mark.parametrize("embed", [flipped, shuffled])
def test_protected_tokens_that_may_have_moved_are_not_guessed(
    embed: Callable[[Encoder, Tensor], Tensor],
) -> None:
    model = embedded(embed)
    with pytest.raises(TomeError, match="which tokens are protected cannot be seen") as caught:
        tomepass.apply(model, r=4, example_inputs=pixels())
    assert "protected=" in str(caught.value.advice)
    given = tomepass.explain(model, ToMe(4, protected=(0, 37, 38)), example_inputs=pixels())
    assert given.protected == (0, 37, 38)


def test_patches_that_move_before_others_join_them_hide_nothing() -> None:
    def embed(model: Encoder, x: Tensor) -> Tensor:
        first, _ = own(model, x)
        return torch.cat([first, x.flip(1)], dim=1)

    assert protected(embedded(embed)) == (0, 1)


class OnTokens(Encoder):
    """Takes its tokens ready made."""

    def embed(self, pixels: Tensor) -> Tensor:
        return pixels


def test_all_tokens_of_an_exported_model_that_takes_tokens_come_from_the_input() -> None:
    model = make(OnTokens, readout="mean")
    assert protected(model, pixels=torch.randn(2, 20, 16)) == ()


def test_tokens_that_enter_a_compiled_graph_may_be_anything() -> None:
    model = make(OnTokens, readout="mean")
    graph = compiled(model, {"pixels": torch.randn(2, 20, 16)})
    (refused,) = report_on(graph, ToMe(4)).refused
    assert "starts inside the model" in refused.reason
    assert report_on(graph, ToMe(4, protected=(0,))).protected == (0,)
    assert report_on(graph, ToMe(4, protected=())).ok


def test_given_positions_override_what_is_found() -> None:
    report = tomepass.explain(make(), ToMe(4, protected=(5, 0, 36)), example_inputs=pixels())
    assert report.protected == (0, 5, 36)


def test_given_positions_outside_the_tokens_are_refused() -> None:
    with pytest.raises(TomeError, match=r"\[37\] lie outside the 37 tokens"):
        tomepass.apply(make(), ToMe(4, protected=(0, 37)), example_inputs=pixels())


# ---- position embeddings ---------------------------------------------------------------------


def terms(model: nn.Module, **inputs: Any) -> list[set[str]]:
    """For each thing found to be added by position, the parameters it is made of."""
    graph = exported(model, inputs or {"pixels": pixels()})
    (stream,) = plan_graph(graph, ToMe(4)).streams
    found = position_terms(stream.stream.entry, 1, graph.data)
    above = Ancestry(graph.graph)
    return [
        {n.name.removeprefix("p_model_") for n in {term} | above.of(term) if not n.args}
        for term in found
    ]


def test_what_is_added_by_position_is_found() -> None:
    assert terms(make()) == [{"positions"}]
    assert terms(embedded(normalised)) == [{"positions"}]
    assert terms(embedded(one_after_the_other)) == [{"positions"}]
    assert terms(embedded(in_the_middle)) == []


def test_position_embeddings_of_every_family_are_found(family: str, shared_models: Any) -> None:
    (found,) = terms(shared_models[family], **make_inputs(family))
    assert any("position" in name for name in found)


@pytest.mark.parametrize(("before", "after"), [(1, 0), (0, 2), (2, 1)])
def test_tokens_that_are_padded_on_are_the_models_own(before: int, after: int) -> None:
    def embed(model: Encoder, x: Tensor) -> Tensor:
        return nn.functional.pad(x, (0, 0, before, after))

    end = before + PATCHES
    expected = (*range(before), *range(end, end + after))
    assert protected(embedded(embed)) == expected
