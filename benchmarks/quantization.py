"""Int8 and merging together: what quantisation changes, unmerged and merged, and what it saves.

    python -m benchmarks quantization --model DIR --images DIR --r 8 16

torchao quantises the model before ``apply`` and Inductor compiles it; NNCF quantises what OpenVINO
read from the export, on the same images. Each error is that of the quantised logits against the
float32 ones of the same form, as a norm over a norm: merged against merged.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import tomepass
from benchmarks.results import OUT, Results, bars, cell
from benchmarks.throughput import SIZES, make_model
from tomepass import ToMe, TomeError
from tomepass.examples import example_inputs
from tomepass.exporting import export_unmerged
from tomepass.loading import load_images
from tomepass.options import errors_told, parse_r
from tomepass.turns import medians_in_turns

Form = Callable[[Tensor], Tensor]
COLUMNS = {
    "int8": cell("int8"),
    "r": cell("r"),
    "error unmerged": cell("error unmerged", "{:.4f}"),
    "error merged": cell("error merged", "{:.4f}"),
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
        x = _images(subject, model, images, count)
        rows = []
        for name in how or MAKERS:
            if name not in MAKERS:
                raise TomeError(f"no {name!r}", advice=f"one of {', '.join(MAKERS)}")
            for text in r or ("8", "16"):
                rows.append(_row(subject, name, text, x, batch, rounds))
    label = Path(model).expanduser().name
    Results(
        name="quantization",
        title=f"{label}, batch {batch}, int8",
        columns=COLUMNS,
        rows=rows,
        settings={"model": label, "batch": batch, "images": len(x), "threads": threads},
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


def _float32(subject: nn.Module, method: ToMe, x: Tensor) -> tuple[Form, Form]:
    return _compiled(subject), _compiled(tomepass.apply(subject, method))


def _torchao(config: str) -> Callable[[nn.Module, ToMe, Tensor], tuple[Form, Form]]:
    def make(subject: nn.Module, method: ToMe, x: Tensor) -> tuple[Form, Form]:
        from torchao import quantization

        quantised = copy.deepcopy(subject)
        quantization.quantize_(quantised, getattr(quantization, config)())
        return _compiled(quantised), _compiled(tomepass.apply(quantised, method))

    return make


def _nncf(subject: nn.Module, method: ToMe, x: Tensor) -> tuple[Form, Form]:
    import nncf
    import openvino

    from tomepass.doors.openvino_ir import convert, token_products

    def form(program: torch.export.ExportedProgram) -> Form:
        dataset = nncf.Dataset([x[i : i + 8].numpy() for i in range(0, len(x), 8)])
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
        return lambda x: torch.from_numpy(compiled([x.numpy()])[0].copy())

    return form(export_unmerged(subject)), form(tomepass.export(subject, method))


MAKERS: dict[str, Callable[[nn.Module, ToMe, Tensor], tuple[Form, Form]]] = {
    "float32": _float32,
    "weights": _torchao("Int8WeightOnlyConfig"),
    "dynamic": _torchao("Int8DynamicActivationInt8WeightConfig"),
    "nncf": _nncf,
}


def _compiled(model: nn.Module) -> Form:
    compiled: Any = torch.compile(model)
    return lambda x: compiled(pixel_values=x).logits


def _row(
    subject: nn.Module, name: str, r: str, x: Tensor, batch: int, rounds: int
) -> dict[str, Any]:
    torch._dynamo.reset()
    method = ToMe(parse_r(r))
    plain = tomepass.apply(subject, method)
    forms = MAKERS[name](subject, method, x)
    with torch.no_grad():
        float32 = (subject(pixel_values=x).logits, plain(pixel_values=x).logits)
        errors = [_error(_all(form, x, batch), them) for form, them in zip(forms, float32)]  # noqa: B905
    timed = x[:batch]
    before, after = medians_in_turns([lambda: forms[0](timed), lambda: forms[1](timed)], rounds, 1)
    return {
        "int8": name,
        "r": r,
        "error unmerged": errors[0],
        "error merged": errors[1],
        "merged tokens": sum(block.r for block in plain.report({"pixel_values": x[:2]}).blocks),
        "ms unmerged": before,
        "ms merged": after,
        "speed-up": before / after,
    }


def _all(form: Form, x: Tensor, batch: int) -> Tensor:
    """In batches of one size: another would be compiled for again."""
    whole = len(x) - len(x) % batch
    return torch.cat([form(x[i : i + batch]) for i in range(0, whole, batch)])


def _error(ours: Tensor, theirs: Tensor) -> float:
    theirs = theirs[: len(ours)].double()
    return float((ours.double() - theirs).norm() / theirs.norm())
