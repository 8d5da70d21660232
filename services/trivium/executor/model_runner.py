"""One model, its KV pool and its standing batch: a plan in, the sampled tokens out.

Order of side effects of a step: rows freed, added and grown; blocks swapped out, in, and copied; cross-attention KV
of new encoder inputs; KV of the scheduled tokens; lengths and sampled tokens of the rows. Used by one thread; knows no
transport.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trivium.config import (
    DEFAULT_PLANS_IN_FLIGHT,
    GPU_PLANS_IN_FLIGHT,
    ExecutorConfig,
    ModelInfo,
    PromptAdapter,
)
from trivium.errors import ConfigurationError, InvalidRequestError
from trivium.executor import transfers
from trivium.executor.adapter_pool import AdapterPool
from trivium.executor.beam_select import BeamGroups
from trivium.executor.decode_tapes import make_tapes
from trivium.executor.deferred_steps import DeferredSteps, DoneStep, StartedStep
from trivium.executor.embedder import embed
from trivium.executor.forward import ForwardPasses
from trivium.executor.generation_config import (
    check_generation_defaults,
    read_generation_config,
    read_generation_defaults,
)
from trivium.executor.grammars import GrammarRows, GrammarService
from trivium.executor.input_batch import InputBatch, Longs, ScheduledRows
from trivium.executor.kv_cache import KVCache
from trivium.executor.layer_products import choose_packer, choose_products
from trivium.executor.limits import choose_limits, describe_model
from trivium.executor.loader import Checkpoint, find_checkpoint
from trivium.executor.logprobs import SampledLogprobs, prompt_logprobs, slot_logprobs
from trivium.executor.model_config import CONFIG_FILE, JsonConfig, read_json, read_special_tokens
from trivium.executor.models.model import LanguageModel
from trivium.executor.models.registry import Architecture, find_architecture
from trivium.executor.parallel.communicator import ALONE, Communicator, agree_on_least
from trivium.executor.parallel.shard import Shard
from trivium.executor.plan_check import check_plan
from trivium.executor.platform import Platform, choose_platform
from trivium.executor.prompt_lookup import Drafts, add_drafts, draft_positions, verify
from trivium.executor.quantization.config import read_quantization
from trivium.executor.sampler import Sampler
from trivium.executor.soft_prompts import SoftPrompts
from trivium.executor.stop_strings import TokenTextService
from trivium.executor.threads import choose_num_threads, count_cores, set_num_threads
from trivium.executor.vocabulary import make_vocabulary
from trivium.pooling import PoolingType
from trivium.step import BeamCandidates, ModelRunnerOutput, SchedulerOutput, SlotFailure, TokenRun
from trivium.structured_outputs import StructuredOutputsParams

logger = logging.getLogger(__name__)


class ModelRunner:
    """Owns model, KV pool and InputBatch. Construct it in the thread that will run it.

    Of a model that is split it is one rank: all ranks are told the same, and find the same results. choose: instead of
    `choose_platform`.
    Raises ConfigurationError if the model cannot be loaded as configured.
    """

    def __init__(
        self,
        config: ExecutorConfig,
        communicator: Communicator = ALONE,
        choose: Callable[[ExecutorConfig, JsonConfig, int], Platform] | None = None,
    ) -> None:
        shard = Shard(communicator)
        self._communicator = communicator
        directory = find_checkpoint(config)
        model_json = read_json(directory / CONFIG_FILE)
        architecture = find_architecture(model_json)
        generation = read_generation_config(config.generation_config, directory, model_json)
        generation = replace(generation, values={**generation.values, **config.override_generation_config})
        special = read_special_tokens(model_json, generation, architecture.default_tokens)
        platform = self._platform = (choose or choose_platform)(config, model_json, shard.rank)
        self._adapters: AdapterPool | None = None
        self._model = self._load_model(config, directory, model_json, architecture, shard)
        self._special = special
        self._vocabulary = make_vocabulary(shard, self._model.vocab_size)
        self._sampler = Sampler(special, self._vocabulary)
        self._limits = choose_limits(config, self._model, platform.device, communicator)
        self._kv_cache = KVCache(
            self._model.kv_shape,
            self._limits.num_blocks,
            self._limits.block_size,
            num_host_blocks=self._limits.num_host_blocks,
            device=platform.device,
        )
        self._grammars = GrammarService(
            config.tokenizer or config.model, config.revision, self._model.vocab_size, special.eos
        )
        self._token_texts = TokenTextService(config.tokenizer or config.model, config.revision, self._model.vocab_size)
        for module in config.lora_modules:
            self._load_adapter(module.name, module.source)
        self._soft_prompts: SoftPrompts | None = None
        if config.enable_prompt_adapter:
            max_tokens = min(config.max_prompt_adapter_token, self._limits.max_model_len)
            self._soft_prompts = SoftPrompts(
                self._model, platform.kernels, shard, max_tokens=max_tokens, device=platform.device
            )
        for module in config.prompt_adapters:
            self._load_prompt_adapter(module.name, module.source)
        self._passes = ForwardPasses(
            self._model,
            platform.kernels,
            self._kv_cache,
            self._adapters,
            self._soft_prompts,
            platform.device,
            make_tapes(platform, self._model, self._limits)
            if communicator.size == 1 and not config.enable_lora
            else None,
        )
        self._deferred: DeferredSteps | None = None
        if platform.is_gpu and communicator.size == 1:
            self._deferred = DeferredSteps(self._passes, self._sampler, self._limits, platform.recorder)
        self._reset()
        self._model_info = self._describe(config, architecture.name, generation)
        check_generation_defaults(self._model_info)

    def _load_model(
        self,
        config: ExecutorConfig,
        directory: Path,
        model_json: JsonConfig,
        architecture: Architecture,
        shard: Shard,
    ) -> LanguageModel:
        """This rank's part of the model, its products chosen; the pool for its adapters, if it may have some."""
        platform, start = self._platform, time.perf_counter()
        quantization = read_quantization(model_json, directory, config.quantization)
        if config.enable_lora:
            self._adapters = AdapterPool(
                platform.kernels.add_lora,
                max_rank=config.max_lora_rank,
                device=platform.device,
                dtype=platform.dtype,
            )
        packer = choose_packer(config, platform)
        with (
            Checkpoint(
                directory, quantization, self._adapters, shard, platform.device, platform.dtype, packer
            ) as checkpoint,
            torch.inference_mode(),
        ):
            model = architecture.build(model_json, checkpoint, platform.kernels)
            (weight_bytes,) = agree_on_least(self._communicator, [checkpoint.loaded_bytes])
            num_threads = choose_num_threads(config, weight_bytes, count_cores())
            set_num_threads(num_threads)
            choose_products(config, platform, model, checkpoint)
        if packer is not None:
            packer.log()
        logger.info(
            "model %s: %s, %s on %s, %.1f MiB of weights%s in %.1f s, %d threads",
            config.served_model_name,
            architecture.name,
            str(platform.dtype).removeprefix("torch."),
            platform.device,
            checkpoint.loaded_bytes / 2**20,
            f" in each of {shard.size} ranks" if shard.size > 1 else "",
            time.perf_counter() - start,
            num_threads,
        )
        return model

    def _describe(self, config: ExecutorConfig, architecture: str, generation: JsonConfig) -> ModelInfo:
        return replace(
            describe_model(
                config,
                architecture,
                self._model,
                self._limits,
                self._special,
                max_plans_in_flight=DEFAULT_PLANS_IN_FLIGHT if self._deferred is None else GPU_PLANS_IN_FLIGHT,
            ),
            generation_defaults=read_generation_defaults(generation, self._special.eos),
            adapters=tuple(module.name for module in config.lora_modules),
            max_loras=config.max_loras if config.enable_lora else 0,
            prompt_adapters=() if self._soft_prompts is None else self._soft_prompts.described,
            max_prompt_adapters=config.max_prompt_adapters if config.enable_prompt_adapter else 0,
        )

    @property
    def model_info(self) -> ModelInfo:
        return self._model_info

    @property
    def num_occupied_slots(self) -> int:
        """Rows of the standing batch. May be read from any thread."""
        return int(self._batch.occupied.sum())

    @property
    def kv_pool_bytes(self) -> int:
        return self._kv_cache.num_bytes

    def reset(self) -> None:
        """Forget every row. Weights and pool stay; what the pool holds means nothing any more."""
        self._reset()

    def close(self) -> None:
        """End what runs beside the steps. Nothing may be called afterwards."""
        self._grammars.close()
        self._token_texts.close()

    def prepare_grammar(
        self, params: StructuredOutputsParams | None, done: Callable[[InvalidRequestError | None], None]
    ) -> None:
        """Have a grammar compiled beside the steps; see `GrammarService.prepare`.

        None: only what beams with stop strings need is read.
        """
        if params is None:
            self._token_texts.prepare(done)
        else:
            self._grammars.prepare(params, done)

    def load_adapter(self, name: str, source: str) -> None:
        """Load a LoRA adapter. Raises ConfigurationError if it does not fit, or the runner was made without LoRA."""
        self._load_adapter(name, source)

    def load_prompt_adapter(self, name: str, source: str) -> PromptAdapter:
        """Load a soft prompt. Raises ConfigurationError if it does not fit, or the runner was made without them."""
        return self._load_prompt_adapter(name, source)

    def _load_adapter(self, name: str, source: str) -> None:
        if self._adapters is None:
            raise ConfigurationError("adapters need enable_lora")
        with self._agreeing_on(f"adapter {name!r}"):
            self._adapters.load(name, source)

    def _load_prompt_adapter(self, name: str, source: str) -> PromptAdapter:
        if self._soft_prompts is None:
            raise ConfigurationError("prompt adapters need enable_prompt_adapter")
        with self._agreeing_on(f"prompt adapter {name!r}"):
            return self._soft_prompts.load(name, source)

    @contextmanager
    def _agreeing_on(self, what: str) -> Iterator[None]:
        """Ranks load `what`: all of them refuse it, or none. Raises RuntimeError if they differ."""
        refusal: ConfigurationError | None = None
        try:
            yield
        except ConfigurationError as error:
            refusal = error
        (is_everywhere,) = agree_on_least(self._communicator, [int(refusal is None)])
        if refusal is not None:
            raise refusal
        if not is_everywhere:
            raise RuntimeError(f"{what} was loaded by some ranks only")

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step. Raises PlanError, having changed nothing, if the plan does not fit the standing batch."""
        return self.start(plan).result()

    @torch.inference_mode()
    def start(self, plan: SchedulerOutput) -> StartedStep:
        """The same, but on a GPU the result may be waited for later, after the next plans have been started.

        Results are asked for in the order of the plans.
        """
        check_plan(self._batch, plan)
        self._batch.apply(plan)
        self._beam_groups.apply(plan.freed_slots, plan.new_requests)
        self._grammar_rows.apply(plan.freed_slots, plan.new_requests, self._batch)
        self._kv_cache.swap_out(plan.swapped_out)
        self._kv_cache.swap_in(plan.swapped_in)
        self._kv_cache.copy_blocks(plan.copied_blocks)
        self._passes.run_encoder(self._batch, plan.encoder_slots)
        if self._deferred is not None and plan.scheduled_slots:
            if self._deferred.takes(self._batch, plan.scheduled_slots):
                rows = self._batch.schedule_rows(plan)
                return self._deferred.start(self._batch, rows, plan.step) if len(rows.slots) else _nothing(plan)
            self._deferred.settle()
        rows = self._batch.schedule_rows(plan)
        if self._batch.prefixes and self._soft_prompts is not None:
            rows = self._soft_prompts.copy_prefixes(self._batch, rows, self._kv_cache)
        return DoneStep(self._compute(plan, rows)) if len(rows.slots) else _nothing(plan)

    def _compute(self, plan: SchedulerOutput, rows: ScheduledRows) -> ModelRunnerOutput:
        """Run the rows of a step, and wait for what they sample."""
        drafts: Drafts | None = None
        if self._batch.sampling.num_lookup_tokens[rows.slots].any():
            rows, drafts = add_drafts(self._batch, rows)
        is_only_sampled = drafts is None and not (self._batch.sampling.num_prompt_logprobs[rows.slots] >= 0).any()
        hidden = self._passes.run_decoder(self._batch, rows, is_only_sampled=is_only_sampled)
        prompts = prompt_logprobs(self._batch, rows, hidden, self._model.decoder.compute_logits, self._vocabulary)
        sampling_slots, logits = self._passes.compute_logits(self._batch, rows, hidden)
        self._batch.advance(rows)
        beams: tuple[BeamCandidates, ...] = ()
        is_beam = self._batch.sampling.is_beam[sampling_slots]
        if is_beam.any():
            of_beams, of_others = transfers.upload_all((is_beam, ~is_beam), logits.device)
            beams = self._select_beams(logits[of_beams], sampling_slots[is_beam])
            sampling_slots, logits = sampling_slots[~is_beam], logits[of_others]
        runs = () if drafts is None or not drafts.token_ids else self._verify(rows, drafts, hidden)
        sampled = SampledLogprobs(logits, self._batch, sampling_slots, self._vocabulary)
        token_ids = self._sample(logits, sampling_slots)
        logprobs = slot_logprobs(sampling_slots, sampled.of(token_ids), prompts)
        return ModelRunnerOutput(
            plan.step,
            tuple(sampling_slots.tolist()),
            tuple(token_ids.tolist()),
            logprobs,
            beams,
            runs,
            self._take_failures(sampling_slots),
        )

    def embed(self, prompts: Sequence[Sequence[int]], kind: PoolingType, *, normalize: bool) -> list[Tensor]:
        """Vectors of `prompts`, beside the standing batch, which does not change; see `embedder.embed`."""
        if self._adapters is not None:
            self._adapters.use(np.zeros(sum(map(len, prompts)), np.int64))
        return embed(
            self._model,
            prompts,
            kind,
            normalize=normalize,
            block_size=self._limits.block_size,
            max_model_len=self._limits.max_model_len,
            device=self._platform.device,
        )

    def check_invariants(self) -> None:
        self._batch.check_invariants()

    def _new_batch(self) -> InputBatch:
        adapters = None if self._adapters is None else self._adapters.indices
        return InputBatch(self._limits, adapters, None if self._soft_prompts is None else self._soft_prompts.by_name)

    def _sample(self, logits: Tensor, slots: Longs) -> Longs:
        """Choose and append the next token of each row."""
        if len(self._grammar_rows):
            self._grammar_rows.mask(logits, slots)
        token_ids = self._sampler.sample(logits, self._batch, slots)
        self._batch.append_tokens(slots, token_ids)
        if len(self._grammar_rows):
            self._grammar_rows.advance(slots, token_ids, self._batch)
        self._batch.ended[slots] = self._sampler.find_ends(self._batch, slots, token_ids)
        return token_ids

    def _verify(self, rows: ScheduledRows, drafts: Drafts, hidden: Tensor) -> tuple[TokenRun, ...]:
        positions = transfers.upload(draft_positions(rows, drafts), hidden.device)
        logits = self._model.decoder.compute_logits(hidden[positions])
        return verify(self._batch, rows, drafts, logits, self._sample)

    def _reset(self) -> None:
        if self._deferred is not None:
            self._deferred.settle()
        self._batch = self._new_batch()
        self._grammar_rows = GrammarRows(
            self._grammars,
            self._special,
            self._limits.vocab_size,
            self._platform.kernels.apply_token_bitmask,
            self._vocabulary.start,
        )
        self._beam_groups = BeamGroups(self._special, self._grammar_rows, self._token_texts, self._vocabulary)

    def _take_failures(self, slots: Longs) -> tuple[SlotFailure, ...]:
        """Rows among `slots`, and beam groups, that cannot or must not go on."""
        if not len(self._grammar_rows):
            return ()
        failures = self._grammar_rows.take_failures(slots)
        self._batch.ended[[failure.slot for failure in failures]] = True
        failures += self._grammar_rows.take_slow(slots)
        return failures + self._beam_groups.take_failures(self._batch)

    def _select_beams(self, logits: Tensor, slots: Longs) -> tuple[BeamCandidates, ...]:
        selection = self._beam_groups.select(logits, self._batch, slots)
        self._kv_cache.copy_blocks(selection.first_copies)
        self._kv_cache.copy_blocks(selection.copies)
        return selection.candidates


def _nothing(plan: SchedulerOutput) -> StartedStep:
    return DoneStep(ModelRunnerOutput(step=plan.step))
