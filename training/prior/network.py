"""The network of a prior: a causal transformer that reads a text and says which image embedding a noisy one stands for.

One network for what is trained here and for public priors: its tensors have the names of diffusers' PriorTransformer (the prior of
DALL-E 2, Ramesh et al. 2022, as Karlo and Kandinsky built it). The sequence is [states of the text][pooled text][time][noisy][query]
and the answer is read at the query. No token sees what comes after it, so the text, which is nearly all of the sequence, is read
once for each prompt, and a step evaluates the last three tokens alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Shape:
    """What decides the size of every tensor."""

    dim: int  # numbers of an image embedding
    text_dim: int  # of the pooled text
    states_dim: int  # of each state of the text; 0 where states are left away
    width: int  # of a token
    layers: int
    heads: int
    text_length: int  # places for states of the text, 77 for CLIP; 0 where states are left away
    time: bool = True  # ECLIPSE (Patel et al. 2023) answers in one evaluation and has no token for time

    def __post_init__(self):
        if self.width % (2 * self.heads):
            raise ValueError(f"A width of {self.width} cannot be split into {self.heads} heads of an even size.")
        if bool(self.states_dim) != bool(self.text_length):
            raise ValueError(
                f"States of {self.states_dim} numbers at {self.text_length} places: both are 0, for a prior without states, or neither is."
            )

    @property
    def added(self) -> int:
        """Tokens after the text: time, the noisy embedding and the query."""
        return 3 if self.time else 2

    @property
    def positions(self) -> int:
        return self.text_length + 1 + self.added


SIZES = {"small": (128, 4, 4), "medium": (256, 6, 4), "large": (512, 12, 8)}  # width, layers, heads
RATE = 0.512  # the learning rate that suits, times the width: 0.004 is the best for 128 (evidence/prior), and with Adam it falls as 1 / width


def shape_of(dim: int, text_dim: int, states_dim: int, text_length: int, size: str = "auto") -> Shape:
    """By a name of SIZES; auto is small for CLIPs as small as Pocket's (128 numbers), else large, about 40 million parameters."""
    if size == "auto":
        size = "small" if max(dim, states_dim) <= 256 else "large"
    return Shape(dim, text_dim, states_dim, *SIZES[size], text_length)


class Prefix(NamedTuple):
    """p texts, read: for each layer the keys and values (p, heads, P, c) of all their tokens."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    mask: torch.Tensor  # (p, P) bool, True where there is a token; the last is the pooled text

    def rows(self, which) -> Prefix:
        """Those of some texts; `which` is a slice or a list of indices."""
        return Prefix([k[which] for k in self.keys], [v[which] for v in self.values], self.mask[which])


class PriorNetwork(nn.Module):
    """`prefix = network.read(states, pooled, mask)`, then `network(noisy, time, prefix)` for every step."""

    def __init__(self, shape: Shape):
        """The weights are torch's own and of the global generator; `drawn` makes a network to be trained."""
        super().__init__()
        width, self.shape = shape.width, shape
        if shape.time:
            self.time_embedding = TimeEmbedding(width)
        self.proj_in = nn.Linear(shape.dim, width)
        self.embedding_proj = nn.Linear(shape.text_dim, width)
        if shape.text_length:
            self.encoder_hidden_states_proj = nn.Linear(shape.states_dim, width)
        self.positional_embedding = nn.Parameter(torch.zeros(1, shape.positions, width))
        self.prd_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.transformer_blocks = nn.ModuleList(Block(width, shape.heads) for _ in range(shape.layers))
        self.norm_out = nn.LayerNorm(width)
        self.proj_to_clip_embeddings = nn.Linear(width, shape.dim)

    def read(self, states: torch.Tensor | None, pooled: torch.Tensor, mask: torch.Tensor | None = None) -> Prefix:
        """p texts: states (p, L, states_dim) with L <= text_length, pooled (p, text_dim), mask (p, L) bool, True up to and with the
        end of the text; without it, everything. Places that no text fills are not computed."""
        x, seen = self._text(states, pooled, mask)
        earlier = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        # A place that is not seen sees itself, or its softmax would be over nothing; nobody reads it.
        itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        visible = (earlier & seen[:, None, :] | itself)[:, None]
        keys, values, last = [], [], len(self.transformer_blocks) - 1
        for i, block in enumerate(self.transformer_blocks):
            x, k, v = block(x, visible, ask=None if i == last else slice(None))  # after the last layer nobody asks
            keys.append(k)
            values.append(v)
        return Prefix(keys, values, seen)

    def _text(self, states, pooled, mask) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (p, P, width) of the text and which of them are seen (p, P)."""
        weight, room = self.embedding_proj.weight, self.shape.text_length
        tokens = self.embedding_proj(pooled.to(weight))[:, None] + self.positional_embedding[:, room : room + 1]
        seen = torch.ones(len(pooled), 1, dtype=torch.bool, device=weight.device)
        if not room:
            return tokens, seen
        if states is None or states.shape[1] > room or states.shape[2] != self.shape.states_dim:
            got = "no states" if states is None else f"{states.shape[1]} states of {states.shape[2]} numbers"
            raise ValueError(
                f"This prior reads texts of up to {room} states of {self.shape.states_dim} numbers and got {got}."
            )
        mask = torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        filled = mask.any(0).nonzero().flatten().tolist()
        length = filled[-1] + 1 if filled else 0
        words = self.encoder_hidden_states_proj(states[:, :length].to(weight)) + self.positional_embedding[:, :length]
        return torch.cat([words, tokens], 1), torch.cat([mask[:, :length].to(seen.device), seen], 1)

    def forward(self, noisy: torch.Tensor, time: torch.Tensor | float | None, prefix: Prefix) -> torch.Tensor:
        """What the network says of n noisy embeddings (n, dim) at `time`, a number or (n,) in 0..999 (None where there is no time):
        (n, dim) in the dtype of `noisy`.

        Of p texts each stands for n / p embeddings, one text's after the other's. They lie side by side in one row of attention,
        hidden from each other, so that the text's keys are there once; with more than some hundred of each text, that row is most of
        the work.
        """
        texts, tokens = len(prefix.mask), self.shape.added
        if len(noisy) % texts:
            raise ValueError(f"{len(noisy)} embeddings cannot be shared out to {texts} texts: each text has as many.")
        x = self._tail(noisy, time).reshape(texts, -1, self.shape.width)
        visible = _visible(prefix.mask, tokens, x.shape[1])
        queries = slice(tokens - 1, None, tokens)
        for i, block in enumerate(self.transformer_blocks):
            ask = queries if i == len(self.transformer_blocks) - 1 else slice(None)
            x = block(x, visible, prefix.keys[i], prefix.values[i], ask)[0]
        return self.proj_to_clip_embeddings(self.norm_out(x)).reshape(noisy.shape).to(noisy)

    def _tail(self, noisy: torch.Tensor, time) -> torch.Tensor:
        """(n, 2 or 3, width): time, the noisy embedding, the query."""
        weight = self.proj_in.weight
        tokens = [self.proj_in(noisy.to(weight))[:, None], self.prd_embedding.expand(len(noisy), -1, -1)]
        if self.shape.time:
            time = torch.as_tensor(time, dtype=torch.float32, device=weight.device).expand(len(noisy))
            tokens.insert(0, self.time_embedding(time)[:, None])
        return torch.cat(tokens, 1) + self.positional_embedding[:, -self.shape.added :]


def _visible(text: torch.Tensor, tokens: int, count: int) -> torch.Tensor:
    """(p, 1, count, P + count): each of `count` tokens sees its text (p, P), itself, and what stands before it in its own group of
    `tokens`."""
    place = torch.arange(count, device=text.device)
    own = (place[:, None] // tokens == place // tokens) & (place[:, None] >= place)
    return torch.cat([text[:, None].expand(-1, count, -1), own.expand(len(text), -1, -1)], 2)[:, None]


class Block(nn.Module):
    """Attention and a feed-forward network, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x, visible, keys=None, values=None, ask: slice | None = slice(None)):
        """x (r, T, width), after the block, where asked (None: nowhere); and the keys and values (r, heads, T, c) of all T.

        `keys` and `values` (r, heads, P, c) are those of earlier tokens; `visible` (r, 1, T, P + T) says who sees whom.
        """
        normed = self.norm1(x)
        own = self.attn1.keys_and_values(normed)
        if ask is None:
            return x, *own
        if keys is not None:
            keys, values = torch.cat([keys, own[0]], 2), torch.cat([values, own[1]], 2)
        else:
            keys, values = own
        x = x[:, ask] + self.attn1(normed[:, ask], keys, values, visible[:, :, ask])
        return x + self.ff(self.norm3(x)), *own


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def keys_and_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._split(self.to_k(x)), self._split(self.to_v(x))

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, keys, values, visible) -> torch.Tensor:
        out = F.scaled_dot_product_attention(self._split(self.to_q(x)), keys, values, visible)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.ModuleList([Gelu(width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net[2](self.net[0](x))


class Gelu(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 4 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.proj(x))  # by erf


class TimeEmbedding(nn.Module):
    """(n,) indices of time -> (n, width): cosines and sines of wavelengths 2 pi to 20000 pi, and a small network."""

    def __init__(self, width: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        weight = self.linear_1.weight
        half = weight.shape[1] // 2
        rates = torch.exp(torch.arange(half, dtype=torch.float32, device=time.device) * (-math.log(10000) / half))
        angles = time[:, None] * rates
        waves = torch.cat([angles.cos(), angles.sin()], 1)
        return self.linear_2(F.silu(self.linear_1(waves.to(weight))))


def empty(shape: Shape) -> PriorNetwork:
    """A network without memory, for `load_state_dict(state, assign=True)`: nothing is drawn that a file replaces."""
    with torch.device("meta"):
        return PriorNetwork(shape)


@torch.no_grad()
def drawn(shape: Shape, generator: torch.Generator) -> PriorNetwork:
    """A network to be trained, float32 on the CPU; the global generator is not touched.

    Matrices from N(0, 1 / number of inputs), those that end a residual branch narrower by sqrt(2 layers) (GPT-2's rule), so that the tokens are
    of one size whatever the depth; places and the query from N(0, 0.02^2). The last matrix is zero: the first answer is zero, which is
    the mean of whitened embeddings.
    """
    network = empty(shape).to_empty(device="cpu")
    for name, weight in network.named_parameters():
        if "norm" in name or name.endswith("bias") or name.startswith("proj_to_clip"):
            weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            continue
        branches = 2 * shape.layers if name.endswith(("to_out.0.weight", "net.2.weight")) else 1
        spread = 0.02 if weight.ndim == 3 else (weight.shape[1] * branches) ** -0.5
        weight.normal_(0.0, spread, generator=generator)
    return network
