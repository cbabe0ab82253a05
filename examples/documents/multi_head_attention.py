"""Multi-head self-attention with one fused projection: the textbook module and this package's.

MultiHead(X) = Concat(head_1, ..., head_h) W_o,   head_i = attention(Q_i, K_i, V_i)
"""

import torch
from torch import nn

import fused_attention as fa


class MultiHeadAttention(nn.Module):
    """The formula, line by line; its scores are a tensor of [batch, heads, length, length]."""

    def __init__(self, input_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, input_dim // num_heads
        self.qkv_proj = nn.Linear(input_dim, 3 * input_dim)
        self.out_proj = nn.Linear(input_dim, input_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = (self.num_heads, self.head_dim)
        q, k, v = (t.unflatten(-1, heads).transpose(1, 2) for t in self.qkv_proj(x).chunk(3, dim=-1))
        weights = (q @ k.transpose(-2, -1) / self.head_dim**0.5).softmax(-1)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2))


def main() -> None:
    torch.manual_seed(0)
    input_dim, num_heads, batch_size, seq_length = 512, 8, 32, 10
    x = torch.randn(batch_size, seq_length, input_dim)
    textbook = MultiHeadAttention(input_dim, num_heads)
    ours = fa.MultiHeadAttention(input_dim, num_heads)
    ours.load_state_dict(textbook.state_dict())
    output = ours(x)
    print(output.shape)
    print(f"largest difference: {(output - textbook(x)).abs().max():.1e}")


if __name__ == "__main__":
    main()
