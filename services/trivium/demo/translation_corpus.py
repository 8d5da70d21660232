"""The translation corpus: seeded generators of English sources and their French, German and Spanish targets.

Which side of the split an item falls on depends on a stable hash of its English meaning (its source without case,
final punctuation or the optional "and"), so no held-out source, in any spelling, is ever trained on. The words
themselves (set phrases, weekdays, months, numbers up to one hundred) are always trained on: nothing else in the
corpus would teach them.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from trivium.demo import translation_numbers as numbers
from trivium.demo.translation_grammar import LANGUAGES, Clock, Date, DigitalClock, Phrase
from trivium.demo.translation_lexicon import (
    ADJECTIVES,
    DAY_FRAMES,
    LIVING_IN,
    LOCATIONS,
    MONTH_DAYS,
    MONTHS,
    NAMES,
    NOUNS,
    SET_PHRASES,
    TIMED_EVENTS,
    WEEKDAYS,
    Adjective,
    Noun,
)

LANGUAGE_NAMES: dict[str, str] = {"fr": "French", "de": "German", "es": "Spanish"}
HELD_OUT_SIZE = 500

_HELD_OUT_PER_MILLE = 60


@dataclass(frozen=True)
class TranslationItem:
    """One English source and its translation into one language."""

    source: str
    language: str
    target: str
    category: str
    key: str


@dataclass(frozen=True)
class _Draft:
    """One meaning in the four languages, before its case and final punctuation are chosen."""

    category: str
    source: str
    targets: tuple[str, str, str]
    core: bool = False
    sentence: bool = False
    restylable: bool = True
    spoken_and: str = ""


def is_held_out(key: str) -> bool:
    """Whether a meaning belongs to the held-out set, stable across runs, machines and versions."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 1000 < _HELD_OUT_PER_MILLE


def with_prefix(item: TranslationItem, style: int = 0) -> str:
    """The source with the instruction that names its language, for a caller that gives no language token."""
    name = LANGUAGE_NAMES[item.language]
    return f"translate English to {name}: {item.source}" if style else f"to {name}: {item.source}"


def _triple(render: Callable[[str], str]) -> tuple[str, str, str]:
    fr, de, es = (render(language) for language in LANGUAGES)
    return fr, de, es


def _number(rng: random.Random) -> _Draft:
    n = rng.choice((rng.randint(0, 100), rng.randint(0, 999), rng.randint(0, 999), rng.randint(1000, 9999)))
    if rng.random() < 0.05:
        n = rng.choice((100, 1000)) * rng.randint(1, 9)
    targets = (numbers.french(n), numbers.german(n), numbers.spanish(n))
    core = n <= 100 or n % 100 == 0
    return _Draft("number", numbers.english(n), targets, core, spoken_and=numbers.english(n, True))


def _count(rng: random.Random, top: int) -> int:
    n = rng.randint(0 if top > 20 else 1, top)
    # German has no settled form for "one hundred and one houses", so such counts are left out.
    return n + 1 if n > 1 and n % 100 == 1 else n


def _adjective_for(rng: random.Random, noun: Noun) -> Adjective:
    return rng.choice([adjective for adjective in ADJECTIVES if noun.kind in adjective.kinds])


def _counted(rng: random.Random) -> _Draft:
    noun = rng.choice(NOUNS)
    top = rng.choices((20, 100, 999, 9999), (35, 35, 22, 8))[0]
    adjective = _adjective_for(rng, noun) if rng.random() < 0.3 else None
    n = _count(rng, top)
    digits = n > 1 and rng.random() < 0.12
    phrase = Phrase(noun, adjective, count=n, digits=digits)
    spoken = "" if digits else phrase.english(True)
    return _Draft("counted noun", phrase.english(), _triple(phrase.render), spoken_and=spoken)


def _date(rng: random.Random) -> _Draft:
    month = rng.randint(1, 12)
    if rng.random() < 0.06:
        names = MONTHS[month - 1]
        if rng.random() < 0.5:
            return _Draft("date", names[0], names[1:], core=True, restylable=False)
        at = rng.randint(1900, 2099)
        targets = (f"{names[1]} {at}", f"{names[2]} {at}", f"{names[3]} de {at}")
        return _Draft("date", f"{names[0]} {at}", targets, restylable=False)
    words = rng.random() < 0.4
    weekday = rng.randrange(7) if rng.random() < 0.5 else None
    year = rng.choice((rng.randint(1900, 2099), rng.randint(1990, 2035))) if rng.random() < 0.55 else None
    british, suffix = rng.random() < 0.25, rng.random() < 0.25
    date = Date(rng.randint(1, MONTH_DAYS[month - 1]), month, weekday, year, words, british, suffix)
    return _Draft("date", date.english(), _triple(date.render), restylable=False)


def _clock(rng: random.Random) -> _Draft:
    time: Clock | DigitalClock
    if rng.random() < 0.35:
        time = DigitalClock(rng.randint(0, 23), rng.choice((0, 15, 30, 45, *range(60))), rng.random() < 0.7)
    else:
        part = rng.randrange(3) if rng.random() < 0.2 else None
        time = Clock(rng.randint(1, 12), rng.choice((0, 15, 30, 45, *range(0, 60, 5))), part)
    source, targets = time.english(), _triple(time.render)
    # The bare hours, halves and quarters are vocabulary; every other time is made of them.
    core = isinstance(time, Clock) and time.part is None and time.minute % 15 == 0
    frame = rng.random()
    if frame < 0.45:
        return _Draft("clock time", source, targets, core)
    if frame < 0.6:
        be = "es" if targets[2].startswith("la ") else "son"
        it_is = (f"il est {targets[0]}", f"es ist {targets[1]}", f"{be} {targets[2]}")
        return _Draft("clock time", f"it is {source}", it_is, sentence=True)
    at = (f"à {targets[0]}", f"um {targets[1]}", f"a {targets[2]}")
    if frame < 0.72:
        return _Draft("clock time", f"at {source}", at)
    event = rng.choice(TIMED_EVENTS)
    timed = (event[1].format(at[0]), event[2].format(at[1]), event[3].format(at[2]))
    return _Draft("clock time", event[0].format(f"at {source}"), timed, sentence=True)


def _day(rng: random.Random) -> _Draft:
    day = rng.choice(WEEKDAYS)
    if rng.random() < 0.35:
        return _Draft("phrase", day[0], day[1:], core=True, restylable=False)
    frame = rng.choice(DAY_FRAMES)
    targets = (frame[1].format(day[1]), frame[2].format(day[2]), frame[3].format(day[3]))
    return _Draft("phrase", frame[0].format(day[0]), targets, sentence=True)


def _set_phrase(rng: random.Random) -> _Draft:
    phrase = rng.choice(SET_PHRASES)
    if phrase[0].endswith("?") or rng.random() < 0.75:
        return _Draft("phrase", phrase[0], phrase[1:], core=True, sentence=True)
    source, fr, de, es = (_capital(text) for text in phrase)
    return _Draft("phrase", f"{source}!", (f"{fr} !", f"{de}!", f"¡{es}!"), core=True, restylable=False)


def _personal(rng: random.Random) -> _Draft:
    kind = rng.randrange(3)
    if kind == 0:
        name = rng.choice(NAMES)
        targets = (f"je m'appelle {name}", f"ich heiße {name}", f"me llamo {name}")
        if rng.random() < 0.5:
            return _Draft("phrase", f"my name is {name}", targets, core=True, sentence=True)
        targets = (f"Je suis {name}", f"Ich bin {name}", f"Soy {name}")
        return _Draft("phrase", f"I am {name}", targets, sentence=True)
    if kind == 1:
        city = rng.choice(LIVING_IN)
        targets = (f"J'habite à {city[1]}", f"Ich wohne in {city[2]}", f"Vivo en {city[3]}")
        return _Draft("phrase", f"I live in {city[0]}", targets, core=True, sentence=True)
    age = rng.randint(2, 99)
    targets = (
        f"J'ai {numbers.french(age)} ans",
        f"Ich bin {numbers.german(age)} Jahre alt",
        f"Tengo {numbers.spanish(age, 'm')} años",
    )
    return _Draft("phrase", f"I am {numbers.english(age)} years old", targets, sentence=True)


def _nouns(kinds: str) -> list[Noun]:
    return [noun for noun in NOUNS if noun.kind in kinds]


def _some_phrase(rng: random.Random, kinds: str, adjective_share: float = 0.5) -> Phrase:
    noun = rng.choice(_nouns(kinds))
    adjective = _adjective_for(rng, noun) if rng.random() < adjective_share else None
    determiner = rng.choice(("the", "the", "the", "a", "my", "our", "this"))
    plural = determiner != "a" and rng.random() < 0.3
    return Phrase(noun, adjective, determiner, 2 if plural else 1)


def _noun_phrase(rng: random.Random) -> _Draft:
    phrase = _some_phrase(rng, "ofapl", 0.7)
    return _Draft("phrase", phrase.english(), _triple(phrase.render))


def _predicate(rng: random.Random) -> _Draft:
    phrase = _some_phrase(rng, "ofapl")
    if phrase.determiner == "a":
        phrase = Phrase(phrase.noun, phrase.adjective, "the")
    fitting = [a for a in ADJECTIVES if phrase.noun.kind in a.kinds and a is not phrase.adjective]
    adjective = rng.choice(fitting)
    be = "are" if phrase.plural else "is"
    return _Draft(
        "phrase",
        f"{phrase.english()} {be} {adjective.en}",
        _triple(lambda language: f"{phrase.render(language)} {phrase.predicate(language, adjective)}"),
        sentence=True,
    )


def _question(rng: random.Random) -> _Draft:
    determiner = rng.choice(("the", "the", "my"))
    if rng.random() < 0.5:
        phrase = Phrase(rng.choice(_nouns("lllop")), None, determiner, rng.choice((1, 1, 1, 2)))
        fr, de, es = _triple(phrase.render)
        many = phrase.plural
        targets = (
            f"où {'sont' if many else 'est'} {fr} ?",
            f"wo {'sind' if many else 'ist'} {de}?",
            f"¿dónde {'están' if many else 'está'} {es}?",
        )
        return _Draft("phrase", f"where {'are' if many else 'is'} {phrase.english()}?", targets, sentence=True)
    noun = rng.choice(_nouns("of"))
    counted = rng.random() < 0.4
    phrase = Phrase(noun, count=rng.randint(2, 12)) if counted else Phrase(noun, None, "the", rng.choice((1, 1, 2)))
    fr, de, es = _triple(phrase.render)
    many = phrase.plural
    targets = (
        f"combien {'coûtent' if many else 'coûte'} {fr} ?",
        f"wie viel {'kosten' if many else 'kostet'} {de}?",
        f"¿cuánto {'cuestan' if many else 'cuesta'} {es}?",
    )
    return _Draft("phrase", f"how much {'do' if many else 'does'} {phrase.english()} cost?", targets, sentence=True)


def _object(rng: random.Random) -> _Draft:
    """Sentences whose noun phrase is a direct object, which German marks on masculine nouns."""
    kind = rng.randrange(4)
    if kind == 0:
        phrase = _some_phrase(rng, "ofl")
        frame = ("I see {}", "Je vois {}", "Ich sehe {}", "Veo {}")
        if phrase.determiner == "a" and phrase.plural:
            phrase = Phrase(phrase.noun, phrase.adjective, "the")
    elif kind == 1:
        phrase = _small_count(rng, "oa")
        frame = ("I have {}", "J'ai {}", "Ich habe {}", "Tengo {}")
    elif kind == 2:
        phrase = _small_count(rng, "oap")
        place = rng.choice(LOCATIONS)
        frame = (f"there {'are' if phrase.plural else 'is'} {{}}{place[0]}", f"il y a {{}}{place[1]}",
                 f"es gibt {{}}{place[2]}", f"hay {{}}{place[3]}")  # fmt: skip
    else:
        phrase = _small_count(rng, "f")
        frame = ("I would like {}", "Je voudrais {}", "Ich möchte {}", "Quisiera {}")
        if rng.random() < 0.4:
            frame = ("I would like {}, please", "Je voudrais {}, s'il vous plaît", "Ich möchte {}, bitte",
                     "Quisiera {}, por favor")  # fmt: skip
    targets = (
        frame[1].format(phrase.french()),
        frame[2].format(phrase.german("acc")),
        frame[3].format(phrase.spanish()),
    )
    return _Draft("phrase", frame[0].format(phrase.english()), targets, sentence=True)


def _small_count(rng: random.Random, kinds: str) -> Phrase:
    noun = rng.choice(_nouns(kinds))
    adjective = _adjective_for(rng, noun) if rng.random() < 0.25 else None
    if rng.random() < 0.25:
        return Phrase(noun, adjective, "a")
    return Phrase(noun, adjective, count=max(2, rng.choice((rng.randint(2, 12), _count(rng, 99)))))


_CATEGORIES: tuple[tuple[int, Callable[[random.Random], _Draft]], ...] = (
    (20, _number),
    (22, _counted),
    (12, _date),
    (14, _clock),
    (3, _day),
    (4, _set_phrase),
    (3, _personal),
    (6, _noun_phrase),
    (6, _predicate),
    (5, _question),
    (7, _object),
)


def _capital(text: str) -> str:
    start = 1 if text.startswith("¿") else 0
    return text[:start] + text[start : start + 1].upper() + text[start + 1 :]


def _restyle(rng: random.Random, draft: _Draft, source: str, target: str) -> tuple[str, str]:
    """One of the spellings a user may choose; the translation follows the source's case and full stop."""
    roll = rng.random()
    question = source.endswith("?")
    if question and rng.random() < 0.15:
        source = source[:-1]
    if not draft.restylable or roll < (0.5 if draft.sentence else 0.75):
        return source, target
    source, target = _capital(source), _capital(target)
    if not question and roll < 0.85:
        return source + ".", target + "."
    return source, target


def _key(source: str) -> str:
    return source.lower().rstrip("?.!")


def _draw(rng: random.Random) -> tuple[_Draft, TranslationItem]:
    make = rng.choices([make for _, make in _CATEGORIES], [weight for weight, _ in _CATEGORIES])[0]
    draft = make(rng)
    index = rng.randrange(3)
    source = draft.spoken_and if draft.spoken_and and rng.random() < 0.35 else draft.source
    source, target = _restyle(rng, draft, source, draft.targets[index])
    return draft, TranslationItem(source, LANGUAGES[index], target, draft.category, _key(draft.source))


def train_stream(seed: int = 0) -> Iterator[TranslationItem]:
    """An endless, reproducible stream of training items."""
    rng = random.Random(seed)
    while True:
        draft, item = _draw(rng)
        if draft.core or not is_held_out(item.key):
            yield item


def held_out(size: int = HELD_OUT_SIZE, seed: int = 20240303) -> list[TranslationItem]:
    """The held-out items, distinct, with the categories in the proportions of the training stream."""
    rng = random.Random(seed)
    items: dict[tuple[str, str], TranslationItem] = {}
    while len(items) < size:
        draft, item = _draw(rng)
        if not draft.core and is_held_out(item.key):
            items.setdefault((item.source, item.language), item)
    return list(items.values())
