"""Plans in exported programs (`torch.export`): the casts are operations of the graph, and every product is checked.

A scope of a plan becomes casts in the graph once autocast regions are lowered, so the program needs neither autoprec
nor autocast, and runs in the plan's formats wherever it is compiled to. Which layer a product belongs to is read
from the weight that it multiplies: names of modules are lost where a region was lowered.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Node

from autoprec.errors import PlanError
from autoprec.formats import Format
from autoprec.plan import Plan, PlanUnit
from autoprec.records import Role
from autoprec.runtime.attach import applied
from autoprec.runtime.identity import canonical_modules
from autoprec.runtime.layout import holders

__all__ = ["Product", "disagreements", "products", "traced"]

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
_MATMULS = frozenset("mm addmm bmm baddbmm linear matmul convolution conv1d conv2d conv3d _grouped_mm".split())
_LOOKUPS = frozenset("embedding _embedding_bag".split())
_DOT_PRODUCTS = frozenset(("scaled_dot_product_attention",))
#: what leaves a weight a weight
_KEEPS = frozenset("_to_copy permute t transpose view reshape _unsafe_view clone alias detach unsqueeze expand".split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A product, lookup or dot product in a graph: whose it is, and the formats of its floating operands."""

    name: str  #: of the graph's node
    operator: str
    module: str | None  #: the leaf whose weight it uses; None for a dot product
    unit: str | None
    executed: tuple[str, ...]
    planned: Format | None  #: None where the plan decides nothing


def traced(
    model: nn.Module, plan: Plan, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, **options: Any
) -> ExportedProgram:
    """Return the exported program of `model` in eval mode with `plan` in its graph; the model stays as it was.

    Args:
        args, kwargs: an example input.
        options: those of `torch.export.export`, such as `dynamic_shapes`.

    Raises:
        PlanError: the plan does not fit, or a product of the graph is not in the plan's format.
    """
    training = model.training
    model.eval()
    try:
        with applied(model, plan):
            program: ExportedProgram = torch.export.export(model, args, dict(kwargs or {}), strict=False, **options)
            program = program.run_decompositions({})  # lowers autocast regions to casts
    finally:
        model.train(training)
    if wrong := disagreements(products(program, plan, model), plan):
        raise PlanError(f"the exported program does not hold the plan: {'; '.join(wrong[:5])}")
    return program


def products(program: ExportedProgram, plan: Plan, model: nn.Module) -> tuple[Product, ...]:
    """Return every product, lookup and dot product of a program's graph."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    leaves = _weights_of_leaves(plan, model)
    units = {module: unit for unit in plan.units for module in unit.modules}
    held = {unit.name for unit in holders(plan, canonical_modules(model)).values()}
    found: dict[Node, Product] = {}
    for node in program.graph.nodes:
        operator = _operator(node)
        if operator in _DOT_PRODUCTS:
            found[node] = _dot_product(node, operator, found, units, held)
        elif operator in _MATMULS or operator in _LOOKUPS:
            module = _leaf(node, names, leaves, units, lookup=operator in _LOOKUPS)
            unit = units.get(module) if module else None
            executed = _looked_up(node) if operator in _LOOKUPS else _operands(node)
            found[node] = Product(
                name=node.name,
                operator=operator,
                module=module,
                unit=unit.name if unit else None,
                executed=executed,
                planned=unit.format if unit else None,
            )
    return tuple(found.values())


def disagreements(found: Sequence[Product], plan: Plan, folded: Collection[str | None] = ()) -> list[str]:
    """Return a sentence for each layer that a graph computes in another format than the plan's, or not at all.

    Args:
        folded: layers that need not be in the graph, because their results are constants there.
    """
    wrong = [
        f"{p.operator} of {p.module or p.unit} computes in {', '.join(p.executed)}, and the plan says {p.planned}"
        for p in found
        if p.planned is not None and p.executed != (str(p.planned),)
    ]
    seen = {product.module for product in found}
    missing = [m for unit in plan.units for m in unit.modules if m not in seen and m not in folded]
    return wrong + [f"no product of {module} is in the program" for module in missing]


def _weights_of_leaves(plan: Plan, model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the leaves of a plan that multiply or look up each parameter, by each name that the parameter has."""
    modules = canonical_modules(model)
    users: dict[int, list[str]] = {}
    for leaf in (name for unit in plan.units for name in unit.modules):
        for parameter in modules[leaf]._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(leaf)
    return {
        name: tuple(users[id(parameter)])
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in users
    }


def _leaf(
    node: Node,
    names: Mapping[str, str],
    leaves: Mapping[str, tuple[str, ...]],
    units: Mapping[str, PlanUnit],
    *,
    lookup: bool,
) -> str | None:
    """Return the leaf whose weight a node uses; a tied weight is its embedding's in a lookup, else the other's."""
    for operand in node.all_input_nodes:
        source = operand
        while source.op == "call_function" and _operator(source) in _KEEPS:
            source = source.all_input_nodes[0]
        candidates = leaves.get(names.get(source.name, ""), ())
        for leaf in candidates:
            if (units[leaf].role is Role.EMBEDDING) is lookup:
                return leaf
    return None


def _dot_product(
    node: Node, operator: str, found: Mapping[Node, Product], units: Mapping[str, PlanUnit], held: set[str]
) -> Product:
    """Return a dot product as its attention unit's, if that unit's scope stands around it."""
    owners = {product.unit for product in _sources(node, found)}
    unit = next(iter(owners)) if len(owners) == 1 else None
    decided = next((u for u in units.values() if u.name == unit and unit in held), None)
    executed = tuple(dict.fromkeys(_format(operand) for operand in node.all_input_nodes[:3]))
    planned = decided.format if decided else None
    return Product(name=node.name, operator=operator, module=None, unit=unit, executed=executed, planned=planned)


def _sources(node: Node, found: Mapping[Node, Product]) -> Iterator[Product]:
    """Yield the nearest products that a node's operands come from."""
    waiting, seen = list(node.all_input_nodes[:3]), set()
    while waiting:
        current = waiting.pop()
        if current in found:
            yield found[current]
        elif current not in seen:
            seen.add(current)
            waiting += current.all_input_nodes


def _operands(node: Node) -> tuple[str, ...]:
    values = [v for operand in node.all_input_nodes if isinstance(v := operand.meta.get("val"), torch.Tensor)]
    return tuple(dict.fromkeys(_NAMES.get(v.dtype, str(v.dtype)) for v in values if v.is_floating_point()))


def _looked_up(node: Node) -> tuple[str, ...]:
    """Return what looked-up values are rounded to: the format of the cast that alone uses them, or their own."""
    users = list(node.users)
    rounded = len(users) == 1 and _operator(users[0]) == "_to_copy"
    return (_format(users[0] if rounded else node),)


def _format(node: Node) -> str:
    value = node.meta["val"]
    return _NAMES.get(value.dtype, str(value.dtype))


def _operator(node: Node) -> str:
    target: Any = node.target
    return str(getattr(target, "_opname", "")) if node.op == "call_function" else ""
