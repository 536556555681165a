"""Images per second, a model against its merged form, both compiled alike.

Run it from the root of the repository; the figures in the README come from

    python -m benchmarks.throughput --model vit_base --r 8 13 16 --batch 16 --dtype bf16 --both

Named models have random weights: speed does not depend on them. Results go to a folder as
``throughput.json`` and ``throughput.png``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from tomepass import ToMe, TomeError
from tomepass.cli.bench import checked_device, option_sets, run_bench, write_bench
from tomepass.cli.options import MultiValueCommand, errors_told, parse_dtype, parse_r
from tomepass.sources.models import load_model

# Width, blocks, heads of a ViT/16 at 224 pixels.
SIZES = {
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=MultiValueCommand)
def main(
    model: Annotated[
        str, typer.Option(help=f"{', '.join(SIZES)}, or a model directory.")
    ] = "vit_base",
    r: Annotated[
        list[str] | None, typer.Option(help="Tokens merged a block; several. Default 8 13 16.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images a call.")] = 16,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    backend: Annotated[str, typer.Option(help="What compiles both.")] = "inductor",
    freezing: Annotated[
        bool, typer.Option(help="Inductor keeps weights as constants, for inference.")
    ] = False,
    both: Annotated[bool, typer.Option("--both", help="Without and with freezing.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 10,
    threads: Annotated[int | None, typer.Option(min=1, help="PyTorch's threads.")] = None,
    cold: Annotated[
        bool, typer.Option("--cold/--warm", help="Compile with empty caches, or as they are.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the JSON and the plot.")] = Path(
        "tomepass-bench"
    ),
) -> None:
    """Measure a model against its merged form, compiled by the same backend, at several r."""
    if threads is not None:
        torch.set_num_threads(threads)
    with errors_told():
        methods = [ToMe(parse_r(text)) for text in r or ("8", "13", "16")]
        options = option_sets(backend, freezing, both)
        place = {"device": checked_device(device), "dtype": parse_dtype(dtype)}
        subject = make_model(model, seed).to(**place)
        label = model if model in SIZES else Path(model).expanduser().resolve().name
        measured = run_bench(
            subject, label, methods, options, backend=backend, batch=batch, rounds=rounds, cold=cold
        )
    write_bench(measured, out)


def make_model(name: str, seed: int = 0, pixels: int = 224) -> nn.Module:
    """A ViT by name, with random weights, or the model in a directory; in eval mode.

    Args:
        pixels: a side of the images that a ViT by name takes.

    Raises:
        TomeError: if the name is neither.
    """
    if name in SIZES:
        return make_vit(*SIZES[name], pixels, seed)
    if not Path(name).expanduser().is_dir():
        raise TomeError(
            f"no model {name!r}", advice=f"one of {', '.join(SIZES)}, or a model directory"
        )
    return load_model(name)


def make_vit(width: int, blocks: int, heads: int, pixels: int, seed: int = 0) -> nn.Module:
    """A ViT/16 classifier with random weights, in eval mode."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=pixels,
        num_labels=1000,
    )
    made: nn.Module = ViTForImageClassification(config)
    return made.eval()


if __name__ == "__main__":
    app()
