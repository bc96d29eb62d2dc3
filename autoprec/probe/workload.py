"""A workload: a model, its batches, what one step is, and what of the output is compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, TypeAlias

from torch import Tensor, nn
from torch.nn import functional

from autoprec.errors import DataError, ModelError, UsageError
from autoprec.probe.batches import (
    IGNORED,
    Batch,
    attention_of,
    batch_digest,
    batch_tensors,
    batch_to,
    batch_tokens,
    call_style,
    check_batches,
    describe_batch,
    read_batches,
)
from autoprec.probe.checks import check_model, parse_mode, parse_outputs
from autoprec.probe.device import resolve_device
from autoprec.probe.loading import load_model, move_model
from autoprec.probe.prepare import BatchWish, prepare_batches
from autoprec.probe.readout import (
    OutputChoice,
    Readout,
    ReadoutKind,
    bare_output,
    field_of,
    read_logits,
    read_values,
)
from autoprec.probe.task import detect_task, parse_task
from autoprec.probe.text import read_examples
from autoprec.probe.userfile import is_function, load_function
from autoprec.records import Mode, Role, Task

__all__ = ["Batch", "Readout", "ReadoutKind", "Workload", "workload_from"]

Loss: TypeAlias = Callable[[Any, Batch], Tensor]
Metric: TypeAlias = Callable[[nn.Module, tuple[Batch, ...]], float]


class Workload:
    """A model with batches, a mode, and what is compared; not to be changed after it is made.

    A batch is a dict of keyword arguments, a tuple of positional arguments, or one tensor. A key `labels` that
    the model's forward does not take is withheld from the call and used for the loss; so is the last element of a
    tuple that is one longer than the forward takes, and those targets are not shifted.

    Args:
        model: with FP32 weights, on the device of the batches. It is run as it is, in its train or eval state.
        batches: a list or DataLoader; all are read now.
        mode: `train` (forward, backward, optimizer step) or `infer` (forward).
        loss: `loss(raw, batch)` → scalar; None: the loss the model returns, else cross entropy with the labels.
        outputs: "logits", "values", or a function from the raw output to the tensor to compare; None: `.logits`
            if present, a bare tensor of a model with a head unit is logits, everything else is values.
        metric: `metric(model, batches)` → float, larger or smaller as the user likes; only reported.
        task: what the outputs mean; None: told from the model's class and configuration.
        model_id: the name used in reports; None: the class name.

    Raises:
        DataError: no batches, or batches without usable tensors.
        ModelError: no module, or weights that are not FP32 or not loaded.
        UsageError: an unknown mode, task or outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        mode: str | Mode = "train",
        loss: Loss | None = None,
        outputs: str | Callable[[Any], Tensor] | None = None,
        metric: Metric | None = None,
        *,
        task: str | Task | None = None,
        model_id: str | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        check_model(model)
        for name, value in (("loss", loss), ("metric", metric)):
            if value is not None and not callable(value):
                raise UsageError(f"{name} must be a function, got {type(value).__name__}.")
        bare = getattr(model, "module", model)
        config = getattr(bare, "config", None)
        self.model: Final = model
        self._batches, waits = read_batches(batches)
        #: seconds waited for each batch when they were read, and the loader's workers; None: they were in memory
        self.waits_s: Final = waits
        self.loader_workers: Final = int(getattr(batches, "num_workers", 0) or 0)
        self._mode = parse_mode(mode)
        self.loss: Final = loss
        self.outputs: Final = parse_outputs(outputs)
        self.metric: Final = metric
        self.task: Final[Task | None] = parse_task(task) or detect_task(type(bare).__name__, config)
        self.model_id: Final[str] = model_id or type(bare).__name__
        #: what was chosen for the user, one sentence each
        self.notes: Final = notes
        self._style: Final = call_style(model)
        # read now: transformers writes its own guess into the configuration at the first labelled forward
        self._problem: Final[str | None] = getattr(config, "problem_type", None)
        self._has_head: bool | None = None
        self._check_labels()

    @property
    def batches(self) -> tuple[Batch, ...]:
        """The batches, as given."""
        return self._batches

    @property
    def mode(self) -> Mode:
        """What one step is."""
        return self._mode

    def forward(self, batch: Batch) -> Any:
        """Run the model on a batch, as it is and where it is, and return its raw output.

        Raises:
            ModelError: the model does not take this batch.
        """
        positional, named, _, _ = self._style.split(batch)
        try:
            return self.model(*positional, **named)
        except (TypeError, IndexError) as error:
            raise ModelError(
                f"{self.model_id} does not take a batch of {describe_batch(batch)}: {error}. Check that the keys are "
                "arguments of its forward, and that token ids and positions are within its embeddings."
            ) from error

    def training_loss(self, batch: Batch, raw: Any) -> Tensor:
        """Return the scalar that a training step minimises: the user's loss, the model's, or cross entropy.

        Cross entropy is computed in FP32. A causal LM without labels learns its own attended input.

        Raises:
            DataError: there are no labels to learn from.
        """
        if self.loss is not None:
            value = self.loss(raw, batch)
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise UsageError(f"loss(raw, batch) must return a scalar tensor, got {_short(value)}.")
            return value.reshape(())
        own = _returned_loss(raw)
        if own is not None:
            return own
        read = self.readout(batch, raw)
        if read.labels is None and read.kind is ReadoutKind.LOGITS and self._shifts:
            read = self._self_labelled(batch, read)
        if read.kind is ReadoutKind.VALUES:
            return self._squared_error(batch, read)
        if read.labels is None:
            raise DataError(
                f"{self.model_id} cannot be trained on batches without labels ({describe_batch(batch)}). Add 'labels' "
                "to the batches, pass loss=a function of (output, batch), or measure with mode='infer'."
            )
        predictions, labels = read.predictions[read.counted].float(), read.labels[read.counted]
        if read.kind is ReadoutKind.BINARY:
            return functional.binary_cross_entropy_with_logits(predictions[:, 0], labels.float())
        return functional.cross_entropy(predictions, labels.long())

    def readout(self, batch: Batch, raw: Any) -> Readout:
        """Return what of the raw output is compared, and at which positions (see `Readout`).

        Raises:
            ModelError: the output has no tensor to compare, or a shape that does not fit labels or logits.
        """
        kind, output = self._compared(batch, raw)
        mask = attention_of(batch, "decoder_attention_mask" if self.task is Task.SEQ2SEQ else "attention_mask")
        if kind is OutputChoice.VALUES:
            return read_values(output, mask=mask)
        _, _, labels, aligned = self._style.split(batch)
        return read_logits(
            output,
            labels=labels,
            mask=mask,
            shift=not aligned and self._shifts,
            multi_label=self._problem == "multi_label_classification",
        )

    def tokens(self, batch: Batch) -> int:
        """Return the count of attended tokens of a batch, or of examples where it holds no token ids."""
        return batch_tokens(batch)

    @property
    def batch_shape(self) -> tuple[int, int]:
        """Examples of the first batch, and attended tokens an example, 1 or more; what a step is predicted for."""
        batch = self.batches[0]
        rows = next((max(1, value.shape[0]) for _, value in batch_tensors(batch) if value.dim()), 1)
        return rows, max(1, self.tokens(batch) // rows)

    def with_batches(self, batches: Iterable[Batch]) -> Workload:
        """Return the same workload on other batches."""
        other = copy.copy(self)
        other._batches = check_batches(batches)
        other._check_labels()
        return other

    def with_mode(self, mode: str | Mode) -> Workload:
        """Return the same workload in another mode."""
        other = copy.copy(self)
        other._mode = parse_mode(mode)
        return other

    def data_digest(self) -> str:
        """Return the sha256 of the batches: names, types, shapes and values of their tensors."""
        return batch_digest(self.batches)

    def __repr__(self) -> str:
        task = self.task.value if self.task else "task unknown"
        return f"Workload({self.model_id}, {task}, {self.mode.value}, {len(self.batches)} batches)"

    def _compared(self, batch: Batch, raw: Any) -> tuple[OutputChoice, Tensor]:
        """Apply the rule for `outputs` and return the tensor it names."""
        logits = field_of(raw, "logits")
        if callable(self.outputs):
            output = self.outputs(raw)
            if not isinstance(output, Tensor) or output.dim() == 0:
                raise UsageError(f"outputs(raw) must return a tensor with a batch dimension, got {_short(output)}.")
            return self._kind_of(output), output
        if self.outputs is OutputChoice.LOGITS:
            return OutputChoice.LOGITS, bare_output(raw) if logits is None else logits
        if self.outputs is None and logits is not None:
            return (OutputChoice.VALUES if self._is_regression(batch, logits) else OutputChoice.LOGITS), logits
        for name in ("last_hidden_state", "pooler_output", "logits"):
            named = field_of(raw, name)
            if named is not None:
                return OutputChoice.VALUES, named
        output = bare_output(raw)
        return (OutputChoice.VALUES if self.outputs else self._kind_of(output)), output

    def _kind_of(self, output: Tensor) -> OutputChoice:
        """Say what a tensor without a name is: logits where the task or the model's head says so."""
        if self.task not in (None, Task.ENCODER):
            return OutputChoice.LOGITS
        if self._has_head is None:
            # here, and not above: only models that return bare tensors need their units known
            from autoprec.probe.units import probe_units

            self._has_head = any(unit.role is Role.LM_HEAD for unit in probe_units(self.model).units)
        return OutputChoice.LOGITS if self._has_head and output.dim() <= 3 else OutputChoice.VALUES

    def _is_regression(self, batch: Batch, logits: Tensor) -> bool:
        """Say whether logits are numbers to be hit: declared so, or one an example with labels that are no classes."""
        if self._problem is not None:
            return self._problem == "regression"
        labels = self._style.split(batch)[2]
        single = logits.dim() == 1 or (logits.dim() == 2 and logits.shape[1] == 1)
        return single and labels is not None and not bool(((labels == 0) | (labels == 1) | (labels == IGNORED)).all())

    @property
    def _shifts(self) -> bool:
        """Say whether output t predicts label t + 1: a causal LM, or a bare model of unknown task."""
        return self.task in (Task.CAUSAL_LM, None)

    def _self_labelled(self, batch: Batch, read: Readout) -> Readout:
        ids = dict(batch_tensors(batch)).get("input_ids") if not isinstance(batch, Tensor) else batch
        if ids is None:
            ids = batch_tensors(batch)[0][1]
        if ids.is_floating_point() or ids.shape != read.counted.shape:
            return read
        labels = ids.masked_fill(~read.counted, IGNORED)
        return read_logits(read.predictions, labels=labels, mask=None, shift=True)

    def _squared_error(self, batch: Batch, read: Readout) -> Tensor:
        labels = self._style.split(batch)[2]
        if labels is None or labels.numel() != read.predictions.numel():
            have = "no labels" if labels is None else f"labels of shape {list(labels.shape)}"
            raise DataError(
                f"{self.model_id} gives values of shape {list(read.predictions.shape)} and the batch has {have}: "
                "there is nothing to train towards. Pass loss=a function of (output, batch), add labels of that "
                "shape, or measure with mode='infer'."
            )
        return functional.mse_loss(read.predictions.float().flatten(), labels.float().flatten())

    def _check_labels(self) -> None:
        for index, batch in enumerate(self._batches):
            _, _, labels, aligned = self._style.split(batch)
            if labels is None or labels.is_floating_point():
                continue
            shifted = self.task is Task.CAUSAL_LM and not aligned and labels.dim() == 2
            if not bool(((labels[:, 1:] if shifted else labels) != IGNORED).any()):
                raise DataError(
                    f"batch {index} has no label that counts: all are {IGNORED}"
                    f"{' after the shift' if shifted else ''}. Leave the batch out, or label it."
                )


def _returned_loss(raw: Any) -> Tensor | None:
    """Return the loss a model computed itself: a field `loss`, or a scalar in the tuple it returned."""
    loss = field_of(raw, "loss")
    if loss is None and isinstance(raw, tuple | list):
        scalars = [x for x in raw if isinstance(x, Tensor) and x.dim() == 0 and x.is_floating_point()]
        loss = scalars[0] if scalars else None
    return loss.mean() if loss is not None else None


def _short(value: object) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def workload_from(
    model: str,
    *,
    data: str | Path | None = None,
    task: str | Task | None = None,
    batch_size: int | None = None,
    seq_len: int | None = None,
    batches: int | None = None,
    mode: str | Mode | None = None,
    metric: str | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
    seed: int = 0,
    made: object | None = None,
) -> Workload:
    """Make the workload of a command line: load the model, read the data, cut it into batches, all on `device`.

    Args:
        model: as `load_model` takes it; a Workload from file.py:function keeps its own batches.
        data: a text or JSONL file; None: the text that ships.
        task: None or "auto": told from the model.
        batch_size: None: 8, or 2 from 50 million parameters.
        seq_len: None: 128, or the model's maximum where that is less.
        batches: None: 8.
        mode: None: the file's own Workload's, else train.
        metric: file.py:function, called as function(model, batches) → float.
        device: `auto`, a torch device, or a catalogued name (absent: the model stays on the CPU).
        made: what file.py:function returned, where it was called already.

    Raises:
        ModelError, DataError, DeviceError, UsageError: as the message says; nothing is left half-done.
    """
    kind = parse_task(task)
    path = None if data is None else Path(data).expanduser()
    wanted = BatchWish(data=path, batch_size=batch_size, seq_len=seq_len, batches=batches, seed=seed)
    here = str(resolve_device(device)[0] or "cpu")  # a device that is not here is emulated on the CPU
    measure = load_function(metric, what="--metric", error=UsageError) if metric else None
    if is_function(model):
        given = load_function(model)() if made is None else made
        if isinstance(given, Workload):
            return _own_workload(given, model, wanted, kind, mode, measure, here)
        raise ModelError(
            f"{model} returned {type(given).__name__}. To be measured it must return an autoprec.Workload: text cannot "
            "be cut into batches without the model's tokenizer."
        )
    examples = read_examples(path)
    loaded = load_model(model, task=kind, trust_remote_code=trust_remote_code, device=here)
    made, notes = prepare_batches(loaded, examples, wanted)
    return Workload(
        loaded.model,
        [batch_to(batch, here) for batch in made],
        mode or Mode.TRAIN,
        metric=measure,
        task=loaded.task,
        model_id=loaded.model_id,
        notes=(*loaded.notes, *notes),
    )


def _own_workload(
    given: Workload,
    model: str,
    wanted: BatchWish,
    task: Task | None,
    mode: str | Mode | None,
    metric: Metric | None,
    device: str,
) -> Workload:
    if wanted.named:
        raise UsageError(f"{model} brings its own batches, so {', '.join(wanted.named)} cannot apply. Leave it out.")
    move_model(given.model, model, device)
    return Workload(
        given.model,
        [batch_to(batch, device) for batch in given.batches],
        mode or given.mode,
        given.loss,
        given.outputs,
        metric or given.metric,
        task=task or given.task,
        model_id=model,
        notes=(*given.notes, f"Model and batches are those of {model}."),
    )
