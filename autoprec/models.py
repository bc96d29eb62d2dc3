"""The catalogue of models: units, leaves and facts of widely used ones by name, without weights, network or torch.

A model is two files of `profiles/models`. The TOML is written by hand: its names, its configuration, and the parameter
count its publisher gives. The JSON is written by `benchmarks/catalogue.py`: what `probe_units` finds in the class of
transformers built from that configuration, repeated blocks once. `docs/models.md` says how to add one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources.abc import Traversable
from typing import Any, ClassVar

from autoprec.catalog import data_files, read_toml
from autoprec.errors import ModelError, closest
from autoprec.facts import facts_of
from autoprec.files import from_json
from autoprec.formats import Format
from autoprec.records import Leaf, LeafKind, ModelFacts, ModelProfile, Pinned, Role, Unit

__all__ = [
    "SCHEMA",
    "CataloguedModel",
    "Published",
    "catalogued_facts",
    "catalogued_profile",
    "expand",
    "find_model",
    "fits_installed",
    "is_installed",
    "model_names",
    "model_spellings",
    "models",
    "read_structure",
    "structure_profile",
]

SCHEMA = "autoprec/structure@1"
#: stands for the index of a repeated block
INDEX = "#"


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The parameter count a publisher gives, to the digits he gives, and where."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    parameters: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CataloguedModel:
    """A model file as it is written."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    #: ids of the hub with this structure, the first the model's own
    ids: tuple[str, ...]
    class_name: str
    published: Published
    #: what a config.json would hold, as far as it decides about shapes; `null` names what is null there
    config: Mapping[str, Any]
    null: tuple[str, ...] = field(default=())
    #: short names, which are no ids
    aliases: tuple[str, ...] = field(default=())

    @property
    def id(self) -> str:
        """The model's own id on the hub."""
        return self.ids[0]

    @property
    def configuration(self) -> dict[str, Any]:
        """The configuration as a config.json would hold it."""
        return {**self.config, **dict.fromkeys(self.null), "architectures": [self.class_name]}


def model_names() -> tuple[str, ...]:
    """Return the ids of all models of the catalogue, each structure's own one only, sorted."""
    return tuple(sorted(model.id for model in models().values()))


@cache
def model_spellings() -> Mapping[str, str]:
    """Return every id and alias, in lower case, with the file it means."""
    known: dict[str, str] = {}
    for stem, model in models().items():
        for name in (*model.ids, *model.aliases):
            if known.setdefault(name.lower(), stem) != stem:
                raise ModelError(f"model file {stem}: '{name}' already means {known[name.lower()]}")
    return known


def find_model(name: str) -> CataloguedModel | None:
    """Return the catalogued model of an id or alias; case does not matter. None where there is none."""
    stem = model_spellings().get(name.strip().lower())
    return None if stem is None else models()[stem]


def catalogued_profile(name: str) -> ModelProfile:
    """Return the units and leaves of a catalogued model, as `probe_units` finds them in its class.

    Its `model_id` is the id that was asked for, for an alias the model's own.

    Raises:
        ModelError: no model is called so (with the closest names), or its file is damaged.
    """
    stem, model = _entry(name)
    asked = name.strip().lower()
    model_id = next((known for known in model.ids if known.lower() == asked), model.id)
    return structure_profile(_structure(stem), model_id, f"structure file {stem}.json")


def catalogued_facts(name: str) -> ModelFacts:
    """Return the facts of a catalogued model; names and errors as in `catalogued_profile`."""
    _, model = _entry(name)
    return facts_of(model.configuration, model.id)


def fits_installed(name: str) -> tuple[bool, str, str]:
    """Say whether a catalogued structure is that of the transformers installed here; and (its version, the one here).

    Classes of one release differ in names and shapes from those of another; within 5.23.x they do not.
    """
    stem, _ = _entry(name)
    made = str(_structure(stem).get("transformers"))
    return is_installed(made), made, _installed()


def is_installed(made: str) -> bool:
    """Say whether the transformers here builds what one of that version does."""
    return made.split(".")[:2] == _installed().split(".")[:2]


def _installed() -> str:
    try:
        return version("transformers")
    except PackageNotFoundError:
        return "none"


@cache
def models() -> Mapping[str, CataloguedModel]:
    """Read every model file, once; keyed by the file's name without its ending."""
    found = {}
    for stem, file in sorted(data_files("profiles", "models").items()):
        what = f"model file {file}"
        found[stem] = from_json(CataloguedModel, read_toml(file, what), what=what, error=ModelError)
        if not found[stem].ids:
            raise ModelError(f"{what} is not valid at ids: give at least one")
    return found


def expand(rows: Sequence[Any]) -> Iterator[Any]:
    """Yield rows with each `{"times": [first, end], "of": […]}` written out, its index in place of `#`."""
    for row in rows:
        if isinstance(row, Mapping):
            for index in range(*row["times"]):
                for inner in row["of"]:
                    yield _at(inner, str(index))
        else:
            yield row


def _at(value: Any, index: str) -> Any:
    if isinstance(value, str):
        return value.replace(INDEX, index)
    return [_at(inner, index) for inner in value] if isinstance(value, list) else value


def _entry(name: str) -> tuple[str, CataloguedModel]:
    wanted = name.strip().lower()
    stem = model_spellings().get(wanted)
    if stem is None:
        raise ModelError(f"there is no model '{name}' in the catalogue{closest(wanted, model_spellings())}")
    return stem, models()[stem]


@cache
def _structure(stem: str) -> Mapping[str, Any]:
    files = data_files("profiles", "models", ending=".json")
    if stem not in files:
        raise ModelError(f"model file {stem}.toml has no structure: run `python benchmarks/catalogue.py {stem}`")
    return read_structure(files[stem])


def read_structure(file: Traversable, schema: str = SCHEMA) -> Mapping[str, Any]:
    """Read a shipped structure of a schema.

    Raises:
        ModelError: it is damaged, or of another schema.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise ModelError(f"structure file {file} cannot be read: {fault}; install autoprec again") from None
    if not isinstance(data, dict) or data.get("schema") != schema:
        raise ModelError(f"structure file {file} is not of schema {schema}; install autoprec again")
    return data


def structure_profile(data: Mapping[str, Any], model_id: str, what: str) -> ModelProfile:
    """Build a profile from a structure as its files hold it; ModelError where it is damaged."""
    try:
        units = tuple(
            Unit(name, Role(role), tuple(modules), tuple(Format(f) for f in formats))
            for name, role, modules, formats in expand(data["units"])
        )
        leaves = tuple(Leaf(module, LeafKind(kind), *sizes) for module, kind, *sizes in expand(data["leaves"]))
        return ModelProfile(
            model_id=model_id,
            class_name=data["class_name"],
            fingerprint=data["fingerprint"],
            units=units,
            pinned=tuple(Pinned(tuple(expand(modules)), reason) for reason, modules in data["pinned"]),
            unassigned=(),
            leaves=leaves,
            tied=tuple(tuple(group) for group in data["tied"]),
            parameters=data["parameters"],
        )
    except (KeyError, TypeError, ValueError) as fault:
        raise ModelError(f"{what} is damaged ({type(fault).__name__}: {fault}); install autoprec again") from None
