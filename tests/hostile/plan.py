"""The whole table, and what the plan has beside it: numbers without a row here, and where an answer is another one."""

from __future__ import annotations

from hostile import embeds_rows, field_rows, http_rows, prompt_rows

ROWS = (*http_rows.ROWS, *prompt_rows.ROWS, *field_rows.ROWS, *embeds_rows.ROWS)
NUMBERS = tuple(f"B{number}" for number in range(1, 81))

# number -> where its behaviour is shown, since one request and one answer cannot show it
ELSEWHERE = {
    "B76": "test_hostile.py: pipelined requests are answered in order",
    "B78": "test_hostile.py: draining, no engine, a full queue; unit/scheduler/test_engine_loop.py: queue timeout",
    "B79": "test_hostile.py: the rate limit",
    "B80": "test_hostile.py: a key for one request",
}

# number -> where the answer is another one than the plan's, and why
DIFFERENT = {
    "B16": "what follows the limit is read for a moment and thrown away, so that the client can read its 413",
    "B28": "a model of null is missing, like one that is left out",
    "B36": "max_tokens of 0 is refused with echo, too: prompt_logprobs scores a prompt without any output",
    "B42": "log-probabilities are of the model's own distribution (decision 22), so nothing is masked in them",
    "B47": "the numbers of {} end with max_tokens: grammars do not count digits",
    "B48": "(a+)+$ is taken, since nothing backtracks; 100 levels are too deep, 10,000 properties too long",
    "B49": "left recursion is taken: an Earley parser does not mind",
    "B50": "a grammar and beams go together (decision 25); two grammars do not",
    "B54": "an assistant's last message is taken unless a prompt for the next one is asked for, as OpenAI does",
    "B58": "in prompts, and in the message that an encoder reads, special tokens are meant: so they are written there",
    "B78": "a model that was never reached says model_loading; a request has no deadline: its client may leave",
}
