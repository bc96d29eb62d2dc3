"""Which tree counts: the shipped one, or one that is fitted anew where the user's own table has rows.

Both are kept as JSON beside the table they were fitted on, so that nothing is fitted twice and reading one loads
neither scikit-learn nor pandas.
"""

from __future__ import annotations

import contextlib
from functools import cache

from autoprec.catalog import data_files
from autoprec.errors import AutoprecError
from autoprec.files import as_json, from_json, read_json, write_json
from autoprec.recommender.table import read_tables, shipped_texts, table_digest, user_table
from autoprec.recommender.tree import SCHEMA, Tree, fit_tree

__all__ = ["current_tree", "shipped_tree"]

_OWN = "the user's own"


@cache
def shipped_tree() -> Tree:
    """Return the tree that ships with the package.

    Raises:
        AutoprecError: its file is missing or damaged.
    """
    file = data_files("profiles", ending=".json").get("tree")
    if file is None:
        raise AutoprecError("the decision tree profiles/tree.json is missing; install autoprec again")
    import json

    return _tree(json.loads(file.read_text(encoding="utf-8")), "profiles/tree.json")


def current_tree() -> Tree:
    """Return the tree of the shipped table and the user's own, fitted now where that has changed.

    Its `notes` say which rows could not be used. Where nothing of the user's table can be, the shipped tree counts,
    with the note.
    """
    path = user_table()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return shipped_tree()
    except (OSError, ValueError) as fault:
        return _noted(shipped_tree(), f"table {path} cannot be read and is not used: {fault}")
    texts = {**shipped_texts(), _OWN: text}
    digest, kept = table_digest(texts), path.with_name("tree.json")
    with contextlib.suppress(AutoprecError):  # none is kept yet, or it is damaged: it is fitted again
        tree = _tree(read_json(kept, what="decision tree"), f"decision tree {kept}")
        if tree.digest == digest:
            return tree
    tables = read_tables(texts)
    notes = tuple(note.replace(f"table {_OWN}", f"table {path}") for note in tables.notes)
    own = len(tables.rows) - shipped_tree().rows
    if own <= 0:
        tree = _noted(shipped_tree(), *notes)
    else:
        tree = fit_tree(tables.rows, digest, (*notes, f"{own} rows of your own finished searches counted"))
    with contextlib.suppress(AutoprecError):  # a folder that cannot be written costs the time of another fit
        write_json(kept, as_json(_with_digest(tree, digest)))
    return tree


def _tree(data: object, what: str) -> Tree:
    tree = from_json(Tree, data, what=what)
    if tree.schema != SCHEMA:
        raise AutoprecError(f"{what} is not of schema {SCHEMA}")
    return tree


def _noted(tree: Tree, *notes: str) -> Tree:
    return Tree(schema=tree.schema, digest=tree.digest, rows=tree.rows, nodes=tree.nodes, notes=(*tree.notes, *notes))


def _with_digest(tree: Tree, digest: str) -> Tree:
    return Tree(schema=tree.schema, digest=digest, rows=tree.rows, nodes=tree.nodes, notes=tree.notes)
