"""The one error class of the pass."""

from __future__ import annotations


class TomeError(RuntimeError):
    """Something cannot be merged exactly, and says why.

    Args:
        reason: what was expected and what came.
        block: index of the transformer block, if one is concerned.
        node: name of the graph node.
        source: the model's source line behind that node.
        advice: what the user can do about it.
    """

    def __init__(
        self,
        reason: str,
        *,
        block: int | None = None,
        node: str | None = None,
        source: str | None = None,
        advice: str | None = None,
    ) -> None:
        self.reason = reason
        self.block = block
        self.node = node
        self.source = source
        self.advice = advice
        super().__init__(self._message())

    def _message(self) -> str:
        where = [
            f"{label} {value}"
            for label, value in (("block", self.block), ("node", self.node), ("at", self.source))
            if value is not None
        ]
        message = self.reason
        if where:
            message += f" [{', '.join(where)}]"
        if self.advice:
            message += f"\n  What to do: {self.advice}"
        return message

    def __reduce__(self) -> tuple[object, ...]:
        fields = {
            "block": self.block,
            "node": self.node,
            "source": self.source,
            "advice": self.advice,
        }
        return _rebuild, (self.reason, fields)


def _rebuild(reason: str, fields: dict[str, object]) -> TomeError:
    return TomeError(reason, **fields)  # type: ignore[arg-type]
