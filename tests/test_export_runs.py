"""Exported programs really run: trained or compiled by the library they are for, and audited against the plan.

The examples run as a user would run them, on the demo model; two processes compare DDP and FSDP2 with one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from export_worker import MODEL, WAYS, not_as_planned
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from zoo import ZOO

import autoprec
from autoprec.demo import folder
from autoprec.errors import PlanError
from autoprec.exporters import export
from autoprec.exporters.onnx_graph import check_graph, graph_products
from autoprec.exporters.program import disagreements, products, traced
from autoprec.plan import Plan

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SMALL = ["--steps", "4", "--batch-size", "2", "--seq-len", "32"]


@pytest.fixture(autouse=True)
def as_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the examples find each other, as they do when run as scripts."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def example(name: str) -> Any:
    """Return an example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan of three formats for the demo model."""
    model = AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32)
    plan = Plan.uniform(model, "bf16").replace({"lm_head": "fp32", "blocks.1.ffn": "fp32", "blocks.2.ffn": "fp16"})
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    return path


def program(plan: Plan, target: str, path: Path) -> dict[str, Any]:
    """Save a plan and return the names of its exported program."""
    plan.save(path / "plan.json")
    names: dict[str, Any] = {"__name__": "exported"}
    exec(compile(export(plan, target, str(path / "plan.json")), "exported", "exec"), names)
    return names


def tiny() -> Any:
    """Return a Llama of two blocks that keeps no cache."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def tiny_gpt2() -> Any:
    """Return a GPT-2 of two blocks: Conv1D layers, and a head that is its embedding's weight."""
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2, "use_cache": False}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def ids() -> torch.Tensor:
    return torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))


MIXED = {"blocks.0.ffn": "fp32", "blocks.1.attention": "fp16"}


# training


def test_an_audit_of_another_plan_is_not_equal(tmp_path: Path) -> None:
    model = tiny()
    plan = Plan.uniform(model, "bf16")
    program(plan, "python", tmp_path)["prepare"](model)
    other = plan.replace({"blocks.1.ffn": "fp32"})
    found = not_as_planned(autoprec.audit(model, other, {"input_ids": ids()}, in_force=False), other)
    assert found[0] == "blocks.1.ffn: {'bf16'}, not fp32"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_lightning_fits_a_model_as_planned(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loss = example("train_lightning").main(["--plan", str(three), *SMALL])
    assert 0 < loss < 10
    assert "audit: 10 of 10 units ran as planned, 0 disagreements" in capsys.readouterr().out


def test_lightning_scales_the_loss_as_the_plan_asks(three: Path) -> None:
    names: dict[str, Any] = {"__name__": "exported"}
    exec(compile(export(Plan.load(three), "lightning"), "exported", "exec"), names)
    plugin = names["precision"]("cpu")
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() == 65536.0


@pytest.mark.filterwarnings("ignore")  # torchao's own
def test_torchao_converts_the_planned_layers(capsys: pytest.CaptureFixture[str]) -> None:
    losses = example("train_torchao").main(["--steps", "4", "--batch-size", "2", "--seq-len", "16"])
    assert losses[-1] < losses[0]
    out = capsys.readouterr().out
    assert "11 layers in FP8" in out
    assert "audit: 6 of 6 units ran as planned, 0 disagreements" in out


@pytest.mark.filterwarnings("ignore")
def test_torchao_says_what_it_cannot_convert(tmp_path: Path) -> None:
    model = tiny_gpt2()
    with pytest.raises(ValueError, match=r"layers are not as the plan says, first transformer\.h\.0\.attn\.c_attn"):
        program(Plan.uniform(model, "fp8"), "torchao", tmp_path)["prepare"](model)


# dynamo looks at .grad of each input, and a block's input is no leaf
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_blocks_share_graphs_and_give_the_bits_of_eager_ones(tmp_path: Path) -> None:
    torch.compiler.reset()
    counting = CompileCounterWithBackend("aot_eager")
    batch = {"input_ids": ids(), "labels": ids()}
    plan = Plan.uniform(tiny(), "bf16").replace({"lm_head": "fp32"})
    eager, compiled = tiny(), tiny()
    compiled.load_state_dict(eager.state_dict())
    autoprec.apply(eager, plan)
    program(plan, "torch-compile", tmp_path)["prepare"](compiled, backend=counting)
    wanted, got = eager(**batch), compiled(**batch)
    wanted.loss.backward()
    got.loss.backward()
    assert torch.equal(got.logits, wanted.logits)
    for (name, one), (_, other) in zip(eager.named_parameters(), compiled.named_parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad), name
    assert counting.frame_count == 1  # two blocks
    torch.compiler.reset()


@pytest.mark.nightly  # the test above has compared bits
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_the_example_of_compiled_blocks_trains_as_planned(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = example("train_compiled").main(["--plan", str(three), *SMALL, "--backend", "aot_eager"])
    assert len(losses) == 4
    assert "audit: 10 of 10 units ran as planned, 0 disagreements" in capsys.readouterr().out
    torch.compiler.reset()


@pytest.mark.slow
def test_accelerate_launch_reads_the_file_and_trains_as_planned(three: Path, tmp_path: Path) -> None:
    text = export(Plan.load(three), "accelerate", str(three)).replace("use_cpu: false", "use_cpu: true")
    (tmp_path / "accelerate.yaml").write_text(text)
    script = [str(EXAMPLES / "train_accelerate.py"), "--plan", str(three), *SMALL]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "accelerate.yaml")]
    around = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, *script], env=around, capture_output=True, text=True, timeout=200)
    out = done.stdout
    assert done.returncode == 0, done.stderr[-3000:]
    assert "accelerate's mixed_precision: fp16" in out  # what scales the loss, where there is a GPU
    assert "audit: 10 of 10 units ran as planned, 0 disagreements" in out


# two processes


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, list[str]]]]:
    """What each of two processes found wrong with each way of wrapping."""
    place = tmp_path_factory.mktemp("two")
    profile = autoprec.probe_units(ZOO[MODEL]().model)
    plan = Plan.uniform(profile, "bf16").replace(MIXED | {"lm_head": "fp32"})
    plan.save(place / "plan.json")
    for target in ("ddp", "fsdp2"):
        (place / f"{target}.py").write_text(export(plan, target, str(place / "plan.json")))
    around = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    around |= {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "export_worker", str(place)]
    logs = [(place / f"log{rank}").open("w+") for rank in (0, 1)]
    started = [
        subprocess.Popen(
            [*command, str(rank)],
            env=os.environ | around | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    until = time.monotonic() + 280
    try:
        # where one ends in an error the other would wait for it
        while time.monotonic() < until and None in (codes := [p.poll() for p in started]) and not any(codes):
            time.sleep(0.1)
    finally:
        for process in started:
            process.kill()
            process.wait()
        for log in logs:
            log.close()
    said = "\n".join((place / f"log{rank}").read_text()[-3000:] for rank in (0, 1))
    assert all((place / f"{rank}.json").exists() for rank in (0, 1)), said
    yield [json.loads((place / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_give_the_bits_of_one_and_the_formats_of_the_plan(
    way: str, two_processes: list[dict[str, list[str]]]
) -> None:
    for rank, result in enumerate(two_processes):
        assert result[way] == [], f"process {rank}:\n" + "\n".join(result[way][:20])


# graphs


#: torch.export's own
LEAFSPEC = pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")


@LEAFSPEC
@pytest.mark.parametrize("make", [tiny, tiny_gpt2])
def test_a_traced_program_holds_every_product_in_its_format(make: Any, tmp_path: Path) -> None:
    model = make()
    plan = Plan.uniform(model, "bf16").replace(MIXED)
    trace = program(plan, "tensorrt", tmp_path)["trace"](model, input_ids=ids())
    found = products(trace, plan, model)
    assert {p.module for p in found if p.module} == {m for unit in plan.units for m in unit.modules}
    assert {p.executed for p in found} == {("bf16",), ("fp16",), ("fp32",)}
    assert all(p.planned is not None and p.executed == (str(p.planned),) for p in found)
    dots = [(p.unit, p.executed) for p in found if p.module is None]
    assert dots == [("blocks.0.attention", ("bf16",)), ("blocks.1.attention", ("fp16",))]
    with autoprec.applied(model.eval(), plan), torch.no_grad():
        assert torch.equal(trace.module()(input_ids=ids()).logits, model(input_ids=ids()).logits)


@LEAFSPEC
def test_a_program_is_not_taken_for_another_plans() -> None:
    model = tiny()
    plan = Plan.uniform(model, "bf16")
    trace = traced(model, plan, (), {"input_ids": ids()})
    other = plan.replace({"blocks.1.ffn": "fp32"})
    wrong = disagreements(products(trace, other, model), other)
    assert wrong[0] == "linear of model.layers.1.mlp.gate_proj computes in bf16, and the plan says fp32"
    assert len(wrong) == 3


@LEAFSPEC
def test_a_plan_that_a_program_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    monkeypatch.setattr("autoprec.exporters.program.applied", lambda model, plan: nullcontext())  # no casts then
    model = tiny()
    with pytest.raises(PlanError, match=r"does not hold the plan: linear of model\.layers\.0\.self_attn\.q_proj"):
        traced(model, Plan.uniform(model, "bf16"), (), {"input_ids": ids()})


@pytest.mark.parametrize(("low", "runtime"), [("fp16", "onnxruntime"), ("bf16", "reference")])
@pytest.mark.filterwarnings("ignore")  # onnxscript's and torch.onnx's own
def test_onnx_holds_the_plan_and_gives_its_numbers(low: str, runtime: str, tmp_path: Path) -> None:
    import onnx
    import onnxruntime
    from onnx.reference import ReferenceEvaluator

    model = tiny_gpt2()
    plan = Plan.uniform(model, low).replace({"blocks.0.ffn": "fp32", "blocks.1.ffn": "fp16"})
    file = tmp_path / "model.onnx"
    written = program(plan, "onnx", tmp_path)["write"](model, file, input_ids=ids())
    assert written is not None
    if runtime == "onnxruntime":
        session: Any = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    else:  # which has BF16, as onnxruntime's CPU provider has not
        session = ReferenceEvaluator(str(file))
    (got,) = session.run(None, {"input_ids": ids().numpy()})
    with torch.no_grad():
        fp32 = model(input_ids=ids()).logits
        with autoprec.applied(model.eval(), plan):
            wanted = model(input_ids=ids()).logits
    off = torch.from_numpy(got.astype("float32")).sub(wanted.float()).abs().max()
    assert str(got.dtype) == {"fp16": "float16", "bf16": "bfloat16"}[low]
    # logits are below 1: half a unit of the last place where sums end in another order, and what a block carries on
    assert off <= 4 * fp32.abs().max() * {"fp16": 2**-11, "bf16": 2**-8}[low]
    trace, other = traced(model, plan, (), {"input_ids": ids()}), plan.replace({"blocks.0.ffn": low})
    found, relabelled = products(trace, plan, model), products(trace, other, model)
    assert {p.executed for p in graph_products(onnx.load(file), found)} == {(low,), ("fp32",), ("fp16",)}
    with pytest.raises(PlanError, match=r"the ONNX graph does not hold the plan: Gemm of transformer\.h\.0\.mlp\.c_fc"):
        check_graph(onnx.load(file), relabelled, other)


# another framework's model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Keras's own
def test_keras_builds_and_trains_with_the_planned_policies(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    model, exported, losses = example("train_keras").main(["--plan", str(three), *SMALL])
    assert len(losses) == 4 and losses[-1] < losses[0]
    ran = keras_products(model)
    plan = Plan.load(three)
    assert plan.formats == {"fp32", "bf16", "fp16"}
    for unit in plan.units:
        # FP16 products Keras widens by itself where its torch backend runs on a CPU; the policy is checked beside it
        wanted = "fp32" if unit.format == "fp16" else str(unit.format)
        for module in unit.modules:
            if unit.role != "embedding":
                assert ran[f"decoder/{module.replace('.', '/')}"] == {wanted}, module
    computes = {layer.path: layer.compute_dtype for layer in model._flatten_layers()}
    assert computes["decoder/transformer/h/2/mlp/c_fc"] == "float16"
    other = dict(exported.POLICIES) | {"lm_head": "mixed_bfloat16"}
    monkeypatch.setattr(exported, "POLICIES", other)
    with pytest.raises(ValueError, match="decoder/lm_head computes in float32, and the plan says bfloat16"):
        exported.check(model, lambda path: f"decoder/{path}")


def keras_products(model: Any) -> dict[str, set[str]]:
    """Return the formats in which each Keras layer's products ran in one forward pass on the torch backend."""
    from torch.utils._python_dispatch import TorchDispatchMode

    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    running: list[str] = []
    ran: dict[str, set[str]] = {}

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._schema.name.split("::")[-1] in ("mm", "addmm", "bmm", "baddbmm") and running:
                ran.setdefault(running[-1], set()).update(names[a.dtype] for a in args if isinstance(a, torch.Tensor))
            return func(*args, **(kwargs or {}))

    hooks = []
    for layer in model._flatten_layers():
        hooks.append(layer.register_forward_pre_hook(lambda module, args: running.append(module.path)))
        hooks.append(layer.register_forward_hook(lambda module, args, output: running.pop() and None))
    seen: Any = Seen
    with seen(), torch.no_grad():
        model(ids().numpy())
    for hook in hooks:
        hook.remove()
    return ran
