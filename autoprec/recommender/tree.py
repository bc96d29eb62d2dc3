"""The decision tree: fitted by scikit-learn, kept as JSON, read and followed without it.

A leaf says the kind of format that solved fronts gave such units, and how much such units drop in each format, nine in
ten of them no more. Fitting is regularised: few leaves, each of many rows, and rows count by what is at stake.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from autoprec.recommender.measures import FEATURES, SEEN, said
from autoprec.recommender.table import DROPS

if TYPE_CHECKING:
    import pandas

__all__ = ["SCHEMA", "Leaf", "Split", "Tree", "fit_tree", "tree_lines"]

SCHEMA = "autoprec/tree@1"
#: leaves, and rows a leaf has at the least, as a share: chosen by the regret on models and devices left out
_LEAVES, _LEAST = 12, 0.01
#: a row about nothing still counts this much, in percent of the step
_FLOOR = 0.01
#: rows of finished searches count this many times: they were measured, on the user's own device and models
_MEASURED = 25.0
#: share of a leaf's units whose drop is no more than what is counted for them
_QUANTILE = 0.9
#: a threshold that any value is below: the question is whether there is one
_ANY = 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """The end of a path: `label` (`table.LABELS`), its share of the rows that count, and drops in percent.

    `drops`: by format and role, the 90th percentile over the leaf's rows; '' is the role for all roles together.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    label: str
    share: float
    rows: int
    drops: Mapping[str, Mapping[str, float]]

    def drop(self, choice: str, role: str) -> float:
        """Return what is counted for a unit in a format, in percent; FP32 drops nothing."""
        known = self.drops.get(choice, {})
        return known.get(role, known.get("", 0.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A question: is the feature at most the threshold? `yes` and `no` are the indices of what follows.

    `unknown` is the answer where the feature is NaN, as it is of weights that were not seen.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    feature: str
    threshold: float
    yes: int
    no: int
    unknown: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """Nodes, the root first. `digest`: of the tables it was fitted on; `notes`: what of them could not be used."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    schema: str
    digest: str
    rows: int
    nodes: tuple[Split | Leaf, ...]
    notes: tuple[str, ...] = ()

    def follow(self, features: Mapping[str, float]) -> tuple[Leaf, str]:
        """Return the leaf of a unit and the path to it in words."""
        node, path = self.nodes[0], dict[tuple[str, bool], str]()
        while isinstance(node, Split):
            value = features[node.feature]
            below = node.unknown if math.isnan(value) else value <= node.threshold
            # of several questions about one feature the last says it all
            path[node.feature, below] = said(node.feature, value, node.threshold, below=below)
            node = self.nodes[node.yes if below else node.no]
        return node, "; ".join(path.values())


def fit_tree(rows: pandas.DataFrame, digest: str, notes: tuple[str, ...] = (), leaves: int = _LEAVES) -> Tree:
    """Fit a tree on a table's rows."""
    from sklearn.tree import DecisionTreeClassifier

    model = DecisionTreeClassifier(
        max_leaf_nodes=leaves, min_weight_fraction_leaf=0.0, min_samples_leaf=_LEAST, random_state=0
    )
    table = rows[list(FEATURES)].to_numpy(dtype="float64")
    counts = (rows["stake"] + _FLOOR) * (rows["origin"] == "search").map({True: _MEASURED, False: 1.0})
    model.fit(table, rows["label"].to_numpy(), sample_weight=counts.to_numpy(dtype="float64"))
    inner, at = model.tree_, model.apply(table)
    nodes: list[Split | Leaf] = []
    for index in range(inner.node_count):
        if inner.children_left[index] >= 0:
            nodes.append(
                Split(
                    feature=FEATURES[inner.feature[index]],
                    threshold=float(f"{min(inner.threshold[index], _ANY):.4g}"),
                    yes=int(inner.children_left[index]),
                    no=int(inner.children_right[index]),
                    unknown=FEATURES[inner.feature[index]] not in SEEN or bool(inner.missing_go_to_left[index]),
                )
            )
        else:
            shares = inner.value[index][0] / inner.value[index][0].sum()
            best = int(shares.argmax())
            own = rows[at == index]
            nodes.append(
                Leaf(
                    label=str(model.classes_[best]),
                    share=round(float(shares[best]), 3),
                    rows=len(own),
                    drops=_drops(own, rows),
                )
            )
    return Tree(schema=SCHEMA, digest=digest, rows=len(rows), nodes=tuple(nodes), notes=notes)


def tree_lines(tree: Tree) -> Iterator[str]:
    """Yield the tree as text, a line a node."""
    yield f"decision tree, fitted on {tree.rows} units of solved fronts and finished searches"
    yield from _lines(tree, 0, "")


def _lines(tree: Tree, index: int, indent: str) -> Iterator[str]:
    node = tree.nodes[index]
    if isinstance(node, Leaf):
        counted = ", ".join(f"{f} {own['']:.2g} %" for f, own in node.drops.items() if "" in own)
        yield f"{indent}→ {node.label} ({node.share:.0%} of {node.rows} units; drop of nine in ten at most: {counted})"
        return
    for below, after in ((True, node.yes), (False, node.no)):
        yield f"{indent}{node.feature} {'≤' if below else '>'} {node.threshold:g}"
        yield from _lines(tree, after, indent + "  ")


def _drops(own: pandas.DataFrame, every: pandas.DataFrame) -> dict[str, dict[str, float]]:
    """Return quantiles of drops by format and role; those of all rows where a leaf has too few."""
    found: dict[str, dict[str, float]] = {}
    for choice in DROPS:
        column = f"drop_{choice}"
        known = own[own[column].notna()]
        if len(known) < 20:
            known = every[every[column].notna()]
        if known.empty:
            continue
        table = {"": known[column].quantile(_QUANTILE)}
        table |= {
            str(role): part.quantile(_QUANTILE) for role, part in known.groupby("role")[column] if len(part) >= 20
        }
        found[choice] = {role: float(f"{value:.3g}") for role, value in table.items()}
    return found
