"""What all methods share: schedules, keep rates, names; counts the papers publish."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from tomepass import EViT, Method, Prune, SPViT, ToFu, ToMe, TomeError
from tomepass.methods import method_from_dict
from tomepass.methods.base import KNOWN


def left(method: Method, tokens: int = 197, depth: int = 12) -> list[int]:
    return [block.tokens_out for block in method.plan(tokens, (0,), depth).blocks]


def gmacs(after: list[int], tokens: int = 197, width: int = 384, patch: int = 16) -> float:
    """Of a plain ViT that loses tokens between attention and MLP (ToMe, appendix)."""
    total, before = (tokens - 1) * width * 3 * patch**2 + width * 1000, tokens
    for count in after:
        total += 4 * before * width**2 + 2 * before**2 * width + 8 * count * width**2
        before = count
    return total / 1e9


def test_evit_keeps_what_its_paper_says() -> None:
    """DeiT-S at keep rate 0.7: 197, 140, 100, 72 tokens and 3.0 G."""
    after = left(EViT(keep_rate=0.7))
    assert after == [197] * 3 + [140] * 3 + [100] * 3 + [72] * 3
    assert gmacs(after) == pytest.approx(3.0, abs=0.1)
    assert left(EViT(keep_rate=0.7, fuse=False))[-1] == 1 + 68
    assert left(SPViT()) == after


def test_keep_rates_count_free_tokens_and_take_blocks() -> None:
    assert left(Prune(keep_rate=0.5, blocks=(1, 4)), 65, 6) == [65, 33, 33, 33, 17, 17]
    assert left(Prune(keep_rate=0.5), 65, 4) == [65, 33, 17, 9]
    assert left(Prune(keep_rate=1.0), 65, 4) == [65] * 4
    assert left(Prune(keep_rate=1e-6), 65, 4) == [65, 2, 2, 2]
    assert left(ToMe(keep_rate=0.3), 65, 4) == [65, 33, 17, 9]  # no more than half


def test_blocks_say_where_counts_go() -> None:
    assert ToMe(8, blocks=[5, 1]).counts(6) == (0, 8, 0, 0, 0, 8)
    with pytest.raises(ValueError, match=r"blocks=\(9,\) names \[9\], the model has 6 blocks"):
        ToMe(8, blocks=(9,)).counts(6)


def test_a_rate_takes_the_place_of_counts_and_stands_in_the_text() -> None:
    method = Prune(8).replace(keep_rate=0.7)
    assert repr(method) == "Prune(keep_rate=0.7)"
    assert method_from_dict(method.to_dict()) == method
    with pytest.raises(ValueError, match="keep_rate is the share to keep"):
        Prune(keep_rate=1.2)
    with pytest.raises(TypeError, match="got r and keep_rate"):
        Prune(8, keep_rate=0.7)


def test_strategies_must_fit_the_depth() -> None:
    method = ToFu(4, strategies=("prune", "merge"))
    assert [method.strategy(i, 2) for i in range(2)] == ["prune", "merge"]
    with pytest.raises(ValueError, match="2 strategies were given and the model has 3 blocks"):
        method.strategy(0, 3)
    with pytest.raises(ValueError, match="strategies must be 'halves'"):
        ToFu(4, strategies=("drop",))  # type: ignore[arg-type]


def test_a_name_is_taken_once_and_not_inherited() -> None:
    @dataclass(frozen=True, repr=False, kw_only=True)
    class Gentle(ToMe):
        """ToMe under no name of its own."""

    assert KNOWN["tome"] is ToMe
    assert type(method_from_dict(Gentle(8).to_dict())) is ToMe
    with pytest.raises(TypeError, match="a method named 'tome' is there already"):

        class Other(Method):
            name: ClassVar[str] = "tome"


def test_a_method_without_a_graph_step_says_so() -> None:
    with pytest.raises(NotImplementedError, match="Method does not say how"):
        Method(4).reduce(None)  # type: ignore[arg-type]
    with pytest.raises(TomeError, match="unknown method 'nobody'"):
        method_from_dict({"method": "nobody"})
