"""A torchtitan configuration with a plan's FP8 layers: Llama 3 8B, row-wise scales.

    autoprec export plan.json --to torchtitan --out planned_titan.py      # beside this file
    MODULE=llama3 CONFIG=llama3_8b_planned ./run_train.sh                 # after importing this from your registry

Not run here: torchtitan's converter needs a GPU. Names were checked against torchtitan 0.3.0.
"""

from __future__ import annotations

from typing import Any

import planned_titan
from torchtitan.models.llama3 import model_registry
from torchtitan.models.llama3.config_registry import llama3_8b


def llama3_8b_planned() -> Any:
    """Return torchtitan's own configuration with the plan's converters and formats."""
    config = llama3_8b()
    config.model_spec = model_registry("8B", converters=planned_titan.converters(config.compile.enable))
    config.training.dtype = "float32"
    config.training.mixed_precision_param = planned_titan.MIXED_PRECISION_PARAM
    return config
