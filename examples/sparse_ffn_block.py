"""Make the FFN of another model sparse, by `actvar_kernels` alone.

    python examples/sparse_ffn_block.py

A block of a plain transformer gets a router. Each token then uses some experts, groups of the FFN's hidden units. With
all experts on, the block is the dense one.
"""

import argparse

import torch
from torch import nn
from torch.nn import functional as F

import actvar_kernels


class Block(nn.Module):
    """A pre-norm transformer block whose FFN runs as experts.

    Args:
        width: of the tokens.
        heads: of attention.
        experts: groups of hidden units.
        active: experts that each token uses.
    """

    def __init__(self, width: int, heads: int, experts: int, active: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.router, self.active = nn.Linear(width, experts), active

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output `[B, L, C]`."""
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        h = self.norm2(x)
        chosen, _ = actvar_kernels.route_experts(h, self.router.weight, self.router.bias, self.active)
        weights = self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
        return x + actvar_kernels.expert_ffn(h, chosen, self.active, *weights)

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output of the block with the whole FFN, by PyTorch."""
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


@torch.no_grad()
def main(arguments: list[str] | None = None) -> dict[int, float]:
    """Print how far the block is from the dense one by the number of experts, and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    block = Block(options.width, heads=4, experts=16, active=16).eval()
    x = torch.randn(2, options.tokens, options.width)
    dense, errors = block.dense(x), {}
    for active in (16, 12, 8):
        block.active = active
        errors[active] = ((block(x) - dense).norm() / (dense - x).norm()).item()
        print(f"{active} of 16 experts: the update differs by {errors[active]:.1%}")
    return errors


if __name__ == "__main__":
    main()
