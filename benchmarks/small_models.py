"""Small models of ten architectures, each trained for a minute on an Austen novel: drops that are not those of noise.

    python benchmarks/small_models.py [NAME ...]

Reads bytes of the texts of `python benchmarks/models.py austen`, trains with a fixed seed on one thread, and writes
`benchmarks/truths/drops/<name>.json`: units, facts, the drop of each unit in each format (emulated, by
`probe_sensitivity`), and how far its largest weights stand out. The trained models of `truths.py` are probed likewise.
What is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from models import default_cache
from truths import WORKLOADS

from autoprec import Workload, probe_sensitivity, probe_units
from autoprec.files import as_json, write_json
from autoprec.probe.described import module_facts
from autoprec.probe.outliers import weight_outliers

FOLDER = Path(__file__).parent / "truths" / "drops"
FORMATS = ("bf16", "fp16", "fp8")
_ROWS, _LENGTH, _RATE = 8, 128, 2e-3
#: steps of training; fewer where a step takes longer, or where an encoder sees both sides
_STEPS = {"mixtral": 150, "bert": 200, "t5": 200}
_USUAL_STEPS = 400
#: held-out windows: 8 batches of 4
_BATCHES, _HELD = 8, 4
_BYTES = 256


def _sizes(**more: Any) -> dict[str, Any]:
    """Return sizes that most configurations name alike; every feature count divides by 16, as FP8 kernels need."""
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return {"vocab_size": _BYTES, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, **ends, **more}


def _gated(**more: Any) -> dict[str, Any]:
    return _sizes(intermediate_size=352, num_key_value_heads=2, max_position_embeddings=256, **more)


def gpt2() -> Any:
    """GPT-2: joint q, k, v, GELU, learned positions."""
    dropped = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": _BYTES, "n_embd": 160, "n_layer": 5, "n_head": 5, "n_positions": 256}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, **dropped, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    )


def llama() -> Any:
    """Llama: grouped queries, SwiGLU, RMS norms."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_gated(num_hidden_layers=6)))


def qwen2() -> Any:
    """Qwen2: Llama with biases on q, k, v, tied embeddings."""
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_gated(tie_word_embeddings=True)))


def gemma() -> Any:
    """Gemma: GeGLU, scaled embeddings, wide heads."""
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**_gated(head_dim=64)))


def opt() -> Any:
    """OPT: ReLU, learned positions with an offset."""
    sizes = _sizes(ffn_dim=512, max_position_embeddings=256, word_embed_proj_dim=128, dropout=0.0)
    return transformers.OPTForCausalLM(transformers.OPTConfig(**sizes))


def neox() -> Any:
    """Pythia's GPT-NeoX: attention and FFN side by side."""
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**_sizes(intermediate_size=512, max_position_embeddings=256))
    )


def bloom() -> Any:
    """BLOOM: scores biased by distance, a norm behind the embedding."""
    sizes = {"vocab_size": _BYTES, "hidden_size": 128, "n_layer": 4, "n_head": 4}
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(**sizes, hidden_dropout=0.0, attention_dropout=0.0, pad_token_id=0)
    )


def mixtral() -> Any:
    """Mixtral: four experts a block, two of them a token."""
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**_gated(num_local_experts=4, num_experts_per_tok=2))
    )


def bert() -> Any:
    """BERT: an encoder that fills in masked bytes."""
    dropped = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForMaskedLM(
        transformers.BertConfig(**_sizes(intermediate_size=512, max_position_embeddings=256), **dropped)
    )


def t5() -> Any:
    """T5: encoder and decoder; it writes the second half of a window given the first."""
    sizes = {"vocab_size": _BYTES, "d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 3, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    )


MODELS: dict[str, Callable[[], Any]] = {
    make.__name__: make for make in (gpt2, llama, qwen2, gemma, opt, neox, bloom, mixtral, bert, t5)
}


def batch_of(name: str, rows: torch.Tensor, draw: torch.Generator) -> dict[str, torch.Tensor]:
    """Return what a model of this name is given of windows [N, length] of bytes."""
    if name == "t5":
        half = rows.shape[1] // 2
        return {"input_ids": rows[:, :half], "labels": rows[:, half:].contiguous()}
    if name == "bert":
        hidden = torch.rand(rows.shape, generator=draw) < 0.15
        return {"input_ids": rows.masked_fill(hidden, 1), "labels": rows.masked_fill(~hidden, -100)}
    return {"input_ids": rows, "labels": rows}


def trained(name: str) -> Workload:
    """Return a model trained on one novel, with batches of another."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    model, steps = MODELS[name]().train(), _STEPS.get(name, _USUAL_STEPS)
    folder = default_cache() / "austen"
    read = [
        torch.frombuffer(bytearray((folder / f"{n}.txt").read_bytes()), dtype=torch.uint8)
        for n in ("emma", "sense_and_sensibility")
    ]
    text, other = (one.long() for one in read)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    loss = torch.tensor(0.0)
    for _ in range(steps):
        starts = torch.randint(len(text) - _LENGTH, (_ROWS,), generator=draw)
        rows = torch.stack([text[s : s + _LENGTH] for s in starts])
        loss = model(**batch_of(name, rows, draw)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    print(f"{name}: loss {loss.item():.3f} after {steps} steps", file=sys.stderr, flush=True)
    starts = torch.arange(_BATCHES * _HELD) * (len(other) // (_BATCHES * _HELD + 1))
    rows = torch.stack([other[s : s + _LENGTH] for s in starts])
    batches = [batch_of(name, part, draw) for part in rows.split(_HELD)]
    return Workload(model.eval(), batches, mode="infer", model_id=f"small-{name}")


def write(name: str) -> None:
    """Make a model, probe it, and write what the table of the recommender needs of it."""
    path, begun = FOLDER / f"{name}.json", time.monotonic()
    known = json.loads(path.read_text()) if path.exists() else {}
    if "outliers" in known:
        return
    workload = trained(name) if name in MODELS else WORKLOADS[name]()
    profile = probe_units(workload.model, model_id=workload.model_id)
    outliers = {u: float(f"{x:.4g}") for u, x in weight_outliers(workload.model, profile).items()}
    if known:  # of before weights were looked at: drops stay
        write_json(path, known | {"outliers": outliers})
        return
    found = probe_sensitivity(workload, FORMATS, cache=False)
    facts = module_facts(workload.model)
    rows: dict[str, dict[str, list[float]]] = {}
    for row in found.drops:
        part = 100 / found.scale
        rows.setdefault(row.unit, {})[row.format] = [float(f"{part * x:.4g}") for x in (row.drop.value, row.drop.high)]
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "made_by": f"benchmarks/small_models.py {name}",
            "scale_nats": found.scale,
            "profile": as_json(profile),
            "facts": None if facts is None else as_json(facts),
            "drop_percent": rows,
            "outliers": outliers,
            "vetoes": [f"{v.unit} {v.format}" for v in found.vetoes],
            "versions": dict(found.versions),
        },
    )
    print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)


def main() -> None:
    """Make the named ones, all where none is named."""
    names = (*MODELS, *WORKLOADS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *names], metavar="NAME", help=", ".join(names))
    torch.set_num_threads(1)
    for name in parser.parse_args().names or names:
        write(name)


if __name__ == "__main__":
    main()
