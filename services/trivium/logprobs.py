"""Log-probabilities as callers see them: vLLM's `Logprob` by token id, with the texts of the tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from trivium.outputs import Logprob, TokenLogprobs, TokenText


def named_ids(token_ids: Iterable[int], logprobs: Iterable[TokenLogprobs]) -> set[int]:
    """All tokens that a report on `token_ids` names."""
    return {*token_ids, *(top_id for value in logprobs for top_id in value.top_ids)}


def to_dicts(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], texts: Mapping[int, TokenText]
) -> list[dict[int, Logprob] | None]:
    """Per position the token itself, then the most likely ones; None where there is no token.

    Without `texts` no token has one.
    """
    return [
        _to_dict(token_id, value, texts) if value.is_of_token else None
        for token_id, value in zip(token_ids, logprobs, strict=True)
    ]


def _to_dict(token_id: int, value: TokenLogprobs, texts: Mapping[int, TokenText]) -> dict[int, Logprob]:
    found = {token_id: Logprob(value.logprob, value.rank, _text(token_id, texts))}
    for rank, (top_id, logprob) in enumerate(zip(value.top_ids, value.top_logprobs, strict=True), 1):
        found.setdefault(top_id, Logprob(logprob, rank, _text(top_id, texts)))
    return found


def _text(token_id: int, texts: Mapping[int, TokenText]) -> str | None:
    return texts[token_id].text if texts else None
