"""What each export target was seen to do here, as a table in docs/exports.md: from the tests that do it, run now.

A cell says `yes` where every test behind it passed, `FAILED` where one did not, and nothing where there is none.

    python benchmarks/exports_table.py
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from record import ROOT, write_result

from autoprec.exporters import TARGETS

PAGE = ROOT / "docs" / "exports.md"
COLUMNS = ("exported", "loads", "runs on CPU", "audit equal")
LAST = "not run because, or what to know"
TEXT = "test_exporters::test_every_target_compiles_and_names_formats_and_plan[{plan}-{target}]"
PLANS = ("mixed", "fp16", "fp8", "cast", "infer")
RUNS, CHECKED = "test_export_runs::", "test_export_checked::"


@dataclass(frozen=True, slots=True)
class Row:
    """The tests behind a target's cells: that its library takes the text, that it ran, that formats were the plan's."""

    loads: tuple[str, ...]
    runs: tuple[str, ...] = ()
    audited: tuple[str, ...] = ()
    note: str = ""


def both(*tests: str) -> dict[str, tuple[str, ...]]:
    """Return tests that run a target to the end and audit it."""
    named = tuple(test if "::" in test else f"{RUNS}{test}" for test in tests)
    return {"loads": named, "runs": named, "audited": named}


TRAINS = "test_exporters::test_the_{}_target_trains"
ONNX = "test_onnx_holds_the_plan_and_gives_its_numbers"
WAY = "test_two_processes_give_the_bits_of_one_and_the_formats_of_the_plan"
TRACED = "test_a_traced_program_holds_every_product_in_its_format"
ROWS = {
    "python": Row(**both(f"{TRAINS.format('python')}_a_model_under_the_plan[bf16]")),
    "transformers": Row(**both(f"{TRAINS.format('transformers')}_with_a_trainer")),
    "accelerate": Row(**both("test_accelerate_launch_reads_the_file_and_trains_as_planned")),
    "lightning": Row(**both("test_lightning_fits_a_model_as_planned")),
    "ddp": Row(**both(f"{WAY}[ddp]")),
    "fsdp2": Row(**both(f"{WAY}[fsdp2]", f"{WAY}[fsdp2 with low_gather]")),
    "torch-compile": Row(
        **both(
            "test_compiled_blocks_share_graphs_and_give_the_bits_of_eager_ones",
            "test_the_example_of_compiled_blocks_trains_as_planned",
        )
    ),
    "torchao": Row(**both("test_torchao_converts_the_planned_layers")),
    "onnx": Row(
        **both(f"{ONNX}[fp16-onnxruntime]", f"{ONNX}[bf16-reference]"),
        note="BF16 ran in ONNX's reference evaluator; equal are the graph's types; onnxruntime may widen FP16",
    ),
    "tensorrt": Row(
        loads=(f"{CHECKED}test_tensorrts_front_end_takes_the_program",),
        audited=(f"{RUNS}{TRACED}[tiny]", f"{RUNS}{TRACED}[tiny_gpt2]"),
        note="an engine needs an NVIDIA GPU; partitioned with a stand-in for TensorRT, the program audited",
    ),
    "keras": Row(
        **both("test_keras_builds_and_trains_with_the_planned_policies"),
        note="forward only was audited; FP16 products are widened by Keras's torch backend on a CPU",
    ),
    "jax": Row(
        loads=(f"{CHECKED}test_flax_builds_a_module_with_the_planned_dtypes",),
        audited=(f"{CHECKED}test_flax_builds_a_module_with_the_planned_dtypes",),
        note="Transformers has no Flax models any more; Flax layers built with it were traced",
    ),
    "deepspeed": Row(
        loads=tuple(f"{CHECKED}test_deepspeed_reads_the_configuration[{low}]" for low in ("bf16", "fp16")),
        note="no GPU here; read by DeepSpeed's own parser",
    ),
    "swift": Row(
        loads=(f"{CHECKED}test_swift_has_what_the_plugin_uses",),
        note="its dependencies exclude this Transformers; its names and signatures were read",
    ),
    "torchtitan": Row(
        loads=(f"{CHECKED}test_torchtitan_converts_the_planned_layers",),
        note="its converter needs a GPU; its own filter was run on the names of its Llama",
    ),
    "transformer-engine": Row(
        loads=(f"{CHECKED}test_transformer_engine_reads_the_recipe_and_the_exclusions",),
        note="it cannot be imported without CUDA; the file was read by nvdlfw-inspect, the recipe built",
    ),
}


def outcomes() -> dict[str, str]:
    """Run the tests and return the outcome of each by its file and name."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        files = ["tests/test_exporters.py", "tests/test_export_runs.py", "tests/test_export_checked.py"]
        command = [sys.executable, "-m", "pytest", "-q", "--timeout", "3600", "-m", "", f"--junitxml={report}", *files]
        subprocess.run(command, cwd=ROOT, check=False)
        found = {}
        for case in ElementTree.parse(report).iter("testcase"):
            bad = any(case.find(tag) is not None for tag in ("failure", "error", "skipped"))
            found[f"{(case.get('classname') or '').rpartition('.')[2]}::{case.get('name')}"] = (
                "FAILED" if bad else "yes"
            )
        return found


def cell(tests: tuple[str, ...], found: dict[str, str]) -> str:
    """Return what a cell says; a test that did not run at all fails it."""
    if not tests:
        return ""
    return "yes" if all(found.get(test) == "yes" for test in tests) else "FAILED"


def main() -> None:
    """Run the tests, write the result and the table."""
    found = outcomes()
    table: dict[str, dict[str, str]] = {}
    for target in TARGETS:
        row = ROWS[target]
        exported = tuple(TEXT.format(plan=plan, target=target) for plan in PLANS)
        cells = (cell(tests, found) for tests in (exported, row.loads, row.runs, row.audited))
        table[target] = dict(zip(COLUMNS, cells, strict=True)) | {LAST: row.note}
    write_result("exports-table", table)
    lines = [f"| target | {' | '.join((*COLUMNS, LAST))} |", f"|{'---|' * 6}"]
    lines += [f"| `{target}` | {' | '.join(cells.values())} |" for target, cells in table.items()]
    text = re.sub(
        r"(<!-- table: begin .*? -->\n).*?(<!-- table: end -->)",
        lambda match: match[1] + "\n".join(lines) + "\n" + match[2],
        PAGE.read_text(),
        flags=re.DOTALL,
    )
    PAGE.write_text(text)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
