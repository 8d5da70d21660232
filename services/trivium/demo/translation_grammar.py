"""Noun phrases with agreement, dates and clock times in English, French, German and Spanish."""

from __future__ import annotations

from dataclasses import dataclass

from trivium.demo import translation_numbers as numbers
from trivium.demo.translation_lexicon import MONTHS, PARTS_OF_DAY, WEEKDAYS, Adjective, Noun

LANGUAGES: tuple[str, ...] = ("fr", "de", "es")

_VOWELS = "aeiouhâàéèêîïôûœ"
_DE_DEFINITE = {
    "nom": {"m": "der", "f": "die", "n": "das", "pl": "die"},
    "acc": {"m": "den", "f": "die", "n": "das", "pl": "die"},
}
_DE_THIS = {
    "nom": {"m": "dieser", "f": "diese", "n": "dieses", "pl": "diese"},
    "acc": {"m": "diesen", "f": "diese", "n": "dieses", "pl": "diese"},
}
_DE_EIN_SUFFIX = {
    "nom": {"m": "", "f": "e", "n": "", "pl": "e"},
    "acc": {"m": "en", "f": "e", "n": "", "pl": "e"},
}
_DE_EIN_STEM = {"a": "ein", "my": "mein", "our": "unser"}
_FR_DETERMINERS = {
    "the": {"m": "le", "f": "la", "pl": "les", "vowel": "l'"},
    "this": {"m": "ce", "f": "cette", "pl": "ces", "vowel": "cet"},
    "my": {"m": "mon", "f": "ma", "pl": "mes", "vowel": "mon"},
    "our": {"m": "notre", "f": "notre", "pl": "nos", "vowel": "notre"},
    "a": {"m": "un", "f": "une", "pl": "des", "vowel": ""},
}
_ES_DETERMINERS = {
    "the": ("el", "la", "los", "las"),
    "this": ("este", "esta", "estos", "estas"),
    "my": ("mi", "mi", "mis", "mis"),
    "our": ("nuestro", "nuestra", "nuestros", "nuestras"),
    "a": ("un", "una", "unos", "unas"),
}


@dataclass(frozen=True)
class Phrase:
    """A noun phrase: a determiner ("the", "this", "my", "our", "a") or a count, maybe an adjective, and a noun."""

    noun: Noun
    adjective: Adjective | None = None
    determiner: str = ""
    count: int = 1
    digits: bool = False

    @property
    def plural(self) -> bool:
        return self.count != 1

    def english(self, with_and: bool = False) -> str:
        tail = f"{self.adjective.en} " if self.adjective else ""
        tail += self.noun.en[self.plural]
        if not self.determiner:
            return f"{self.count if self.digits else numbers.english(self.count, with_and)} {tail}"
        word = self.determiner
        if word == "a" and tail[0] in "aeiou":
            word = "an"
        if word == "this" and self.plural:
            word = "these"
        return f"{word} {tail}"

    def french(self) -> str:
        singular, plural, gender = self.noun.fr
        # French counts zero in the singular, unlike the other three languages.
        many = self.count > 1
        tail = plural if many else singular
        if self.adjective:
            tail = self._french_adjective(tail, gender, many)
        if not self.determiner:
            return f"{self.count if self.digits else numbers.french(self.count, gender == 'f')} {tail}"
        forms = _FR_DETERMINERS[self.determiner]
        if many:
            return f"{forms['pl']} {tail}"
        if tail[0] in _VOWELS and forms["vowel"] and not (self.determiner == "this" and gender == "f"):
            return forms["vowel"] + ("" if forms["vowel"].endswith("'") else " ") + tail
        return f"{forms[gender]} {tail}"

    def _french_adjective(self, noun: str, gender: str, many: bool) -> str:
        assert self.adjective is not None
        word = self.adjective.fr[(gender == "f") + 2 * many]
        if not self.adjective.fr_before_noun:
            return f"{noun} {word}"
        if gender == "m" and not many and noun[0] in _VOWELS:
            word = self.adjective.fr[4]
        return f"{word} {noun}"

    def german(self, case: str = "nom") -> str:
        singular, plural, gender = self.noun.de
        slot = "pl" if self.plural else gender
        noun = plural if self.plural else singular
        determiner, ending = self._german_determiner(case, slot)
        adjective = f"{self.adjective.de[1]}{ending} " if self.adjective else ""
        return f"{determiner} {adjective}{noun}"

    def _german_determiner(self, case: str, slot: str) -> tuple[str, str]:
        """The determiner, and the ending that it leaves to the adjective."""
        weak = "en" if slot == "pl" or (case == "acc" and slot == "m") else "e"
        mixed = weak if weak == "en" else {"m": "er", "f": "e", "n": "es"}[slot]
        if self.determiner == "the":
            return _DE_DEFINITE[case][slot], weak
        if self.determiner == "this":
            return _DE_THIS[case][slot], weak
        if self.determiner or (self.count == 1 and not self.digits):
            suffix = _DE_EIN_SUFFIX[case][slot]
            return _DE_EIN_STEM[self.determiner or "a"] + suffix, mixed
        word = str(self.count) if self.digits else numbers.german(self.count)
        return word, "e" if slot == "pl" else mixed

    def spanish(self) -> str:
        singular, plural, gender = self.noun.es
        tail = plural if self.plural else singular
        index = (gender == "f") + 2 * self.plural
        if self.adjective:
            tail = f"{tail} {self.adjective.es[index]}"
        if not self.determiner:
            return f"{self.count if self.digits else numbers.spanish(self.count, gender)} {tail}"
        return f"{_ES_DETERMINERS[self.determiner][index]} {tail}"

    def render(self, language: str, case: str = "nom") -> str:
        if language == "fr":
            return self.french()
        return self.german(case) if language == "de" else self.spanish()

    def predicate(self, language: str, adjective: Adjective) -> str:
        """ "is big" with the agreement this phrase imposes."""
        if language == "de":
            return f"{'sind' if self.plural else 'ist'} {adjective.de[0]}"
        if language == "fr":
            word = adjective.fr[(self.noun.fr[2] == "f") + 2 * self.plural]
            return f"{'sont' if self.plural else 'est'} {word}"
        word = adjective.es[(self.noun.es[2] == "f") + 2 * self.plural]
        return f"{'son' if self.plural else 'es'} {word}"


def _english_suffix(day: int) -> str:
    return "th" if day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")


@dataclass(frozen=True)
class Date:
    """A day of a month, maybe with its weekday and its year, in figures or in words."""

    day: int
    month: int
    weekday: int | None = None
    year: int | None = None
    words: bool = False
    british: bool = False
    suffix: bool = False

    def english(self) -> str:
        month = MONTHS[self.month - 1][0]
        year = "" if self.year is None else str(self.year)
        head = "" if self.weekday is None else f"{WEEKDAYS[self.weekday][0]}, "
        if self.words:
            return f"{head}the {numbers.english_ordinal(self.day)} of {month}" + (f" {year}" if year else "")
        day = f"{self.day}{_english_suffix(self.day) if self.suffix else ''}"
        if self.british:
            lead = f"the {day} of" if self.suffix else day
            return f"{head}{lead} {month}" + (f" {year}" if year else "")
        return f"{head}{month} {day}" + (f", {year}" if year else "")

    def french(self) -> str:
        if self.words:
            day = "premier" if self.day == 1 else numbers.french(self.day)
        else:
            day = "1er" if self.day == 1 else str(self.day)
        head = "le" if self.weekday is None else WEEKDAYS[self.weekday][1]
        return f"{head} {day} {MONTHS[self.month - 1][1]}" + (f" {self.year}" if self.year else "")

    def german(self) -> str:
        head = "" if self.weekday is None else f"{WEEKDAYS[self.weekday][2]}, "
        day = f"der {numbers.german_ordinal(self.day)}" if self.words else f"{self.day}."
        return f"{head}{day} {MONTHS[self.month - 1][2]}" + (f" {self.year}" if self.year else "")

    def spanish(self) -> str:
        plain = "el " if self.words else ""
        head = plain if self.weekday is None else f"{WEEKDAYS[self.weekday][3]}, "
        day = ("primero" if self.day == 1 else numbers.spanish(self.day)) if self.words else str(self.day)
        return f"{head}{day} de {MONTHS[self.month - 1][3]}" + (f" de {self.year}" if self.year else "")

    def render(self, language: str) -> str:
        return {"fr": self.french, "de": self.german, "es": self.spanish}[language]()


@dataclass(frozen=True)
class Clock:
    """A time of day told in words on a twelve-hour dial, maybe with the part of the day."""

    hour: int
    minute: int
    part: int | None = None

    def _tail(self, index: int) -> str:
        return "" if self.part is None else f" {PARTS_OF_DAY[self.part][index]}"

    def _anchor(self, after: int) -> int:
        """The hour that is named: the next one once the dial passes `after` minutes."""
        return self.hour if self.minute <= after else self.hour % 12 + 1

    def english(self) -> str:
        hour = numbers.english(self._anchor(30))
        tail = self._tail(0)
        if self.minute == 0:
            return f"{hour} o'clock{tail}"
        gap = {15: "a quarter", 30: "half", 45: "a quarter"}.get(
            self.minute, numbers.english(self.minute if self.minute < 30 else 60 - self.minute)
        )
        return f"{gap} {'past' if self.minute <= 30 else 'to'} {hour}{tail}"

    def french(self) -> str:
        anchor = self._anchor(30)
        hour = f"{numbers.french(anchor, True)} heure{'s' if anchor > 1 else ''}"
        if self.minute == 0:
            gap = ""
        elif self.minute == 45:
            gap = " moins le quart"
        elif self.minute > 30:
            gap = f" moins {numbers.french(60 - self.minute)}"
        else:
            gap = {15: " et quart", 30: " et demie"}.get(self.minute, f" {numbers.french(self.minute)}")
        return hour + gap + self._tail(1)

    def german(self) -> str:
        tail = self._tail(2)
        if self.minute == 0:
            return f"{'ein' if self.hour == 1 else numbers.german(self.hour)} Uhr{tail}"
        if self.minute == 30:
            return f"halb {numbers.german(self._anchor(0))}{tail}"
        gap = 60 - self.minute if self.minute > 30 else self.minute
        word = "Viertel" if gap == 15 else numbers.german(gap)
        return f"{word} {'vor' if self.minute > 30 else 'nach'} {numbers.german(self._anchor(30))}{tail}"

    def spanish(self) -> str:
        anchor = self._anchor(30)
        hour = f"{'la' if anchor == 1 else 'las'} {'una' if anchor == 1 else numbers.spanish(anchor)}"
        if self.minute == 0:
            gap = ""
        elif self.minute > 30:
            gap = " menos " + ("cuarto" if self.minute == 45 else numbers.spanish(60 - self.minute))
        else:
            gap = " y " + {15: "cuarto", 30: "media"}.get(self.minute, numbers.spanish(self.minute))
        return hour + gap + self._tail(3)

    def render(self, language: str) -> str:
        return {"fr": self.french, "de": self.german, "es": self.spanish}[language]()


@dataclass(frozen=True)
class DigitalClock:
    """A time of day in figures; English may give it with am or pm, the other languages count to 24."""

    hour: int
    minute: int
    twelve: bool = True

    def english(self) -> str:
        if not self.twelve:
            return f"{self.hour}:{self.minute:02d}"
        return f"{(self.hour - 1) % 12 + 1}:{self.minute:02d} {'am' if self.hour < 12 else 'pm'}"

    def render(self, language: str) -> str:
        if language == "fr":
            return f"{self.hour} h" + (f" {self.minute:02d}" if self.minute else "")
        if language == "de":
            return f"{self.hour}:{self.minute:02d} Uhr"
        return f"{'la' if self.hour == 1 else 'las'} {self.hour}:{self.minute:02d}"
