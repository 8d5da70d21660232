"""The seam between model graphs and the runner: packed tokens in, hidden states and logits out.

Graphs hold weights and nothing else: no batch, no cache, no lengths. All of that comes as arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from trivium.executor.attention import AttentionMetadata
from trivium.executor.kv_cache import KVCache, KVCacheShape

NOT_A_TOKEN = -1


@dataclass(frozen=True, slots=True)
class InputEmbeds:
    """What takes the place of token embeddings: row `tokens[i]` of a step is `rows[i]`.

    tokens: [num_embedded] int64. rows: [num_embedded, hidden], as transformers takes them for `inputs_embeds`. The
    ids of these tokens are placeholders.
    """

    tokens: Tensor
    rows: Tensor

    def put_into(self, hidden: Tensor) -> Tensor:
        """`hidden` [num_tokens, hidden], which nobody else uses, with the rows in their places."""
        return hidden.index_copy_(0, self.tokens, self.rows.to(hidden.dtype))

    def mark(self, token_ids: Tensor) -> Tensor:
        """`token_ids` [num_tokens] with NOT_A_TOKEN for the placeholders."""
        return token_ids.index_fill(0, self.tokens, NOT_A_TOKEN)


class DecoderGraph(Protocol):
    """The part of a model that runs for every token of every step."""

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
        embeds: InputEmbeds | None = None,
    ) -> Tensor:
        """token_ids, positions [num_tokens] int64 -> hidden states; writes the KV of all tokens.

        [num_tokens, hidden], or where `metadata.last` says what is wanted, [num_wanted, hidden].
        """
        ...

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [num_rows, hidden] -> float32 logits [num_rows, vocab_size]."""
        ...


class EncoderGraph(Protocol):
    """The part that runs once per encoder input."""

    def word_embeddings(self, token_ids: Tensor) -> Tensor:
        """[num_tokens, hidden] what the model's embedding module of transformers gives for `token_ids`.

        A scale is in it only where the module has it, and not the encoder around it.
        """
        ...

    def hidden_states(
        self, token_ids: Tensor, positions: Tensor, cu_seqlens: Tensor, embeds: InputEmbeds | None = None
    ) -> Tensor:
        """The encoder's output for packed inputs, as `encode` takes them: [num_tokens, hidden]."""
        ...

    def encode(
        self, token_ids: Tensor, positions: Tensor, cu_seqlens: Tensor, embeds: InputEmbeds | None = None
    ) -> Tensor:
        """Packed inputs [num_tokens] -> cross-attention [num_tokens, num_layers, 2, num_kv_heads, head_dim].

        Sequence i is [cu_seqlens[i], cu_seqlens[i + 1]). Keys and values of all decoder layers come from one
        projection of the encoder's output, so that the decoder never sees the encoder's hidden states.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModel:
    """A loaded model and its limits in tokens. max_encoder_len is 0 and encoder None for decoder-only models.

    kv_shape: of what this rank has; num_kv_heads: of all ranks. hidden_size: width of the embeddings that may take the
    place of the prompt's tokens, of the encoder's where there is one; 0 if the graph takes none. can_be_recorded: the
    decoder runs the same operators whatever its tokens are.
    """

    decoder: DecoderGraph
    encoder: EncoderGraph | None
    kv_shape: KVCacheShape
    num_kv_heads: int
    vocab_size: int
    max_model_len: int
    max_encoder_len: int
    hidden_size: int = 0
    can_be_recorded: bool = True
