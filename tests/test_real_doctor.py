"""The doctor on trained models: nothing above a note, and figures of a trace that are the model's."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_real_models import part

from autoprec.doctor.diagnosis import diagnose
from autoprec.doctor.hosts import host_profile
from autoprec.formats import Format
from autoprec.records import Severity, Support

pytestmark = pytest.mark.real


@pytest.mark.parametrize("name", ["smollm2", "minilm", "vit-digits"])
def test_trained_models_are_well(name: str, tmp_path: Path) -> None:
    (tmp_path / "args.json").write_text('{"bf16": true, "learning_rate": 2e-5, "per_device_train_batch_size": 8}')
    found = diagnose(str(part(name)), settings=[str(tmp_path / "args.json")])
    assert found.worst in (None, Severity.NOTE), [(f.code, f.evidence) for f in found.findings]


@pytest.mark.nightly
def test_a_trace_of_smollm2_finds_its_large_activations(tmp_path: Path) -> None:
    (tmp_path / "args.json").write_text('{"bf16": true}')
    found = diagnose(str(part("smollm2")), settings=[str(tmp_path / "args.json")], trace=True)
    assert found.trace is not None
    # measured by the trace: on a CPU without units for BF16 a step takes longer in it (9 times with AVX2)
    slow = set() if host_profile().supports(Format.BF16) is Support.NATIVE else {"AP011"}
    assert {finding.code for finding in found.findings if finding.severity is not Severity.NOTE} == slow
    largest = max(found.trace.units, key=lambda unit: unit.largest_activation)
    assert largest.unit == "blocks.11.ffn" and largest.largest_activation > 65504 / 8
    assert "AP041" in {finding.code for finding in found.findings}
