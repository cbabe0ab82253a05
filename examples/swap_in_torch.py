"""A script that trains and runs a torch.nn.TransformerEncoder, with one line added; without it, the same results.

python examples/swap_in_torch.py
"""

from __future__ import annotations

import torch
from torch import nn

import fused_attention

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(d_model=64, nhead=4, dim_feedforward=128, dropout=0.0, batch_first=True)
encoder = nn.TransformerEncoder(layer, num_layers=2)
fused_attention.replace_attention(encoder)  # the added line

tokens = torch.randn(8, 32, 64)
lengths = torch.randint(8, 33, (8, 1))
padding = torch.arange(32) >= lengths
target = torch.randn(8, 32, 64)
optimizer = torch.optim.SGD(encoder.parameters(), 0.05)
for step in range(5):
    out = encoder(tokens, src_key_padding_mask=padding)
    loss = nn.functional.mse_loss(out[~padding], target[~padding])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.5f}")

encoder.eval()
with torch.no_grad():
    out = encoder(tokens, src_key_padding_mask=padding)[~padding]
print(f"inference: mean {out.mean().item():.5f}, spread {out.std().item():.5f}")
