"""From the language that a caller names to the code that a tokenizer has.

Knows the shapes of codes (`en`, `en_XX`, `eng_Latn`, `zh-TW`) and which two- and three-letter codes mean the same
language: ISO 639-1 and 639-3 (https://iso639-3.sil.org), with the individual language that checkpoints choose for a
macrolanguage (`arb_Arab` for Arabic). Knows no tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from trivium.errors import InvalidRequestError

MAX_CODE_CHARS = 64
NUM_SHOWN_CODES = 8

# two letters, then all codes of the same language
_SAME = """
aa aar|ab abk|ae ave|af afr|ak aka|am amh|an arg|ar ara arb|as asm|av ava|ay aym ayr|az aze azj|ba bak|be bel|bg bul
bi bis|bm bam|bn ben|bo bod tib|br bre|bs bos|ca cat|ce che|ch cha|co cos|cr cre|cs ces cze|cu chu|cv chv|cy cym wel
da dan|de deu ger|dv div|dz dzo|ee ewe|el ell gre|en eng|eo epo|es spa|et est ekk|eu eus baq|fa fas per pes
ff ful fuv|fi fin|fj fij|fo fao|fr fra fre|fy fry|ga gle|gd gla|gl glg|gn grn gug|gu guj|gv glv|ha hau|he heb iw
hi hin|ho hmo|hr hrv|ht hat|hu hun|hy hye arm|hz her|ia ina|id ind in|ie ile|ig ibo|ii iii|ik ipk|io ido|is isl ice
it ita|iu iku|ja jpn|jv jav jw|ka kat geo|kg kon|ki kik|kj kua|kk kaz|kl kal|km khm|kn kan|ko kor|kr kau knc|ks kas
ku kur kmr|kv kom|kw cor|ky kir|la lat|lb ltz|lg lug|li lim|ln lin|lo lao|lt lit|lu lub|lv lav lvs|mg mlg plt|mh mah
mi mri mao|mk mkd mac|ml mal|mn mon khk|mr mar|ms msa may zsm|mt mlt|my mya bur|na nau|nd nde|ne nep npi|ng ndo
nl nld dut|nn nno|no nor nob nb|nr nbl|nso ns|nv nav|ny nya|oc oci|oj oji|om orm gaz|or ori ory|os oss|pa pan|pi pli
pl pol|ps pus pbt|pt por|qu que quy|rm roh|rn run|ro ron rum|ru rus|rw kin|sa san|sc srd|sd snd|se sme|sg sag|si sin
sk slk slo|sl slv|sm smo|sn sna|so som|sq sqi alb als|sr srp|ss ssw|st sot|su sun|sv swe|sw swa swh|ta tam|te tel
tg tgk|th tha|ti tir|tk tuk|tl tgl fil|tn tsn|to ton|tr tur|ts tso|tt tat|tw twi|ty tah|ug uig|uk ukr|ur urd
uz uzb uzn|ve ven|vi vie|vo vol|wa wln|wo wol|xh xho|yi yid ydd ji|yo yor|za zha|zh zho chi cmn|zu zul
"""
_CANONICAL = {code: group.split()[0] for group in re.split(r"[|\n]", _SAME.strip()) for code in group.split()}
_CHINESE_SCRIPTS = {"CN": "Hans", "SG": "Hans", "TW": "Hant", "HK": "Hant", "MO": "Hant"}
_PART = re.compile(r"[A-Za-z0-9]+")


@dataclass(frozen=True, slots=True)
class LanguageTag:
    """A code taken apart: canonical language, script (`Latn`) and region (`US`), empty where it does not say."""

    language: str
    script: str = ""
    region: str = ""
    variant: str = ""

    @classmethod
    def parse(cls, code: str) -> LanguageTag:
        language, *rest = _PART.findall(code) or [""]
        script = region = variant = ""
        for part in rest:
            if len(part) == 4 and part.isalpha():
                script = part.title()
            elif len(part) == 2 and part.isalpha():
                region = "" if part.upper() == "XX" else part.upper()
            else:
                variant = part.lower()
        canonical = _CANONICAL.get(language.lower(), language.lower())
        if canonical == "zh" and not script:
            script = _CHINESE_SCRIPTS.get(region, "")
        return cls(canonical, script, region, variant)

    @property
    def is_bare(self) -> bool:
        return not (self.script or self.region or self.variant)


def is_language(code: str) -> bool:
    """True if `code` is a two- or three-letter code of the table."""
    return code in _CANONICAL


def resolve_language(name: object, codes: Collection[str], param: str) -> str:
    """The one of `codes` that `name` means: itself, up to case and separator, or the only one of its language.

    A script in `name` must be that of the code; a region decides between several codes. Raises InvalidRequestError
    with valid codes in its text: nothing fits (`unknown_language`), or several do (`ambiguous_language`).
    """
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_CODE_CHARS:
        raise InvalidRequestError(f"{param} must be a language code, got {name!r:.40}", param=param)
    if name in codes:
        return name
    wanted = LanguageTag.parse(name)
    same_spelling = [code for code in codes if _plain(code) == _plain(name)]
    if len(same_spelling) == 1:
        return same_spelling[0]
    fitting = {code: tag for code in codes if _fits(wanted, tag := LanguageTag.parse(code))}
    narrowed = [code for code, tag in fitting.items() if wanted.region and tag.region == wanted.region]
    chosen = narrowed or [code for code, tag in fitting.items() if tag.is_bare] or list(fitting)
    if len(chosen) == 1:
        return chosen[0]
    if chosen:
        raise InvalidRequestError(
            f"{param} {name!r} may be any of {', '.join(sorted(chosen)[:NUM_SHOWN_CODES])}",
            param=param,
            code="ambiguous_language",
        )
    near = [code for code in codes if LanguageTag.parse(code).language == wanted.language]
    raise InvalidRequestError(
        f"{param} {name!r} is not a language of this model; it has {shown_codes(codes, first=near)}",
        param=param,
        code="unknown_language",
    )


def shown_codes(codes: Collection[str], first: Sequence[str] = ()) -> str:
    """Some of `codes` for an error text."""
    ordered = list(dict.fromkeys([*sorted(first), *sorted(codes)]))
    more = "" if len(ordered) <= NUM_SHOWN_CODES else f" and {len(ordered) - NUM_SHOWN_CODES} more"
    return ", ".join(ordered[:NUM_SHOWN_CODES]) + more


def _plain(code: str) -> str:
    return code.replace("-", "_").lower()


def _fits(wanted: LanguageTag, tag: LanguageTag) -> bool:
    if tag.language != wanted.language:
        return False
    return not (wanted.script and tag.script and wanted.script != tag.script)
