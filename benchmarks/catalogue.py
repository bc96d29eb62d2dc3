"""Writes profiles/models/*.json: the structure of each catalogued model, from its TOML and the transformers installed.

    python benchmarks/catalogue.py [NAME…]

A model's class is built on the meta device, so neither weights nor network are needed; all of them take less than a
minute. Rows that repeat block by block are stored once. Run it again after each change of a TOML, and for each new
transformers that the project moves to.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from autoprec.models import INDEX, SCHEMA, CataloguedModel, catalogued_profile, expand, models
from autoprec.probe.units import probe_units
from autoprec.records import ModelProfile

FOLDER = Path(__file__).resolve().parent.parent / "profiles" / "models"
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def skeleton(model: CataloguedModel) -> torch.nn.Module:
    """Return the class of a catalogued model on the meta device."""
    config = transformers.AutoConfig.for_model(**model.configuration)
    with torch.device("meta"):
        built: torch.nn.Module = getattr(transformers, model.class_name)._from_config(config, dtype=torch.float32)
    return built.eval()


def structure(profile: ModelProfile) -> dict[str, Any]:
    """Return a profile as plain data, repeated blocks once."""
    units = [[u.name, str(u.role), list(u.modules), [str(f) for f in u.formats]] for u in profile.units]
    leaves = [[x.module, str(x.kind), x.inputs, x.outputs, x.parameters] for x in profile.leaves]
    return {
        "schema": SCHEMA,
        "transformers": transformers.__version__,
        "class_name": profile.class_name,
        "fingerprint": profile.fingerprint,
        "parameters": profile.parameters,
        "tied": [list(group) for group in profile.tied],
        "units": folded(units),
        "pinned": [[pinned.reason, folded(list(pinned.modules))] for pinned in profile.pinned],
        "leaves": folded(leaves),
    }


def folded(rows: Sequence[Any]) -> list[Any]:
    """Return rows with runs of equal blocks as `{"times": [first, end], "of": […]}`; the inverse of `expand`."""
    done: list[Any] = []
    at = 0
    while at < len(rows):
        first = block_of(rows[at])
        size = 0
        while first is not None and at + size < len(rows) and block_of(rows[at + size]) == first:
            size += 1
        pattern = [marked(row, first) for row in rows[at : at + size]] if first is not None else []
        count = 0
        while size and [marked(r, first + count) for r in rows[at + count * size :][:size]] == pattern:
            count += 1
        if first is not None and count > 1:
            done.append({"times": [first, first + count], "of": pattern})
            at += count * size
        else:
            done.append(rows[at])
            at += 1
    assert list(expand(done)) == list(rows)
    return done


def block_of(row: Any) -> int | None:
    """Return the first number that is a part of a name in the row."""
    for text in [row] if isinstance(row, str) else (value for value in row if isinstance(value, str)):
        if match := _NUMBER.search(text):
            return int(match[0])
    return None


def marked(value: Any, index: int) -> Any:
    """Return a row with the index as the first number of each name replaced."""
    if isinstance(value, str):
        return re.sub(rf"(?<![^.]){index}(?![^.])", INDEX, value, count=1) if _first(value) == index else value
    return [marked(inner, index) for inner in value] if isinstance(value, list) else value


def _first(text: str) -> int | None:
    match = _NUMBER.search(text)
    return int(match[0]) if match else None


def lines(data: dict[str, Any]) -> str:
    """Return JSON with one row a line."""
    parts = []
    for key, value in data.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(f"  {_row(row)}" for row in value) + "\n ]"
        parts.append(f' "{key}": {text}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _row(row: Any) -> str:
    if isinstance(row, dict):
        inner = ",\n".join(f"    {json.dumps(r)}" for r in row["of"])
        return f'{{"times": {json.dumps(row["times"])}, "of": [\n{inner}\n  ]}}'
    return json.dumps(row)


def main() -> None:
    warnings.simplefilter("ignore")
    for stem, model in models().items():
        if sys.argv[1:] and stem not in sys.argv[1:]:
            continue
        profile = probe_units(skeleton(model), model_id=model.id)
        (FOLDER / f"{stem}.json").write_text(lines(structure(profile)))
        assert catalogued_profile(model.id) == profile
        print(f"{stem:28} {profile.parameters:>15,}  published {model.published.parameters}", flush=True)


if __name__ == "__main__":
    main()
