"""Build a Flax module with the dtypes of a plan, and print what its products compute in.

    autoprec export plan.json --to jax --out dtypes.json
    python examples/jax_dtypes.py dtypes.json

The module has one layer for each path of the plan: what matters here is how a layer gets its dtype.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Planned(nn.Module):
    """A linear layer for each path; each computes in its dtype, and holds its weight in `param_dtype`."""

    dtypes: dict[str, str]
    param_dtype: str

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for path, dtype in self.dtypes.items():
            y = nn.Dense(16, dtype=dtype, param_dtype=self.param_dtype, name=path.replace("/", "_"))(x)
            x = x + y.astype(x.dtype)  # the stream stays in its own format
        return x


def products(text: str) -> dict[str, list[str]]:
    """Return the formats of the operands of each layer's product."""
    plan = json.loads(text)
    paths = list(plan["dtypes"])
    leaves = {p: d for p, d in plan["dtypes"].items() if not any(q.startswith(f"{p}/") for q in paths)}
    layers = {p: d for p, d in leaves.items() if not p.endswith(("embed_tokens", "wte", "wpe"))}
    model = Planned(layers, plan["param_dtype"])
    x = jnp.ones((2, 16), plan["stream"])
    weights = model.init(jax.random.key(0), x)
    traced = jax.make_jaxpr(lambda w, v: model.apply(w, v))(weights, x)
    found = [eqn for eqn in traced.jaxpr.eqns if eqn.primitive.name == "dot_general"]
    return {
        path: sorted({str(operand.aval.dtype) for operand in eqn.invars})
        for path, eqn in zip(layers, found, strict=True)
    }


if __name__ == "__main__":
    for path, dtypes in products(Path(sys.argv[1]).read_text()).items():
        print(f"{path}: {', '.join(dtypes)}")
