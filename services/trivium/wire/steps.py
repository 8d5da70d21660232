"""What scheduler and executor tell each other in each step."""

from __future__ import annotations

from trivium import columns
from trivium.step import (
    BeamCandidates,
    CachedRequestData,
    ModelRunnerOutput,
    NewRequestData,
    SchedulerOutput,
    SlotFailure,
    SlotLogprobs,
    TokenRun,
)
from trivium.v1 import executor_pb2
from trivium.wire.logprobs import logprobs_from_proto, logprobs_to_proto
from trivium.wire.sampling import sampling_params_from_proto, sampling_params_to_proto


def plan_to_proto(plan: SchedulerOutput) -> executor_pb2.StepPlan:
    grown_counts, grown_block_ids = columns.pack_ragged(plan.new_blocks.block_ids)
    return executor_pb2.StepPlan(
        step=plan.step,
        scheduled_slots=columns.pack(plan.scheduled_slots),
        num_scheduled_tokens=columns.pack(plan.num_scheduled_tokens),
        new_requests=[_slot_init_to_proto(new) for new in plan.new_requests],
        grown_slots=columns.pack(plan.new_blocks.slots),
        grown_counts=grown_counts,
        grown_block_ids=grown_block_ids,
        encoder_slots=columns.pack(plan.encoder_slots),
        freed_slots=columns.pack(plan.freed_slots),
        copied_blocks=columns.pack_pairs(plan.copied_blocks),
        swapped_out=columns.pack_pairs(plan.swapped_out),
        swapped_in=columns.pack_pairs(plan.swapped_in),
    )


def plan_from_proto(message: executor_pb2.StepPlan) -> SchedulerOutput:
    """Inverse of `plan_to_proto`. Raises ColumnError."""
    scheduled, counts = columns.unpack(message.scheduled_slots), columns.unpack(message.num_scheduled_tokens)
    columns.check_same_length(scheduled_slots=scheduled, num_scheduled_tokens=counts)
    grown = columns.unpack(message.grown_slots)
    grown_ids = columns.unpack_ragged(message.grown_counts, message.grown_block_ids)
    columns.check_same_length(grown_slots=grown, grown_counts=grown_ids)
    return SchedulerOutput(
        step=message.step,
        scheduled_slots=tuple(scheduled),
        num_scheduled_tokens=tuple(counts),
        new_requests=tuple(_slot_init_from_proto(new) for new in message.new_requests),
        new_blocks=CachedRequestData(slots=tuple(grown), block_ids=tuple(grown_ids)),
        encoder_slots=tuple(columns.unpack(message.encoder_slots)),
        freed_slots=tuple(columns.unpack(message.freed_slots)),
        copied_blocks=columns.unpack_pairs(message.copied_blocks),
        swapped_out=columns.unpack_pairs(message.swapped_out),
        swapped_in=columns.unpack_pairs(message.swapped_in),
    )


def result_to_proto(output: ModelRunnerOutput, executor_epoch: int) -> executor_pb2.StepResult:
    return executor_pb2.StepResult(
        step=output.step,
        executor_epoch=executor_epoch,
        slots=columns.pack(output.slots),
        token_ids=columns.pack(output.token_ids),
        logprobs=[_slot_logprobs_to_proto(item) for item in output.logprobs],
        beams=[_candidates_to_proto(item) for item in output.beams],
        runs=[executor_pb2.TokenRun(slot=run.slot, token_ids=columns.pack(run.token_ids)) for run in output.runs],
        failures=[executor_pb2.SlotFailure(slot=item.slot, message=item.message) for item in output.failures],
    )


def result_from_proto(message: executor_pb2.StepResult) -> ModelRunnerOutput:
    """Inverse of `result_to_proto`. Raises ColumnError."""
    slots, token_ids = columns.unpack(message.slots), columns.unpack(message.token_ids)
    columns.check_same_length(slots=slots, token_ids=token_ids)
    return ModelRunnerOutput(
        step=message.step,
        slots=tuple(slots),
        token_ids=tuple(token_ids),
        logprobs=tuple(_slot_logprobs_from_proto(item) for item in message.logprobs),
        beams=tuple(_candidates_from_proto(item) for item in message.beams),
        runs=tuple(TokenRun(run.slot, tuple(columns.unpack(run.token_ids))) for run in message.runs),
        failures=tuple(SlotFailure(item.slot, item.message) for item in message.failures),
    )


def _slot_logprobs_to_proto(item: SlotLogprobs) -> executor_pb2.SlotLogprobs:
    sampled = () if item.sampled is None else (item.sampled,)
    return executor_pb2.SlotLogprobs(
        slot=item.slot,
        sampled=next(iter(logprobs_to_proto(sampled)), None),
        prompt_start=item.prompt_start,
        prompt=logprobs_to_proto(item.prompt),
    )


def _slot_logprobs_from_proto(message: executor_pb2.SlotLogprobs) -> SlotLogprobs:
    sampled = logprobs_from_proto([message.sampled])[0] if message.HasField("sampled") else None
    return SlotLogprobs(message.slot, sampled, message.prompt_start, logprobs_from_proto(message.prompt))


def _candidates_to_proto(item: BeamCandidates) -> executor_pb2.BeamCandidates:
    return executor_pb2.BeamCandidates(
        slot=item.slot,
        scores=columns.pack_floats(item.scores),
        beams=columns.pack(item.beams),
        token_ids=columns.pack(item.token_ids),
        logprobs=logprobs_to_proto(item.logprobs),
        stops=columns.pack(item.stops),
    )


def _candidates_from_proto(message: executor_pb2.BeamCandidates) -> BeamCandidates:
    scores, beams = columns.unpack_floats(message.scores), columns.unpack(message.beams)
    token_ids, logprobs = columns.unpack(message.token_ids), logprobs_from_proto(message.logprobs)
    columns.check_same_length(scores=scores, beams=beams, token_ids=token_ids, logprobs=logprobs or scores)
    stops = tuple(columns.unpack(message.stops))
    return BeamCandidates(message.slot, scores, tuple(beams), tuple(token_ids), logprobs, stops)


def _slot_init_to_proto(new: NewRequestData) -> executor_pb2.SlotInit:
    return executor_pb2.SlotInit(
        slot=new.slot,
        prompt_token_ids=columns.pack(new.prompt_token_ids),
        output_token_ids=columns.pack(new.output_token_ids),
        num_computed_tokens=new.num_computed_tokens,
        block_ids=columns.pack(new.block_ids),
        sampling=sampling_params_to_proto(new.sampling),
        choice_index=new.choice_index,
        max_tokens=new.max_tokens,
        encoder_token_ids=columns.pack(new.encoder_token_ids),
        cross_block_ids=columns.pack(new.cross_block_ids),
        beam_slots=columns.pack(new.beam_slots),
        adapter=new.adapter,
        prompt_embeds=new.prompt_embeds,
        encoder_embeds=new.encoder_embeds,
        prompt_places=columns.pack_pairs(new.prompt_places),
        encoder_places=columns.pack_pairs(new.encoder_places),
        prompt_adapter=new.prompt_adapter,
    )


def _slot_init_from_proto(message: executor_pb2.SlotInit) -> NewRequestData:
    return NewRequestData(
        slot=message.slot,
        prompt_token_ids=tuple(columns.unpack(message.prompt_token_ids)),
        output_token_ids=tuple(columns.unpack(message.output_token_ids)),
        num_computed_tokens=message.num_computed_tokens,
        block_ids=tuple(columns.unpack(message.block_ids)),
        sampling=sampling_params_from_proto(message.sampling),
        choice_index=message.choice_index,
        max_tokens=message.max_tokens,
        encoder_token_ids=tuple(columns.unpack(message.encoder_token_ids)),
        cross_block_ids=tuple(columns.unpack(message.cross_block_ids)),
        beam_slots=tuple(columns.unpack(message.beam_slots)),
        adapter=message.adapter,
        prompt_embeds=message.prompt_embeds if message.HasField("prompt_embeds") else None,
        encoder_embeds=message.encoder_embeds if message.HasField("encoder_embeds") else None,
        prompt_places=columns.unpack_pairs(message.prompt_places),
        encoder_places=columns.unpack_pairs(message.encoder_places),
        prompt_adapter=message.prompt_adapter,
    )
