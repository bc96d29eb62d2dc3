"""Whether every model type that Transformers can build is divided into units, without weights and without a list.

Each type of its configurations is built on the meta device from its default configuration with four layers (or as
many as it has, where that does not build), by the first auto class that knows it, and its units are probed. Types
that cannot be built from a default configuration, or need another library, are counted by what Transformers says.

    python benchmarks/bench_placing.py
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections import Counter
from typing import Any

import torch
import transformers
from record import write_result
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from autoprec.errors import AutoprecError
from autoprec.probe.units import probe_units
from autoprec.records import Role

_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModelForImageTextToText",
    "AutoModelForCTC",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForObjectDetection",
    "AutoModelForSemanticSegmentation",
    "AutoModelForSequenceClassification",
    "AutoModel",
)
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")


def build(kind: str) -> nn.Module:
    """Return a model of a type on the meta device; raises whatever Transformers raises."""
    problem: Exception = ValueError("no auto class")
    for depth in (4, None):
        config = CONFIG_MAPPING[kind]()
        if depth is not None:
            shorten(config, depth)
        for name in _CLASSES:
            auto: Any = getattr(modeling_auto, name)
            if type(config) not in auto._model_mapping:
                continue
            try:
                with torch.device("meta"):
                    model: nn.Module = auto.from_config(config)
                return model
            except Exception as error:
                problem = error
    raise problem


def shorten(config: Any, depth: int) -> None:
    """Leave at most `depth` layers, in the configurations within this one too."""
    for name in _DEPTHS:
        if isinstance(getattr(config, name, None), int) and getattr(config, name) > depth:
            with contextlib.suppress(AttributeError, ValueError):  # some depths follow from other settings
                setattr(config, name, depth)
    if isinstance(getattr(config, "layer_types", None), list):
        with contextlib.suppress(AttributeError, ValueError):
            config.layer_types = config.layer_types[:depth]
    for inner in list(vars(config).values()):
        if isinstance(inner, transformers.PretrainedConfig):
            shorten(inner, depth)


def row_of(model: nn.Module) -> dict[str, Any]:
    """Probe a model and return what there is to see."""
    started = time.process_time()
    profile = probe_units(model)
    seconds = time.process_time() - started
    placed = [m for u in profile.units for m in u.modules] + [m for p in profile.pinned for m in p.modules]
    apart = [m for p in profile.pinned if "code of its own" in p.reason for m in p.modules]
    return {
        "class": profile.class_name,
        "units": len(profile.units),
        "roles": dict(Counter(str(u.role) for u in profile.units)),
        "leaves": len(profile.leaves),
        "each leaf once": len(placed) == len(set(placed)) and {x.module for x in profile.leaves} <= set(placed),
        "modules with matrices of their own": len(apart),
        "head": any(u.role is Role.LM_HEAD for u in profile.units),
        "cpu_s": round(seconds, 3),
    }


def main() -> None:
    """Probe all types and write one result."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    unbuilt: Counter[str] = Counter()
    failed: dict[str, str] = {}
    for kind in sorted(CONFIG_MAPPING_NAMES):
        try:
            model = build(kind)
        except Exception as error:
            unbuilt[" ".join(str(error).split())[:60]] += 1
            continue
        try:
            found[kind] = row_of(model)
        except AutoprecError as error:
            failed[kind] = str(error)
    total = {
        "types": len(CONFIG_MAPPING_NAMES),
        "built": len(found) + len(failed),
        "placed": sum(row["each leaf once"] for row in found.values()),
        "failed": failed,
        "not built, by reason": dict(unbuilt.most_common()),
        "slowest probe, cpu_s": max(row["cpu_s"] for row in found.values()),
    }
    path = write_result("placing", {"total": total, "types": found})
    print(f"{total}\n{path}")


if __name__ == "__main__":
    main()
