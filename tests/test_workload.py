"""Workloads: the training loss, what is compared, and which positions count, against small cases by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    VOCABULARY,
    BareGPT,
    bert_classifier,
    bert_encoder,
    bert_masked,
    gpt2,
    save,
    t5,
)
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

from autoprec.errors import DataError, DeviceError, ModelError, UsageError
from autoprec.probe.workload import Batch, Readout, ReadoutKind, Workload, workload_from
from autoprec.records import Mode, Task

IGNORED = -100


def ids(rows: int, length: int) -> Tensor:
    """Return random token ids, none of them special."""
    return torch.randint(5, 32, (rows, length))


def run(workload: Workload) -> tuple[Any, Readout]:
    """Return raw output and readout of the first batch."""
    with torch.no_grad():
        raw = workload.forward(workload.batches[0])
    return raw, workload.readout(workload.batches[0], raw)


def loss_of(workload: Workload) -> Tensor:
    """Return the training loss of the first batch."""
    return workload.training_loss(workload.batches[0], workload.forward(workload.batches[0]))


def test_causal_with_labels_counts_what_is_labelled_after_the_shift() -> None:
    tokens = ids(2, 4)
    labels = torch.tensor([[7, IGNORED, 9, 10], [IGNORED, 12, 13, IGNORED]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    workload = Workload(gpt2(), [{"input_ids": tokens, "labels": labels, "attention_mask": mask}])
    raw, read = run(workload)
    assert (workload.task, workload.mode, read.kind) == (Task.CAUSAL_LM, Mode.TRAIN, ReadoutKind.LOGITS)
    assert torch.equal(read.predictions, raw.logits[:, :3])
    assert read.counted.tolist() == [[False, True, True], [True, True, False]]
    assert read.labels is not None
    assert read.labels[read.counted].tolist() == [9, 10, 12, 13]
    by_hand = functional.cross_entropy(raw.logits[[0, 0, 1, 1], [1, 2, 0, 1]], torch.tensor([9, 10, 12, 13]))
    # the model's own loss is the mean over the same four positions; FP32 sums in another order
    torch.testing.assert_close(loss_of(workload).detach(), by_hand, rtol=1e-6, atol=0)


def test_causal_without_labels_counts_attended_positions_and_learns_its_input() -> None:
    tokens, mask = ids(2, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    workload = Workload(gpt2(), [{"input_ids": tokens, "attention_mask": mask}])
    raw, read = run(workload)
    assert read.labels is None
    assert torch.equal(read.predictions, raw.logits)
    assert read.counted.tolist() == [[True] * 4, [True, True, False, False]]
    targets = [tokens[0, 1], tokens[0, 2], tokens[0, 3], tokens[1, 1]]
    by_hand = functional.cross_entropy(raw.logits[[0, 0, 0, 1], [0, 1, 2, 0]], torch.stack(targets))
    torch.testing.assert_close(loss_of(workload).detach(), by_hand, rtol=1e-6, atol=0)
    assert workload.tokens(workload.batches[0]) == 6


def test_masked_lm_counts_labelled_positions_without_a_shift() -> None:
    labels = torch.tensor([[IGNORED, 8, IGNORED], [9, IGNORED, 10]])
    workload = Workload(bert_masked(), [{"input_ids": ids(2, 3), "labels": labels}])
    raw, read = run(workload)
    assert workload.task is Task.MASKED_LM
    assert read.counted.tolist() == [[False, True, False], [True, False, True]]
    assert torch.equal(read.predictions, raw.logits)
    by_hand = functional.cross_entropy(raw.logits[[0, 1, 1], [1, 0, 2]], torch.tensor([8, 9, 10]))
    torch.testing.assert_close(loss_of(workload).detach(), by_hand, rtol=1e-6, atol=0)


def test_masked_lm_without_labels_counts_attended_positions() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    workload = Workload(bert_masked(), [{"input_ids": ids(2, 3), "attention_mask": mask}])
    assert run(workload)[1].counted.tolist() == mask.bool().tolist()
    with pytest.raises(DataError, match="without labels.*mode='infer'"):
        loss_of(workload)


def test_classifier_counts_one_an_example() -> None:
    workload = Workload(bert_classifier(3), [{"input_ids": ids(4, 5), "labels": torch.tensor([0, 2, 1, 1])}])
    raw, read = run(workload)
    assert (read.kind, tuple(read.predictions.shape)) == (ReadoutKind.LOGITS, (4, 1, 3))
    assert read.counted.tolist() == [[True]] * 4
    assert read.labels is not None and read.labels.tolist() == [[0], [2], [1], [1]]
    assert torch.equal(loss_of(workload).detach(), functional.cross_entropy(raw.logits, torch.tensor([0, 2, 1, 1])))


def test_a_single_logit_is_bernoulli() -> None:
    labels = torch.tensor([0, 1])

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = bert_encoder(), nn.Linear(16, 1)

        def forward(self, input_ids: Tensor) -> Tensor:
            logit: Tensor = self.head(self.encoder(input_ids=input_ids).pooler_output)
            return logit

    model = Head().eval()
    workload = Workload(model, [{"input_ids": ids(2, 5), "labels": labels}], task="classification")
    raw, read = run(workload)
    assert (read.kind, tuple(read.predictions.shape)) == (ReadoutKind.BINARY, (2, 1, 1))
    by_hand = -(functional.logsigmoid(-raw[0, 0]) + functional.logsigmoid(raw[1, 0])) / 2
    torch.testing.assert_close(loss_of(workload).detach(), by_hand, rtol=1e-6, atol=0)


def test_one_class_in_transformers_is_bernoulli_until_the_labels_are_numbers() -> None:
    tokens = ids(2, 5)
    assert run(Workload(bert_classifier(1), [{"input_ids": tokens}]))[1].kind is ReadoutKind.BINARY
    scores = {"input_ids": tokens, "labels": torch.tensor([0.5, 3.0])}
    workload = Workload(bert_classifier(1), [scores])
    assert run(workload)[1].kind is ReadoutKind.VALUES
    raw = run(workload)[0]
    by_hand = functional.mse_loss(raw.logits[:, 0], scores["labels"])
    torch.testing.assert_close(loss_of(workload).detach(), by_hand, rtol=1e-6, atol=0)
    declared = Workload(bert_classifier(1, problem_type="regression"), [{"input_ids": tokens}])
    assert run(declared)[1].kind is ReadoutKind.VALUES


def test_several_labels_an_example_are_yes_or_no_each() -> None:
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    model = bert_classifier(3, problem_type="multi_label_classification")
    workload = Workload(model, [{"input_ids": ids(2, 5), "labels": labels}])
    raw, read = run(workload)
    assert (read.kind, tuple(read.predictions.shape)) == (ReadoutKind.BINARY, (2, 3, 1))
    assert torch.equal(read.predictions[..., 0], raw.logits)
    assert read.labels is not None and torch.equal(read.labels, labels)


def test_image_classifier() -> None:
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=10,
    )
    batch = {"pixel_values": torch.randn(3, 1, 8, 8), "labels": torch.tensor([1, 2, 3])}
    workload = Workload(ViTForImageClassification(config).eval(), [batch])
    assert workload.task is Task.IMAGE
    assert tuple(run(workload)[1].predictions.shape) == (3, 1, 10)
    assert workload.tokens(batch) == 3


def test_sequence_to_sequence_counts_its_target_without_a_shift() -> None:
    labels = torch.tensor([[7, 8, IGNORED], [9, IGNORED, IGNORED]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    workload = Workload(t5(), [{"input_ids": ids(2, 4), "attention_mask": mask, "labels": labels}])
    raw, read = run(workload)
    assert workload.task is Task.SEQ2SEQ
    assert read.counted.tolist() == [[True, True, False], [True, False, False]]
    by_hand = functional.cross_entropy(raw.logits[[0, 0, 1], [0, 1, 0]], torch.tensor([7, 8, 9]))
    torch.testing.assert_close(loss_of(workload).detach(), by_hand, rtol=1e-6, atol=0)


def test_encoder_values_leave_padding_out_and_labels_are_withheld() -> None:
    tokens, mask = ids(2, 3), torch.tensor([[1, 1, 1], [1, 0, 0]])
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": torch.tensor([0, 1])}
    workload = Workload(bert_encoder(), [batch], mode="infer")
    raw, read = run(workload)
    assert (workload.task, read.kind, read.labels) == (Task.ENCODER, ReadoutKind.VALUES, None)
    assert torch.equal(read.predictions, raw.last_hidden_state)
    assert read.counted.tolist() == [[True] * 3, [True, False, False]]
    with pytest.raises(DataError, match="Pass loss="):
        loss_of(workload)


def test_values_with_labels_of_their_shape_are_trained_by_squared_error() -> None:
    inputs, targets = torch.randn(4, 3), torch.randn(4, 2)
    model = nn.Linear(3, 2)
    workload = Workload(model, [(inputs, targets)], outputs="values")
    torch.testing.assert_close(loss_of(workload), functional.mse_loss(model(inputs), targets))
    assert tuple(run(workload)[1].predictions.shape) == (4, 1, 2)


def test_a_bare_gpt_returning_a_tensor_has_logits() -> None:
    tokens = ids(2, 6)
    model = BareGPT().eval()
    workload = Workload(model, [tokens])
    raw, read = run(workload)
    assert workload.task is None
    assert (read.kind, tuple(read.predictions.shape)) == (ReadoutKind.LOGITS, (2, 6, 32))
    by_hand = functional.cross_entropy(raw[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss_of(workload).detach(), by_hand, rtol=1e-6, atol=0)
    # a key `labels` follows transformers' shift, and does not reach the forward
    named = Workload(model, [{"ids": tokens, "labels": tokens}])
    assert tuple(run(named)[1].predictions.shape) == (2, 5, 32)
    torch.testing.assert_close(loss_of(named).detach(), by_hand, rtol=1e-6, atol=0)


def test_targets_of_a_pair_are_aligned_already() -> None:
    text = ids(2, 7)
    inputs, targets = text[:, :-1], text[:, 1:].clone()
    targets[0, 0] = IGNORED
    workload = Workload(BareGPT().eval(), [(inputs, targets)])
    raw, read = run(workload)
    assert torch.equal(read.predictions, raw)
    assert read.counted.tolist() == [[False] + [True] * 5, [True] * 6]
    by_hand = functional.cross_entropy(raw.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss_of(workload).detach(), by_hand, rtol=1e-6, atol=0)


def test_a_bare_model_without_head_has_values() -> None:
    class Trunk(BareGPT):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
            for block in self.blocks:
                x = block(x)
            hidden: Tensor = self.lnf(x)
            return hidden

    model = Trunk().eval()
    del model.head
    assert run(Workload(model, [ids(2, 6)], mode="infer"))[1].kind is ReadoutKind.VALUES


def test_a_loss_in_the_returned_tuple_is_used() -> None:
    class WithTargets(BareGPT):
        def forward(self, ids: Tensor, targets: Tensor | None = None) -> Any:
            logits = super().forward(ids)
            return logits, None if targets is None else functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten()
            )

    text = ids(2, 7)
    workload = Workload(WithTargets().eval(), [(text[:, :-1], text[:, 1:])])
    raw, read = run(workload)
    assert torch.equal(loss_of(workload).detach(), raw[1])
    assert torch.equal(read.predictions, raw[0])


def test_outputs_can_be_chosen() -> None:
    batch = {"input_ids": ids(2, 4)}
    assert run(Workload(gpt2(), [batch], outputs="logits"))[1].kind is ReadoutKind.LOGITS
    assert run(Workload(gpt2(), [batch], outputs="values"))[1].kind is ReadoutKind.VALUES
    pooled = Workload(bert_encoder(), [batch], mode="infer", outputs=lambda raw: raw.pooler_output)
    raw, read = run(pooled)
    assert read.kind is ReadoutKind.VALUES
    assert torch.equal(read.predictions[:, 0], raw.pooler_output)
    halved = Workload(gpt2(), [batch], outputs=lambda raw: raw.logits / 2)
    raw, read = run(halved)
    assert (read.kind, torch.equal(read.predictions, raw.logits / 2)) == (ReadoutKind.LOGITS, True)
    with pytest.raises(UsageError, match="must return a tensor"):
        run(Workload(gpt2(), [batch], outputs=lambda raw: 3))  # type: ignore[arg-type, return-value]


def test_the_users_loss_comes_first() -> None:
    def loss(raw: Any, batch: Batch) -> Tensor:
        assert isinstance(batch, dict)
        total: Tensor = raw.logits.sum() * 0 + batch["weight"].sum()
        return total

    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = gpt2()

        def forward(self, input_ids: Tensor, labels: Tensor, weight: Tensor) -> Any:
            return self.inner(input_ids=input_ids, labels=labels)

    tokens = ids(2, 4)
    batch = {"input_ids": tokens, "labels": tokens, "weight": torch.tensor([2.0, 3.0])}
    assert loss_of(Workload(Weighted(), [batch], "train", loss)).item() == 5.0
    with pytest.raises(UsageError, match="scalar tensor, got a tensor of shape"):
        loss_of(Workload(gpt2(), [{"input_ids": tokens}], loss=lambda raw, batch: raw.logits))


def test_the_pinned_signature() -> None:
    """Positions as the interface pins them: model, batches, mode, loss, outputs, metric."""

    def metric(model: nn.Module, batches: tuple[Batch, ...]) -> float:
        return 1.0

    workload = Workload(gpt2(), [{"input_ids": ids(1, 4)}], "infer", None, "logits", metric)
    assert (workload.mode, workload.outputs, workload.metric) == (Mode.INFER, "logits", metric)
    assert repr(workload) == "Workload(GPT2LMHeadModel, causal-lm, infer, 1 batches)"


class Wrapped(nn.Module):
    """Hands everything on to its `module`, as distributed wrappers do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self.module(*args, **kwargs)


def test_a_wrapper_takes_what_the_wrapped_model_takes() -> None:
    tokens = ids(2, 4)
    batch = {"input_ids": tokens, "labels": tokens}
    causal = Workload(Wrapped(gpt2()), [batch])
    assert causal.task is Task.CAUSAL_LM
    assert run(causal)[0].loss is not None
    encoder = Workload(Wrapped(bert_encoder()), [batch], mode="infer")
    assert run(encoder)[1].kind is ReadoutKind.VALUES
    pair = Workload(Wrapped(BareGPT().eval()), [(tokens, tokens)], outputs="logits")
    assert run(pair)[1].labels is not None


def test_a_data_loader_is_a_list_of_batches() -> None:
    data = torch.utils.data.TensorDataset(ids(6, 5), ids(6, 5))
    workload = Workload(BareGPT().eval(), torch.utils.data.DataLoader(data, batch_size=2))
    assert len(workload.batches) == 3
    assert tuple(run(workload)[1].predictions.shape) == (2, 5, 32)


def test_other_batches_and_digests() -> None:
    tokens = ids(2, 4)
    workload = Workload(gpt2(), [{"input_ids": tokens}], mode="infer", model_id="mine")
    same = workload.with_batches([{"input_ids": tokens.clone()}])
    assert (same.model_id, same.mode, same.model is workload.model) == ("mine", Mode.INFER, True)
    assert same.data_digest() == workload.data_digest()
    for other in ({"input_ids": tokens + 1}, {"input_ids": tokens.int()}, {"inputs": tokens}, tokens.view(4, 2)):
        assert workload.with_batches([other]).data_digest() != workload.data_digest()
    with pytest.raises(DataError, match="no batches"):
        workload.with_batches([])
    assert len(workload.batches) == 1


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "there are no batches"),
        ({"input_ids": torch.ones(1, 1)}, r"got dict.*batches=\[batch\]"),
        (torch.ones(2, 2), "got Tensor"),
        (iter([torch.ones(1, 1)]), "got list_iterator"),
        (["text"], "batch 0 is a str"),
        ([{"input_ids": [1, 2]}], "batch 0 holds no tensor"),
        ([torch.ones(2, 3), torch.ones(0, 3)], r"batch 1: '0' has shape \[0, 3\]"),
        ([(torch.tensor([[1.0, float("nan")]]),)], "batch 0: '0' holds NaN"),
        (
            [{"input_ids": ids(1, 3), "labels": torch.tensor([[5, -100, -100]])}],
            "no label that counts.*after the shift",
        ),
    ],
)
def test_bad_batches(batches: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Workload(gpt2(), batches)


def test_bad_arguments() -> None:
    batches = [{"input_ids": ids(1, 3)}]
    with pytest.raises(UsageError, match="'fly' is not a mode"):
        Workload(gpt2(), batches, "fly")
    with pytest.raises(UsageError, match="'logit' is not a choice of outputs"):
        Workload(gpt2(), batches, outputs="logit")
    with pytest.raises(UsageError, match="'masked' is not a task; closest: masked-lm"):
        Workload(gpt2(), batches, task="masked")
    with pytest.raises(UsageError, match="metric must be a function, got float"):
        Workload(gpt2(), batches, metric=0.5)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="needs a torch.nn.Module, got str"):
        Workload("gpt2", batches)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="'transformer.wte.weight' is bfloat16.*dtype=torch.float32"):
        Workload(gpt2().to(torch.bfloat16), batches)
    with torch.device("meta"):
        skeleton = gpt2()
    with pytest.raises(ModelError, match="meta device"):
        Workload(skeleton, batches)


def test_a_batch_the_model_does_not_take() -> None:
    unknown = Workload(BareGPT(), [{"input_ids": ids(2, 4)}])
    with pytest.raises(ModelError, match=r"input_ids \[2, 4\] int64.*unexpected keyword"):
        unknown.forward(unknown.batches[0])
    outside = Workload(gpt2(), [{"input_ids": torch.full((2, 4), VOCABULARY)}])
    with pytest.raises(ModelError, match="within its embeddings"):
        outside.forward(outside.batches[0])
    misfit = Workload(BareGPT(), [{"ids": ids(2, 4), "labels": ids(2, 3)}])
    with pytest.raises(ModelError, match=r"labels of shape \[2, 3\] do not fit"):
        run(misfit)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a GPT-2 of 64 positions."""
    return save(gpt2(), tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a text of 10,000 bytes."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("\n".join(f"line {index:04d}" for index in range(1000)))
    return path


def test_workload_of_a_folder_with_everything_chosen(folder: Path) -> None:
    workload = workload_from(str(folder), device="cpu")
    batch = workload.batches[0]
    assert isinstance(batch, dict)
    # 64 positions are all the model has; the default would be 128
    assert (len(workload.batches), tuple(batch["input_ids"].shape)) == (8, (8, 64))
    assert (workload.mode, workload.task, workload.model_id) == (Mode.TRAIN, Task.CAUSAL_LM, str(folder))
    assert workload.notes == (
        "GPT2LMHeadModel (causal-lm), as config.json says.",
        "Data: the text that ships with autoprec.",
        "8 batches of 8 sequences of up to 64 tokens.",
    )
    assert torch.isfinite(loss_of(workload))
    assert workload_from(str(folder), device="cpu").data_digest() == workload.data_digest()


def test_workload_of_a_folder_with_everything_given(folder: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def count(model, batches):\n    return float(len(batches))\n")
    workload = workload_from(
        str(folder),
        data=text,
        task="causal-lm",
        batch_size=2,
        seq_len=16,
        batches=3,
        mode="infer",
        metric=f"{tmp_path / 'own.py'}:count",
        device="cpu",
    )
    assert [tuple(batch["input_ids"].shape) for batch in workload.batches if isinstance(batch, dict)] == [(2, 16)] * 3
    assert workload.mode is Mode.INFER
    assert workload.metric is not None and workload.metric(workload.model, workload.batches) == 3.0
    assert workload.notes == ("GPT2LMHeadModel (causal-lm), as asked.",)


def test_workload_of_a_classifier_from_jsonl(tmp_path: Path) -> None:
    folder = save(bert_classifier(2, id2label={0: "ham", 1: "spam"}, label2id={"ham": 0, "spam": 1}), tmp_path)
    rows = [{"text": f"text {n}" * (1 + n % 3), "label": "spam" if n % 3 else "ham"} for n in range(12)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    workload = workload_from(str(folder), data=data, batch_size=3, batches=2, device="cpu")
    read = run(workload)[1]
    assert workload.task is Task.CLASSIFICATION
    assert read.labels is not None and set(read.labels.flatten().tolist()) <= {0, 1}
    assert torch.isfinite(loss_of(workload))
    data.write_text(json.dumps({"text": "a", "label": "eggs"}))
    with pytest.raises(DataError, match=r"'eggs' of example 1 .* \(ham, spam\)"):
        workload_from(str(folder), data=data, device="cpu")


def test_a_decoder_that_classifies_is_given_a_padding_token(tmp_path: Path) -> None:
    from transformers import GPT2ForSequenceClassification

    model = GPT2ForSequenceClassification(gpt2(num_labels=2).config)
    model.config.pad_token_id = None
    folder = save(model, tmp_path, pad=False)
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"text": "a" * n, "label": n % 2}) for n in range(1, 9)))
    workload = workload_from(str(folder), data=tmp_path / "data.jsonl", batch_size=4, batches=2, device="cpu")
    assert tuple(run(workload)[1].predictions.shape) == (4, 1, 2)


def test_workload_of_a_function(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "import torch, autoprec\n"
        "def build():\n"
        "    return autoprec.Workload(torch.nn.Linear(2, 2), [torch.ones(3, 2)], 'infer', outputs='values')\n"
        "def module():\n    return torch.nn.Linear(2, 2)\n"
    )
    workload = workload_from(f"{own}:build", device="cpu")
    assert (workload.model_id, workload.mode, workload.outputs) == (f"{own}:build", Mode.INFER, "values")
    assert workload_from(f"{own}:build", mode="train", device="cpu").mode is Mode.TRAIN
    with pytest.raises(UsageError, match="brings its own batches, so --seq-len cannot apply"):
        workload_from(f"{own}:build", seq_len=8, device="cpu")
    with pytest.raises(ModelError, match="returned Linear.*autoprec.Workload"):
        workload_from(f"{own}:module", device="cpu")


def test_bad_input_of_a_command_line(folder: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="takes at most 64 tokens, not 65. Use --seq-len 64"):
        workload_from(str(folder), data=text, seq_len=65, device="cpu")
    with pytest.raises(DataError, match="9999 tokens; 6400 sequences of 64 need 409600"):
        workload_from(str(folder), data=text, batches=800, device="cpu")
    with pytest.raises(UsageError, match="--batch-size must be at least 1, got 0"):
        workload_from(str(folder), data=text, batch_size=0, device="cpu")
    with pytest.raises(DataError, match="none.txt does not exist"):
        workload_from(str(folder), data=tmp_path / "none.txt", device="cpu")
    with pytest.raises(UsageError, match="--metric nowhere.py:f: there is no file"):
        workload_from(str(folder), metric="nowhere.py:f", device="cpu")
    gpt2().save_pretrained(tmp_path / "mute")
    with pytest.raises(DataError, match="no tokenizer"):
        workload_from(str(tmp_path / "mute"), device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="no device 'cuda'"):
            workload_from(str(folder), device="cuda")
