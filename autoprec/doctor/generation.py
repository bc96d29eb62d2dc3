"""Checks of models that generate: logits that are no numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator

from autoprec.doctor.case import Case, Evidence, check, patterns, said
from autoprec.doctor.logs import Log
from autoprec.records import Severity

_SAMPLING = patterns(
    r"probability tensor contains (?:either|invalid)",
    r"invalid multinomial distribution|probabilities contain nan|prob_dist\w* .{0,30}contains? (?:nan|inf)",
)
#: token 0 of many vocabularies is '!': what argmax gives for logits that are all NaN
_MARKS = re.compile(r"!{12,}")
_ALONE = re.compile(r"^[\s\"'“>|:\[-]*!{12,}[\s\"'”,}|\]]*$")
_ANSWER = re.compile(
    r"(?:output|response|assistant|generat\w*|completion|answer|content|text|prediction|predict|result|reply|bot|model|ai|output_text"
    r"|decoded|out|回答|输出|结果)\W{1,8}[\"'“]*\s*!{12,}|(?:输出|回答|结果|感叹号).{0,20}!{12,}",
    re.IGNORECASE,
)
#: a speaker or a label, then nothing but marks
_LABELLED = re.compile(
    r"^\W*(?!warn|error|note|attention|alert|danger|stop)\w{1,20}\s*[:>]\s*[\"'“]*!{12,}\W*$", re.IGNORECASE
)
_CUE = re.compile(
    r"\b(?:output|response|assistant|generat\w*|completion|answer|content|prediction|reply|prompt|question|user)\b",
    re.IGNORECASE,
)


@check(
    "AP004", "Sampling met probabilities that are no numbers", Severity.ERROR,
    advice="""The logits hold NaN or infinity, in FP16 inference nearly always an overflow: load in BF16, or FP32, or
    keep the overflowing layers in FP32 (`autoprec doctor MODEL --trace` names the first).""",
    paste="AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)",
    sources="JIA-Lab-research/LongLoRA#165 OpenBMB/MiniCPM-V#549 yangjianxin1/Firefly#272 "
            "2U1/Llama3.2-Vision-Finetune#7",
)  # fmt: skip
def sampling(case: Case) -> Iterator[Evidence]:
    """ "probability tensor contains either `inf`, `nan` or element < 0", from `torch.multinomial`, also as the
    assertion of its CUDA kernel."""
    yield from said(case, _SAMPLING)


@check(
    "AP005", "The model answers with exclamation marks only", Severity.ERROR,
    advice="""All logits are NaN, and the first token of the vocabulary is '!'. Seen with Qwen2 and GLM-4 in FP16, whose
    attention overflows: use BF16, or an attention that keeps its softmax in FP32 (SDPA).""",
    paste='from_pretrained(name, dtype=torch.bfloat16, attn_implementation="sdpa")',
    sources="QwenLM/Qwen3#761 QwenLM/Qwen3#826 huggingface/transformers#33294 zai-org/GLM-4#760",
)  # fmt: skip
def exclamation_marks(case: Case) -> Iterator[Evidence]:
    """Twelve and more '!' as an answer: after a word such as output, response, assistant or text, or alone on a line
    after one. Rows of '!' that frame a banner are none."""
    for log in case.logs:
        found = next((i for i, line in enumerate(log.lines) if "!!!!!!!!!!!!" in line and _is_answer(log, i)), None)
        if found is not None:
            yield Evidence(log.lines[found].strip()[:80], log.place(found))


def _is_answer(log: Log, index: int) -> bool:
    line = log.lines[index]
    if _ANSWER.search(line) or _LABELLED.search(line):
        return True
    if not _ALONE.match(line):
        return False
    around = log.lines[max(0, index - 6) : index] + log.lines[index + 1 : index + 7]
    if any(_MARKS.search(other) for other in around):  # a banner has a row above and one below
        inside = [o for o in around if o.strip() and not _MARKS.search(o)]
        if inside:
            return False
    filled = [other for other in log.lines if other.strip()]
    return any(_CUE.search(other) for other in log.lines[max(0, index - 4) : index]) or len(filled) <= 3
