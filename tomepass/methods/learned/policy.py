"""The trained weights of a learned method, as a value."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tomepass.errors import TomeError

if TYPE_CHECKING:
    from torch import Tensor


class Policy:
    """Weights that score tokens, made by :func:`tomepass.train_policy`: a value.

    Two are equal, and hash alike, where they hold the same bits under the same names. The tensors
    are copied here, to float32 on the CPU, and are not to be changed; a graph that uses them
    brings them to its own device and dtype.

    Args:
        blocks: for the index of each block that scores, its tensors by name.
    """

    def __init__(self, blocks: Mapping[int, Mapping[str, Tensor]]) -> None:
        import torch

        self._blocks = {
            int(index): {
                name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
                for name, tensor in sorted(blocks[index].items())
            }
            for index in sorted(blocks)
        }
        self._digest = hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks there are weights for, ascending."""
        return tuple(self._blocks)

    def weights(self, index: int) -> dict[str, Tensor]:
        """The tensors of a block by name.

        Raises:
            KeyError: if there are none for it.
        """
        return dict(self._blocks[index])

    def to_bytes(self) -> bytes:
        """A safetensors file: ``BLOCK.NAME`` is a tensor's name in it."""
        from safetensors.torch import save

        return save({f"{i}.{n}": t for i, held in self._blocks.items() for n, t in held.items()})

    @classmethod
    def from_bytes(cls, data: bytes) -> Policy:
        """What :meth:`to_bytes` wrote.

        Raises:
            TomeError: if it is something else, or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        blocks: dict[int, dict[str, Tensor]] = {}
        try:
            for name, tensor in load(data).items():
                index, _, own = name.partition(".")
                blocks.setdefault(int(index), {})[own] = tensor
        except (SafetensorError, ValueError) as error:
            raise TomeError(
                f"these are no weights of a policy: {error}",
                advice="Policy.save() writes what Policy.load() reads",
            ) from error
        return cls(blocks)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        Path(path).write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Reads what :meth:`save` wrote."""
        return cls.from_bytes(Path(path).read_bytes())

    def to_json_types(self) -> dict[str, str]:
        """As JSON types: the safetensors file in base64."""
        return {"safetensors": base64.b64encode(self.to_bytes()).decode()}

    @classmethod
    def from_json_types(cls, data: dict[str, str]) -> Policy:
        """What :meth:`to_json_types` wrote."""
        return cls.from_bytes(base64.b64decode(data["safetensors"]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Policy) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __reduce__(self) -> tuple[Any, ...]:
        return Policy.from_bytes, (self.to_bytes(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> Policy:
        return self  # a value

    def __repr__(self) -> str:
        count = sum(t.numel() for held in self._blocks.values() for t in held.values())
        places = ", ".join(map(str, self._blocks))
        return f"Policy({count:,} weights of blocks {places}; {self._digest[:8]})"
