"""Why a low format does not pay at a unit: its sizes do not fit the hardware, or its products are too small."""

from __future__ import annotations

import torch

from autoprec.formats import Format
from autoprec.probe.pacing import SAME
from autoprec.records import Estimate, Leaf, LeafKind, ModelProfile, Unit

__all__ = ["SETTLED", "misfit", "pays", "why_not"]

#: elements that rows of operands must be a multiple of for tensor cores: 16 bytes (NVIDIA, Matrix Multiplication
#: Background User's Guide); FP8 kernels refuse others
_MULTIPLE = {Format.BF16: 8, Format.FP16: 8, Format.FP8: 16}
#: a format this many times slower than FP32 is settled
SETTLED = 3.0
_PRODUCTS = (LeafKind.LINEAR, LeafKind.CONV1D)


def pays(ratio: Estimate) -> bool:
    """Say whether a format is faster than FP32, by its time over FP32's."""
    return ratio.value < 1 / SAME and ratio.high < 1


def why_not(
    profile: ModelProfile,
    unit: Unit,
    choice: Format,
    ratio: Estimate,
    device: torch.device,
    even: tuple[int, bool] | None = None,
    tokens: int = 0,
    *,
    launch_bound: bool = False,
) -> str | None:
    """Say why a format that was timed at a unit does not pay there; None where it does.

    Args:
        ratio: its time over FP32's.
        even: at how many times the batch it was tried, too, and whether it pays there.
        tokens: of the batch.
        launch_bound: whether launching its kernels takes longer than they do.
    """
    if pays(ratio):
        return None
    seen = f"{choice} takes {ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f}) times FP32's time here"
    leaves = [leaf for leaf in profile.leaves if leaf.module in unit.modules]
    if device.type == "cuda" and (why := misfit(leaves, choice)):
        return f"{seen}: {why}"
    if not any(leaf.kind in _PRODUCTS for leaf in leaves):
        return f"{seen}: it multiplies nothing, so only bytes could be saved"
    if launch_bound:
        seen += "; launching its kernels takes longer than they do, which torch.compile or larger batches mend"
    elif ratio.low > SETTLED:
        return f"{seen}: the device has no unit for such products"
    if even is None:
        return f"{seen}: its products are too small, or what stands between them takes longer"
    times, found = even
    if found:
        return (
            f"{seen}: its products are too small; it pays from about {times * tokens} tokens a step on ({tokens} here)"
        )
    return f"{seen}; up to {times * tokens} tokens a step ({tokens} here) it does not pay either"


def misfit(leaves: list[Leaf], choice: Format) -> str | None:
    """Return which feature count of linear layers is no multiple of what tensor cores take, and what to pad it to."""
    multiple = _MULTIPLE.get(choice, 1)
    for leaf in leaves:
        for what, size in (("inputs", leaf.inputs), ("outputs", leaf.outputs)):
            if leaf.kind in _PRODUCTS and size % multiple:
                padded = -(-size // multiple) * multiple
                return f"{leaf.module} has {size} {what}, no multiple of {multiple}; pad to {padded}"
    return None
