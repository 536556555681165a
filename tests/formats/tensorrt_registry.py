"""torch_tensorrt's own answer to which operators of a program it converts, without TensorRT.

    python tensorrt_registry.py PACKAGE_FOLDER PROGRAM.pt2 ...

prints for each program, as JSON, how many operators there are after torch_tensorrt's own
decompositions and lowering, which of them have no converter, and how many engines its partitioner
makes. The TensorRT libraries and CUDA, which only building an engine needs, are stood in for: the
registry, the decompositions and the partitioner are the package's own.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch


class _TensorRT:
    """Finds modules of the TensorRT libraries: names without any code."""

    tensor = type("ITensor", (), {})

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in ("tensorrt", "dllist"):
            return importlib.util.spec_from_loader(name, self)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: Any) -> Any:
        made = MagicMock(name=spec.name)
        made.__spec__, made.__name__, made.__path__ = spec, spec.name, []
        made.__version__, made.ITensor, made.tensorrt = "11.0.0", self.tensor, made
        return made

    def exec_module(self, module: Any) -> None:
        pass


def open_registry(package: Path) -> None:
    """Imports what is wanted of torch_tensorrt, past its start, which loads CUDA libraries."""
    sys.meta_path.insert(0, _TensorRT())  # type: ignore[arg-type]
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch._C._CudaDeviceProperties = object  # type: ignore[attr-defined]
    root: Any = types.ModuleType("torch_tensorrt")
    root.__path__ = [str(package)]
    sys.modules["torch_tensorrt"] = root
    features: Any = importlib.import_module("torch_tensorrt._features")
    # Its C++ runtime and its frontend of other days are not loaded.
    features.ENABLED_FEATURES = features.ENABLED_FEATURES._replace(
        torch_tensorrt_runtime=False, torchscript_frontend=False
    )
    root.ENABLED_FEATURES = features.ENABLED_FEATURES
    root.Device = importlib.import_module("torch_tensorrt._Device").Device
    enums = importlib.import_module("torch_tensorrt._enums")
    for name in ("DeviceType", "EngineCapability", "Platform", "dtype", "memory_format"):
        setattr(root, name, getattr(enums, name))
    root.Input = importlib.import_module("torch_tensorrt._Input").Input
    importlib.import_module("torch_tensorrt.runtime")


def read(program: torch.export.ExportedProgram) -> dict[str, Any]:
    """What torch_tensorrt does with a program, as far as no engine is built."""
    lowering: Any = importlib.import_module("torch_tensorrt.dynamo.lowering")
    partitioning: Any = importlib.import_module("torch_tensorrt.dynamo.partitioning")
    dynamo: Any = importlib.import_module("torch_tensorrt.dynamo")
    registry: Any = importlib.import_module("torch_tensorrt.dynamo.conversion").DYNAMO_CONVERTERS
    # Ranges of shapes stand in the graph; a converter for fixed ones alone is none here.
    settings = dynamo.CompilationSettings(assume_dynamic_shape_support=False)
    registry.set_compilation_settings(settings)
    decomposed = program.run_decompositions(lowering.get_decompositions())
    graph = lowering.post_lowering(decomposed.module(), settings)
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    missing = sorted({str(node.target) for node in calls if node not in registry})
    supported, total = partitioning.get_graph_converter_support(graph, set())
    parts, _ = partitioning.fast_partition(graph, min_block_size=5, torch_executed_ops=set())
    engines = [name for name, _ in parts.named_children() if name.startswith("_run_on_acc")]
    others = [name for name, _ in parts.named_children() if name.startswith("_run_on_gpu")]
    return {
        "operators": total,
        "supported": supported,
        "missing": missing,
        "kinds": sorted({str(node.target) for node in calls}),
        "engines": len(engines),
        "in torch": len(others),
    }


if __name__ == "__main__":
    open_registry(Path(sys.argv[1]))
    found = {Path(path).stem: read(torch.export.load(path)) for path in sys.argv[2:]}
    print("RESULT " + json.dumps(found))
