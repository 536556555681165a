"""Draws one block of ViT-B/16 before and after the rewrite, from the real graphs.

python -m benchmarks.draw_block docs/pictures/block.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import networkx as nx
import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, fx
from transformers import ViTConfig, ViTForImageClassification

import tomepass
from tomepass.capture.exported import capture_module
from tomepass.planning.plan_graph import plan_graph
from tomepass.rewriting.sweep import rewrite

BLOCK = 1  # the second: its keys carry sizes already

Place = tuple[float, float]

# They only re-view their input; drawing them would hide the rest.
QUIET = ("view", "transpose", "reshape", "dropout", "permute", "contiguous")


def main(path: Annotated[Path, typer.Argument(help="The PNG to write.")]) -> None:
    """Captures, rewrites, and draws both blocks side by side, the same operators at one height."""
    model = ViTForImageClassification(ViTConfig(num_hidden_layers=3)).eval()
    capture = capture_module(model, {"pixel_values": torch.randn(2, 3, 224, 224)})
    planned = plan_graph(capture.graph, tomepass.ToMe(r=16))
    rewritten = rewrite(capture.graph, planned)
    blocks = planned.streams[0].stream.blocks
    start, end = blocks[BLOCK].entry.name, blocks[BLOCK + 1].entry.name
    before = _block(capture.graph.graph, start, end)
    after = _block(rewritten.module.graph, rewritten.renamed[start], rewritten.renamed[end])
    place = _places(before, start, blocks[BLOCK].join.name)
    # A merged node's name stands for the merge now; the sum before it keeps its own.
    moved = place | {rewritten.renamed[n]: at for n, at in place.items() if n in rewritten.renamed}
    figure = Figure(figsize=(11, 8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _draw(left, before, place, "as captured")
    _draw(right, after, _with_own(after, moved), "rewritten, r = 16")
    figure.savefig(path, dpi=130)


def _places(flow: nx.DiGraph[str], start: str, join: str) -> dict[str, Place]:
    """Column and row of each node: rows by depth, one left free below the residual sum."""
    place = {}
    layers = list(nx.topological_generations(flow))
    below = next(i for i, layer in enumerate(layers) if join in layer)
    for depth, layer in enumerate(layers):
        row = depth + (depth > below)
        ordered = sorted(layer, key=lambda n: flow.nodes[n]["order"])
        for i, name in enumerate(ordered):
            place[name] = (i - (len(ordered) - 1) / 2, -float(row))
    # What else enters the block (a mask) stands beside the stream.
    for i, name in enumerate(n for n in layers[0] if n != start):
        place[name] = (-1.4 - i, 0.0)
    place[start] = (0.0, 0.0)
    return place


def _with_own(flow: nx.DiGraph[str], place: dict[str, Place]) -> dict[str, Place]:
    """The pass's own operators: the merge on the spine, the others in a column beside it."""
    placed = {n: at for n, at in place.items() if n in flow}
    attention = next(n for n in placed if flow.nodes[n]["label"].startswith("attention"))
    row = placed[attention][1]
    rows = {"log_size": row + 0.5, "match": row - 0.5, "merge": row - 3, "merge_size": row - 2.5}
    for name in nx.topological_sort(flow):
        if flow.nodes[name]["new"]:
            operator = flow.nodes[name]["operator"]
            first = operator == "merge_size" and not flow.pred[name]
            column = 0.0 if operator == "merge" else 1.75
            placed[name] = (column, 0.0 if first else rows[operator])
    return placed


def _block(graph: fx.Graph, start: str, end: str) -> nx.DiGraph[str]:
    """The tensors between two stream nodes, views contracted."""
    nodes = {n.name: n for n in graph.nodes}
    order = {name: i for i, name in enumerate(nodes)}
    flow: nx.DiGraph[str] = nx.DiGraph()
    inside = False
    for node in graph.nodes:
        if inside:
            operands = [a for a in node.all_input_nodes if a.op != "placeholder"]
            flow.add_edges_from((a.name, node.name) for a in operands)
        inside = inside or node.name == start
        if node.name == end:
            break
    shown = flow.subgraph(n for n in flow if isinstance(nodes[n].meta.get("val"), Tensor)).copy()
    for name in list(shown):
        if _operator(nodes[name]) in QUIET and shown.in_degree(name):
            shown.add_edges_from((a, b) for a in shown.pred[name] for b in shown.succ[name])
            shown.remove_node(name)
    for name in shown:
        shown.nodes[name]["label"] = _label(nodes[name])
        shown.nodes[name]["operator"] = _operator(nodes[name])
        shown.nodes[name]["order"] = order[name]
        shown.nodes[name]["new"] = getattr(nodes[name].target, "namespace", "") == "tome"
    return shown


def _operator(node: fx.Node) -> str:
    return str(getattr(node.target, "_opname", node.target))


def _label(node: fx.Node) -> str:
    sizes = ["B", *(str(s) for s in node.meta["val"].shape[1:])]
    name = _operator(node).replace("scaled_dot_product_attention", "attention")
    namespace = "tome::" if getattr(node.target, "namespace", "") == "tome" else ""
    return f"{namespace}{name}\n[{', '.join(sizes)}]"


def _draw(axes: Axes, flow: nx.DiGraph[str], place: dict[str, Place], title: str) -> None:
    boxes = {}
    for name, at in place.items():
        colour = "#ffd9a0" if flow.nodes[name]["new"] else "#dbe7f5"
        boxes[name] = axes.annotate(
            flow.nodes[name]["label"],
            at,
            ha="center",
            va="center",
            fontsize=8,
            bbox={"boxstyle": "round,pad=0.35", "facecolor": colour, "edgecolor": "#5b6b7f"},
            zorder=3,
        )
    for tail, head in flow.edges:
        same_column = place[tail][0] == place[head][0]
        skips = same_column and place[tail][1] - place[head][1] > 2
        # The first residual edge goes around the projections, the second needs less room.
        bend = 0.0
        if skips:
            spine = 1.25 if place[tail][1] == 0 else 0.5
            bend = spine if place[tail][0] == 0 else -0.35
        axes.annotate(
            "",
            place[head],
            place[tail],
            arrowprops={
                "arrowstyle": "-|>",
                "color": "#8794a5",
                "patchA": boxes[tail].get_bbox_patch(),
                "patchB": boxes[head].get_bbox_patch(),
                "shrinkA": 2,
                "shrinkB": 2,
                "connectionstyle": f"arc3,rad={bend}",
            },
        )
    axes.set_title(title, fontsize=11)
    axes.set_xlim(-1.9, 2.3)
    axes.set_ylim(min(y for _, y in place.values()) - 0.5, 0.5)
    axes.axis("off")


if __name__ == "__main__":
    typer.run(main)
