"""Checks of what a workload is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autoprec.errors import ModelError, UsageError
from autoprec.probe.readout import OutputChoice
from autoprec.records import Mode

__all__ = ["check_model", "parse_mode", "parse_outputs"]


def check_model(model: object) -> None:
    """Check that a model can be the reference.

    Raises:
        ModelError: no module, or weights that are not loaded or narrower than FP32.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"a workload needs a torch.nn.Module, got {type(model).__name__}. Load one with "
            "transformers' from_pretrained(…, dtype=torch.float32), or build it in a file.py:function."
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelError(f"weight '{name}' is on the meta device: the weights were not loaded.")
        if parameter.dtype in (torch.bfloat16, torch.float16):
            raise ModelError(
                f"weight '{name}' is {str(parameter.dtype).removeprefix('torch.')}; the reference needs FP32 weights. "
                "Load with dtype=torch.float32 (transformers' default is the file's own dtype)."
            )


def parse_mode(mode: str | Mode) -> Mode:
    """Read the value of `--mode`; UsageError where it is none."""
    try:
        return Mode(mode)
    except ValueError:
        raise UsageError(f"'{mode}' is not a mode. Choose train or infer.") from None


def parse_outputs(outputs: str | Callable[[Any], Tensor] | None) -> OutputChoice | Callable[[Any], Tensor] | None:
    """Read the choice of outputs; UsageError where it is none."""
    if outputs is None or not isinstance(outputs, str):
        if outputs is not None and not callable(outputs):
            raise UsageError(f"outputs must be 'logits', 'values' or a function, got {type(outputs).__name__}.")
        return outputs
    try:
        return OutputChoice(outputs)
    except ValueError:
        raise UsageError(
            f"'{outputs}' is not a choice of outputs. Choose 'logits', 'values', or pass a function of the output."
        ) from None
