"""What the settings and scripts of a run come to: the format it trains in, what its weights are stored in, who keeps
master copies. `None` where the text does not say; a check must not take that for either answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property

from autoprec.doctor.scripts import Call
from autoprec.doctor.settings import Setting, Settings
from autoprec.doctor.stores import Placed, autocast_formats, cast_of, format_of, load_of, untyped_load
from autoprec.formats import Format

__all__ = ["Run"]

#: names under which programs keep the dtype of stored weights
_DTYPE_NAMES = ("torch_dtype", "dtype", "model_dtype", "weights_dtype", "param_dtype")
#: dtypes of other things than stored weights
_OTHER_DTYPES = ("bnb", "quant", "autocast", "mp_policy")
_ADAPTER_CALLS = ("LoraConfig", "get_peft_model", "prepare_model_for_kbit_training", "BitsAndBytesConfig", "IA3Config",
                  "PeftModel", "AdaLoraConfig", "PromptTuningConfig")  # fmt: skip
_ROUNDS = ("bf16_stochastic_round", "kahan_sum", "use_kahan_summation", "stochastic_rounding", "master_weights")
_TRAINS = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "train_batch_size",
           "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "num_epochs", "max_epochs", "lr",
           "optimizer", "micro_batch_size", "total_epochs")  # fmt: skip


class Run:
    """A training or inference run as its files say it."""

    def __init__(self, files: Sequence[Settings]) -> None:
        self.files = tuple(files)

    def get(self, *names: str) -> Iterator[Setting]:
        """Yield every setting of a name, in all files."""
        for file in self.files:
            yield from file.get(*names)

    def first(self, *names: str) -> Setting | None:
        """Return the first setting of a name."""
        return next(self.get(*names), None)

    def calls(self, *names: str) -> Iterator[tuple[Call, str]]:
        """Yield the calls of a last name in all scripts, with their places."""
        for file in self.files:
            if file.script is not None:
                for call in file.script.named(*names):
                    yield call, f"{file.path}:{call.line}"

    def imports(self, *prefixes: str) -> bool:
        """Say whether a script imports something whose name begins so."""
        return any(n.startswith(prefixes) for f in self.files if f.script is not None for n in f.script.imports)

    @cached_property
    def amp(self) -> dict[Format, Placed]:
        """The formats asked of mixed precision, with where."""
        found: dict[Format, Placed] = {}
        for placed, choice in self._amp():
            found.setdefault(choice, placed)
        return found

    def _amp(self) -> Iterator[tuple[Placed, Format]]:
        for choice in (Format.FP16, Format.BF16):
            for s in self.get(choice.value, f"{choice.value}.enabled"):
                if s.on and "zero" not in s.name:
                    yield Placed(s.value, s.place, f"{s.name}={s.value}"), choice
        for s in self.get(
            "mixed_precision", "accelerate_mixed_precision", "amp_dtype", "autocast_dtype", "mixed_precision_param"
        ):
            known = Format.FP8 if str(s.value).lower() == "fp8" else format_of(s.value)
            if known not in (None, Format.FP32):
                yield Placed(s.value, s.place, f"{s.name}={s.value}"), known
        if any(s.on for s in self.get("torch_autocast.enabled")):
            for s in self.get("torch_autocast.dtype"):
                if known := format_of(s.value):
                    yield Placed(s.value, s.place, f"{s.name}={s.value}"), known
        for s in self.get("precision"):
            text = str(s.value).lower()
            known = {"16-mixed": Format.FP16, "16": Format.FP16, "bf16-mixed": Format.BF16, "bf16": Format.BF16,
                     "transformer-engine": Format.FP8, "transformer-engine-float16": Format.FP8, "amp": Format.FP16,
                     "amp_bf16": Format.BF16, "amp_bfloat16": Format.BF16, "amp_fp8": Format.FP8}.get(text)  # fmt: skip
            if known:
                yield Placed(s.value, s.place, f"precision={s.value!r}"), known
        for call, place in self.calls("autocast"):
            yield from autocast_formats(call, place)
        for call, place in self.calls("fp8_autocast", "convert_to_float8_training", "fp8_model_init", "convert_model"):
            if call.last != "convert_model":
                yield Placed(True, place, f"{call.last}()"), Format.FP8
        for s in self.get(
            "fp8", "fp8_format", "enable_float8", "enable_fp8_training", "fp8_recipe", "float8.recipe_name"
        ):
            if s.value not in (None, False, "", "none", "null") and not isinstance(s.value, dict):
                yield Placed(s.value, s.place, f"{s.name}={s.value}"), Format.FP8

    @cached_property
    def stored(self) -> dict[Format, Placed]:
        """The formats weights are loaded in or cast to, with where; storage of adapters' frozen bases included."""
        found: dict[Format, Placed] = {}
        frozen = {call.receiver for call, _ in self.calls("requires_grad_") if call.args[:1] == (False,)}
        for call, place in self.calls("from_pretrained", "from_config", "pipeline"):
            if call.target not in frozen and (load := load_of(call, place)):
                found.setdefault(*load)
        for call, place in self.calls("half", "bfloat16", "to", "set_default_dtype"):
            if not {call.target, call.receiver} & frozen and (placed := cast_of(call, place)):
                found.setdefault(placed.value, placed)
        for s in self.get(*_DTYPE_NAMES):
            if (choice := format_of(s.value)) and not any(part in s.name for part in _OTHER_DTYPES):
                found.setdefault(choice, Placed(s.value, s.place, f"{s.name}={s.value}"))
        for s in self.get("pure_bf16"):
            if s.on:
                found.setdefault(Format.BF16, Placed(s.value, s.place, "pure_bf16=true"))
        for s in self.get("precision"):
            known = {"bf16-true": Format.BF16, "16-true": Format.FP16, "32-true": Format.FP32}.get(str(s.value).lower())
            if known:
                found.setdefault(known, Placed(s.value, s.place, f"precision={s.value!r}"))
        return found

    @cached_property
    def untyped_loads(self) -> tuple[Placed, ...]:
        """Models loaded without a dtype, which take that of the checkpoint."""
        calls = [*self.calls("from_pretrained"), *((c, p) for c, p in self._all_calls() if c.last.endswith("Trainer"))]
        return tuple(load for call, place in calls if (load := untyped_load(call, place)))

    @cached_property
    def names(self) -> tuple[Placed, ...]:
        """Model names in the files."""
        found = []
        for call, place in self.calls("from_pretrained"):
            if call.args and isinstance(call.args[0], str):
                found.append(Placed(call.args[0], place, call.args[0]))
        for s in self.get(
            "model_name_or_path", "base_model", "model", "pretrained_model_name_or_path", "model_id", "model_name"
        ):
            if isinstance(s.value, str):
                found.append(Placed(s.value, s.place, s.value))
        return tuple(found)

    @cached_property
    def adapters(self) -> bool:
        """Whether adapters are trained on a frozen or quantised base."""
        if any(True for _ in self.calls(*_ADAPTER_CALLS)):
            return True
        kinds = self.get("adapter", "finetuning_type", "train_type", "tuner_type", "peft_type", "sft_type")
        if any("lora" in str(s.value).lower() or str(s.value).lower() in ("freeze", "adapter") for s in kinds):
            return True
        if any(s.on for s in self.get("use_peft", "use_lora", "lora", "load_in_4bit", "load_in_8bit", "qlora")):
            return True
        return any(True for _ in self.get("lora_r", "lora_rank", "lora_alpha", "lora_target", "peft_config"))

    @cached_property
    def trains(self) -> bool:
        """Whether weights are trained, as far as the files say."""
        if any(True for _ in self.get(*_TRAINS)):
            return True
        if any(True for _ in self.calls("backward", "fit", "minimize", "AdamW", "Adam", "SGD", "GradScaler")):
            return True
        return any(
            re.search(r"Trainer$|TrainingArguments$|^(?:SFT|DPO|GRPO)Config$", c.last) for c, _ in self._all_calls()
        )

    @cached_property
    def masters(self) -> Placed | None:
        """Who keeps FP32 copies of low-precision weights, if anyone says so."""
        for s in self.get("zero_optimization", "zero_stage", "deepspeed", "deepspeed_config", "deepspeed_config_file",
                          "train_micro_batch_size_per_gpu", "zero_optimization.stage", "use_deepspeed"):  # fmt: skip
            if s.value not in (None, "", False):
                return Placed(s.value, s.place, "DeepSpeed keeps FP32 masters")
        for s in self.get("distributed_type"):
            if str(s.value).upper() in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
                return Placed(s.value, s.place, f"{s.value} keeps FP32 masters")
        for s in self.get("fsdp", "fsdp_config", "use_fsdp"):
            if s.value not in (None, "", False, [], {}):
                return Placed(s.value, s.place, "accelerate's FSDP keeps trained weights in FP32")
        for call, place in self.calls("initialize"):
            if call.name.startswith("deepspeed"):
                return Placed(True, place, "DeepSpeed keeps FP32 masters")
        return None

    @cached_property
    def rounding(self) -> Placed | None:
        """An optimizer that keeps small updates of BF16 weights: stochastic rounding, Kahan summation, masters."""
        for call, place in self._all_calls():
            text = f"{call.name} {' '.join(map(str, call.keywords))}"
            on = [name for name in _ROUNDS if call.keywords.get(name)]
            if on or re.search(r"[Kk]ahan|[Ss]tochastic|AnyPrecision|optimi\b", text):
                return Placed(True, place, f"{call.name}({', '.join(on)})")
        for s in self.get("optim", "optimizer", "optim_args", "optimizer.name"):
            if re.search(r"anyprecision|kahan|stochastic|optimi_", str(s.value).lower()):
                return Placed(s.value, s.place, f"{s.name}={s.value}")
        return None

    @cached_property
    def scaler(self) -> Placed | None:
        """A gradient scaler made by a script."""
        for call, place in self.calls("GradScaler", "ShardedGradScaler"):
            if call.keywords.get("enabled") is not False:
                return Placed(True, place, f"{call.name}()")
        return None

    @property
    def on_cpu(self) -> Placed | None:
        """What puts the run on a CPU, if the files say so."""
        for s in self.get("use_cpu", "no_cuda", "cpu"):
            if s.on:
                return Placed(s.value, s.place, f"{s.name}={s.value}")
        for s in self.get("device", "device_type", "accelerator"):
            # DeepSpeed's offload_optimizer.device says where states lie, not where steps run
            if str(s.value).lower() == "cpu" and "offload" not in s.name:
                return Placed(s.value, s.place, f"{s.name}={s.value}")
        return None

    def number(self, *names: str) -> float | None:
        """Return the first setting of a name that is a number."""
        for s in self.get(*names):
            try:
                if not isinstance(s.value, bool | None):
                    return float(s.value)
            except (TypeError, ValueError):
                continue
        return None

    def _all_calls(self) -> Iterator[tuple[Call, str]]:
        for file in self.files:
            for call in file.script.calls if file.script is not None else ():
                yield call, f"{file.path}:{call.line}"
