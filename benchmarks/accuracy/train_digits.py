"""Train the digits model that ships in ``tomepass/digits``.

Run it from the root of the repository; it takes about six minutes on two CPU cores:

    python -m benchmarks.train_digits

Everything is seeded, so the same versions, thread count and kind of CPU give the same weights.
The weights kept are those of the last epoch: no checkpoint is selected on the test images.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from tomepass import digits

SPLIT_SEED = 0  # apart from the training seed: the held-out images never change

TEST_FRACTION = 0.2

WARMUP_FRACTION = 0.1

WEIGHT_DECAY = 0.05

LABEL_SMOOTHING = 0.1

GRADIENT_NORM = 1.0

MAX_DEGREES = 12.0

MAX_SCALING = 0.12

MAX_SHIFT = 0.12  # of the whole width: about one pixel of the original 8x8 image

MAX_NOISE = 0.15


class Split(NamedTuple):
    """Images ``[B, 8, 8]`` uint8 in 0..16 and their labels ``[B]`` int64."""

    images: Tensor
    labels: Tensor


def load_split() -> tuple[Split, Split]:
    """Return the fixed, stratified training (1437) and test (360) images."""
    data = load_digits()
    images = torch.from_numpy(data.images).to(torch.uint8)
    labels = torch.from_numpy(data.target).long()
    train, test = train_test_split(
        range(len(labels)),
        test_size=TEST_FRACTION,
        stratify=labels.numpy(),
        random_state=SPLIT_SEED,
    )
    return Split(images[train], labels[train]), Split(images[test], labels[test])


def build_model() -> ViTForImageClassification:
    """Return the untrained model: 8 pre-norm layers over 64 patches and a class token."""
    names = [str(digit) for digit in range(10)]
    config = ViTConfig(
        image_size=digits.IMAGE_SIZE,
        patch_size=4,
        num_channels=1,
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=3,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    return ViTForImageClassification(config)


def augment(pixels: Tensor) -> Tensor:
    """Rotate, scale and shift each of ``[B, 1, H, W]`` its own way, and add noise."""
    batch = len(pixels)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(batch) * 2.0 - 1.0) * limit

    angle = uniform(math.radians(MAX_DEGREES))
    scale = 1.0 + uniform(MAX_SCALING)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    # Sampling coordinates span [-1, 1], so a shift of one whole width is 2.
    rows = [cos, -sin, uniform(2 * MAX_SHIFT), sin, cos, uniform(2 * MAX_SHIFT)]
    affine = torch.stack(rows, dim=1).view(batch, 2, 3)
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    # grid_sample fills with 0, while paper is -1: move paper to 0 and back.
    moved = F.grid_sample(pixels + 1.0, grid, align_corners=False) - 1.0
    strength = torch.rand(batch, 1, 1, 1) * MAX_NOISE
    return moved + torch.randn_like(moved) * strength


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    warmup = max(1, round(steps * WARMUP_FRACTION))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def parameter_groups(model: torch.nn.Module) -> list[dict[str, object]]:
    """Decay the weight matrices only, not biases, norms, positions or the class token."""
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and "position" not in name and "cls_token" not in name
        (decayed if is_matrix else plain).append(parameter)
    return [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": plain, "weight_decay": 0.0},
    ]


def train(
    model: ViTForImageClassification,
    data: Split,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    console: Console,
) -> None:
    """Train ``model`` in place."""
    pixels = digits.upscale(data.images)
    steps = epochs * (len(pixels) // batch_size)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps)
    )
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )
    model.train()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps, loss=math.nan)
        for _ in range(epochs):
            order = torch.randperm(len(pixels))
            # The incomplete last batch is dropped; the next epoch's shuffle makes up for it.
            for rows in torch.split(order, batch_size)[: len(pixels) // batch_size]:
                logits = model(pixel_values=augment(pixels[rows])).logits
                loss = F.cross_entropy(logits, data.labels[rows], label_smoothing=LABEL_SMOOTHING)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
                optimizer.step()
                schedule.step()
                progress.update(task, advance=1, loss=loss.item())
    model.train(False)


@torch.inference_mode()
def accuracy(model: ViTForImageClassification, pixels: Tensor, labels: Tensor) -> float:
    """Return the share of ``pixels [B, 1, 32, 32]`` whose label is predicted."""
    predicted = model(pixel_values=pixels).logits.argmax(dim=-1)
    return float((predicted == labels).float().mean())


def save(model: ViTForImageClassification, test: Split, directory: Path) -> None:
    """Write the model, its weights in float16, and the test images into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    # Only the stored tensors are halved: config.json keeps float32 as the type to compute in.
    halved = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(directory, state_dict=halved)
    tensors = {"images": test.images.contiguous(), "labels": test.labels.to(torch.uint8)}
    save_file(tensors, directory / "images.safetensors")
    for path in directory.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors makes its files private, a package's are for everyone


def main(
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 75,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Seeds weights, order and augmentation.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    output: Annotated[Path, typer.Option(help="Folder to write.")] = digits.DIRECTORY,
) -> None:
    """Train the digits model and store it with its test images."""
    console = Console()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)

    train_split, test_split = load_split()
    model = build_model()
    start = time.perf_counter()
    train(
        model,
        train_split,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        console=console,
    )
    seconds = time.perf_counter() - start

    save(model, test_split, output)
    stored, images = digits.load_model(output), digits.load_images(output)
    console.print(f"parameters        {sum(p.numel() for p in model.parameters()):,}")
    console.print(f"training time     {seconds:.0f} s")
    train_accuracy = accuracy(model, digits.upscale(train_split.images), train_split.labels)
    console.print(f"training accuracy {train_accuracy:.2%}")
    console.print(f"test accuracy     {accuracy(model, *images):.2%} as trained")
    console.print(f"test accuracy     {accuracy(stored, *images):.2%} as stored")


if __name__ == "__main__":
    typer.run(main)
