"""torch-tensorrt's front end on a machine without TensorRT: imported and run up to partitioning, nothing is built.

TensorRT's own module is replaced by one whose every attribute exists. What is tested is what the front end makes of
an exported program: which operators it takes, and that it keeps the types that hold the plan.
"""

from __future__ import annotations

import contextlib
import io
import sys
import types
from collections import Counter
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

__all__ = ["partition"]

_DOT = "scaled_dot_product_attention"


class _Anything(type):
    """A class whose attributes are classes of its kind, so that it can be asked for, called and subclassed."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Anything(name, (), {})
        setattr(cls, name, made)
        return made

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__call__()

    def __or__(cls, other: Any) -> Any:
        return cls

    def __int__(cls) -> int:
        return 0

    __index__ = __int__


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "tensorrt_rtx":  # by which another product is told
            raise AttributeError(name)
        made = _Anything(name, (), {})
        setattr(self, name, made)
        return made


def _stand_in(name: str) -> None:
    module = _Module(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__path__ = []
    module.__file__ = __file__
    module.__loader__ = None
    module.__version__ = "11.0.0"  # type: ignore[attr-defined]
    vars(module)["tensorrt"] = module  # the real one's names are found under both
    sys.modules[name] = module


def _as_with_cuda(torch: Any) -> None:
    """Give a CPU build of PyTorch the few names of CUDA that are asked for at import."""
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.current_device = lambda: 0
    torch.cuda.mem_get_info = lambda *_: (2**33, 2**34)
    if not hasattr(torch._C, "_CudaDeviceProperties"):
        torch._C._CudaDeviceProperties = type("_CudaDeviceProperties", (), {})


def partition(folder: str) -> dict[str, Any]:
    """Partition a two-block Llama with a plan of three formats and return what came of it."""
    import torch

    _as_with_cuda(torch)
    for name in ("tensorrt", "tensorrt.plugin"):
        _stand_in(name)
    with contextlib.redirect_stdout(io.StringIO()):
        import torch_tensorrt
    torch_tensorrt.dynamo._compiler.to_torch_device = lambda device: torch.device("cpu")
    torch_tensorrt.dynamo.utils.to_torch_device = lambda device: torch.device("cpu")
    from test_export_runs import MIXED, ids, program, tiny

    from autoprec.exporters.program import products
    from autoprec.plan import Plan

    model = tiny()
    plan = Plan.uniform(model, "bf16").replace(MIXED)
    exported = program(plan, "tensorrt", Path(folder))
    traced = exported["trace"](model, input_ids=ids())
    planned = Counter(p.executed for p in products(traced, plan, model))
    known = torch_tensorrt.dynamo.compile.__code__.co_varnames
    settings = exported["settings"](known)
    seen: list[Any] = []
    keep = torch_tensorrt.dynamo._compiler.dryrun_stats_display
    torch_tensorrt.dynamo._compiler.dryrun_stats_display = lambda tracker, *_: seen.append(tracker)
    with contextlib.redirect_stdout(io.StringIO()):
        partitioned = torch_tensorrt.dynamo.compile(
            traced,
            arg_inputs=(),
            kwarg_inputs={"input_ids": ids()},
            dryrun=True,
            min_block_size=1,
            **settings,
        )
    torch_tensorrt.dynamo._compiler.dryrun_stats_display = keep
    (tracker,) = seen
    kept: Counter[tuple[str, ...]] = Counter()
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    for graph in (m.graph for m in partitioned.modules() if isinstance(m, torch.fx.GraphModule)):
        for node in graph.nodes:
            if getattr(node.target, "_opname", "") in ("linear", "mm", "addmm", "matmul", "embedding", _DOT):
                values = [v.meta["val"] for v in node.all_input_nodes if v.meta.get("val") is not None]
                kept[tuple(dict.fromkeys(names[v.dtype] for v in values if v.dtype in names))] += 1
    return {
        "engines": tracker.tensorrt_graph_count,
        "operators": tracker.total_ops_in_graph,
        "supported": tracker.supported_ops_in_graph,
        "planned": sorted((*formats, count) for formats, count in planned.items()),
        "kept": sorted((*formats, count) for formats, count in kept.items()),
    }
