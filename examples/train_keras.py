"""Build a decoder in Keras with the policies of a plan, a policy for each layer, and train it.

    KERAS_BACKEND=torch python examples/train_keras.py

Layers are named as in the PyTorch model, so the plan's paths are theirs: `transformer/h/0/mlp/c_fc`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
from exported import demo, parser


class Named(keras.layers.Layer):
    """A layer that hands its policies on to its parts, which are named as in the PyTorch model."""

    def __init__(self, name: str, dtype: Any) -> None:
        super().__init__(name=name, dtype=dtype)
        self.policies = dtype

    def dense(self, name: str, width: int) -> keras.layers.Layer:
        """Return a linear layer of this one."""
        return keras.layers.Dense(width, name=name, dtype=self.policies)

    def norm(self, name: str) -> keras.layers.Layer:
        """Return a norm of this one."""
        return keras.layers.LayerNormalization(name=name, dtype=self.policies)


class Attention(Named):
    """Causal attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int, dtype: Any) -> None:
        super().__init__("attn", dtype)
        self.heads, self.c_attn, self.c_proj = heads, self.dense("c_attn", 3 * width), self.dense("c_proj", width)

    def call(self, x: Any) -> Any:
        rows, length, width = x.shape
        shape = (rows, length, self.heads, width // self.heads)
        q, k, v = (keras.ops.reshape(part, shape) for part in keras.ops.split(self.c_attn(x), 3, axis=-1))
        y = keras.ops.dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(keras.ops.reshape(y, (rows, length, width)))


class FeedForward(Named):
    """Expand, GELU, contract."""

    def __init__(self, width: int, dtype: Any) -> None:
        super().__init__("mlp", dtype)
        self.c_fc, self.c_proj = self.dense("c_fc", 4 * width), self.dense("c_proj", width)

    def call(self, x: Any) -> Any:
        return self.c_proj(keras.activations.gelu(self.c_fc(x), approximate=True))


class Block(Named):
    """A block of the decoder; its stream stays in FP32."""

    def __init__(self, index: int, width: int, heads: int, dtype: Any) -> None:
        super().__init__(str(index), dtype)
        self.ln_1, self.ln_2 = self.norm("ln_1"), self.norm("ln_2")
        self.attn, self.mlp = Attention(width, heads, dtype), FeedForward(width, dtype)

    def call(self, x: Any) -> Any:
        x = x + keras.ops.cast(self.attn(self.ln_1(x)), "float32")
        return x + keras.ops.cast(self.mlp(self.ln_2(x)), "float32")


class Blocks(Named):
    """The list of blocks, `h`."""

    def __init__(self, count: int, width: int, heads: int, dtype: Any) -> None:
        super().__init__("h", dtype)
        self.blocks = [Block(index, width, heads, dtype) for index in range(count)]

    def call(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return x


class Transformer(Named):
    """Embeddings, blocks and the last norm."""

    def __init__(self, config: Any, dtype: Any) -> None:
        super().__init__("transformer", dtype)
        self.wte = keras.layers.Embedding(config.vocab_size, config.n_embd, name="wte", dtype=dtype)
        self.wpe = keras.layers.Embedding(config.n_positions, config.n_embd, name="wpe", dtype=dtype)
        self.h, self.ln_f = Blocks(config.n_layer, config.n_embd, config.n_head, dtype), self.norm("ln_f")

    def call(self, ids: Any) -> Any:
        positions = keras.ops.arange(ids.shape[1])
        x = keras.ops.cast(self.wte(ids), "float32") + keras.ops.cast(self.wpe(positions), "float32")
        return self.ln_f(self.h(x))


class Decoder(keras.Model):
    """The demo model's architecture in Keras, with random weights and a head of its own."""

    def __init__(self, config: Any, dtype: Any) -> None:
        super().__init__(name="decoder")
        self.transformer = Transformer(config, dtype)
        self.lm_head = keras.layers.Dense(config.vocab_size, use_bias=False, name="lm_head", dtype=dtype)

    def call(self, ids: Any) -> Any:
        return self.lm_head(self.transformer(ids))


def main(argv: Sequence[str] | None = None) -> tuple[Any, Any, list[float]]:
    """Train; return the model, the exported program and the losses."""
    made = demo(parser("Train in Keras with a plan's policies.").parse_args(argv))
    program = made.program("keras")

    def rename(path: str) -> str:
        return f"decoder/{path}"

    model = Decoder(made.model.config, program.policy_map(rename))
    batches = [np.asarray(batch["input_ids"]) for batch in made.batches()]
    model(batches[0])  # builds it, and gives every layer its path
    program.check(model, rename)
    optimizer: Any = keras.optimizers.AdamW(1e-3)
    optimizer = program.scaled(optimizer) if hasattr(program, "scaled") else optimizer
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, auto_scale_loss=False)
    losses = [float(model.train_on_batch(ids[:, :-1], ids[:, 1:])) for ids in batches]
    policies: dict[str, int] = {}
    for layer in model._flatten_layers():
        policies[layer.compute_dtype] = policies.get(layer.compute_dtype, 0) + 1
    print("layers by compute dtype: " + ", ".join(f"{name} {count}" for name, count in sorted(policies.items())))
    print(f"loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at step {len(losses)}")
    return model, program, losses


if __name__ == "__main__":
    main()
