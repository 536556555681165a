"""Int8 and merging together: what quantisation changes, unmerged and merged, and what it saves.

    python -m benchmarks quantization --model DIR --images DIR --r 8 16

torchao quantises the model before ``apply`` and Inductor compiles it; NNCF quantises what OpenVINO
read from the export, on images of their own. An error is that of the quantised logits against the
float32 ones of the same form, as a norm over a norm: merged against merged, where int8 also sends
tokens elsewhere than float32 does; "same tokens merged" is the error, eagerly, of the int8 model
that merges what the float32 one does. What that is worth the divergences say, all of them from the
float32 unmerged model: of the merged one in float32, and of the merged one in int8. Merged tokens
are counted in a run of the int8 model.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
import typer
from torch import Tensor, nn

import tomepass
from benchmarks.cpu.throughput import SIZES, make_model
from benchmarks.results import OUT, Results, bars, cell
from tomepass import ToMe, TomeError
from tomepass.capture.captured import read_state
from tomepass.cli.options import errors_told, parse_r
from tomepass.formats.exporting import export_unmerged
from tomepass.handover.merged import MergedModel
from tomepass.measuring.turns import medians_in_turns
from tomepass.ops.choices import CHOICES
from tomepass.proof.replay import Recorder, replayed
from tomepass.sources.examples import example_inputs
from tomepass.sources.extras import import_extra
from tomepass.sources.images import load_images

Run = Callable[[Tensor], Tensor]


class Form(NamedTuple):
    """A model as it is timed.

    Args:
        run: images to logits.
        merged: the same, eagerly and not compiled; None where it is none of PyTorch's or unmerged.
        counted: tokens merged of each image, as :func:`merged_tokens` has them; None if unmerged.
    """

    run: Run
    merged: MergedModel | None = None
    counted: Callable[[Tensor], Tensor] | None = None


Make = Callable[[nn.Module, list[ToMe], Tensor], list[Form]]

COLUMNS = {
    "int8": cell("int8"),
    "r": cell("r"),
    "error unmerged": cell("error unmerged", "{:.4f}"),
    "error merged": cell("error merged", "{:.4f}"),
    "same tokens merged": lambda row: _figure(row["error same tokens"]),
    "KL merged, float32": cell("KL float32", "{:.4f}"),
    "KL merged, int8": cell("KL int8", "{:.4f}"),
    "merged tokens": cell("merged tokens"),
    "ms unmerged": cell("ms unmerged", "{:.1f}"),
    "ms merged": cell("ms merged", "{:.1f}"),
    "speed-up": cell("speed-up", "{:.2f}x"),
}


def main(
    model: Annotated[str, typer.Option(help=f"{', '.join(SIZES)}, or a directory.")] = "vit_tiny",
    images: Annotated[Path | None, typer.Option(help="Real images; else random input.")] = None,
    r: Annotated[list[str] | None, typer.Option(help="Several. Default 8 16.")] = None,
    how: Annotated[
        list[str] | None, typer.Option(help="float32, weights, dynamic, nncf. Default: all.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images a timed call.")] = 8,
    count: Annotated[int, typer.Option(min=8, help="Images for the errors.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Of every runtime.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = OUT,
) -> None:
    """Print a row for each way to quantise and each r."""
    torch.set_num_threads(threads)
    with errors_told(ImportError):
        subject = make_model(model)
        x = _images(subject, model, images, 2 * count)
        methods = {text: ToMe(parse_r(text)) for text in r or ("8", "16")}
        rows = []
        for name in how or MAKERS:
            if name not in MAKERS:
                raise TomeError(f"no {name!r}", advice=f"one of {', '.join(MAKERS)}")
            found = _rows(subject, name, [*methods.values()], x, batch, rounds)
            rows += [{"int8": name, "r": text} | row for text, row in zip(methods, found)]  # noqa: B905
    label = Path(model).expanduser().name
    Results(
        name="quantization",
        title=f"{label}, batch {batch}, int8",
        columns=COLUMNS,
        rows=rows,
        settings={"model": label, "batch": batch, "images": len(x) // 2, "threads": threads},
        plot=lambda axes, rows: bars(
            axes,
            [f"{row['int8']} r={row['r']}" for row in rows],
            {"speed-up": [row["speed-up"] for row in rows]},
        ),
    ).publish(out)


def _images(subject: nn.Module, model: str, folder: Path | None, count: int) -> Tensor:
    if folder is None:
        return example_inputs(subject, count)["pixel_values"]
    return load_images(subject, model, folder, limit=count).pixel_values


def _float32(subject: nn.Module, methods: list[ToMe], seen: Tensor) -> list[Form]:
    merged = [tomepass.apply(subject, method) for method in methods]
    counts = [functools.partial(merged_tokens, form) for form in merged]
    forms = [Form(_compiled(m), m, count) for m, count in zip(merged, counts, strict=True)]
    return [Form(_compiled(subject)), *forms]


def _torchao(config: str) -> Make:
    def make(subject: nn.Module, methods: list[ToMe], seen: Tensor) -> list[Form]:
        needed("torchao")
        from torchao import quantization

        quantised = copy.deepcopy(subject)
        quantization.quantize_(quantised, getattr(quantization, config)())
        return _float32(quantised, methods, seen)

    return make


def _nncf(subject: nn.Module, methods: list[ToMe], seen: Tensor) -> list[Form]:
    needed("nncf", "openvino")
    import nncf
    import openvino

    from tomepass.formats.openvino_ir import convert, token_products

    def form(program: torch.export.ExportedProgram) -> Form:
        dataset = nncf.Dataset([seen[i : i + 8].numpy() for i in range(0, len(seen), 8)])
        converted = convert(program)
        model = nncf.quantize(
            converted,
            dataset,
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=8,
            ignored_scope=nncf.IgnoredScope(names=token_products(converted)),
        )
        hints = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = openvino.Core().compile_model(model, "CPU", hints)
        return Form(
            lambda x: torch.from_numpy(compiled([x.numpy()])[0].copy()),
            counted=functools.partial(merged_by_openvino, model),
        )

    programs = [tomepass.export(subject, method) for method in methods]
    return [form(program) for program in (export_unmerged(subject), *programs)]


MAKERS: dict[str, Make] = {
    "float32": _float32,
    "weights": _torchao("Int8WeightOnlyConfig"),
    "dynamic": _torchao("Int8DynamicActivationInt8WeightConfig"),
    "nncf": _nncf,
}


def needed(*modules: str) -> None:
    """Raises a TomeError that names the extra where a module cannot be imported."""
    for module in modules:
        import_extra(module, "quantization", "int8")


def _compiled(model: nn.Module) -> Run:
    compiled: Any = torch.compile(model)
    return lambda x: compiled(pixel_values=x).logits


@torch.no_grad()
def _rows(
    subject: nn.Module, name: str, methods: list[ToMe], x: Tensor, batch: int, rounds: int
) -> list[dict[str, Any]]:
    """A row a method; the unmerged model is made, run and timed once for all of them."""
    torch._dynamo.reset()
    x, seen = x[: len(x) // 2], x[len(x) // 2 :]
    plain = [tomepass.apply(subject, method) for method in methods]
    exact = [_all(_logits(model), x, batch) for model in (subject, *plain)]
    forms = MAKERS[name](subject, methods, seen)
    found = [_all(form.run, x, batch) for form in forms]
    errors = [_error(a, b) for a, b in zip(found, exact, strict=True)]
    timed = [functools.partial(form.run, x[:batch]) for form in forms]
    before, *after = medians_in_turns(timed, rounds, 1)
    return [
        {
            "error unmerged": errors[0],
            "error merged": errors[i],
            "error same tokens": _error_replayed(forms[i].merged, plain[i - 1], exact[i], x, batch),
            "KL float32": _divergence(exact[i], exact[0]),
            "KL int8": _divergence(found[i], exact[0]),
            "KL int8 unmerged": _divergence(found[0], exact[0]),
            "merged tokens": _counted(forms[i], x[:batch]),
            "ms unmerged": before,
            "ms merged": after[i - 1],
            "speed-up": before / after[i - 1],
        }
        for i in range(1, len(forms))
    ]


@torch.no_grad()
def decisions(merged: MergedModel, x: Tensor) -> list[Tensor]:
    """Where every block of a run sends each token of each image, ``[B, N]`` each."""
    applied = merged.tome.captured({"pixel_values": x})
    assert applied.graph is not None
    recorder = Recorder(applied.graph, CHOICES)
    recorder.run(*read_state(merged.tome.original, applied.capture), x)
    return [leaf for call in recorder.calls for leaf in pytree.tree_leaves(call.result)]


@torch.no_grad()
def with_decisions(merged: MergedModel, x: Tensor, given: list[Tensor]) -> Tensor:
    """The logits of a model that merges what another run decided."""
    applied = merged.tome.captured({"pixel_values": x})
    assert applied.graph is not None
    state = read_state(merged.tome.original, applied.capture)
    logits: Tensor = pytree.tree_leaves(replayed(applied.graph)(*state, x, *given))[0]
    return logits


def merged_tokens(merged: MergedModel, x: Tensor) -> Tensor:
    """Tokens that share a place with others, counted in a run: ``[blocks, B]``."""
    return torch.stack([_lost(assign) for assign in decisions(merged, x)])


def merged_by_openvino(model: Any, x: Tensor) -> Tensor:
    """The same of an ``openvino.Model``: read off the weights that its merges multiply by.

    A row of ``[B, N', N]`` weights is a place, and a token goes where its column is not 0.
    """
    import openvino

    from tomepass.formats.openvino_ir import token_products

    seen, names = model.clone(), set(token_products(model))
    products = [node for node in seen.get_ordered_ops() if node.get_friendly_name() in names]
    before = len(seen.outputs)
    seen.add_outputs([node.input_value(0) for node in products])
    hints = {"INFERENCE_PRECISION_HINT": "f32"}
    found = openvino.Core().compile_model(seen, "CPU", hints)([x.numpy()])
    weights = [torch.from_numpy(found[i].copy()) for i in range(before, len(seen.outputs))]
    merges = [w for w in weights if _merging(w)]
    # Values and sizes of a block may be merged by the same weights, in several products.
    blocks = {w.shape[1:]: w for w in merges}.values()
    return torch.stack([_lost((w != 0).int().argmax(1)) for w in blocks])


def _merging(weights: Tensor) -> bool:
    """Does every row hold a mean, and every column one weight?"""
    if weights.ndim != 3 or not bool((weights >= 0).all()):
        return False
    means = torch.allclose(weights.sum(-1), torch.ones(weights.shape[:2]), atol=1e-4)
    return means and bool(((weights != 0).sum(1) == 1).all())


def _lost(assign: Tensor) -> Tensor:
    left = [len(image.unique()) for image in assign]
    return assign.shape[1] - torch.tensor(left)


def _counted(form: Form, x: Tensor) -> str:
    """Tokens merged of an image: one figure, or the least and the greatest."""
    assert form.counted is not None
    counts = form.counted(x).sum(0)
    least, greatest = int(counts.min()), int(counts.max())
    return str(least) if least == greatest else f"{least}-{greatest}"


def _error_replayed(
    small: MergedModel | None, plain: MergedModel, exact: Tensor, x: Tensor, batch: int
) -> float | None:
    """The error of an int8 model, with the tokens merged that the float32 model merges."""
    if small is None:
        return None
    same = _all(lambda part: with_decisions(small, part, decisions(plain, part)), x, batch)
    return _error(same, exact)


def _figure(error: float | None) -> str:
    return "" if error is None else f"{error:.4f}"


def _logits(model: nn.Module) -> Run:
    return lambda x: model(pixel_values=x).logits


def _all(run: Run, x: Tensor, batch: int) -> Tensor:
    """In batches of one size: another would be compiled for again."""
    whole = len(x) - len(x) % batch
    return torch.cat([run(x[i : i + batch]) for i in range(0, whole, batch)])


def _error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def _divergence(ours: Tensor, theirs: Tensor) -> float:
    """Mean ``KL(theirs || ours)``, in nats."""
    ours, theirs = (logits.double().log_softmax(-1) for logits in (ours, theirs))
    return float(F.kl_div(ours, theirs, log_target=True, reduction="batchmean"))
