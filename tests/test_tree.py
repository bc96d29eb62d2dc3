"""The decision tree: what ships, what it does within an allowance, and what a user's own searches add."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import sklearn.tree
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoprec.catalog import device_names, find_device
from autoprec.files import as_json, from_json
from autoprec.formats import Format
from autoprec.models import catalogued_facts, catalogued_profile
from autoprec.plan import Plan
from autoprec.predict.additive import step_prices
from autoprec.predict.setup import Optimizer, Setup
from autoprec.predict.steptime import predict_step
from autoprec.probe.outliers import weight_outliers
from autoprec.probe.units import probe_units
from autoprec.recommender.choice import within
from autoprec.recommender.gains import Gains
from autoprec.recommender.learned import current_tree, shipped_tree
from autoprec.recommender.measures import FEATURES
from autoprec.recommender.recommender import recommend, recommend_plan
from autoprec.recommender.table import COLUMNS, add_rows, as_csv, read_tables, shipped_texts, table_digest, user_table
from autoprec.recommender.tree import Leaf, Tree, fit_tree, tree_lines
from autoprec.records import Mode, Role

FP32, BF16, FP8 = Format.FP32, Format.BF16, Format.FP8
GPT2, LLAMA = "openai-community/gpt2", "meta-llama/Llama-3.1-8B"


@pytest.fixture(autouse=True)
def own_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Give every test a user without a table."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


# what ships


def test_the_shipped_tree_is_that_of_the_shipped_table() -> None:
    texts = shipped_texts()
    tables = read_tables(texts)
    assert tables.notes == () and 1000 < len(tables.rows) <= 20_000
    assert sum(map(len, texts.values())) <= 2_000_000
    assert set(tables.rows["origin"]) == {"solved"} and tables.rows["group"].nunique() >= 12
    assert set(tables.rows["device"]) <= set(device_names())
    again = fit_tree(tables.rows, table_digest(texts))
    assert again == shipped_tree(), "run benchmarks/tree_table.py"


def test_it_can_be_read_and_says_what_its_leaves_are() -> None:
    lines = list(tree_lines(shipped_tree()))
    assert len(lines) <= 60
    text = "\n".join(lines)
    for label in ("fp32", "half", "fp8"):
        assert f"→ {label} (" in text
    leaves = [node for node in shipped_tree().nodes if isinstance(node, Leaf)]
    for leaf in leaves:  # more bits, less drop
        assert leaf.drop("fp16", "ffn") <= leaf.drop("bf16", "ffn") <= leaf.drop("fp8", "ffn")
        assert leaf.drop("fp32", "ffn") == 0


def test_scikit_learn_follows_the_same_paths() -> None:
    rows = read_tables(shipped_texts()).rows.sample(2000, random_state=1)
    tree = fit_tree(rows, "", leaves=6)
    facts = rows[list(FEATURES)].to_numpy(dtype=float)
    labels = [tree.follow(dict(zip(FEATURES, row, strict=True)))[0].label for row in facts]
    model = sklearn.tree.DecisionTreeClassifier(max_leaf_nodes=6, min_samples_leaf=0.01, random_state=0)
    model.fit(facts, rows["label"], sample_weight=rows["stake"] + 0.01)
    assert sum(a == b for a, b in zip(labels, model.predict(facts), strict=True)) > 1990


def test_nothing_heavy_is_loaded_for_a_catalogued_model(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "autoprec", "recommend", GPT2]
    done = subprocess.run(
        [*command, "--device", "h100-sxm", "--explain", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert not loaded & {"torch", "transformers", "sklearn", "pandas", "optuna"}
    assert "decision tree, fitted on" in done.stdout and "→ half (" in done.stdout


# prices


def test_prices_add_up_to_the_predicted_step_and_tangents_lie_below() -> None:
    profile, facts, device = catalogued_profile(GPT2), catalogued_facts(GPT2), find_device("h100-sxm")
    setup = Setup(mode=Mode.TRAIN, batch_size=8, seq_len=512, optimizer=Optimizer.ADAMW)
    mixed = {u.name: (FP8 if i % 3 == 0 else BF16) if FP8 in u.formats else FP32 for i, u in enumerate(profile.units)}
    low = {u.name: BF16 for u in profile.units}
    for compiled in (False, True):
        prices = step_prices(profile, device, setup, facts, tf32=True, compiled=compiled)
        for assignment in (mixed, low):
            plan = Plan.assign(profile, assignment, ambient="bf16", device=device, mode="train", tf32=True)
            step = predict_step(profile, plan, device, setup, facts, compiled=compiled).step_ms.value
            assert 1e3 * prices.seconds(assignment) == pytest.approx(step)
        tangent = prices.tangent(low)
        along = {
            key: prices.rest_seconds(tangent) + sum(prices.unit_seconds(n, f, tangent) for n, f in chosen.items())
            for key, chosen in (("low", low), ("mixed", mixed))
        }
        assert along["low"] == pytest.approx(prices.seconds(low))
        assert along["mixed"] <= prices.seconds(mixed) * (1 + 1e-9)


# the joint allowance


def gains_of(seconds: Mapping[str, Mapping[Format, float]]) -> Gains:
    return Gains(seconds=seconds, half=BF16, step=1.0, prices=None)


@given(
    st.lists(
        st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 0.1), st.floats(0.1, 3.0), st.floats(0.1, 3.0)),
        min_size=1,
        max_size=12,
    ),
    st.floats(0.0, 3.0),
)
def test_an_allowance_is_met_and_nothing_is_promoted_for_nothing(
    units: list[tuple[float, float, float, float]], allowed: float
) -> None:
    counted = {f"u{i}": {FP8: drop + small, BF16: small} for i, (drop, small, _, _) in enumerate(units)}
    seconds = {f"u{i}": {FP8: 1.0, BF16: 1.0 + a, FP32: 1.0 + a + b} for i, (_, _, a, b) in enumerate(units)}
    done = within(dict.fromkeys(counted, FP8), counted, gains_of(seconds), allowed)
    total = sum(counted[name].get(choice, 0.0) for name, choice in done.assignment.items())
    assert total <= allowed + 1e-9 and done.drop == pytest.approx(total, abs=1e-9)
    if sum(own[FP8] for own in counted.values()) <= allowed:
        assert not done.promoted


def test_what_loses_least_time_for_its_drop_is_promoted_first() -> None:
    counted = {"cheap": {FP8: 1.0, BF16: 0.0}, "dear": {FP8: 1.0, BF16: 0.0}}
    seconds = {"cheap": {FP8: 1.0, BF16: 1.1, FP32: 2.0}, "dear": {FP8: 1.0, BF16: 1.5, FP32: 3.0}}
    done = within({"cheap": FP8, "dear": FP8}, counted, gains_of(seconds), 1.0)
    assert done.assignment == {"cheap": BF16, "dear": FP8} and done.promoted == {"cheap"}


def test_a_wider_allowance_is_never_slower() -> None:
    device, times = find_device("h100-sxm"), []
    for limit in ("0.25%", "0.5%", "2%", "10%"):
        plan = recommend_plan(
            catalogued_profile(LLAMA), device, mode=Mode.TRAIN, batch_size=8, seq_len=2048, max_drop=limit
        )
        times.append(sum(u.format is FP8 for u in plan.units))
    assert times == sorted(times) and times[-1] > 40


def test_reasons_are_paths_in_words() -> None:
    plan = recommend_plan(
        catalogued_profile(LLAMA), find_device("h100-sxm"), mode=Mode.TRAIN, batch_size=8, seq_len=2048
    )
    low = [u for u in plan.units if u.format is FP8]
    assert low and all("tree: " in u.reason and "→ fp8" in u.reason and "compiled" not in u.name for u in low)
    tiny = recommend("sentence-transformers/all-MiniLM-L6-v2", "h100-sxm", mode="infer", batch_size=1, seq_len=64)
    wide = [u for u in tiny.plan.units if u.role is Role.FFN]
    # a step that waits for its launches gains nothing by casts
    assert {u.format for u in wide} == {FP32}
    assert all("16 bits do not pay here" in u.reason and "as fast as in fp32" in u.reason for u in wide)


# the user's own table


def rows(count: int, **changes: object) -> list[dict[str, object]]:
    """Return rows such as a search adds: 16 bits on a device where fronts say they pay, but FP32 was chosen."""
    plain = {name: 1.0 for name in FEATURES} | {"half_gain": 2.0, "fp8_gain": 0.0, "fp8_saves": 0.0, "half_rate": 1.07}
    labels: dict[str, object] = {"origin": "search", "group": "", "device": "some-cpu", "role": "ffn"}
    figures = {"drop_bf16": 0.001, "drop_fp16": None, "drop_fp8": None, "stake": 5.0, "label": "fp32"}
    return [labels | plain | figures | changes for _ in range(count)]


def test_own_rows_count_at_once_and_the_tree_is_kept() -> None:
    before = shipped_tree()
    assert current_tree() == before
    path = add_rows(rows(400))
    assert path == user_table()
    tree = current_tree()
    assert tree.rows == before.rows + 400 and "400 rows of your own" in tree.notes[-1]
    assert (
        tree.follow(dict.fromkeys(FEATURES, 1.0) | {"half_gain": 2.0, "half_rate": 1.07, "fp8_gain": 0.0})[0].label
        == "fp32"
    )
    assert current_tree() == tree  # read, not fitted
    add_rows(rows(1))
    assert current_tree().rows == before.rows + 401
    assert any("401 rows of your own" in reason for reason in recommend(GPT2, "a100-sxm").reasons)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe\x00binary", "cannot be read"),
        (b"a,b\n1,2\n", "lacks column 'origin'"),
        (b"", "is no CSV"),
    ],
)
def test_a_foreign_table_is_said_and_not_used(content: bytes, said: str) -> None:
    user_table().parent.mkdir(parents=True)
    user_table().write_bytes(content)
    tree = current_tree()
    assert tree.nodes == shipped_tree().nodes and said in tree.notes[-1]
    assert any(said in reason for reason in recommend(GPT2, "a100-sxm").reasons)


def test_damaged_rows_are_left_out_and_counted() -> None:
    add_rows(rows(30))
    good = user_table().read_text().splitlines()
    cells = dict(zip(COLUMNS, good[1].split(","), strict=True))
    bad = [
        ",".join((cells | change).values())
        for change in (
            {"label": "int4"}, {"half_gain": "fast"}, {"half_gain": "nan"}, {"stake": "inf"}, {"drop_bf16": "-1"},
            {"log2_outlier": "far"}, {"role": "wheel"}, {"origin": "rumour"},
        )
    ]  # fmt: skip
    user_table().write_text("\n".join([*good, *bad, "short,row", "x," * 99]) + "\n")
    tree = current_tree()
    assert tree.rows == shipped_tree().rows + 30
    assert any("10 of 40 rows are damaged or foreign and are not used" in note for note in tree.notes)


def test_a_table_from_before_weights_were_looked_at_is_kept() -> None:
    add_rows(rows(30))
    lines = user_table().read_text().splitlines()
    at = COLUMNS.index("log2_outlier")
    user_table().write_text("".join(",".join(c for i, c in enumerate(x.split(",")) if i != at) + "\n" for x in lines))
    assert current_tree().rows == shipped_tree().rows + 30
    add_rows(rows(5, log2_outlier=float("nan")))
    assert user_table().read_text().splitlines()[0] == ",".join(COLUMNS)
    assert current_tree().rows == shipped_tree().rows + 35


# outliers of weights


def test_how_far_weights_stand_out_is_asked_of_weights_that_were_seen() -> None:
    draw = random.Random(0)
    made = rows(800)
    for index, row in enumerate(made):
        outlier = draw.choice([2.0, 6.0, float("nan")])
        row |= {"log2_outlier": outlier, "label": "half" if outlier == 2.0 else "fp32", "device": str(index)}
    tree = fit_tree(read_tables({"made": as_csv(made)}).rows, "")
    plain = {name: float(made[0][name]) for name in FEATURES}  # type: ignore[arg-type]
    for outlier, label, said in (
        (2.0, "half", "its largest weight is at most 16 times the usual one"),
        (6.0, "fp32", "its largest weight is more than 16 times the usual one"),
        (float("nan"), "fp32", "its weights were not seen"),
    ):
        leaf, path = tree.follow(plain | {"log2_outlier": outlier})
        assert leaf.label == label and said in path, (outlier, path)
    assert from_json(Tree, as_json(tree), what="tree") == tree


def test_outliers_are_those_of_the_weights_that_are_here() -> None:
    flat, spiked = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
    with torch.no_grad():
        for layer in (flat, spiked):
            layer.weight.fill_(0.5)
        spiked.weight[3, 5] = 32.0
    model = torch.nn.Sequential(flat, torch.nn.ReLU(), spiked)
    profile = probe_units(model)
    assert list(weight_outliers(model, profile).values()) == [pytest.approx(32 / ((4095 * 0.25 + 1024) / 4096) ** 0.5)]
    seen = recommend(model, "h100-sxm").plan
    assert seen.assignment.keys() == recommend(profile, "h100-sxm").plan.assignment.keys()
    assert weight_outliers(model.to("meta"), profile) == {}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_outliers_of_a_model_with_adapters() -> None:
    peft: Any = pytest.importorskip("peft")
    model = tiny_models.gpt2(vocab_size=64, n_embd=32, n_layer=2)
    plain = weight_outliers(model, probe_units(model))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True))
    found = weight_outliers(adapted, probe_units(adapted))
    assert found.keys() == plain.keys() and all(found[name] >= plain[name] for name in plain)
    assert recommend(adapted, "t4").plan.assignment.keys() == plain.keys()


def test_a_table_holds_no_more_than_its_newest_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoprec.recommender.table._MOST", 10)
    add_rows(rows(8))
    add_rows(rows(5, device="newer"))
    lines = user_table().read_text().splitlines()
    assert len(lines) == 11 and [line.split(",")[2] for line in lines[-5:]] == ["newer"] * 5
