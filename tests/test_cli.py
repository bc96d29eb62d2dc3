"""The command line from outside: help, exit codes, what goes to stdout and what to stderr.

AUTOPREC_UPDATE_GOLDEN=1 rewrites golden/help.txt from the help as it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import samples
from click.testing import CliRunner, Result
from tiny_models import bert_encoder, save
from zoo import ZOO

import autoprec.cli.recommend
import autoprec.cli.search
import autoprec.cli.show
import autoprec.study.run
from autoprec.catalog import find_device
from autoprec.cli.main import main
from autoprec.cli.running import newest_run, slug
from autoprec.errors import DataError, Interrupted
from autoprec.files import as_json, from_json, write_json
from autoprec.plan import Plan
from autoprec.records import DeviceProfile, ModelProfile, Origin, SearchResult, SensitivityProfile

GOLDEN = Path(__file__).parent / "golden" / "help.txt"
COMMANDS = ("probe", "recommend", "search", "show", "verify", "compare", "export", "doctor")


def autoprec_run(*arguments: str) -> Result:
    """Run the command inside this process."""
    return CliRunner(env={"COLUMNS": "80"}).invoke(main, arguments)


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command as users do, in a process of its own."""
    command = [sys.executable, "-m", "autoprec", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=250, **options)


def assert_failed(result: Result, code: int, *wanted: str) -> None:
    """Check that a command failed with one clear message on stderr and nothing on stdout."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert sum(line.startswith("Error: ") for line in result.stderr.splitlines()) == 1, result.stderr
    missing = [w for w in wanted if w not in result.stderr]
    assert not missing, f"{missing} not in: {result.stderr}"


def one_document(text: str) -> Any:
    """Return the JSON document that is all of `text`."""
    return json.loads(text)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units are timed for a second, not ten: here it matters what is said of them."""
    monkeypatch.setattr("autoprec.cli.probe._SPEED_SECONDS", 1.0)


@pytest.fixture
def plan_file(here: Path) -> str:
    samples.plan().save("plan.json")
    return "plan.json"


# help


def all_help() -> str:
    pages = []
    for command in ((), *((name,) for name in COMMANDS)):
        result = autoprec_run(*command, "--help")
        assert result.exit_code == 0
        pages.append(f"$ {' '.join(('autoprec', *command, '--help'))}\n{result.stdout}")
    return "\n".join(pages)


def test_help_is_the_golden_text() -> None:
    text = all_help()
    if os.environ.get("AUTOPREC_UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text(), "see the difference, then update with AUTOPREC_UPDATE_GOLDEN=1"


def test_help_fits_80_columns_and_lists_commands_in_the_order_of_work() -> None:
    text = all_help()
    assert max(map(len, text.splitlines())) <= 80
    assert "..." not in autoprec_run("--help").stdout.partition("Commands:")[2]  # no sentence cut off
    listed = re.findall(r"^  (\w+)  +\w", autoprec_run("--help").stdout.partition("Commands:")[2], re.MULTILINE)
    assert tuple(listed) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_is_complete(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    first = (command.help or "").split("\n\n")[0]
    assert 0 < len(first) < 60
    for option in (p for p in command.params if isinstance(p, click.Option)):
        assert option.help, f"{option.opts} has no help"
        told = option.show_default or option.is_flag or "[required]" in option.help or option.name in UNSET
        assert told, f"{option.opts} does not say its default"


#: options that are off unless given
UNSET = {"metric", "data"}


def test_help_of_every_command_loads_nothing_heavy() -> None:
    code = """
import sys
from click.testing import CliRunner
from autoprec.cli.main import main
for name in sys.argv[1:]:
    assert CliRunner().invoke(main, [name, "--help"]).exit_code == 0
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""
    run = subprocess.run([sys.executable, "-c", code, *COMMANDS], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "optuna", "pandas", "sklearn", "scipy", "numpy", "rich", "pydantic", "torchao"}
    assert not heavy & set(run.stdout.split())


def test_version() -> None:
    assert autoprec_run("--version").stdout == f"autoprec, version {autoprec.__version__}\n"


# usage and errors


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["search", "demo", "--nonsense"], "No such option"),
        (["recommend"], "Missing argument 'MODEL'"),
        (["search", "demo", "--trials", "0"], "0 is not in the range x>=1"),
        (["search", "demo", "--budget", "2hours"], "'2hours' is not a duration. Write it like 90s, 45m, 2h or 1h30m."),
        (["search", "demo", "--max-drop", "much"], "'much' is not a drop limit"),
        (["recommend", "demo", "--max-drop", "-1"], "a drop limit must be zero or more"),
        (["recommend", "demo", "--method", "half"], "'half' is not one of 'full', 'lora', 'qlora'"),
    ],
)
def test_usage_errors_exit_2(here: Path, arguments: list[str], wanted: str) -> None:
    assert_failed(autoprec_run(*arguments), 2, wanted)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["show", "none.json"], "none.json does not exist"),
        (["export", "none.json", "--to", "python"], "none.json does not exist"),
        (["recommend", "no/such/folder/here"], "there is no model folder"),
        (["recommend", "demo", "--device", "nope"], "there is no device 'nope'"),
        (["search", "demo", "--data", "none.txt"], "none.txt"),
        (["search", "demo", "--device", "nope"], "there is no device 'nope'"),
        (["search", "demo", "--device", "mps"], "there is no device 'mps'"),
        (["search", "demo", "--device", "cpu-amx-bf16"], "no time can be predicted for cpu-amx-bf16"),
        (["probe", "--device", "nope"], "there is no device 'nope'"),
        (["probe", "demo", "--device", "t4", "--batches", "2"], "'t4' is not here"),
    ],
)
def test_what_cannot_be_done_exits_1_and_writes_nothing(here: Path, arguments: list[str], wanted: str) -> None:
    assert_failed(autoprec_run(*arguments), 1, wanted)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("content", [b"\x00\xff\x00\xfe" * 64, b"", b"  \n"])
def test_data_that_cannot_be_used_are_refused(here: Path, content: bytes) -> None:
    Path("data.txt").write_bytes(content)
    assert_failed(autoprec_run("search", "demo", "--data", "data.txt"), 1, "data.txt")
    assert [path.name for path in here.iterdir()] == ["data.txt"]


def fail_with(error: BaseException) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_an_unexpected_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoprec.cli.show, "read_json", fail_with(RuntimeError("a\n  b")))
    result = autoprec_run("show", "plan.json")
    assert_failed(result, 1)
    assert result.stderr == "Error: unexpected RuntimeError: a b; run with AUTOPREC_DEBUG=1 for the traceback\n"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoprec.cli.show, "read_json", fail_with(RuntimeError("a")))
    monkeypatch.setenv("AUTOPREC_DEBUG", "1")
    result = autoprec_run("show", "plan.json")
    assert "Traceback" in result.stderr and "raise error" in result.stderr
    assert result.exit_code == 1


def test_ctrl_c_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoprec.cli.show, "read_json", fail_with(KeyboardInterrupt()))
    result = autoprec_run("show", "plan.json")
    assert result.exit_code == 130
    assert result.stderr.strip() == "Interrupted."


@pytest.mark.parametrize("arguments", [["--help"], ["export", "plan.json", "--to", "python"]])
def test_a_reader_that_leaves_is_no_error(plan_file: str, arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)  # as `| true` does
    command = [sys.executable, "-m", "autoprec", *arguments]
    run = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert run.returncode == 1
    assert run.stderr == ""


def test_a_terminal_without_utf8_gets_question_marks(plan_file: str) -> None:
    run = process("show", plan_file, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert run.returncode == 0
    assert "drop 0.00123 ?0.00010 nats" in run.stdout


# probe


def test_probe_prints_device_and_units() -> None:
    result = autoprec_run("probe", "demo", "--device", "h100-sxm")
    assert result.exit_code == 0, result.output
    for wanted in ("Device h100-sxm-80gb", "not here: datasheet", "Model demo", "blocks.0-3.attention"):
        assert wanted in result.stdout
    assert "Reading demo" in result.stderr


def test_probe_json_is_one_document_that_reads_back() -> None:
    result = autoprec_run("probe", "demo", "--device", "t4", "--json")
    data = one_document(result.stdout)
    assert data["schema"] == "autoprec/probe@1"
    assert from_json(DeviceProfile, data["device"], what="device").name == "t4"
    assert from_json(ModelProfile, data["model"], what="model").unassigned == ()


def test_probe_keeps_what_it_measured_and_its_name_finds_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(here / "data"))
    result = autoprec_run("probe", "--device", "cpu", "--json")
    device = one_document(result.stdout)["device"]
    kept = list((here / "data").rglob("*.json"))
    assert len(kept) == 1 and str(kept[0]) in result.stderr
    known = find_device(device["name"])
    assert known.origin is Origin.MEASURED and known.gemm_rates[0].tflops == device["gemm_rates"][0]["tflops"]
    advice = one_document(autoprec_run("recommend", "demo", "--device", device["name"], "--json").stdout)
    rate = max((r for r in device["gemm_rates"] if r["format"] == "fp32"), key=lambda r: r["size"])
    assert advice["expected"]["rates_tflops"]["fp32"] == {"value": rate["tflops"], "origin": "measured"}
    kept[0].write_text(kept[0].read_text().replace(f'"tflops": {rate["tflops"]}', '"tflops": 0.0'))
    broken = autoprec_run("recommend", "demo", "--device", device["name"])
    assert_failed(broken, 1, str(kept[0]), "matmul rate in fp32", "is 0")


def test_probe_of_an_absent_device_says_what_is_known_and_where_from() -> None:
    output = autoprec_run("probe", "--device", "v100s").stdout
    assert "not here: datasheet" in output and "130" in output and "source of peak_tflops" in output
    assert "the best measured matmul reaches 83% in fp32" in output
    assert "kept in" not in output


def test_probe_without_a_model_has_no_units() -> None:
    assert one_document(autoprec_run("probe", "--device", "t4", "--json").stdout)["model"] is None


SMALL = ("--batches", "2", "--batch-size", "2", "--seq-len", "32")


def test_probe_shows_the_drop_of_every_unit_and_keeps_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    result = autoprec_run("probe", "demo", *SMALL)
    assert result.exit_code == 0, result.output
    for wanted in (
        "Sensitivity of demo",
        "bf16, nats",
        "fp8, nats",
        "share",
        "Weight gradients",
        "loss scale for fp16",
    ):
        assert wanted in result.stdout
    kept = Path(result.stdout.rpartition("as JSON  ")[2].strip())
    profile = from_json(SensitivityProfile, json.loads(kept.read_text()), what="kept")
    order = [d.unit for d in sorted(profile.drops, key=lambda d: -d.drop.value) if d.format == "fp8"]
    shown = result.stdout[result.stdout.index("Sensitivity of") :]
    places = [shown.index(f"\n  {unit} ") for unit in order]
    assert places == sorted(places), "most sensitive first"
    again = one_document(autoprec_run("probe", "demo", *SMALL, "--json").stdout)
    assert from_json(SensitivityProfile, again["sensitivity"], what="again") == profile


def test_probe_of_what_cannot_be_trained_leaves_gradients_out(here: Path) -> None:
    save(bert_encoder(), here / "encoder", framed=True)
    result = autoprec_run("probe", "encoder", *SMALL)
    assert result.exit_code == 0, result.output
    assert "nothing to train towards" in result.stderr
    assert "relative squared error" in result.stdout and "Weight gradients" not in result.stdout


def test_probe_of_an_image_model_lists_units_and_says_why_no_more(here: Path) -> None:
    ZOO["vit"]().model.save_pretrained(here / "vit")  # type: ignore[operator]
    result = autoprec_run("probe", "vit")
    assert result.exit_code == 0, result.output
    assert "Units only, without drops" in result.stderr and "takes images" in result.stderr
    assert "Model vit" in result.stdout and "Sensitivity" not in result.stdout


NOISY = """
import warnings
import torch

print("to stdout")
warnings.warn("to stderr")

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(16, 8)
        self.head = torch.nn.Linear(8, 16)

    def forward(self, ids):
        return self.head(self.embed(ids))

def make():
    print("more to stdout")
    return Net()
"""


def test_what_users_code_prints_stays_off_stdout(here: Path) -> None:
    Path("net.py").write_text(NOISY)
    run = process("probe", "net.py:make", "--device", "t4", "--json")
    assert run.returncode == 0, run.stderr
    assert one_document(run.stdout)["model"]["model_id"] == "net.py:make"
    assert "more to stdout" in run.stderr
    assert "to stderr" not in run.stderr


# recommend


def test_recommend_prints_and_writes_the_plan(here: Path) -> None:
    result = autoprec_run("recommend", "demo", "--device", "t4", "--out", "new/folder")
    assert result.exit_code == 0, result.output
    plan = Plan.load("new/folder/plan.json")
    for wanted in ("blocks.0-3.ffn", "fp16=True", "GradScaler from 65536", "new/folder/plan.json", "uniform fp32"):
        assert wanted in result.stdout
    assert plan.device.name == "t4"
    assert plan.grad_scaler is not None


def test_recommend_shows_where_memory_goes(here: Path) -> None:
    told = autoprec_run("recommend", "demo", "--device", "t4").stdout
    for wanted in ("memory  ", "predicted", "activations", "sequences fit"):
        assert wanted in told
    assert "alternatives" not in told
    told = autoprec_run("recommend", "demo", "--device", "t4", "--explain").stdout
    assert "alternatives" in told and "simple count" in told and "fp32 weights under the plan" in told


def test_recommend_explains(here: Path) -> None:
    told = autoprec_run("recommend", "demo", "--device", "t4", "--explain").stdout
    for unit in Plan.load("plan.json").units:
        assert unit.name in told
    assert "Memory" in told and "optimizer" in told


def test_recommend_json_is_one_document(here: Path) -> None:
    result = autoprec_run("recommend", "demo", "--device", "h100-sxm", "--mode", "infer", "--json")
    data = one_document(result.stdout)
    assert data["schema"] == "autoprec/recommendation@1"
    assert Plan.from_json(data["plan"]) == Plan.load("plan.json")
    assert "Wrote plan.json" in result.stderr


def test_recommend_refuses_a_file_as_its_folder(here: Path) -> None:
    Path("taken").write_text("mine")
    assert_failed(
        autoprec_run("recommend", "demo", "--device", "t4", "--out", "taken"), 1, "--out taken cannot be used"
    )
    assert Path("taken").read_text() == "mine"


# show


def test_show_a_plan(plan_file: str) -> None:
    result = autoprec_run("show", plan_file)
    assert result.exit_code == 0
    assert "blocks.0-2.attention" in result.stdout
    for said in (
        "What runs",
        "operands and results rounded to bf16",
        "autoprec.apply(model",
        "autoprec verify plan.json",
    ):
        assert said in result.stdout
    assert Plan.from_json(one_document(autoprec_run("show", plan_file, "--json").stdout)) == samples.plan()


def test_show_a_run_folder_and_its_result(here: Path) -> None:
    Path("run").mkdir()
    write_json("run/result.json", as_json(samples.search_result()))
    samples.plan().save("run/plan.json")
    for what in ("run", "run/result.json"):
        text = autoprec_run("show", what).stdout
        assert "trial 14" in text and "Plan for org/tiny-llama" in text and "run/plan.json" in text
        data = one_document(autoprec_run("show", what, "--json").stdout)
        assert from_json(SearchResult, data, what="result") == samples.search_result()


def test_show_a_recommendation_by_its_plan(here: Path) -> None:
    write_json("r.json", {"schema": "autoprec/recommendation@1", "plan": samples.plan().to_json()})
    assert Plan.from_json(one_document(autoprec_run("show", "r.json", "--json").stdout)) == samples.plan()


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("{", "is damaged or cut off"),
        ("[]", "neither a plan nor a result: its schema is 'missing'"),
        ('{"schema": "autoprec/search@9"}', "its schema is 'autoprec/search@9'"),
        ('{"schema": "autoprec/search@1"}', "is not valid at"),
        ('{"schema": "autoprec/plan@1"}', "is not valid at"),
        ('{"schema": "autoprec/plan@7"}', "install a newer autoprec"),
    ],
)
def test_show_refuses_what_it_cannot_read(here: Path, content: str, wanted: str) -> None:
    Path("x.json").write_text(content)
    assert_failed(autoprec_run("show", "x.json"), 1, "x.json", wanted)


def test_show_an_empty_folder_says_how_to_go_on(here: Path) -> None:
    Path("run").mkdir()
    assert_failed(autoprec_run("show", "run"), 1, "autoprec search MODEL --resume --out run")
    write_json("run/units.json", {"model_id": "org/a"})
    assert_failed(autoprec_run("show", "run"), 1, "autoprec search org/a --resume --out run")


# export


def test_export_to_stdout_and_to_a_file(plan_file: str) -> None:
    shown = autoprec_run("export", plan_file, "--to", "python")
    compile(shown.stdout, "exported", "exec")
    written = autoprec_run("export", plan_file, "--to", "python", "--out", "train.py")
    assert written.stdout == ""
    assert Path("train.py").read_text() == shown.stdout


def test_export_lists_its_targets(plan_file: str) -> None:
    assert_failed(autoprec_run("export", plan_file, "--to", "onx"), 2, "'onx' is no export target", "closest: onnx")
    assert_failed(autoprec_run("export", plan_file), 2, "--to is missing", "python, transformers")


def test_export_refuses_what_a_target_cannot_express(plan_file: str) -> None:
    found = autoprec_run("export", plan_file, "--to", "torchao", "--out", "x.py")
    assert_failed(found, 1, "'torchao' cannot express this plan", "model.layers.0.mlp.gate_proj", "nearest(")
    assert not Path("x.py").exists()


def test_export_to_a_missing_folder_writes_nothing(plan_file: str) -> None:
    assert_failed(autoprec_run("export", plan_file, "--to", "python", "--out", "no/x.py"), 1, "cannot write no/x.py")


# search: what is asked of the library, and what is done with its answer


@pytest.fixture
def asked(here: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Note what a search would be asked, and answer with the sample result."""
    seen: dict[str, Any] = {}

    def begin(options: dict[str, Any]) -> Any:
        seen.update(model=options["model"], workload=options)
        return SimpleNamespace(load=lambda device: SimpleNamespace(notes=("a note",))), [contextlib.nullcontext()]

    def search(workload: Any, **options: Any) -> SearchResult:
        seen.update(options)
        if "raise" in seen:
            raise seen["raise"]
        return samples.search_result()

    monkeypatch.setattr(autoprec.cli.search, "_begin", begin)
    monkeypatch.setattr(autoprec.study.run, "search", search)
    return seen


def run_folder(name: str, model: str) -> Path:
    folder = Path("autoprec-runs") / name
    folder.mkdir(parents=True)
    write_json(folder / "units.json", {"model_id": model})
    return folder


def test_search_passes_its_options_on(asked: dict[str, Any]) -> None:
    result = autoprec_run(
        "search", "org/m", "--data", "d.txt", "--batch-size", "4", "--budget", "1h", "--trials", "9", "--mode", "infer",
        "--max-drop", "0.01", "--space", "roles", "--seed", "3", "--out", "run", "--storage", "sqlite:///s.db",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert asked["model"] == "org/m"
    workload = asked["workload"]
    assert (workload["data"], workload["batch_size"], workload["mode"]) == ("d.txt", 4, "infer")
    assert (workload["seq_len"], workload["seed"], workload["trust_remote_code"]) == (None, 3, False)
    assert (asked["budget"], asked["trials"], asked["max_drop"]) == ("1h", 9, "0.01")
    assert (asked["space"], asked["storage"], asked["seed"]) == ("roles", "sqlite:///s.db", 3)
    assert (asked["out"], asked["resume"]) == (Path("run"), False)
    assert "a note" in result.stderr
    assert "trial 14" in result.stdout and "use-plan" in result.stdout


def test_search_tells_the_report_its_command_without_a_password(asked: dict[str, Any]) -> None:
    url = "postgresql+psycopg://me:s3cret@db.local:5432/studies"
    autoprec_run("search", "org/m", "--budget", "2h", "--resume", "--out", "run", "--storage", url)
    assert asked["storage"] == url
    assert asked["command"] == "autoprec search org/m --budget 2h --storage " + "'" + url.replace("s3cret", "***") + "'"


def test_search_json_is_the_result_alone(asked: dict[str, Any]) -> None:
    result = autoprec_run("search", "org/m", "--json")
    assert from_json(SearchResult, one_document(result.stdout), what="result") == samples.search_result()


def test_search_makes_a_run_folder_of_its_own(asked: dict[str, Any]) -> None:
    autoprec_run("search", "org/My Model")
    assert re.fullmatch(r"autoprec-runs/\d{8}-\d{6}-my-model", str(asked["out"]))
    assert slug("models/") == "models"
    assert slug("net.py:make") == "net-py-make"
    assert slug("é") == "model"


def test_search_without_a_model_takes_the_demo_and_says_so(asked: dict[str, Any]) -> None:
    result = autoprec_run("search")
    assert asked["model"] == "demo"
    assert result.stderr.startswith("Searching demo, the model that ships with autoprec")


def test_search_without_a_model_takes_that_of_the_newest_run(asked: dict[str, Any]) -> None:
    run_folder("20250101-000000-b", "org/b")
    run_folder("20240101-000000-a", "org/a")
    run_folder("zzz-not-a-run", "org/c")
    result = autoprec_run("search")
    assert asked["model"] == "org/b"
    assert result.stderr.startswith(
        "Searching org/b, the model of the newest run here (autoprec-runs/20250101-000000-b)"
    )


@pytest.mark.parametrize("header", ["", "[autoprec]\n"])
def test_search_without_a_model_takes_the_settings_file(asked: dict[str, Any], header: str) -> None:
    run_folder("20250101-000000-b", "org/b")
    Path("autoprec.toml").write_text(f'{header}model = "org/t"\nbudget = "5m"\nbatch-size = 2\nmax-drop = "1%"\n')
    result = autoprec_run("search", "--budget", "7m")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("Searching org/t, the model of ./autoprec.toml")
    assert (asked["model"], asked["budget"], asked["max_drop"]) == ("org/t", "7m", "1%")
    assert asked["workload"]["batch_size"] == 2


def test_a_named_model_leaves_the_settings_file_alone(asked: dict[str, Any]) -> None:
    Path("autoprec.toml").write_text('model = "org/t"\nbudget = "5m"\n')
    autoprec_run("search", "org/m")
    assert (asked["model"], asked["budget"]) == ("org/m", "20m")


@pytest.mark.parametrize(
    ("content", "code", "wanted"),
    [
        ("budgit = 5", 2, "sets 'budgit', which is no option of search; closest: budget"),
        ("trials = 0", 2, "sets trials = 0: 0 is not in the range x>=1"),
        ('trials = "many"', 2, "'many' is not a valid integer range"),
        ("model = ", 1, "./autoprec.toml cannot be read"),
        ("[other]\nmodel = 'x'", 2, "sets 'other', which is no option of search"),
    ],
)
def test_a_wrong_settings_file_is_told(asked: dict[str, Any], content: str, code: int, wanted: str) -> None:
    Path("autoprec.toml").write_text(content)
    assert_failed(autoprec_run("search"), code, wanted)


def test_resume_goes_on_in_the_newest_run_of_the_model(asked: dict[str, Any]) -> None:
    mine = run_folder("20250101-000000-a", "org/a")
    run_folder("20250301-000000-b", "org/b")
    autoprec_run("search", "org/a", "--resume")
    assert (asked["out"], asked["resume"]) == (mine, True)
    result = autoprec_run("search", "--resume", "--out", str(mine))
    assert (asked["model"], asked["out"]) == ("org/a", mine)
    assert "Searching org/a, the model of autoprec-runs/20250101-000000-a" in result.stderr
    assert newest_run("org/none") is None
    autoprec_run("search", "org/none", "--resume")
    assert asked["out"].name.endswith("-none")  # nothing to resume: it starts


@pytest.mark.parametrize("as_document", [False, True])
def test_an_interrupted_search_shows_its_best_and_the_line_that_resumes(
    asked: dict[str, Any], as_document: bool
) -> None:
    asked["raise"] = Interrupted("stopped", folder="a run", result=samples.search_result())
    Path("autoprec.toml").write_text('model = "org/t"\nseq-len = 64\n')
    result = autoprec_run("search", "--data", "my text.txt", "--seed", "4", *(["--json"] if as_document else []))
    assert result.exit_code == 130
    if as_document:
        assert one_document(result.stdout)["schema"] == "autoprec/search@1"
    else:
        assert "trial 14" in result.stdout
    line = result.stderr.splitlines()[-1].strip()
    json_flag = " --json" if as_document else ""
    assert line == (
        f"autoprec search org/t --data 'my text.txt' --seq-len 64 --seed 4{json_flag} --resume --out 'a run'"
    )


def test_a_search_that_fails_says_so_alone(asked: dict[str, Any]) -> None:
    asked["raise"] = DataError("nothing to count")
    assert_failed(autoprec_run("search", "org/m"), 1, "Error: nothing to count")


# the whole way, on the model that ships


@pytest.mark.slow
def test_a_search_from_the_shell_interrupted_and_resumed(here: Path) -> None:
    # a card that is not here, so that there is something to search on any CPU
    quick = "--mode infer --batches 2 --batch-size 2 --seq-len 32 --device h100-sxm".split()
    command = [sys.executable, "-m", "autoprec", "search", "demo", "--budget", "5m", "--out", "run", *quick]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        told = []
        for line in running.stderr:
            told.append(line)
            if "search: trial" in line:
                running.send_signal(signal.SIGINT)
                break
        out, rest = running.communicate(timeout=120)
    assert running.returncode == 130, "".join(told) + rest
    assert "Front" in out
    resume = rest.splitlines()[-1].strip()
    assert resume.startswith("autoprec search demo") and resume.endswith("--resume --out run")
    assert autoprec_run("show", "run").exit_code == 0

    again = process(*resume.split()[1:], "--trials", "4", "--json")
    assert again.returncode == 0, again.stderr
    data = one_document(again.stdout)
    assert data == one_document(Path("run/result.json").read_text())
    assert data["trials"] >= 1
    front = [(m["drop"], m["step_ms"]) for m in data["front"]]
    assert front and all(drop is not None and ms > 0 for drop, ms in front)
    if data["chosen"] is not None:
        plan = process("show", "run/plan.json", "--json")
        assert one_document(plan.stdout)["model"]["id"] == "demo"
