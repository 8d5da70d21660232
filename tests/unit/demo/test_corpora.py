"""The generated corpora: linguistically right, reproducible, and split so that nothing held out is trained on."""

from __future__ import annotations

from itertools import islice

import pytest

from trivium.demo import dialogue_corpus, translation_corpus
from trivium.demo import translation_numbers as numbers
from trivium.demo.translation_grammar import Clock, Date, DigitalClock, Phrase
from trivium.demo.translation_lexicon import ADJECTIVES, MONTHS, NOUNS, SET_PHRASES, WEEKDAYS, Adjective, Noun

SAMPLE = 5_000


def noun(english: str) -> Noun:
    return next(entry for entry in NOUNS if entry.en[0] == english)


def adjective(english: str) -> Adjective:
    return next(entry for entry in ADJECTIVES if entry.en == english)


def in_all(thing: Phrase | Date | Clock | DigitalClock) -> tuple[str, str, str]:
    return thing.render("fr"), thing.render("de"), thing.render("es")


@pytest.mark.parametrize(
    ("number", "english", "french", "german", "spanish"),
    [
        (0, "zero", "zéro", "null", "cero"),
        (16, "sixteen", "seize", "sechzehn", "dieciséis"),
        (17, "seventeen", "dix-sept", "siebzehn", "diecisiete"),
        (21, "twenty-one", "vingt et un", "einundzwanzig", "veintiuno"),
        (22, "twenty-two", "vingt-deux", "zweiundzwanzig", "veintidós"),
        (30, "thirty", "trente", "dreißig", "treinta"),
        (31, "thirty-one", "trente et un", "einunddreißig", "treinta y uno"),
        (70, "seventy", "soixante-dix", "siebzig", "setenta"),
        (71, "seventy-one", "soixante et onze", "einundsiebzig", "setenta y uno"),
        (80, "eighty", "quatre-vingts", "achtzig", "ochenta"),
        (81, "eighty-one", "quatre-vingt-un", "einundachtzig", "ochenta y uno"),
        (91, "ninety-one", "quatre-vingt-onze", "einundneunzig", "noventa y uno"),
        (99, "ninety-nine", "quatre-vingt-dix-neuf", "neunundneunzig", "noventa y nueve"),
        (100, "one hundred", "cent", "einhundert", "cien"),
        (101, "one hundred one", "cent un", "einhunderteins", "ciento uno"),
        (200, "two hundred", "deux cents", "zweihundert", "doscientos"),
        (201, "two hundred one", "deux cent un", "zweihunderteins", "doscientos uno"),
        (280, "two hundred eighty", "deux cent quatre-vingts", "zweihundertachtzig", "doscientos ochenta"),
        (500, "five hundred", "cinq cents", "fünfhundert", "quinientos"),
        (1000, "one thousand", "mille", "eintausend", "mil"),
        (1100, "one thousand one hundred", "mille cent", "eintausendeinhundert", "mil cien"),
        (
            9999,
            "nine thousand nine hundred ninety-nine",
            "neuf mille neuf cent quatre-vingt-dix-neuf",
            "neuntausendneunhundertneunundneunzig",
            "nueve mil novecientos noventa y nueve",
        ),
    ],
)
def test_cardinals(number: int, english: str, french: str, german: str, spanish: str) -> None:
    assert numbers.english(number) == english
    assert (numbers.french(number), numbers.german(number), numbers.spanish(number)) == (french, german, spanish)


def test_cardinals_agree_with_the_noun() -> None:
    assert numbers.english(1105, with_and=True) == "one thousand one hundred and five"
    assert numbers.french(81, feminine=True) == "quatre-vingt-une"
    assert [numbers.spanish(n, "m") for n in (1, 21, 31, 200)] == ["un", "veintiún", "treinta y un", "doscientos"]
    assert [numbers.spanish(n, "f") for n in (1, 21, 31, 200)] == ["una", "veintiuna", "treinta y una", "doscientas"]


@pytest.mark.parametrize(
    ("phrase", "english", "translations"),
    [
        (Phrase(noun("house"), count=21), "twenty-one houses",
         ("vingt et une maisons", "einundzwanzig Häuser", "veintiuna casas")),
        (Phrase(noun("car"), count=21), "twenty-one cars",
         ("vingt et une voitures", "einundzwanzig Autos", "veintiún coches")),
        (Phrase(noun("book"), count=1), "one book", ("un livre", "ein Buch", "un libro")),
        (Phrase(noun("door"), count=1), "one door", ("une porte", "eine Tür", "una puerta")),
        (Phrase(noun("house"), count=0), "zero houses", ("zéro maison", "null Häuser", "cero casas")),
        (Phrase(noun("dog"), adjective("black"), count=3), "three black dogs",
         ("trois chiens noirs", "drei schwarze Hunde", "tres perros negros")),
        (Phrase(noun("tree"), adjective("old"), "a"), "an old tree",
         ("un vieil arbre", "ein alter Baum", "un árbol viejo")),
        (Phrase(noun("tree"), None, "the"), "the tree", ("l'arbre", "der Baum", "el árbol")),
        (Phrase(noun("school"), None, "my"), "my school", ("mon école", "meine Schule", "mi escuela")),
        (Phrase(noun("house"), adjective("red"), "the", 2), "the red houses",
         ("les maisons rouges", "die roten Häuser", "las casas rojas")),
        (Phrase(noun("church"), None, "this"), "this church", ("cette église", "diese Kirche", "esta iglesia")),
        (Phrase(noun("hotel"), None, "this"), "this hotel", ("cet hôtel", "dieses Hotel", "este hotel")),
        (Phrase(noun("car"), count=21, digits=True), "21 cars", ("21 voitures", "21 Autos", "21 coches")),
    ],
)  # fmt: skip
def test_noun_phrases(phrase: Phrase, english: str, translations: tuple[str, str, str]) -> None:
    assert phrase.english() == english
    assert in_all(phrase) == translations


def test_german_objects_take_the_accusative() -> None:
    assert Phrase(noun("coffee"), None, "a").german("acc") == "einen Kaffee"
    assert Phrase(noun("bridge"), adjective("old"), "the").german("acc") == "die alte Brücke"
    assert Phrase(noun("train"), adjective("expensive"), "the").german("acc") == "den teuren Zug"


@pytest.mark.parametrize(
    ("date", "english", "translations"),
    [
        (Date(3, 3, None, 2024), "March 3, 2024", ("le 3 mars 2024", "3. März 2024", "3 de marzo de 2024")),
        (Date(1, 5), "May 1", ("le 1er mai", "1. Mai", "1 de mayo")),
        (Date(3, 3, 0, None, words=True), "Monday, the third of March",
         ("lundi trois mars", "Montag, der dritte März", "lunes, tres de marzo")),
        (Date(21, 8, None, None, words=True), "the twenty-first of August",
         ("le vingt et un août", "der einundzwanzigste August", "el veintiuno de agosto")),
        (Date(22, 6, 4, 1999, suffix=True), "Friday, June 22nd, 1999",
         ("vendredi 22 juin 1999", "Freitag, 22. Juni 1999", "viernes, 22 de junio de 1999")),
    ],
)  # fmt: skip
def test_dates(date: Date, english: str, translations: tuple[str, str, str]) -> None:
    assert date.english() == english
    assert in_all(date) == translations


@pytest.mark.parametrize(
    ("clock", "english", "translations"),
    [
        (Clock(3, 15), "a quarter past three", ("trois heures et quart", "Viertel nach drei", "las tres y cuarto")),
        (Clock(4, 30), "half past four", ("quatre heures et demie", "halb fünf", "las cuatro y media")),
        (Clock(5, 40), "twenty to six", ("six heures moins vingt", "zwanzig vor sechs", "las seis menos veinte")),
        (Clock(12, 45), "a quarter to one", ("une heure moins le quart", "Viertel vor eins", "la una menos cuarto")),
        (Clock(1, 0), "one o'clock", ("une heure", "ein Uhr", "la una")),
        (DigitalClock(15, 45), "3:45 pm", ("15 h 45", "15:45 Uhr", "las 15:45")),
        (DigitalClock(0, 30), "12:30 am", ("0 h 30", "0:30 Uhr", "las 0:30")),
    ],
)
def test_clock_times(clock: Clock | DigitalClock, english: str, translations: tuple[str, str, str]) -> None:
    assert clock.english() == english
    assert in_all(clock) == translations


def test_translation_held_out_set_is_disjoint_from_training() -> None:
    held_out = translation_corpus.held_out()
    trained = list(islice(translation_corpus.train_stream(), SAMPLE))
    assert len(held_out) >= 400
    assert not {item.source.lower().rstrip("?.!") for item in held_out} & {
        item.source.lower().rstrip("?.!") for item in trained
    }
    assert not {item.key for item in held_out} & {item.key for item in trained}


def test_translation_held_out_set_covers_every_category_and_language() -> None:
    held_out = translation_corpus.held_out()
    categories = [item.category for item in held_out]
    assert set(categories) == {"number", "counted noun", "date", "clock time", "phrase"}
    assert min(categories.count(category) for category in set(categories)) >= 40
    assert {item.language for item in held_out} == {"fr", "de", "es"}


def test_translation_vocabulary_is_always_trained() -> None:
    trained = {item.key for item in islice(translation_corpus.train_stream(), 12_000)}
    assert {row[0].lower() for row in (*WEEKDAYS, *MONTHS)} <= trained
    assert {row[0].lower().rstrip("?") for row in SET_PHRASES} <= trained


def test_translation_prefix() -> None:
    item = translation_corpus.TranslationItem("two cats", "de", "zwei Katzen", "counted noun", "two cats")
    assert translation_corpus.with_prefix(item) == "to German: two cats"
    assert translation_corpus.with_prefix(item, 1) == "translate English to German: two cats"


def test_dialogue_held_out_set_is_disjoint_from_training() -> None:
    held_out = dialogue_corpus.held_out()
    trained = list(islice(dialogue_corpus.train_stream(), SAMPLE))
    assert len(held_out) >= 400
    assert not {item.key for item in held_out} & {item.key for item in trained}

    def opening_questions(items: list[dialogue_corpus.DialogueItem]) -> set[str]:
        alone = [item for item in items if sum(turn["role"] == "user" for turn in item.messages) == 1]
        return {item.messages[-1]["content"].lower().rstrip("?. =") for item in alone}

    assert not opening_questions(held_out) & opening_questions(trained)


def test_dialogues_alternate_and_end_with_the_user() -> None:
    for item in islice(dialogue_corpus.train_stream(), 500):
        roles = [turn["role"] for turn in item.messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user" if index % 2 == 0 else "assistant" for index in range(len(turns))]
        assert len(turns) % 2 == 1
        assert item.answer.endswith((".", "!", "?"))


def test_dialogue_sums_are_right() -> None:
    seen = 0
    for item in islice(dialogue_corpus.train_stream(), 3_000):
        parts = item.answer.rstrip(".").split()
        if len(parts) == 5 and parts[1] in ("plus", "minus", "times"):
            a, b, result = int(parts[0]), int(parts[2]), int(parts[4])
            assert result == {"plus": a + b, "minus": a - b, "times": a * b}[parts[1]]
            seen += 1
    assert seen > 1_000


def test_dialogue_facts_are_right() -> None:
    answers = {item.answer for item in islice(dialogue_corpus.train_stream(), 12_000)}
    assert {
        "The day after Sunday is Monday.",
        "The day before Monday is Sunday.",
        "April has 30 days.",
        "February has 28 days, or 29 in a leap year.",
        "The month after December is January.",
        "The third month of the year is March.",
        "September is month number 9.",
        "3 days after Monday is Thursday.",
        "10 days are 1 week and 3 days, and 3 days after Monday is Thursday.",
        "21 days are 3 weeks, and 3 weeks after Friday is Friday.",
        "3 hours are 180 minutes.",
        "1 kilogram is 1000 grams.",
        "3 dozen is 36.",
    } <= answers


def test_corpora_are_deterministic() -> None:
    for corpus in (translation_corpus, dialogue_corpus):
        first, second = ([*islice(corpus.train_stream(7), 200), *corpus.held_out(50)] for _ in range(2))
        assert first == second
        assert list(islice(corpus.train_stream(8), 200)) != first[:200]
