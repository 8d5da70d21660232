"""The turns of the dialogue corpus: one question and its true answer, by category, and what may follow it.

A turn's key tells what it asks: its meaning where the answer can be computed, its wording where it can only be looked
up. `dialogue_corpus` splits on it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from trivium.demo import dialogue_lexicon as words
from trivium.demo.translation_lexicon import MONTHS, WEEKDAYS
from trivium.demo.translation_numbers import english

# Sums and differences of numbers up to this one are facts to know by heart.
_BY_HEART = 12
_DAYS = tuple(row[0] for row in WEEKDAYS)
_MONTHS = tuple(row[0] for row in MONTHS)
_MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


class Turn(NamedTuple):
    """One question and its answer; `topic` names what a follow-up may refer to. A core turn is never held out."""

    category: str
    question: str
    answer: str
    key: str
    topic: tuple[str, int] = ("", 0)
    core: bool = False


def _worded(category: str, question: str, answer: str, topic: tuple[str, int] = ("", 0), core: bool = False) -> Turn:
    """A turn whose key is its wording."""
    key = f"{category}: " + "".join(c for c in question.lower() if c.isalnum() or c in " +-*").strip()
    return Turn(category, question, answer, key, topic, core)


def _fill(rng: random.Random, wordings: tuple[str, ...], a: int, b: int = 0) -> str:
    """A wording with its numbers, now and then spelled out when they are small."""
    if max(a, b) <= 20 and rng.random() < 0.08:
        spelled = wordings[0], wordings[2], wordings[3 % len(wordings)]
        return rng.choice(spelled).format(a=english(a), b=english(b))
    return rng.choice(wordings).format(a=a, b=b)


def _operand(rng: random.Random) -> int:
    return rng.randint(0, 20) if rng.random() < 0.25 else rng.randint(0, 99)


def _computed(category: str, question: str, calculation: tuple[str, str, int], largest: int) -> Turn:
    """A calculation: small ones are facts to know by heart, so only their wording may be held out."""
    answer, key, value = calculation
    if largest <= _BY_HEART:
        return _worded(category, question, answer, ("result", value))
    return Turn(category, question, answer, key, ("result", value))


def _sum(a: int, b: int) -> tuple[str, str, int]:
    return f"{a} plus {b} is {a + b}.", f"add {min(a, b)} {max(a, b)}", a + b


def _difference(a: int, b: int) -> tuple[str, str, int]:
    return f"{a} minus {b} is {a - b}.", f"subtract {a} {b}", a - b


def _add(rng: random.Random) -> Turn:
    a, b = _operand(rng), _operand(rng)
    return _computed("addition", _fill(rng, words.ADD_WORDINGS, a, b), _sum(a, b), max(a, b))


def _subtract(rng: random.Random) -> Turn:
    a, b = _operand(rng), _operand(rng)
    if a < b and rng.random() < 0.7:
        a, b = b, a
    return _computed("subtraction", _fill(rng, words.SUBTRACT_WORDINGS, a, b), _difference(a, b), max(a, b))


def _multiply(rng: random.Random) -> Turn:
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    question = _fill(rng, words.MULTIPLY_WORDINGS, a, b)
    return _worded("multiplication", question, f"{a} times {b} is {a * b}.", ("result", a * b))


def _number(rng: random.Random) -> Turn:
    kind = rng.randrange(6)
    a = rng.randint(0, 99)
    if kind == 0:
        b = (a + rng.randint(1, 99)) % 100
        question = rng.choice(words.COMPARE_WORDINGS).format(a=a, b=b)
        answer = f"{max(a, b)} is bigger than {min(a, b)}."
        return Turn("numbers", question, answer, f"compare {min(a, b)} {max(a, b)}")
    if kind == 1:
        question = rng.choice(words.PARITY_WORDINGS).format(a=a)
        return _worded("numbers", question, f"{a} is {'an odd' if a % 2 else 'an even'} number.", ("parity", a))
    if kind == 2:
        question = rng.choice(words.NEXT_WORDINGS).format(a=a)
        return _worded("numbers", question, f"The number after {a} is {a + 1}.")
    if kind == 3:
        question = rng.choice(words.BEFORE_WORDINGS).format(a=a + 1)
        return _worded("numbers", question, f"The number before {a + 1} is {a}.")
    if kind == 4:
        question = rng.choice(words.DOUBLE_WORDINGS).format(a=a)
        return _worded("numbers", question, f"Twice {a} is {2 * a}.", ("result", 2 * a))
    question = rng.choice(words.HALF_WORDINGS).format(a=2 * a)
    return _worded("numbers", question, f"Half of {2 * a} is {a}.", ("result", a))


def _day_after(day: int) -> str:
    return f"The day after {_DAYS[day]} is {_DAYS[(day + 1) % 7]}."


def _day_before(day: int) -> str:
    return f"The day before {_DAYS[day]} is {_DAYS[day - 1]}."


def _days_later(day: int, count: int) -> str:
    """The answer tells the weeks first, which leaves a step of less than a week to take."""
    weeks, days = divmod(count, 7)
    end = _DAYS[(day + count) % 7]
    span = f"{days} day{'' if days == 1 else 's'}"
    if not weeks:
        return f"{span} after {_DAYS[day]} is {end}."
    whole = f"{weeks} week{'' if weeks == 1 else 's'}"
    if not days:
        return f"{count} days are {whole}, and {whole} after {_DAYS[day]} is {end}."
    return f"{count} days are {whole} and {span}, and {span} after {_DAYS[day]} is {end}."


def _day(rng: random.Random) -> Turn:
    day = rng.randrange(7)
    name = _DAYS[day]
    kind = rng.randrange(6)
    if kind == 0:
        question = rng.choice(words.DAY_AFTER_WORDINGS).format(x=name)
        return _worded("days", question, _day_after(day), ("day after", 0))
    if kind == 1:
        question = rng.choice(words.DAY_BEFORE_WORDINGS).format(x=name)
        return _worded("days", question, _day_before(day), ("day before", 0))
    if kind == 2:
        question = rng.choice(words.TOMORROW_WORDINGS).format(x=name)
        return _worded("days", question, f"If today is {name}, tomorrow is {_DAYS[(day + 1) % 7]}.")
    if kind == 3:
        question = rng.choice(words.YESTERDAY_WORDINGS).format(x=name)
        return _worded("days", question, f"If today is {name}, yesterday was {_DAYS[day - 1]}.")
    count = rng.randint(1, 31)
    span = "1 day" if count == 1 else f"{count} days"
    question = rng.choice(words.DAYS_LATER_WORDINGS).format(n=span, x=name)
    if count < 7:
        return _worded("days", question, _days_later(day, count))
    return Turn("days", question, _days_later(day, count), f"later {day} {count}")


def _month_length(month: int) -> str:
    if month == 1:
        return "February has 28 days, or 29 in a leap year."
    return f"{_MONTHS[month]} has {_MONTH_DAYS[month]} days."


def _month(rng: random.Random) -> Turn:
    month = rng.randrange(12)
    name = _MONTHS[month]
    kind = rng.randrange(5)
    if kind == 0:
        question = rng.choice(words.MONTH_DAYS_WORDINGS).format(x=name)
        return _worded("months", question, _month_length(month), ("month length", 0))
    if kind == 1:
        question = rng.choice(words.MONTH_AFTER_WORDINGS).format(x=name)
        return _worded("months", question, f"The month after {name} is {_MONTHS[(month + 1) % 12]}.")
    if kind == 2:
        question = rng.choice(words.MONTH_BEFORE_WORDINGS).format(x=name)
        return _worded("months", question, f"The month before {name} is {_MONTHS[month - 1]}.")
    if kind == 3:
        question = rng.choice(words.MONTH_NUMBER_WORDINGS).format(x=name)
        return _worded("months", question, f"{name} is month number {month + 1}.", ("month number", 0))
    ordinal = words.ORDINALS[month]
    question = rng.choice(words.MONTH_NAME_WORDINGS).format(x=ordinal)
    return _worded("months", question, f"The {ordinal} month of the year is {name}.")


def _conversion(unit: words.Unit, count: int) -> str:
    """The answer to a conversion, in American spelling."""
    be, name = ("is", unit.one) if count == 1 else ("are", unit.many)
    return f"{count} {name} {be} {count * unit.factor} {unit.to}."


def _is_decimal(unit: words.Unit, count: int) -> bool:
    """Whether a conversion only appends zeros, so that it can be worked out rather than known."""
    return unit.factor in (10, 100, 1000) and count > 1


def _unit_turn(unit: words.Unit, count: int, question: str) -> Turn:
    topic = ("unit", words.UNITS.index(unit))
    if not _is_decimal(unit, count):
        return _worded("units", question, _conversion(unit, count), topic)
    return Turn("units", question, _conversion(unit, count), f"convert {count} {unit.one}", topic)


def _unit(rng: random.Random) -> Turn:
    if rng.random() < 0.12:
        count = rng.randint(1, 12)
        span = rng.choice(("a dozen", "1 dozen")) if count == 1 else f"{count} dozen"
        question = rng.choice(words.DOZEN_WORDINGS).format(n=span)
        if count == 1:
            return _worded("units", question, "A dozen is 12.", core=True)
        return _worded("units", question, f"{count} dozen is {12 * count}.")
    unit = rng.choice(words.UNITS)
    count = rng.choice((rng.randint(1, 12), rng.randint(1, unit.top)))
    count = min(count, unit.top)
    british = rng.random() < 0.15
    one, many = unit.british if british else (unit.one, unit.many)
    to = unit.to_british if british else unit.to
    span = f"{count} {one if count == 1 else many}"
    if rng.random() < 0.2:
        made = f"{count * unit.factor} {to}"
        question = rng.choice(words.UNIT_WORDINGS[:5]).format(n=made, to=many)
        answer = f"{count * unit.factor} {unit.to} are {count} {unit.one if count == 1 else unit.many}."
        key = f"convert {count} {unit.one}"
        if not _is_decimal(unit, count):
            return _worded("units", question, answer)
        return Turn("units", question, answer, key)
    return _unit_turn(unit, count, rng.choice(words.UNIT_WORDINGS).format(n=span, to=to))


def _small_talk(rng: random.Random) -> Turn:
    questions, answer = rng.choice(words.SMALL_TALK)
    question = rng.choice(questions)
    if question[-1] not in "?." and rng.random() < 0.5:
        question += rng.choice("!.")
    return _worded("small talk", question, answer, core=True)


def _introduction(rng: random.Random) -> Turn:
    index = rng.randrange(len(words.NAMES))
    name = words.NAMES[index]
    question = rng.choice(words.NAME_WORDINGS).format(x=name)
    return _worded("names", question, f"Nice to meet you, {name}!", ("name", index))


def _out_of_scope(rng: random.Random) -> Turn:
    if rng.random() < 0.15:
        question = rng.choice(words.OUT_OF_SCOPE_OTHERS)
        return _worded("out of scope", question, words.OUT_OF_SCOPE_ANSWER, core=True)
    question = rng.choice(words.OUT_OF_SCOPE_WORDINGS).format(x=rng.choice(words.OUT_OF_SCOPE_SUBJECTS))
    return _worded("out of scope", question, words.OUT_OF_SCOPE_ANSWER)


def _asked_name(rng: random.Random, name: str | None) -> Turn:
    answer = f"Your name is {name}." if name else "You have not told me your name yet."
    question = rng.choice(words.NAME_QUESTIONS)
    return Turn("names", question, answer, f"asked name {name}", core=name is None)


def _arithmetic_follow_up(rng: random.Random, value: int) -> Turn:
    """Another calculation, said in short, or one that takes up the last result."""
    opening = rng.choice(words.FOLLOW_UP_OPENINGS)
    a, b = _operand(rng), _operand(rng)
    if rng.random() < 0.4 and 0 <= value <= 99:
        b = rng.randint(0, 20)
        if rng.random() < 0.5:
            answer, key, result = _sum(value, b)
            question = rng.choice(("Add {b} to that.", "And plus {b}?", "And {b} more?", "Plus {b}?")).format(b=b)
        else:
            answer, key, result = _difference(value, b)
            question = rng.choice(("Subtract {b} from that.", "And minus {b}?", "And {b} less?", "Minus {b}?"))
            question = question.format(b=b)
        core = max(value, b) <= _BY_HEART
        return Turn("follow-up", question, answer, key, ("result", result), core)
    kind = rng.randrange(3)
    if kind == 2:
        a, b = rng.randint(0, 12), rng.randint(0, 12)
        question = f"{opening} {a} times {b}?"
        return _worded("follow-up", question, f"{a} times {b} is {a * b}.", ("result", a * b))
    question = f"{opening} {a} {'plus' if kind == 0 else 'minus'} {b}?"
    return _computed("follow-up", question, _sum(a, b) if kind == 0 else _difference(a, b), max(a, b))


def _follow_up(rng: random.Random, topic: tuple[str, int]) -> Turn | None:
    """A question that only makes sense after the last one, or None when nothing can follow it."""
    kind, value = topic
    opening = rng.choice(("And", "What about", "And what about"))
    if kind == "result":
        return _arithmetic_follow_up(rng, value)
    if kind in ("day after", "day before"):
        day = rng.randrange(7)
        question = rng.choice((f"And {kind[4:]} {_DAYS[day]}?", f"{opening} {_DAYS[day]}?"))
        answer = _day_after(day) if kind == "day after" else _day_before(day)
        return Turn("follow-up", question, answer, f"follow {kind} {question.lower()}", topic)
    if kind in ("month length", "month number"):
        month = rng.randrange(12)
        question = rng.choice((f"{opening} {_MONTHS[month]}?", f"And {_MONTHS[month]}?"))
        answer = _month_length(month) if kind == "month length" else f"{_MONTHS[month]} is month number {month + 1}."
        return Turn("follow-up", question, answer, f"follow {kind} {question.lower()}", topic)
    if kind == "unit":
        unit = words.UNITS[value]
        count = rng.randint(2, unit.top)
        question = rng.choice((f"And in {count} {unit.many}?", f"{opening} {count} {unit.many}?", f"And {count}?"))
        return _unit_turn(unit, count, question)._replace(category="follow-up")
    if kind == "parity":
        number = rng.randint(0, 99)
        answer = f"{number} is {'an odd' if number % 2 else 'an even'} number."
        return _worded("follow-up", f"{opening} {number}?", answer, topic)
    return None


_CATEGORIES: tuple[tuple[int, Callable[[random.Random], Turn]], ...] = (
    (20, _add),
    (21, _subtract),
    (8, _multiply),
    (7, _number),
    (13, _day),
    (7, _month),
    (13, _unit),
    (4, _small_talk),
    (3, _introduction),
    (4, _out_of_scope),
)


def draw(rng: random.Random, topic: tuple[str, int], name: str | None, fresh: bool) -> Turn:
    """A turn that may follow one of this topic; `fresh` tells that it opens the dialogue."""
    if not fresh:
        if rng.random() < (0.25 if name else 0.02):
            return _asked_name(rng, name)
        if rng.random() < 0.45:
            following = _follow_up(rng, topic)
            if following is not None:
                return following
    return rng.choices([make for _, make in _CATEGORIES], [weight for weight, _ in _CATEGORIES])[0](rng)
