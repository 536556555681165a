"""The first door: ``apply`` wraps a model; the wrapper runs rewritten graphs of it."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from tomepass.attention_paths import take_fastest_attention
from tomepass.capture import Capture, capture_module
from tomepass.errors import TomeError, no_foreign_errors
from tomepass.examples import example_inputs as inputs_from_config
from tomepass.graphs import copied, only_outputs
from tomepass.kept import Counting, KeptReport
from tomepass.kernels.choose import on_cuda, take_kernels
from tomepass.methods import Method, RLike, ToMe, resolve_method
from tomepass.parallel import refuse_sharded
from tomepass.planning import PlannedStream, plan_graph
from tomepass.report import Report, make_report
from tomepass.rewrite import Rewritten, rewrite

OnUnmatched = Literal["raise", "warn"]
Outputs = Literal["original", "merged"]

# What the applied module shares with the model, and what is made anew when it is unpickled.
SHARED = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")
_SETTINGS = ("original", "method", "on_unmatched", "outputs")
_REMADE = {*SHARED, *_SETTINGS, "_captures", "_names", "_optional", "_compiled_call_impl"}


@no_foreign_errors("apply itself to the model")
def apply(
    model: nn.Module,
    method: Method | None = None,
    *,
    r: RLike | None = None,
    example_inputs: Any = None,
    on_unmatched: OnUnmatched = "raise",
    outputs: Outputs = "original",
) -> Any:
    """A module that computes what ``model`` computes, with redundant tokens merged.

    The model itself is not changed; its parameters are shared, as with ``torch.compile``.

    Args:
        model: any encoder; HuggingFace vision and audio models need nothing more.
        method: what to do, for example ``ToMe(r=8)``. Default ``ToMe()``, r=16.
        r: short for ``method=ToMe(r=r)``.
        example_inputs: a tensor, a tuple or a dict of inputs to capture ahead. Default: made
            from ``model.config`` where that says enough, else captured on first use.
        on_unmatched: ``"raise"`` a TomeError on a model that cannot be merged, or ``"warn"`` and
            run it unmerged.
        outputs: ``"original"`` returns token sequences unmerged, at their original length;
            ``"merged"`` returns the short ones.

    Returns:
        a :class:`MergedModel`; an :class:`tomepass.adaptive.AdaptiveModel` where the method is
        adaptive.

    Raises:
        TomeError: if the model cannot be merged exactly, with block, node, source line, reason.
        TypeError, ValueError: on a wrong ``r``, or ``method`` and ``r`` both given.
    """
    method = resolve_method(method, r)
    check_choices(on_unmatched, outputs)
    if isinstance(model, MergedModel):
        raise TomeError(
            f"the model is already merged with {model.method!r}",
            advice="apply tomepass to the original model",
        )
    check_model(model)
    if method.adaptive is not False:
        from tomepass.adaptive import make_adaptive

        return make_adaptive(model, method, example_inputs, on_unmatched, outputs)
    merged = _rebuild(model, method, on_unmatched, outputs)
    if example_inputs is not None:
        merged.prepare(example_inputs)
    else:
        try:
            inputs = inputs_from_config(model)
        except TomeError:
            return merged  # captured on first use
        merged.prepare(inputs)
    return merged


@no_foreign_errors("explain the model")
def explain(
    model: nn.Module,
    method: Method | None = None,
    *,
    r: RLike | None = None,
    example_inputs: Any = None,
    on_unmatched: OnUnmatched = "raise",
    outputs: Outputs = "original",
) -> Report:
    """What would be merged, why not the rest, and what it saves. Takes what :func:`apply` takes.

    Never raises on a mismatch: the report holds it. An applied module is explained as it is
    unless another method is given.

    Raises:
        TomeError: if torch.export cannot capture the model, or if there are no example inputs
            and the config does not say what to make, or if the method or model is adaptive.
        TypeError, ValueError: on a wrong ``r``, or ``method`` and ``r`` both given.
    """
    if isinstance(model, MergedModel):
        method = model.method if method is None and r is None else method
        model = model.original
    method = resolve_method(method, r)
    check_choices(on_unmatched, outputs)
    check_model(model)
    check_one_graph(method, "explain")
    inputs = inputs_from_config(model) if example_inputs is None else example_inputs
    call = _rebuild(model, method, on_unmatched, outputs).bind(inputs)
    return _analyse(model, method, call, outputs).report


class MergedModel(nn.Module):
    """A model with merging applied; see :func:`apply`, which makes it.

    It shares the parameters, buffers and submodules of the model, so ``state_dict()``,
    ``to()``, ``train()`` and the rest act on both. What it adds lives beside them: one
    rewritten graph for each call signature, resolution, dtype and mode.
    """

    original: nn.Module
    method: Method
    on_unmatched: OnUnmatched
    outputs: Outputs
    _captures: dict[tuple[Any, ...], Applied]
    _names: tuple[str, ...]
    _optional: frozenset[str]

    def __init__(
        self, model: nn.Module, method: Method, on_unmatched: OnUnmatched, outputs: Outputs
    ) -> None:
        super().__init__()
        # The very dictionaries of the model: one module tree, seen through two objects.
        self.__dict__.update({name: model.__dict__[name] for name in SHARED})
        names, optional = _inputs_of(model)
        # Past nn.Module's own __setattr__, which would make the model a child.
        self.__dict__.update(
            original=model,
            method=method,
            on_unmatched=on_unmatched,
            outputs=outputs,
            _captures={},
            _names=names,
            _optional=optional,
        )

    # ---- running ---------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own outputs for the model's own inputs, at any batch size."""
        call = self._bind(args, kwargs)
        applied = self._applied(call)
        if applied.graph is None:
            return self.original(**call)
        return applied.run(self.original, pytree.tree_leaves(call))

    def prepare(self, inputs: Any) -> MergedModel:
        """Captures and rewrites ahead of the first call with inputs like these.

        Args:
            inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.

        Returns:
            itself.
        """
        self.captured(inputs)
        return self

    def source(self, *args: Any, **kwargs: Any) -> Tensor:
        """The final token of every original token: ``[B, N]`` indices into the merged sequence.

        Takes the model's inputs; needs ``trace_source=True`` in the method.
        """
        if not self.method.trace_source:
            raise TomeError(
                "the source map is not traced",
                advice=f"apply with {self.method.replace(trace_source=True)!r}",
            )
        call = self._bind(args, kwargs)
        applied = self._applied(call)
        if applied.graph is None:
            raise TomeError("this model is left unmerged, so there is no source map")
        leaves = pytree.tree_leaves(call)
        if applied.source_graph is not None:
            (source,) = applied.run(self.original, leaves, graph=applied.source_graph)
            return source  # type: ignore[no-any-return]
        first, stream = _first_tensor(call), applied.report.streams[0]
        assert first is not None
        assert not any(block.r for block in stream.blocks), "merges without a source map"
        # Nothing merges: every token is its own.
        return torch.arange(stream.tokens, device=first.device).expand(first.shape[0], -1)

    def kept(self, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens in use after each block of the first stream, for each image: ``[B, blocks]``.

        Takes the model's inputs. Padding and places out of use do not count.

        Raises:
            TomeError: if the model is left unmerged.
        """
        call = self._bind(args, kwargs)
        applied = self._applied(call)
        if applied.graph is None:
            raise TomeError("this model is left unmerged, so no block loses a token")
        state = read_state(self.original, applied.capture)
        return applied.counting.counts(state, pytree.tree_leaves(call))

    def kept_report(self, inputs: Any) -> KeptReport:
        """The distribution of :meth:`kept` over the images of inputs like those it takes."""
        call = self.bind(inputs)
        kept = self.kept(**call)
        (stream, *_) = self._applied(call).report.streams
        return KeptReport.of(type(self.original).__name__, self.method, stream, kept)

    def report(self, inputs: Any) -> Report:
        """What was read off the graph for inputs like these, and done."""
        return self.captured(inputs).report

    def captured(self, inputs: Any) -> Applied:
        """The rewritten graph for inputs like these, made if it is not there yet."""
        return self._applied(self.bind(inputs))

    def bind(self, inputs: Any) -> dict[str, Any]:
        """Inputs in the shapes :meth:`prepare` takes them, as keyword inputs of the model."""
        return self._bind(*_as_call(inputs))

    def _applied(self, call: dict[str, Any]) -> Applied:
        signature = self._signature(call)
        if signature not in self._captures:
            if torch.compiler.is_compiling():
                _refuse_to_capture()
            self._captures[signature] = make_applied(
                self.original, self.method, call, self.on_unmatched, self.outputs
            )
        return self._captures[signature]

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Positional and keyword inputs as keywords, in the order of the model's signature."""
        names = self._names
        if len(args) > len(names):
            raise TypeError(
                f"{type(self.original).__name__} takes at most {len(names)} positional inputs, "
                f"got {len(args)}"
            )
        given = dict(zip(names, args, strict=False))
        for name in kwargs:
            if name in given:
                raise TypeError(f"input {name!r} was given twice, by position and by name")
        given.update(kwargs)
        ordered = {name: given.pop(name) for name in names if name in given}
        ordered.update((name, given[name]) for name in sorted(given))
        # An optional input left out or given as None is one call.
        optional = self._optional
        return {n: v for n, v in ordered.items() if not (v is None and n in optional)}

    def _signature(self, call: dict[str, Any]) -> tuple[Any, ...]:
        model, first = self.original, _first_tensor(call)
        state = next(model.parameters(), None)
        batch = 0 if first is None else first.shape[0]
        return (
            # A part may be in another mode than the whole: a frozen backbone in eval.
            tuple(module.training for module in model.modules()),
            None if state is None else (state.dtype, _device(state)),
            tuple((name, _shape_of(value, batch)) for name, value in call.items()),
        )

    # ---- being the model -------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "original" or name.startswith("__"):
                raise
            return getattr(self.original, name)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Captures are made again where they are needed. The user's hooks and attributes go along.
        settings = tuple(self.__dict__[name] for name in _SETTINGS)
        return _rebuild, settings, {n: v for n, v in self.__dict__.items() if n not in _REMADE}

    @property
    def training(self) -> bool:
        """The model's mode: there is one."""
        return self.original.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "original" in self.__dict__:  # nn.Module.__init__ sets it before there is a model
            self.original.training = mode

    def _apply(self, fn: Any, recurse: bool = True) -> MergedModel:
        self.original._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def train(self, mode: bool = True) -> MergedModel:
        """Sets training mode, of the model too."""
        self.original.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        return self.original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        return self.original.load_state_dict(*args, **kwargs)

    def save_pretrained(self, directory: Any, **options: Any) -> Any:
        """Saves the model as usual, and beside it ``tomepass.json``: :func:`tomepass.load` reads
        both.

        Raises:
            TomeError: if the model has no ``save_pretrained`` of its own.
        """
        from tomepass.saving import save

        return save(self.original, self.method, self.outputs, directory, **options)

    def push_to_hub(self, *args: Any, **options: Any) -> NoReturn:
        """Raises a TomeError that says how else: the model's own would leave the method behind."""
        from tomepass.saving import refuse_to_push

        refuse_to_push()

    def extra_repr(self) -> str:
        return f"merged by tomepass with {self.method!r}"


@dataclass(frozen=True)
class Applied:
    """A model rewritten for one call signature.

    Args:
        capture: the graph as captured and where its state comes from.
        rewritten: the rewritten graph, None where the model is left as it is.
        source_graph: the same, returning the source map alone.
        report: what was found and done.
        on_device: the graph with kernels for its device, where there are some that run anywhere
            but in an exported program.
    """

    capture: Capture
    rewritten: Rewritten | None
    source_graph: fx.GraphModule | None
    report: Report
    on_device: fx.GraphModule | None = None

    @property
    def graph(self) -> fx.GraphModule | None:
        """The graph in composite operators, which is what is exported."""
        return None if self.rewritten is None else self.rewritten.module

    @functools.cached_property
    def counting(self) -> Counting:
        """A graph that counts tokens, made when it is asked for."""
        return Counting.of(self.capture, self.report.method)

    def run(
        self, model: nn.Module, leaves: Iterable[Any], graph: fx.GraphModule | None = None
    ) -> Any:
        """Runs a graph on the model's current parameters; the model's graph by default."""
        values = [*read_state(model, self.capture), *leaves]
        if graph is not None:
            return graph(*values)
        own = self.graph
        # Dynamo of torch 2.11 takes `is_exporting()` for true whatever it compiles for.
        if self.on_device is not None and not torch.compiler._is_exporting_flag:
            own = self.on_device
        assert own is not None
        return pytree.tree_unflatten(list(own(*values)), self.capture.out_spec)


@no_foreign_errors("merge the model for these inputs")
def make_applied(
    model: nn.Module,
    method: Method,
    call: dict[str, Any],
    on_unmatched: OnUnmatched = "raise",
    outputs: Outputs = "original",
) -> Applied:
    """Captures, plans and rewrites a model for keyword inputs like ``call``.

    Raises:
        TomeError: if it cannot be captured, or is refused and ``on_unmatched`` is ``"raise"``.
    """
    applied = _analyse(model, method, call, outputs)
    if applied.graph is None:
        refusal = applied.report.refusal()
        if on_unmatched == "raise":
            raise refusal
        warnings.warn(f"left unmerged: {refusal}", stacklevel=4)
    return applied


def _analyse(model: nn.Module, method: Method, call: dict[str, Any], outputs: Outputs) -> Applied:
    return apply_capture(model, capture_module(model, call), method, outputs)


def apply_capture(
    model: nn.Module, capture: Capture, method: Method, outputs: Outputs = "original"
) -> Applied:
    """Plans and rewrites a captured model; what is refused, the report says."""
    planned = plan_graph(capture.graph, method)
    rewritten, refused = None, None
    if planned.streams:
        try:
            rewritten = rewrite(capture.graph, planned, outputs=outputs)
        except TomeError as error:
            refused = error
    report = make_report(type(model).__name__, capture.graph, planned, rewritten, refused)
    if rewritten is not None:
        paths = take_fastest_attention(rewritten.module, capture.graph.fake_mode)
        report = replace(report, paths=paths)
    on_device = None
    if rewritten is not None and on_cuda(rewritten.module):
        on_device = copied(rewritten.module)
        taken = take_kernels(on_device)
        report = replace(report, kernels=taken.kernels, paths=taken.paths or report.paths)
    source_graph = None
    if method.trace_source and rewritten is not None and rewritten.source is not None:
        source_graph = only_outputs(rewritten.module, [rewritten.source])
    return Applied(capture, rewritten, source_graph, report, on_device)


def call_of(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Inputs in the shapes :meth:`MergedModel.prepare` takes them, as a model's keyword inputs."""
    return _rebuild(model, ToMe(0), "raise", "original").bind(inputs)


def read_streams(
    model: nn.Module, call: dict[str, Any]
) -> tuple[Capture, tuple[PlannedStream, ...]]:
    """A model as captured, and its streams of tokens, nothing reduced yet.

    Raises:
        TomeError: if it cannot be captured, or is refused.
    """
    capture = capture_module(model, call)
    streams = plan_graph(capture.graph, ToMe(0)).streams
    if not streams:
        raise apply_capture(model, capture, ToMe(0)).report.refusal()
    return capture, streams


def read_state(model: nn.Module, capture: Capture) -> list[Tensor]:
    """The parameters and buffers a capture needs, as the model holds them now."""
    return [path if isinstance(path, Tensor) else _attribute(model, path) for path in capture.state]


def _rebuild(
    model: nn.Module, method: Method, on_unmatched: OnUnmatched, outputs: Outputs
) -> MergedModel:
    cls: Any = type(model)
    return _class_like(cls)(model, method, on_unmatched, outputs)


@functools.cache
def _class_like(cls: type[Any]) -> type[MergedModel]:
    # HuggingFace pipelines look a model's class up by its name.
    return type(cls.__name__, (MergedModel,), {"__doc__": MergedModel.__doc__})


def _attribute(model: nn.Module, path: str) -> Tensor:
    value: Any = model
    for name in path.split("."):
        value = getattr(value, name)
    return value  # type: ignore[no-any-return]


def _inputs_of(model: nn.Module) -> tuple[tuple[str, ...], frozenset[str]]:
    """The names of the forward's inputs in order, and those whose default is None."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    names = tuple(p.name for p in parameters if p.kind in kinds)
    return names, frozenset(p.name for p in parameters if p.default is None)


def _first_tensor(call: dict[str, Any]) -> Tensor | None:
    """The input whose first dimension is the batch."""
    return next((v for v in pytree.tree_leaves(call) if isinstance(v, Tensor) and v.ndim), None)


def _shape_of(value: Any, batch: int) -> Any:
    """What a capture depends on in an input: all but the batch size and the tensor's values."""
    if isinstance(value, Tensor):
        batched = value.ndim > 0 and value.shape[0] == batch
        sizes = value.shape[1:] if batched else value.shape
        return (batched, tuple(int(s) for s in sizes), value.dtype, _device(value))
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *(_shape_of(v, batch) for v in value))
    if isinstance(value, dict):
        return ("dict", *((name, _shape_of(v, batch)) for name, v in value.items()))
    return repr(value)


def _device(tensor: Tensor) -> tuple[str, int | None]:
    return (tensor.device.type, tensor.device.index)


def _as_call(inputs: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    if isinstance(inputs, Mapping):
        return (), inputs
    raise TypeError(
        "inputs must be a tensor, a tuple of positional inputs or a dict of keyword inputs, "
        f"got {type(inputs).__name__}"
    )


def check_model(model: object) -> None:
    """Refuses what is no module, what is compiled already, and what routes images to graphs."""
    from tomepass.adaptive import AdaptiveModel

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise TomeError(
            "the model is already compiled",
            advice="give the model itself, and compile what apply returns: "
            "torch.compile(tomepass.apply(model))",
        )
    if isinstance(model, AdaptiveModel):
        raise TomeError(
            f"the model is already merged with {model.method!r}, which routes images to several "
            "graphs",
            advice="give its .original, or one of its .budgets, which is a graph of its own",
        )
    refuse_sharded(model)


def check_one_graph(method: Method, door: str) -> None:
    """Refuses a method that makes several graphs, where a door is about one."""
    if method.adaptive is not False:
        raise TomeError(
            f"adaptive={method.adaptive!r} routes images to several graphs, {door} is about one",
            advice="give a method without adaptive=, or that of one budget: "
            "tomepass.apply(model, method, example_inputs=images).budgets[0].method",
        )


def check_choices(on_unmatched: object, outputs: object) -> None:
    """Refuses any other value of the two options that both doors have."""
    _one_of("on_unmatched", on_unmatched, ("raise", "warn"))
    _one_of("outputs", outputs, ("original", "merged"))


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


class _NotPreparedError(TomeError, AssertionError):
    """Dynamo raises an AssertionError as it is and wraps every other error."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _refuse_to_capture() -> None:
    """Raises while Dynamo traces, not when what it traced runs."""
    raise _NotPreparedError(
        "this call signature was not captured before compiling, and a capture inside a "
        "compiled region is impossible",
        advice="call merged.prepare(inputs) with inputs like these first",
    )
