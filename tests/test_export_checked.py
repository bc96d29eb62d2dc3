"""Export targets that are checked and not run: read by the library's own parser, schema or signatures.

Each library comes from the package index into a folder of its own, without its dependencies, and is read in a process
of its own: some need a GPU to be imported, others want versions that do not fit those of the tests.
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import samples

from autoprec.exporters import export
from autoprec.exporters.torchtitan import titan_name
from autoprec.plan import Plan

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.nightly


def plan(choice: str = "bf16", **options: Any) -> Plan:
    return Plan.uniform(samples.model_profile(), choice, **options).replace({"blocks.1.ffn": "bf16", "lm_head": "bf16"})


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that installs packages, without dependencies, and returns their folder."""
    done: dict[tuple[str, ...], Path] = {}

    def install(*packages: str) -> Path:
        if packages not in done:
            done[packages] = tmp_path_factory.mktemp("packages")
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(done[packages])]
            subprocess.run([*command, *packages], check=True, env=_environment(DS_BUILD_OPS="0"))
        return done[packages]

    return install


def _environment(**more: str) -> dict[str, str]:
    import os

    return os.environ | more


def run(code: str, *folders: Path) -> Any:
    """Run Python code in a process that finds `folders` and the checkout; it prints one JSON document last."""
    path = ":".join(str(folder) for folder in (*folders, ROOT))
    done = subprocess.run(
        [sys.executable, "-c", code], env=_environment(PYTHONPATH=path), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def constant(text: str, name: str) -> Any:
    """Return a constant of an exported program."""
    names: dict[str, Any] = {"__name__": "exported"}
    exec(compile(text, "exported", "exec"), names)
    return names[name]


@pytest.mark.parametrize("choice", ["bf16", "fp16"])
def test_deepspeed_reads_the_configuration(choice: str, installed: Any) -> None:
    folder = installed("deepspeed==0.19.8", "hjson", "py-cpuinfo", "msgpack", "ninja", "einops")
    text = export(plan(choice), "deepspeed")
    code = f"""
import json, inspect, deepspeed
from deepspeed.runtime.config import DeepSpeedConfig
read = DeepSpeedConfig({constant(text, "CONFIG")!r} | {{"train_micro_batch_size_per_gpu": 1}})
asked = inspect.signature(deepspeed.initialize).parameters
print(json.dumps([read.torch_autocast_enabled, str(read.torch_autocast_dtype), read.bfloat16_config.enabled,
    read.float16_config.enabled, read.torch_autocast_lower_precision_safe_modules, str(read.communication_data_type),
    read.grad_accum_dtype, [n for n in ("model", "model_parameters", "config") if n not in asked]]))
"""
    dtype = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}[choice]
    assert run(code, folder) == [True, dtype, False, False, [], "torch.float32", "fp32", []]


def fields(tree: ast.Module, name: str) -> set[str]:
    """Return the annotated fields and the methods of a class in a source file."""
    (found,) = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name]
    assigned = {n.target.id for n in found.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    return assigned | {n.name for n in found.body if isinstance(n, ast.FunctionDef)}


def test_swift_has_what_the_plugin_uses(installed: Any) -> None:
    folder = installed("ms-swift==4.6.0") / "swift"
    text = export(plan(), "swift")
    base = fields(ast.parse((folder / "arguments/base_args/base_args.py").read_text()), "BaseArguments")
    assert {"external_plugins", "get_model_processor"} <= base
    assert "torch_dtype" in fields(
        ast.parse((folder / "arguments/base_args/model_args.py").read_text()), "ModelArguments"
    )
    sft = ast.parse((folder / "arguments/sft_args.py").read_text())
    (arguments,) = [n for n in sft.body if isinstance(n, ast.ClassDef) and n.name == "SftArguments"]
    assert "BaseArguments" in {ast.unparse(base) for base in arguments.bases}
    assert {"bf16", "fp16"} <= {n.target.id for n in ast.walk(sft) if isinstance(n, ast.AnnAssign)}  # type: ignore[union-attr]
    assert "SftArguments" in (folder / "arguments/__init__.py").read_text()
    pipeline = (folder / "pipelines/train/sft.py").read_text()
    assert "args.get_model_processor(" in pipeline  # called on the arguments, before the tuner is put around it
    assert pipeline.index("_prepare_model_tokenizer()") < pipeline.index("self.prepare_model(")
    assert "--torch_dtype float32 --bf16 true --fp16 false" in text


def test_torchtitan_converts_the_planned_layers(installed: Any) -> None:
    """The converter's own filter on the names of torchtitan's Llama leaves the plan's FP8 layers, and no others."""
    folder = installed("torchtitan==0.3.0") / "torchtitan"
    made = plan("fp8", fp8_recipe="rowwise")
    text = export(made, "torchtitan")
    utils = ast.parse((folder / "components/quantization/utils.py").read_text())
    (function,) = [n for n in utils.body if isinstance(n, ast.FunctionDef) and n.name == "module_filter_fn"]
    for argument in function.args.args:
        argument.annotation = None
    names: dict[str, Any] = {}
    exec(compile(ast.Module([function], []), "titan", "exec"), names)
    layer = type("Config", (), {"in_features": 64, "out_features": 64})
    denied = constant(text, "FILTER_FQNS")
    wanted = {titan_name(m): u.format for u in made.units if u.role != "embedding" for m in u.modules}
    for name, choice in wanted.items():
        assert names["module_filter_fn"](layer, name, denied) is (choice == "fp8"), name
    converter = ast.parse((folder / "components/quantization/float8.py").read_text())
    (config,) = [n for n in ast.walk(converter) if isinstance(n, ast.ClassDef) and n.name == "Float8LinearConverter"]
    assert {"recipe_name", "filter_fqns"} <= fields(ast.Module([config.body[1]], []), "Config")
    assert "model_compile_enabled" in (folder / "components/quantization/__init__.py").read_text()
    assert {"dtype", "mixed_precision_param"} <= fields(
        ast.parse((folder / "config/configs.py").read_text()), "TrainingConfig"
    )
    adapter = (folder / "models/llama3/state_dict_adapter.py").read_text()
    for theirs in {titan_name(m) for u in made.units for m in u.modules}:
        assert f'"{theirs.replace(".0.", ".{}.").replace(".1.", ".{}.").replace(".2.", ".{}.")}.weight"' in adapter


#: Transformer Engine's own stands on its CUDA library; the inspector only asks that there is one
API = """
from nvdlfw_inspect.base import BaseNamespaceAPI
from nvdlfw_inspect.registry import Registry

BaseNamespaceAPI.__abstractmethods__ = frozenset()  # none is called here


@Registry.register_namespace_api(namespace="transformer_engine")
class TransformerEngineAPI(BaseNamespaceAPI):
    pass
"""


def test_transformer_engine_reads_the_recipe_and_the_exclusions(installed: Any, tmp_path: Path) -> None:
    engine, inspector = installed("transformer-engine==2.20.2"), installed("nvdlfw-inspect==0.2.2")
    made = plan("fp8")
    text = export(made, "transformer-engine")
    (tmp_path / "autoprec.yaml").write_text(constant(text, "EXCLUDED"))
    features = tmp_path / "features"  # the others cannot be imported without CUDA
    features.mkdir()
    feature = "disable_quantization_layer.py"
    shutil.copy(engine / "transformer_engine/debug/features" / feature, features)
    (features / "api.py").write_text(API)
    layers = {m: str(u.format) for u in made.units if u.role != "embedding" for m in u.modules}
    code = f"""
import importlib.util, json, sys
import torch
file = {str(engine / "transformer_engine/common/recipe/__init__.py")!r}
spec = importlib.util.spec_from_file_location("recipe", file)
recipe = importlib.util.module_from_spec(spec)
sys.modules["recipe"] = recipe
spec.loader.exec_module(recipe)
made = recipe.Float8CurrentScaling(fp8_format=recipe.Format.HYBRID)
import nvdlfw_inspect.api as debug_api
from nvdlfw_inspect.config_manager import ConfigManager
debug_api.initialize(config_file={str(tmp_path / "autoprec.yaml")!r},
    feature_dirs=[{str(features)!r}],
    log_dir={str(tmp_path)!r})
class Net(torch.nn.Module):
    pass
root = Net()
for name in {list(layers)!r}:
    here = root
    for part in name.split(".")[:-1]:
        if not hasattr(here, part):
            here.add_module(part, torch.nn.ModuleList() if part == "layers" else Net())
        here = getattr(here, part)
    here.add_module(name.split(".")[-1], torch.nn.Linear(1, 1))
debug_api.infer_and_assign_layer_names(root)
excluded = []
for name, module in root.named_modules():
    if isinstance(module, torch.nn.Linear):
        found = ConfigManager.get_config_for_layer(module.name)
        if found and "DisableQuantizationLayer" in str(found):
            excluded.append(name)
print(json.dumps([str(made.fp8_format), made.delayed(), excluded]))
"""
    recipe, delayed, excluded = run(code, inspector)
    assert "HYBRID" in recipe and delayed is False
    assert set(excluded) == {name for name, choice in layers.items() if choice != "fp8"}


def test_flax_builds_a_module_with_the_planned_dtypes(installed: Any) -> None:
    made = Plan.uniform(samples.model_profile(), "bf16").replace({"blocks.0.ffn": "fp32", "blocks.1.ffn": "fp16"})
    code = f"""
import json, sys
sys.path.insert(0, {str(ROOT / "examples")!r})
from jax_dtypes import products
print(json.dumps(products({export(made, "jax")!r})))
"""
    packages = ("flax", "jax", "jaxlib", "msgpack", "optax", "orbax-checkpoint", "tensorstore", "etils", "opt_einsum")
    folder = installed(*packages, "absl-py", "humanize", "simplejson", "treescope", "zipp", "importlib_resources")
    ran = run(code, folder)
    names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    wanted = {m.replace(".", "/"): names[u.format] for u in made.units for m in u.modules if u.role != "embedding"}
    assert ran == {path: [dtype] for path, dtype in wanted.items()}


def test_tensorrts_front_end_takes_the_program(installed: Any, tmp_path: Path) -> None:
    """torch-tensorrt partitions the program with a stand-in for TensorRT's module: no engine is built."""
    folder = installed("torch-tensorrt==2.13.0", "dllist")
    shutil.rmtree(folder / "torch_tensorrt" / "lib", ignore_errors=True)  # what needs CUDA and TensorRT to be loaded
    code = f"""
import json, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import tensorrt_stand_in
print(json.dumps(tensorrt_stand_in.partition({str(tmp_path)!r})))
"""
    result = run(code, folder)
    assert result["engines"] == 1
    assert result["supported"] == result["operators"]
    assert result["kept"] == result["planned"]
