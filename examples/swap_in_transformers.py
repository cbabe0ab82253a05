"""A script that trains a model of Hugging Face transformers and generates with it, with one line added.

Without the line: the same losses and the same tokens. The model is small and random, so that nothing is downloaded;
`register()` before and `from_pretrained(..., attn_implementation="fused_attention")` do the same for a model that is
loaded later.

    python examples/swap_in_transformers.py
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fused_attention.integrations.transformers import register

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 100}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=0, initializer_range=0.2))
register(model)  # the added line

tokens = torch.randint(1, 100, (4, 24))
visible = torch.arange(24) >= torch.tensor([[0], [3], [10], [17]])  # prompts of different lengths, padded on the left
batch = {"input_ids": tokens * visible, "attention_mask": visible.long()}
hidden = ~visible | ~visible.roll(1, 1)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for step in range(5):
    loss = model(**batch, labels=tokens.masked_fill(hidden, -100)).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.5f}")

model.eval()
generated = model.generate(**batch, max_new_tokens=12, num_beams=3)
for row in generated[:, 24:].tolist():
    print("generated:", *row)
