"""What an ONNX graph computes in: each product with the types of its operands, compared with a plan.

The exporter keeps, with each node, the name of the traced program's node that it comes from; weights that are folded
into constants lose their names, so nothing else tells a node's layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from autoprec.errors import PlanError
from autoprec.exporters.program import Product, disagreements
from autoprec.plan import Plan

__all__ = ["check_graph", "graph_products"]

_PRODUCTS = frozenset(("MatMul", "Gemm", "Conv", "ConvTranspose", "Attention"))
_LOOKUPS = frozenset(("Gather",))
#: of onnx.TensorProto.DataType
_TYPES = {1: "fp32", 10: "fp16", 11: "fp64", 16: "bf16"}
_ORIGIN = "pkg.torch.onnx.fx_node"


def check_graph(model: Any, found: Sequence[Product], plan: Plan) -> None:
    """Check that an `onnx.ModelProto` computes every layer in the plan's format.

    Args:
        found: the products of the traced program that the graph was made from.

    Raises:
        PlanError: it does not; names the layers.
    """
    lookups = {product.module for product in found if "embedding" in product.operator}  # positions may be constants
    if wrong := disagreements(tuple(graph_products(model, found)), plan, folded=lookups):
        raise PlanError(f"the ONNX graph does not hold the plan: {'; '.join(wrong[:5])}")


def graph_products(model: Any, found: Sequence[Product]) -> Iterator[Product]:
    """Yield the products of a traced program as they stand in the graph, with the types of their operands there."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    types |= {constant.name: constant.data_type for constant in graph.initializer}
    by_name = {product.name: product for product in found}
    for node in graph.node:
        if node.op_type not in _PRODUCTS and node.op_type not in _LOOKUPS:
            continue
        product = by_name.get(_origin(node))
        if product is None:
            continue
        names = [_after(node, graph)] if node.op_type in _LOOKUPS else [name for name in node.input if name]
        executed = tuple(dict.fromkeys(_TYPES.get(types.get(name, 0), "an unknown format") for name in names))
        yield replace(product, operator=node.op_type, executed=executed)


def _origin(node: Any) -> str:
    text = next((entry.value for entry in node.metadata_props if entry.key == _ORIGIN), "")
    match = re.match(r"%(\w+)", text)
    return match[1] if match else ""


def _after(node: Any, graph: Any) -> str:
    """Return the name of what looked-up values are rounded to by the one cast that uses them, or their own."""
    users = [other for other in graph.node if node.output[0] in other.input]
    return str(users[0].output[0] if len(users) == 1 and users[0].op_type == "Cast" else node.output[0])
