"""This project and its peers behind one call: `generate` prompts of token ids, greedily or with beams.

Every peer computes in float32 with the same number of threads, forbids EOS until the length asked for, and has no
prefix cache. For encoder-decoder models a prompt is the encoder input.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Protocol

import torch
from checkpoints import PAD, Shape, checkpoint, ct2_checkpoint, load_transformers, token

from trivium import LLM, BeamSearchParams, SamplingParams, TokensPrompt

Prompts = Sequence[Sequence[int]]


class Peer(Protocol):
    """name: with version and code path."""

    name: str

    def generate(self, prompts: Prompts, num_tokens: int, num_beams: int = 1) -> list[list[int]]:
        """Exactly `num_tokens` new tokens for each prompt; of beams, the best."""
        ...

    def close(self) -> None: ...


class Trivium:
    """In process, through the public class: scheduler and engine loop included."""

    def __init__(self, shape: Shape, num_threads: int, *, name: str = "trivium", **settings: Any) -> None:
        self.name = name
        options: dict[str, Any] = {
            "kv_cache_memory_bytes": 2**30,
            "max_num_batched_tokens": 4096,
            "enable_prefix_caching": False,
            **settings,
        }
        self._llm = LLM(
            str(checkpoint(shape)),
            num_threads=num_threads,
            generation_config="none",
            **options,
        )

    def generate(self, prompts: Prompts, num_tokens: int, num_beams: int = 1) -> list[list[int]]:
        params: SamplingParams | BeamSearchParams = SamplingParams(
            temperature=0, max_tokens=num_tokens, min_tokens=num_tokens, detokenize=False
        )
        if num_beams > 1:
            params = BeamSearchParams(beam_width=num_beams, max_tokens=num_tokens, min_tokens=num_tokens)
        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts], params, use_tqdm=False
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        self._llm.close()


class Transformers:
    """`generate` on one padded batch."""

    def __init__(self, shape: Shape, num_threads: int) -> None:
        self.name = f"transformers {version('transformers')} generate"
        self._num_threads = num_threads
        self._model: Any = load_transformers(shape)
        self._is_encoder_decoder = shape.is_encoder_decoder

    @torch.inference_mode()
    def generate(self, prompts: Prompts, num_tokens: int, num_beams: int = 1) -> list[list[int]]:
        torch.set_num_threads(self._num_threads)
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), PAD)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # decoder-only models continue at the right edge
            columns = slice(0, len(prompt)) if self._is_encoder_decoder else slice(longest - len(prompt), None)
            ids[row, columns], mask[row, columns] = torch.tensor(prompt), 1
        output = self._model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            num_beams=num_beams,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
        )
        return [row[-num_tokens:].tolist() for row in output]

    def close(self) -> None:
        del self._model


class CTranslate2:
    """compute_type: "float32" or "int8"."""

    def __init__(self, shape: Shape, num_threads: int, compute_type: str = "float32") -> None:
        import ctranslate2

        self.name = f"CTranslate2 {version('ctranslate2')} {compute_type}"
        self._is_encoder_decoder = shape.is_encoder_decoder
        kind = ctranslate2.Translator if shape.is_encoder_decoder else ctranslate2.Generator
        self._model: Any = kind(str(ct2_checkpoint(shape)), compute_type=compute_type, intra_threads=num_threads)

    def generate(self, prompts: Prompts, num_tokens: int, num_beams: int = 1) -> list[list[int]]:
        batch = [[token(token_id) for token_id in prompt] for prompt in prompts]
        if self._is_encoder_decoder:
            results = self._model.translate_batch(
                batch, beam_size=num_beams, min_decoding_length=num_tokens, max_decoding_length=num_tokens
            )
            return [[int(name[1:]) for name in result.hypotheses[0]] for result in results]
        results = self._model.generate_batch(
            batch, beam_size=num_beams, min_length=num_tokens, max_length=num_tokens, include_prompt_in_result=False
        )
        return [list(result.sequences_ids[0]) for result in results]

    def close(self) -> None:
        self._model.unload_model()
