"""Exact match of the two models over their held-out sets, by category, with transformers' greedy generation."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from trivium.demo import dialogue_corpus, translation_corpus
from trivium.demo.checkpoints import LANGUAGE_TOKENS, bundled_path

_BATCH = 64

Scores = dict[str, tuple[int, int]]


def score(categories: Sequence[str], correct: Sequence[bool]) -> Scores:
    """Correct answers and items, by category, with their sum under "all"."""
    scores: Scores = {}
    for category, right in zip(categories, correct, strict=True):
        for name in (category, "all"):
            hits, count = scores.get(name, (0, 0))
            scores[name] = (hits + right, count + 1)
    return dict(sorted(scores.items(), key=lambda entry: (entry[0] == "all", entry[0])))


def table(scores: Scores) -> str:
    """The scores as a Markdown table."""
    rows = [f"| {name} | {hits} | {count} | {hits / count:.1%} |" for name, (hits, count) in scores.items()]
    return "\n".join(["| category | correct | items | accuracy |", "|---|---|---|---|", *rows])


def translate(directory: Path, sources: Sequence[str], languages: Sequence[str | None]) -> list[str]:
    """Greedy translations; a language of None leaves the choice to the model, and must be None for all."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=torch.float32).eval()
    outputs: list[str] = []
    for start in range(0, len(sources), _BATCH):
        chunk = languages[start : start + _BATCH]
        encoded = tokenizer(list(sources[start : start + _BATCH]), padding=True, return_tensors="pt")
        prompt = [[tokenizer.pad_token_id] for _ in chunk]
        for row, language in zip(prompt, chunk, strict=True):
            if language is not None:
                row.append(tokenizer.convert_tokens_to_ids(LANGUAGE_TOKENS[language]))
        generated = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            decoder_input_ids=torch.tensor(prompt),
            do_sample=False,
        )
        outputs += tokenizer.batch_decode(generated, skip_special_tokens=True)
    return outputs


def answer(directory: Path, dialogues: Sequence[list[dict[str, str]]]) -> list[str]:
    """Greedy answers to dialogues that end with a user's turn."""
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    outputs: list[str] = []
    for start in range(0, len(dialogues), _BATCH):
        prompts = [
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            for messages in dialogues[start : start + _BATCH]
        ]
        encoded = tokenizer(prompts, padding=True, return_tensors="pt", add_special_tokens=False)
        generated = model.generate(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], do_sample=False
        )
        outputs += tokenizer.batch_decode(generated[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    return outputs


def evaluate_translate(directory: Path, by_prefix: bool = False) -> tuple[Scores, list[tuple[str, str, str]]]:
    """Scores on the held-out translations and the misses; `by_prefix` names the language in the source instead."""
    items = translation_corpus.held_out()
    if by_prefix:
        outputs = translate(directory, [translation_corpus.with_prefix(item) for item in items], [None] * len(items))
    else:
        outputs = translate(directory, [item.source for item in items], [item.language for item in items])
    pairs = list(zip(items, outputs, strict=True))
    misses = [(item.source, item.target, output) for item, output in pairs if output != item.target]
    return score([item.category for item in items], [output == item.target for item, output in pairs]), misses


def evaluate_chat(directory: Path) -> tuple[Scores, list[tuple[str, str, str]]]:
    """Scores on the held-out dialogues and the misses, each shown by its last question."""
    items = dialogue_corpus.held_out()
    outputs = answer(directory, [item.messages for item in items])
    pairs = list(zip(items, outputs, strict=True))
    misses = [(item.messages[-1]["content"], item.answer, output) for item, output in pairs if output != item.answer]
    return score([item.category for item in items], [output == item.answer for item, output in pairs]), misses


def main() -> None:
    """Print the per-category table of one model, and its misses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=("translate", "chat"))
    parser.add_argument("--model", type=Path, help="checkpoint directory (the bundled one by default)")
    parser.add_argument("--by-prefix", action="store_true", help="translate: name the language in the source")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    directory: Path = arguments.model or bundled_path(arguments.task)
    if arguments.task == "translate":
        scores, misses = evaluate_translate(directory, arguments.by_prefix)
    else:
        scores, misses = evaluate_chat(directory)
    print(table(scores))
    for question, expected, output in misses:
        print(f"  {question!r}: expected {expected!r}, got {output!r}")


if __name__ == "__main__":
    main()
