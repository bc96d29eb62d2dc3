"""Small real models with random weights and a byte-level tokenizer, saved as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

SPECIAL = ["<pad>", "<eos>", "<mask>", "<cls>", "<sep>"]
VOCABULARY = 256 + len(SPECIAL)
POSITIONS = 64


def tokenizer(*, framed: bool = False, pad: bool = True) -> Any:
    """Return a tokenizer with a token a byte; `framed` puts <cls> and <sep> around a text, as BERT's does."""
    vocabulary = {symbol: index for index, symbol in enumerate(SPECIAL)}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if framed:
        inner.post_processor = processors.TemplateProcessing(
            single="<cls> $A <sep>", special_tokens=[("<cls>", 3), ("<sep>", 4)]
        )
    named = {"eos_token": "<eos>", "mask_token": "<mask>"}
    if pad:
        named["pad_token"] = "<pad>"
    return PreTrainedTokenizerFast(tokenizer_object=inner, **named)


def gpt2(**changes: Any) -> GPT2LMHeadModel:
    """Return a GPT-2 with one block of width 16."""
    settings = {
        "vocab_size": VOCABULARY,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": POSITIONS,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    return GPT2LMHeadModel(GPT2Config(**{**settings, **changes})).eval()


def bert_config(**changes: Any) -> BertConfig:
    """Return the configuration of a BERT with one block of width 16."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": 0,
    }
    return BertConfig(**{**settings, **changes})


def bert_encoder() -> BertModel:
    """Return a bare BERT encoder."""
    return BertModel(bert_config()).eval()


def bert_masked() -> BertForMaskedLM:
    """Return a BERT for masked language modelling."""
    return BertForMaskedLM(bert_config()).eval()


def bert_classifier(labels: int, **changes: Any) -> BertForSequenceClassification:
    """Return a BERT classifier of `labels` classes."""
    return BertForSequenceClassification(bert_config(num_labels=labels, **changes)).eval()


def t5() -> T5ForConditionalGeneration:
    """Return an encoder-decoder of width 16."""
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).eval()


def save(model: Any, folder: Path, *, framed: bool = False, pad: bool = True) -> Path:
    """Save a model with its tokenizer and return the folder."""
    model.save_pretrained(folder)
    tokenizer(framed=framed, pad=pad).save_pretrained(folder)
    return folder


class BareBlock(nn.Module):
    """A pre-norm block with a joint q/k/v projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, width] to the same shape."""
        b, t, d = x.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.qkv(self.ln1(x)).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(b, t, d))
        output: Tensor = x + self.fc2(functional.gelu(self.fc1(self.ln2(x))))
        return output


class BareGPT(nn.Module):
    """A GPT without transformers: ids [B, T] in, logits [B, T, vocabulary] out as a bare tensor."""

    def __init__(self, vocabulary: int = 32, width: int = 16, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(POSITIONS, width)
        self.blocks = nn.ModuleList(BareBlock(width, heads) for _ in range(layers))
        self.lnf, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits."""
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.lnf(x))
        return logits
