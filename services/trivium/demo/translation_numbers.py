"""Cardinals and ordinals in words for English, French, German and Spanish, from 0 to 9,999.

Spelling follows the traditional conventions: French joins with hyphens below one hundred only, German writes one
word with an explicit leading "ein" (einhundert, eintausend), Spanish contracts 16 to 29.
"""

from __future__ import annotations


def _words(*lines: str) -> tuple[str, ...]:
    """The words of a table, "-" standing where a language has none."""
    return tuple(" ".join(lines).split())


_EN_SMALL = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen",
    "seventeen eighteen nineteen",
)
_EN_TENS = _words("- - twenty thirty forty fifty sixty seventy eighty ninety")

_FR_SMALL = _words(
    "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize dix-sept",
    "dix-huit dix-neuf",
)
_FR_TENS = _words("- - vingt trente quarante cinquante soixante soixante quatre-vingt quatre-vingt")

_DE_SMALL = _words(
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn",
    "siebzehn achtzehn neunzehn",
)
_DE_TENS = _words("- - zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig")

_ES_SMALL = _words(
    "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis",
    "diecisiete dieciocho diecinueve veinte veintiuno veintidós veintitrés veinticuatro veinticinco veintiséis",
    "veintisiete veintiocho veintinueve",
)
_ES_TENS = _words("- - - treinta cuarenta cincuenta sesenta setenta ochenta noventa")
_ES_HUNDREDS = _words(
    "- ciento doscientos trescientos cuatrocientos quinientos seiscientos setecientos ochocientos novecientos"
)

_EN_ORDINALS = _words(
    "- first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth",
    "fifteenth sixteenth seventeenth eighteenth nineteenth twentieth",
)
_DE_ORDINAL_STEMS = {1: "erst", 3: "dritt", 7: "siebt", 8: "acht"}


def english(number: int, with_and: bool = False) -> str:
    """The English cardinal; `with_and` gives the British "one hundred and five"."""
    parts: list[str] = []
    thousands, rest = divmod(number, 1000)
    hundreds, tail = divmod(rest, 100)
    if thousands:
        parts.append(f"{_EN_SMALL[thousands]} thousand")
    if hundreds:
        parts.append(f"{_EN_SMALL[hundreds]} hundred")
    if tail or not parts:
        if parts and with_and:
            parts.append("and")
        parts.append(_EN_SMALL[tail] if tail < 20 else _english_tens(tail))
    return " ".join(parts)


def _english_tens(tail: int) -> str:
    tens, unit = divmod(tail, 10)
    return _EN_TENS[tens] + (f"-{_EN_SMALL[unit]}" if unit else "")


def english_ordinal(day: int) -> str:
    """The English ordinal of a day of the month, 1 to 31."""
    if day <= 20:
        return _EN_ORDINALS[day]
    tens, unit = divmod(day, 10)
    return f"{_EN_TENS[tens]}-{_EN_ORDINALS[unit]}" if unit else "thirtieth"


def french(number: int, feminine: bool = False) -> str:
    """The French cardinal; `feminine` turns a final "un" into "une"."""
    thousands, rest = divmod(number, 1000)
    hundreds, tail = divmod(rest, 100)
    parts: list[str] = []
    if thousands:
        parts.append("mille" if thousands == 1 else f"{_FR_SMALL[thousands]} mille")
    if hundreds:
        plural = "s" if hundreds > 1 and not tail else ""
        parts.append("cent" if hundreds == 1 else f"{_FR_SMALL[hundreds]} cent{plural}")
    if tail or not parts:
        parts.append(_french_below_hundred(tail))
    words = " ".join(parts)
    return words + "e" if feminine and words.endswith("un") else words


def _french_below_hundred(tail: int) -> str:
    if tail < 20:
        return _FR_SMALL[tail]
    tens, unit = divmod(tail, 10)
    if tens in (7, 9):
        unit += 10
    if tail == 80:
        return "quatre-vingts"
    if not unit:
        return _FR_TENS[tens]
    # "et" joins one and eleven, except after quatre-vingt.
    joint = " et " if unit in (1, 11) and tens < 8 else "-"
    return f"{_FR_TENS[tens]}{joint}{_FR_SMALL[unit]}"


def german(number: int) -> str:
    """The German cardinal as it is counted, with a final "eins"."""
    thousands, rest = divmod(number, 1000)
    hundreds, tail = divmod(rest, 100)
    words = f"{_german_prefix(thousands)}tausend" if thousands else ""
    words += f"{_german_prefix(hundreds)}hundert" if hundreds else ""
    if tail or not words:
        words += _german_below_hundred(tail)
    return words


def _german_prefix(digit: int) -> str:
    return "ein" if digit == 1 else _DE_SMALL[digit]


def _german_below_hundred(tail: int) -> str:
    if tail < 20:
        return _DE_SMALL[tail]
    tens, unit = divmod(tail, 10)
    return (f"{_german_prefix(unit)}und" if unit else "") + _DE_TENS[tens]


def german_ordinal(day: int) -> str:
    """The German ordinal after a definite article ("der dritte"), 1 to 31."""
    if day in _DE_ORDINAL_STEMS:
        return f"{_DE_ORDINAL_STEMS[day]}e"
    return german(day) + ("te" if day < 20 else "ste")


def spanish(number: int, gender: str = "") -> str:
    """The Spanish cardinal; `gender` "m" or "f" is that of a noun that follows, "" when none does."""
    thousands, rest = divmod(number, 1000)
    hundreds, tail = divmod(rest, 100)
    parts: list[str] = []
    if thousands:
        parts.append("mil" if thousands == 1 else f"{_ES_SMALL[thousands]} mil")
    if hundreds:
        word = "cien" if hundreds == 1 and not tail else _ES_HUNDREDS[hundreds]
        parts.append(word[:-2] + "as" if gender == "f" and hundreds > 1 else word)
    if tail or not parts:
        parts.append(_spanish_below_hundred(tail, gender))
    return " ".join(parts)


def _spanish_below_hundred(tail: int, gender: str) -> str:
    tens, unit = divmod(tail, 10)
    words = _ES_SMALL[tail] if tail < 30 else _ES_TENS[tens] + (f" y {_ES_SMALL[unit]}" if unit else "")
    if unit != 1 or tail == 11 or not gender:
        return words
    if gender == "f":
        return words[:-1] + "a"
    # The accent marks the stress that the lost final vowel used to carry.
    return "veintiún" if tail == 21 else words[:-1]
