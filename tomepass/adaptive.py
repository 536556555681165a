"""A budget for each image: the more redundant it is, the more tokens it loses."""

from __future__ import annotations

import dataclasses
from typing import Any, NoReturn

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from tomepass.capture import Capture
from tomepass.errors import TomeError
from tomepass.examples import example_inputs as inputs_from_config
from tomepass.graphs import only_outputs
from tomepass.methods import Method
from tomepass.module import (
    MergedModel,
    OnUnmatched,
    Outputs,
    call_of,
    read_state,
    read_streams,
)
from tomepass.planning import PlannedStream

BUDGETS = (0.85, 1.0, 1.15)
"""Shares of the method's counts, from the least redundant images to the most.

Divergence grows faster than the counts: budgets that lie farther apart lose more than routing
gains.
"""


def redundancy(x: Tensor, protected: tuple[int, ...]) -> Tensor:
    """How alike the tokens of an image are: the mean cosine with the most similar other token.

    Args:
        x: ``[B, N, C]``, as they enter the first block.
        protected: positions that do not count.

    Returns:
        ``[B]`` float32.
    """
    free = [i for i in range(x.shape[1]) if i not in set(protected)]
    metric = torch.nn.functional.normalize(x[:, free].float(), dim=-1)
    cosines = metric @ metric.transpose(1, 2)
    alone = torch.eye(len(free), dtype=torch.bool, device=x.device)
    return cosines.masked_fill(alone, -1.0).amax(-1).mean(-1)


class AdaptiveModel(nn.Module):
    """A model with a few budgets, and a router; :func:`tomepass.apply` makes it.

    Each image goes, by :func:`redundancy`, to one of the models in ``budgets``; the results come
    back in the order of the batch. An image's result does not depend on its neighbours.

    Args:
        model: in eval mode.
        method: with ``adaptive`` thresholds, as many as lie between the budgets, or True, which
            measures them: redundancies that split ``example_inputs`` evenly.
        example_inputs: as for :meth:`MergedModel.prepare`.
        outputs: ``"original"``: merged sequences of different lengths could not be put together.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        example_inputs: Any,
        on_unmatched: OnUnmatched = "raise",
        outputs: Outputs = "original",
    ) -> None:
        super().__init__()
        if outputs == "merged":
            raise ValueError(
                "outputs='merged' and adaptive=... make no sense together: images of one batch "
                "keep different numbers of tokens"
            )
        call = call_of(model, example_inputs)
        capture, (stream, *_) = read_streams(model, call)
        router = _router(model, capture, stream)
        if method.adaptive is True:
            method = method.replace(adaptive=_thresholds(router(call)))
        plain = method.replace(adaptive=False)
        scaled = [_scaled(plain, share, stream) for share in BUDGETS]
        # Past nn.Module's own __setattr__: the model is the user's, not a child of three parents.
        self.__dict__.update(
            original=model,
            method=method,
            budgets=tuple(MergedModel(model, each, on_unmatched, outputs) for each in scaled),
            _router=router,
        )
        for budget in self.budgets:
            budget.prepare(example_inputs)

    original: nn.Module
    method: Method
    budgets: tuple[MergedModel, ...]
    _router: _Router

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own outputs for the model's own inputs, at any batch size."""
        call = self.budgets[0]._bind(args, kwargs)
        routes = self.routes(**call)
        images = routes.shape[0]
        parts, places = [], []
        for number, budget in enumerate(self.budgets):
            mine = (routes == number).nonzero()[:, 0]
            if len(mine):
                places.append(mine)
                parts.append(budget(**{n: _rows(v, mine, images) for n, v in call.items()}))
        return _together(parts, torch.cat(places).argsort(), [len(p) for p in places])

    def routes(self, *args: Any, **kwargs: Any) -> Tensor:
        """The budget of each image, ``[B]`` int64. Takes the model's inputs."""
        call = self.budgets[0]._bind(args, kwargs)
        limits = torch.tensor(self.method.adaptive, dtype=torch.float32)
        found = self._router(call)
        return torch.bucketize(found, limits.to(found.device), right=True)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles each budget by ``torch.compile``, whose arguments it takes.

        Groups differ in size from batch to batch, so sizes are dynamic unless it is said otherwise.
        """
        kwargs.setdefault("dynamic", True)
        for budget in self.budgets:
            budget.compile(*args, **kwargs)

    def save_pretrained(self, directory: Any, **options: Any) -> Any:
        """Saves the model as usual, and beside it the method with its thresholds."""
        from tomepass.saving import save

        return save(self.original, self.method, "original", directory, **options)

    def push_to_hub(self, *args: Any, **options: Any) -> NoReturn:
        """Raises a TomeError that says how else: the model's own would leave the method behind."""
        from tomepass.saving import refuse_to_push

        refuse_to_push()

    def train(self, mode: bool = True) -> AdaptiveModel:
        """Sets training mode, of the model too."""
        self.original.train(mode)
        return self

    def parameters(self, recurse: bool = True) -> Any:
        """The model's."""
        return self.original.parameters(recurse)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        return self.original.state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "original" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.original, name)

    def extra_repr(self) -> str:
        return f"merged by tomepass with {self.method!r}"


def make_adaptive(
    model: nn.Module,
    method: Method,
    example_inputs: Any,
    on_unmatched: OnUnmatched,
    outputs: Outputs,
) -> AdaptiveModel:
    """The model behind ``apply(model, method)`` where the method is adaptive.

    Raises:
        TomeError: if there are no images to measure thresholds on, or none to capture with can be
            made from the config.
    """
    if example_inputs is None and method.adaptive is not True:
        example_inputs = inputs_from_config(model)
    if example_inputs is None:
        raise TomeError(
            f"{method!r} routes images by their redundancy, which is to be measured",
            advice="give example_inputs=: a batch of real images, 32 or more",
        )
    return AdaptiveModel(model, method, example_inputs, on_unmatched, outputs)


@dataclasses.dataclass(frozen=True, eq=False)
class _Router:
    """Works out the tokens that enter the first block, and how alike they are."""

    model: nn.Module
    capture: Capture
    graph: fx.GraphModule
    protected: tuple[int, ...]

    def __call__(self, call: dict[str, Any]) -> Tensor:
        values = [*read_state(self.model, self.capture), *pytree.tree_leaves(call)]
        with torch.no_grad():
            (x,) = self.graph(*values)
            return redundancy(x, self.protected)


def _router(model: nn.Module, capture: Capture, stream: PlannedStream) -> _Router:
    graph = only_outputs(capture.graph.module, [stream.stream.entry.name])
    return _Router(model, capture, graph, stream.plan.protected)


def _thresholds(found: Tensor) -> tuple[float, ...]:
    """Redundancies that split images evenly over the budgets, given theirs, ``[B]``."""
    if len(found) < len(BUDGETS):
        raise TomeError(
            f"adaptive=True splits images over {len(BUDGETS)} budgets by what it measures on "
            f"example_inputs, which hold {len(found)}",
            advice="give a batch of real images, 32 or more",
        )
    shares = torch.arange(1, len(BUDGETS), dtype=torch.float64) / len(BUDGETS)
    return tuple(found.double().quantile(shares.to(found.device)).tolist())


def _scaled(method: Method, share: float, stream: PlannedStream) -> Method:
    """A method that takes a share of its tokens in every block."""
    if method.schedule.kind == "keep_rate":
        rate = float(method.schedule.values[0])
        return method.replace(keep_rate=max(1 - (1 - rate) * share, 0.01))
    if method.schedule.macs is not None:
        return method.replace(macs=max(1 - (1 - method.schedule.macs) * share, 0.01))
    counts = method.counts(len(stream.plan.blocks))
    return method.replace(r=[round(count * share) for count in counts], blocks=None)


def _rows(value: Any, places: Tensor, images: int) -> Any:
    """An input, for some of the images."""

    def chosen(leaf: Any) -> Any:
        batched = isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == images
        return leaf[places] if batched else leaf

    return pytree.tree_map(chosen, value)


def _together(parts: list[Any], order: Tensor, lengths: list[int]) -> Any:
    """The outputs of several groups, in the order of the batch."""
    leaves, form = zip(*(pytree.tree_flatten(part) for part in parts), strict=True)
    joined: list[Any] = []
    for values in zip(*leaves, strict=True):
        batched = all(
            isinstance(value, Tensor) and value.ndim and value.shape[0] == length
            for value, length in zip(values, lengths, strict=True)
        )
        if not batched and any(value is not None for value in values):
            raise TomeError(
                "the model returns something that is not one entry an image, which cannot be put "
                "together from several budgets",
                advice="apply the method without adaptive=",
            )
        joined.append(torch.cat(values)[order] if batched else None)
    return pytree.tree_unflatten(joined, form[0])
