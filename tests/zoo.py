"""One small model of every architecture that plans are proven on, with a batch and a loss each.

Width 32, two blocks, feature counts in multiples of 16 (as FP8 kernels need), no dropout, seeded, FP32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import transformers
from tiny_models import BareGPT
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ZOO", "Case"]

VOCABULARY = 96
TOKENS = 16

_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True, slots=True)
class Case:
    """A model with a batch (keyword arguments, or one tensor) and the scalar to differentiate."""

    model: nn.Module
    batch: dict[str, Tensor] | Tensor
    loss: Callable[[Any], Tensor]

    def run(self) -> Any:
        """Return the model's output on its batch."""
        return self.model(**self.batch) if isinstance(self.batch, dict) else self.model(self.batch)


def _own_loss(output: Any) -> Tensor:
    loss: Tensor = output.loss
    return loss


def _squares(output: Tensor) -> Tensor:
    return output.float().square().mean()


def _ids(offset: int = 3) -> Tensor:
    return torch.randint(offset, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def _lm(model: nn.Module) -> Case:
    ids = _ids()
    return Case(model, {"input_ids": ids, "labels": ids.clone()}, _own_loss)


def bert() -> Case:
    """BERT, masked language modelling, head tied to the lookup."""
    return _lm(transformers.BertForMaskedLM(transformers.BertConfig(**_BERT)))


def bert_classifier() -> Case:
    """BERT with a pooler and a classifier of 16 classes."""
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**_BERT, num_labels=16))
    return Case(model, {"input_ids": _ids(), "labels": torch.tensor([1, 0])}, _own_loss)


def roberta() -> Case:
    """RoBERTa: positions count from the padding index."""
    return _lm(transformers.RobertaForMaskedLM(transformers.RobertaConfig(**_BERT)))


def albert() -> Case:
    """ALBERT: one block that runs twice, a factorised lookup."""
    return _lm(transformers.AlbertForMaskedLM(transformers.AlbertConfig(**_BERT, embedding_size=16)))


def deberta() -> Case:
    """DeBERTa v2: relative positions projected by the attention's own queries and keys."""
    config = transformers.DebertaV2Config(
        **_BERT, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"], share_att_key=True
    )
    return _lm(transformers.DebertaV2ForMaskedLM(config))


def gpt2() -> Case:
    """GPT-2: Conv1D leaves, q/k/v fused."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # what its class name does not tell, of which Transformers warns at every loss
    return _lm(model)


def gpt_neox() -> Case:
    """GPT-NeoX: attention and FFN in parallel."""
    settings = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}
    return _lm(transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**settings)))


def opt() -> Case:
    """OPT: projections into and out of the stream."""
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        word_embed_proj_dim=16,
        max_position_embeddings=32,
        dropout=0.0,
        pad_token_id=0,
    )
    return _lm(transformers.OPTForCausalLM(config))


def llama() -> Case:
    """Llama: grouped heads, gated FFN."""
    return _lm(transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA)))


def llama_tied() -> Case:
    """Llama whose head is its lookup."""
    return _lm(transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=True)))


def qwen3() -> Case:
    """Qwen3: norms on queries and keys, heads wider together than the stream."""
    return _lm(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_LLAMA, head_dim=32)))


def gemma3() -> Case:
    """Gemma 3: sandwich norms, sliding and full attention, scaled lookup."""
    config = transformers.Gemma3TextConfig(**_LLAMA, head_dim=16, sliding_window=8, sliding_window_pattern=2)
    return _lm(transformers.Gemma3ForCausalLM(config))


def phi() -> Case:
    """Phi: parallel attention and FFN, half-rotated heads, a head with a bias."""
    return _lm(transformers.PhiForCausalLM(transformers.PhiConfig(**_LLAMA, resid_pdrop=0.0, embd_pdrop=0.0)))


def mistral() -> Case:
    """Mistral: a sliding window."""
    return _lm(transformers.MistralForCausalLM(transformers.MistralConfig(**_LLAMA, sliding_window=8)))


def mixtral() -> Case:
    """Mixtral: a router that owns its matrix, experts as 3-D parameters."""
    config = transformers.MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2)
    return _lm(_filled(transformers.MixtralForCausalLM(config)))


def qwen3_moe() -> Case:
    """Qwen3-MoE: many small experts."""
    config = transformers.Qwen3MoeConfig(
        **_LLAMA, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1
    )
    return _lm(_filled(transformers.Qwen3MoeForCausalLM(config)))


def t5() -> Case:
    """T5: encoder and decoder, cross-attention, one lookup for both."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return _lm(transformers.T5ForConditionalGeneration(config))


def bart() -> Case:
    """BART: encoder and decoder with learned positions."""
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=32,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    return _lm(transformers.BartForConditionalGeneration(config))


def whisper() -> Case:
    """Whisper: a convolution stem before the encoder."""
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=16,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=16,
        max_target_positions=32,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
        suppress_tokens=None,
    )
    model = transformers.WhisperForConditionalGeneration(config)
    return Case(model, {"input_features": torch.randn(2, 16, 32), "labels": _ids()}, _own_loss)


def vit() -> Case:
    """ViT: patches by a convolution, a class token."""
    settings = {k: v for k, v in _BERT.items() if k not in ("vocab_size", "max_position_embeddings", "pad_token_id")}
    config = transformers.ViTConfig(**settings, image_size=16, patch_size=4, num_labels=16)
    pixels = torch.randn(2, 3, 16, 16)
    return Case(
        transformers.ViTForImageClassification(config),
        {"pixel_values": pixels, "labels": torch.tensor([1, 0])},
        _own_loss,
    )


def clip() -> Case:
    """CLIP: two towers projected into one space."""
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 16,
    }
    text = tower | {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = tower | {"image_size": 16, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    ids = _ids()
    ids[:, -1] = 2
    return Case(
        transformers.CLIPModel(config),
        {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)},
        lambda output: output.logits_per_image.float().square().mean(),
    )


def batchnorm_cnn() -> Case:
    """ResNet: convolutions with batch norms, shortcuts, one linear head."""
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic", num_labels=16
    )
    model = transformers.ResNetForImageClassification(config)
    return Case(model, {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([1, 0])}, _own_loss)


def mamba() -> Case:
    """Mamba: a selective state space instead of attention."""
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        state_size=16,
        num_hidden_layers=2,
        time_step_rank=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    return _lm(transformers.MambaForCausalLM(config))


def peft_lora() -> Case:
    """Llama with LoRA adapters around all linear layers of its blocks."""
    return _adapted(llama().model)


def qlora() -> Case:
    """Llama whose blocks hold 4-bit weights, with LoRA adapters."""
    model = llama().model
    _pack(model)
    return _adapted(model)


def bare_gpt() -> Case:
    """A GPT without any library."""
    model = BareGPT(vocabulary=VOCABULARY, width=32)
    ids = _ids()
    return Case(model, ids, lambda logits: functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten()))


def falcon() -> Case:
    """Falcon: a linear layer of its own class, parallel attention with one key and value head."""
    config = transformers.FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=0,
    )
    return _lm(transformers.FalconForCausalLM(config))


def deepseek_v3() -> Case:
    """DeepSeek V3: low-rank queries, keys and values, a shared expert, a dense first block."""
    config = transformers.DeepseekV3Config(
        **_LLAMA | {"num_key_value_heads": 2},
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=32,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    )
    return _lm(_filled(transformers.DeepseekV3ForCausalLM(config)))


def llama4() -> Case:
    """Llama 4: experts as batched products, a shared expert."""
    config = transformers.Llama4TextConfig(
        **_LLAMA | {"intermediate_size": 32},
        intermediate_size_mlp=64,
        num_local_experts=4,
        num_experts_per_tok=1,
        head_dim=16,
        attention_chunk_size=32,
    )
    return _lm(_filled(transformers.Llama4ForCausalLM(config)))


def gpt_oss() -> Case:
    """GPT-OSS: experts with biases, attention sinks."""
    config = transformers.GptOssConfig(
        **_LLAMA, num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=8
    )
    return _lm(_filled(transformers.GptOssForCausalLM(config)))


def jetmoe() -> Case:
    """JetMoE: attention heads that are experts, experts whose two matrices are two modules."""
    config = transformers.JetMoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=16,
        intermediate_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=32,
    )
    return _lm(_filled(transformers.JetMoeForCausalLM(config)))


def switch() -> Case:
    """Switch Transformers: experts in a dict, a router with its matrix in a module of its own."""
    config = transformers.SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        num_experts=4,
        expert_capacity=32,
        dropout_rate=0.0,
        router_jitter_noise=0.0,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return _lm(transformers.SwitchTransformersForConditionalGeneration(config))


def qwen3_next() -> Case:
    """Qwen3-Next: blocks of a gated delta rule and of attention, a shared expert with a gate."""
    config = transformers.Qwen3NextConfig(
        **_LLAMA,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
    )
    return _lm(_filled(transformers.Qwen3NextForCausalLM(config)))


def recurrent_gemma() -> Case:
    """RecurrentGemma: a linear recurrence whose gates are matrices of its own code."""
    config = transformers.RecurrentGemmaConfig(
        **_LLAMA | {"num_hidden_layers": 3}, lru_width=32, attention_window_size=16, head_dim=16
    )
    return _lm(_filled(transformers.RecurrentGemmaForCausalLM(config)))


def swin() -> Case:
    """Swin: stages of blocks with a reduction after each, position tables in the attention."""
    config = transformers.SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=4,
        num_labels=16,
        drop_path_rate=0.0,
    )
    pixels = torch.randn(2, 3, 32, 32)
    model = transformers.SwinForImageClassification(config)
    return Case(model, {"pixel_values": pixels, "labels": torch.tensor([1, 0])}, _own_loss)


def wav2vec2() -> Case:
    """Wav2Vec2: a convolution whose weight is computed (weight norm), a CTC head."""
    config = transformers.Wav2Vec2Config(
        vocab_size=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16, 16),
        conv_stride=(4, 4),
        conv_kernel=(8, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
        mask_time_prob=0.0,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )
    model = transformers.Wav2Vec2ForCTC(config)
    return Case(model, {"input_values": torch.randn(2, 640)}, lambda output: _squares(output.logits))


class Upsampler(nn.Module):
    """A convolution down, one whose weight is normed, a transposed one up."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.middle = nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3, padding=1))
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.out = nn.Conv2d(16, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return [B, 4, H, W]."""
        hidden = functional.relu(self.middle(functional.relu(self.down(image))))
        result: Tensor = self.out(functional.relu(self.up(hidden)))
        return result


def upsampler() -> Case:
    """A small U-shaped network of convolutions."""
    return Case(Upsampler(), torch.randn(2, 3, 16, 16), _squares)


class TorchEncoder(nn.Module):
    """PyTorch's own encoder between a lookup and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 16)

    def forward(self, ids: Tensor) -> Tensor:
        """Return [B, 16]."""
        logits: Tensor = self.head(self.encoder(self.embedding(ids)).mean(1))
        return logits


def torch_encoder() -> Case:
    """PyTorch's TransformerEncoder, with MultiheadAttention."""
    return Case(TorchEncoder(), _ids(), _squares)


def _filled(model: nn.Module) -> nn.Module:
    """Give 3-D expert parameters values of ordinary size, whatever the initialiser left."""
    for parameter in model.parameters():
        if parameter.dim() == 3:
            nn.init.normal_(parameter, std=0.1)
    return model


def _adapted(model: nn.Module) -> Case:
    from peft import LoraConfig, get_peft_model

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=names, lora_dropout=0.0))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zeros at first, which would hide what its product does
            nn.init.normal_(parameter, std=0.1)
    return _lm(adapted)


def _pack(model: nn.Module) -> None:
    """Replace the linear layers of the blocks by 4-bit ones, as a quantized checkpoint has them."""
    four_bit: Any = import_module("bitsandbytes.nn")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            packed = four_bit.Linear4bit(module.in_features, module.out_features, bias=False)
            packed.weight = four_bit.Params4bit(module.weight.detach(), requires_grad=False, quant_type="nf4")
            model.set_submodule(name, packed.to("cpu"))


_MAKERS: list[Callable[[], Case]] = [
    bert,
    bert_classifier,
    roberta,
    albert,
    deberta,
    gpt2,
    gpt_neox,
    opt,
    llama,
    llama_tied,
    qwen3,
    gemma3,
    phi,
    mistral,
    mixtral,
    qwen3_moe,
    t5,
    bart,
    whisper,
    vit,
    clip,
    batchnorm_cnn,
    mamba,
    peft_lora,
    qlora,
    bare_gpt,
    torch_encoder,
    falcon,
    deepseek_v3,
    llama4,
    gpt_oss,
    jetmoe,
    switch,
    qwen3_next,
    recurrent_gemma,
    swin,
    wav2vec2,
    upsampler,
]


def _seeded(make: Callable[[], Case]) -> Callable[[], Case]:
    def made() -> Case:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make()

    return made


ZOO: dict[str, Callable[[], Case]] = {make.__name__: _seeded(make) for make in _MAKERS}
