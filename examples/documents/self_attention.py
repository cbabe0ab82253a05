"""Single-head self-attention: the textbook module and this package's, with one `state_dict` and one result.

softmax(Q K^T / sqrt(d_k)) V,   Q = X W_q,  K = X W_k,  V = X W_v
"""

import torch
from torch import nn

import fused_attention as fa


class SelfAttention(nn.Module):
    """The formula, line by line; its scores are a tensor of [batch, length, length]."""

    def __init__(self, input_dim: int, d_k: int) -> None:
        super().__init__()
        self.W_q = nn.Linear(input_dim, d_k)
        self.W_k = nn.Linear(input_dim, d_k)
        self.W_v = nn.Linear(input_dim, d_k)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.W_q(x), self.W_k(x), self.W_v(x)
        scores = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5
        return scores.softmax(-1) @ v


def main() -> None:
    torch.manual_seed(0)
    input_dim, d_k, batch_size, seq_length = 128, 64, 32, 10
    x = torch.randn(batch_size, seq_length, input_dim)
    textbook = SelfAttention(input_dim, d_k)
    ours = fa.SelfAttention(input_dim, d_k)
    ours.load_state_dict(textbook.state_dict())
    output = ours(x)
    print(output.shape)
    print(f"largest difference: {(output - textbook(x)).abs().max():.1e}")


if __name__ == "__main__":
    main()
