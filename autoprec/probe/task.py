"""What a model is for, told from its class and configuration: the task decides which positions a drop counts."""

from __future__ import annotations

from typing import Any

from autoprec.errors import UsageError, closest
from autoprec.records import Task

__all__ = ["detect_task", "parse_task"]

#: endings of class names in transformers; the order matters only where one name could carry two
_BY_CLASS = (
    ("ForMaskedLM", Task.MASKED_LM),
    ("ForPreTraining", Task.MASKED_LM),
    ("ForCausalLM", Task.CAUSAL_LM),
    ("LMHeadModel", Task.CAUSAL_LM),
    ("LMHead", Task.CAUSAL_LM),
    ("ForSequenceClassification", Task.CLASSIFICATION),
    ("ForTokenClassification", Task.CLASSIFICATION),
    ("ForImageClassification", Task.IMAGE),
    ("ForConditionalGeneration", Task.SEQ2SEQ),
    ("ForSpeechSeq2Seq", Task.SEQ2SEQ),
)


def parse_task(text: str | Task | None) -> Task | None:
    """Read the value of `--task`; None and 'auto' mean: look at the model.

    Raises:
        UsageError: no such task.
    """
    if text is None or text == "auto":
        return None
    try:
        return Task(text)
    except ValueError:
        names = [task.value for task in Task]
        raise UsageError(
            f"'{text}' is not a task{closest(str(text), names)}. Choose auto, {', '.join(names)}."
        ) from None


def detect_task(class_name: str, config: Any = None) -> Task | None:
    """Return the task of a model class and its configuration, or None for a class of unknown purpose.

    A bare transformers encoder or decoder (`BertModel`, `GPT2Model`) is `Task.ENCODER`: its outputs are values.
    """
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    for ending, task in _BY_CLASS:
        if class_name.endswith(ending):
            # Gemma3ForConditionalGeneration and its like are decoders that also take images
            return Task.CAUSAL_LM if task is Task.SEQ2SEQ and not encoder_decoder else task
    if encoder_decoder:
        return Task.SEQ2SEQ
    return Task.ENCODER if hasattr(config, "model_type") and class_name.endswith("Model") else None
