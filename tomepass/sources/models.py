"""Models and images from disk or the hub, with errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tomepass.errors import TomeError

if TYPE_CHECKING:
    from torch import nn


_ADAPTER = "adapter_config.json"  # as PEFT writes it


def load_model(name: str | Path) -> nn.Module:
    """A transformers model from a directory (``save_pretrained``) or the hub, in eval mode.

    Raises:
        TomeError: if the directory does not exist or holds no model, or the hub does not answer.
    """
    source = locate(str(name))
    import transformers

    if (Path(source) / _ADAPTER).is_file() and not (Path(source) / "config.json").is_file():
        raise TomeError(
            f"{str(name)!r} holds an adapter, whose model is saved elsewhere",
            advice="load that model, PeftModel.from_pretrained(model, DIR), then "
            "tomepass.apply(model, method), where method, _ = tomepass.saving.read_settings(DIR)",
        )
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        named = [getattr(transformers, n, None) for n in config.architectures or ()]
        cls: Any = next((c for c in named if c is not None), transformers.AutoModel)
        model: nn.Module = cls.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise TomeError(
            f"no model could be loaded from {str(name)!r}: {first_line(error)}",
            advice="give a directory written by model.save_pretrained(), with config.json and "
            "model.safetensors in it",
        ) from error
    return model.eval()


def locate(name: str) -> str:
    """The directory of a model, or its hub id where there is such a model.

    Raises:
        TomeError: if there is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise TomeError(
            f"{name!r} is a file; expected a model directory",
            advice="give the directory that holds config.json and model.safetensors",
        )
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise TomeError(
            f"no such model directory: {name!r}",
            advice="give a directory written by model.save_pretrained(), or a hub id owner/name",
        )
    _ask_hub(name)
    return name


def first_line(error: BaseException) -> str:
    """What an error says, without the rest of a long message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _ask_hub(name: str) -> None:
    """One short question, instead of transformers' many retries where there is no network."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # a 404, an offline setting or a connection error of any library
        raise TomeError(
            f"{name!r} is not a directory here, and as a hub id it could not be fetched: "
            f"{first_line(error)}",
            advice="without a network, download the model elsewhere (model.save_pretrained(DIR)) "
            "and give that directory",
        ) from error
