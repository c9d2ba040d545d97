"""The residual transformer branch of association learning: a few learned tokens see the whole image.

Source: arXiv 2311.05147 names it (learnable tokens, stacked multi-head attention and feed-forward
networks) without code; how tokens and image features meet is our reading. A token costs as much as
there are pixels, so a few of them make attention over the whole image linear in its size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from restore_kernels import masked_attention
from restore_kernels.nn import ChannelNorm
from restore_nets.models.gated import GatedBlockOptions, ResidualBlocks

EXPANSION = 2  # of the tokens' feed-forward networks


class TokenAttention(nn.Module):
    """Multi-head scaled dot-product attention of queries to a context.

    Args:
        dim: length of a query; a multiple of heads.
        heads: number of heads.

    Shape: queries (B, N, dim), context (B, M, dim) -> (B, N, dim).
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.project_out = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        q, k, v = (self._split_heads(x) for x in (self.q(queries), *self.kv(context).chunk(2, dim=-1)))
        out = masked_attention(q, k, v, layout="token", normalize=False)  # (B, heads, N, dim / heads)
        return self.project_out(out.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> (B, heads, N, dim / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class TokenLayer(nn.Module):
    """tokens + attention(norm1(tokens)), then tokens + feed-forward(norm2(tokens)).

    Shape: (B, T, dim) -> (B, T, dim).
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = TokenAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, EXPANSION * dim), nn.GELU(), nn.Linear(EXPANSION * dim, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.norm1(tokens)
        tokens = tokens + self.attn(normed, normed)
        return tokens + self.ffn(self.norm2(tokens))


class TokenBranch(nn.Module):
    """Tokens read the image features and think about them, the features read the tokens; then ORB.

    Args:
        blocks: options of the transformer blocks of ORB.
        heads: of every attention here.
        tokens: number of learned tokens.
        token_layers: layers of attention among the tokens.
        num_blocks: transformer blocks of ORB, see ``ResidualBlocks``.

    Shape: (B, dim, H, W) -> (B, dim, H, W).
    """

    def __init__(
        self, blocks: GatedBlockOptions, heads: int, tokens: int, token_layers: int, num_blocks: int
    ) -> None:
        super().__init__()
        dim = blocks.dim
        self.tokens = nn.Parameter(torch.randn(tokens, dim))
        self.norm = ChannelNorm(dim, blocks.norm)
        self.read = TokenAttention(dim, heads)
        self.layers = nn.Sequential(*(TokenLayer(dim, heads) for _ in range(token_layers)))
        self.norm_tokens = nn.LayerNorm(dim)
        self.read_back = TokenAttention(dim, heads)
        self.orb = ResidualBlocks(blocks, heads, num_blocks)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # (B, H * W, dim)
        tokens = self.tokens.expand(len(x), -1, -1)
        tokens = self.layers(tokens + self.read(tokens, pixels))
        seen = self.read_back(pixels, self.norm_tokens(tokens))  # (B, H * W, dim)
        return self.orb(x + seen.transpose(1, 2).unflatten(2, x.shape[2:]))
