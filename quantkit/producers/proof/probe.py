"""Texts on which tokenizers that look alike differ."""

# ruff: noqa: RUF001  letters that look alike are what is asked
from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from quantkit.formats.gguf.vocabulary import SPACE

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPACES = (
    "", " ", "  ", "   ", "a", " a", "a ", " a ", "  a", "a  ", "   a  b   c    ", "a b c", ". a",
    " .", " ,a", "a , b", "x  =  1", "\u2581", "a\u2581b", "\u2581 a", " \u2581",
    *(f"a{' ' * count}b" for count in range(2, 18)),
    *(" " * count for count in (4, 7, 8, 15, 16, 31, 32, 63)),
)  # fmt: skip
_LINES = (
    "\n", "\n\n", "\n\n\n", "\r\n", "\r", "\t", "\t\t", "\t\t\t\t", "a\nb", "a\n\nb", "a\n\n\n\nb",
    "a \nb", "a\n b", "\na", "a\n", " \n", "\n ", " \n \n ", "a\r\nb\r\n\r\n", "\ta\tb\t",
    "a\t b", "a \t\tb", "if x:\n\treturn\n\n\n", "a\u00a0b", "\u00a0", "a\u2003b", "\u3000a\u3000",
    "a\u200bb", "\ufeffa", "a\u2028b\u2029c", "a\u0085b", "a\u000bb\u000cc",
)  # fmt: skip
_NUMBERS = (
    *("1234567890123"[:count] for count in range(1, 14)),
    "0", "00", "007", "3.14159", "1,234,567.89", "-1", "+1", "1e-10", "0x1F", "2024-11-26", "12:30",
    "a1b22c333d4444", "1 22 333 4444", "$1.50", "50%", "1st 2nd", "v1.2.3", "192.168.0.1",
    "½ ¼ ⅓ ⅞", "x² + y³", "Ⅷ ⅻ", "①②⑳", "٣٤٥", "२०२४", "１２３", "一二三", "1½", "2⁄3",
)  # fmt: skip
_FORMS = (
    "é", "e\u0301", "naïve", "nai\u0308ve", "Å \u212b A\u030a", "ñ n\u0303", "한국어",
    "\u1112\u1161\u11ab\u1100\u116e\u11a8", "が か\u3099", "ﾊﾟ ｶﾞ", "ﬁ ﬂ ﬃ ﬆ", "ｆｕｌｌ ｗｉｄｔｈ",
    "Ｑ１", "㎏ ㏒", "ẛ\u0323", "q\u0323\u0307", "ﷺ", "™ ℠ ℡", "\u1e9b", "Ω \u2126", "K \u212a",
    "…", "ĳ ŉ", "ǆ ǅ Ǆ", "o\u0302\u0301",
)  # fmt: skip
_CASE = (
    "A", "HELLO", "Hello", "hELLO wORLD", "camelCase", "PascalCase", "snake_case", "SCREAMING_CASE",
    "XMLHttpRequest", "iPhone", "É é ÉCOLE école", "ΣΊΣΥΦΟΣ σίσυφος", "МОСКВА Москва", "İ ı I i",
    "ß ẞ STRASSE", "ԱՐԱՐԱՏ Արարատ", "I'm you're he's we've I'd they'll don't",
    "I'M YOU'RE HE'S WE'VE I'D THEY'LL DON'T", "i'M you'Re he'S we'Ve i'D they'Ll", "'s 't 're",
    "l'été d’accord ’s", "rock'n'roll", "'tis ''quoted''",
)  # fmt: skip
_MARKS = (
    ".", "..", "...", "!", "!!", "?!", ",", ";", ":", "-", "--", "---", "—", "_", "__", "/", "//",
    "\\", "\\n", "|", "||", "<", ">", "</", "<>", "<a>", "</a>", "<|", "|>", "<|a|>", "[", "]",
    "[[a]]", "{", "}", "{{ a }}", "(a)", "«a»", "“a” ‘b’", "`a`", "```\na\n```", "#", "## a", "*",
    "**a**", "@a", "a@b.c", "&amp;", "a&b", "=", "==", "===", "=>", "->", "+=", "~", "^", "%s",
    "§ 1", "© ® €", "¿a? ¡b!", "、。！？", "「a」", "a,b;c:d.e", "a.b.c", "https://a.b/c?d=e&f=g#h",
)  # fmt: skip
_PICTURES = (
    "😀", "😀😀", "a😀b", " 😀 ", "👍🏽", "👩‍🚀", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇯🇵",
    "1️⃣", "❤️", "❤", "☺︎", "🫠", "✅ 🦙",
    "→ ⇒ ∀ ∃ ∑ √ ∞", "█▓▒░", "♠♥", "☃", "⠓⠑", "𝔸𝕓𝓒", "𝒙²", "🀄", "🂡",
)  # fmt: skip
_RARE = (
    "\ue000", "a\ue000b", "\U000f0000", "\U0010fffd", "𠀀𠀁", "𐍈", "𓀀𓁐", "𝄞", "\u0378",
    "\x01", "\x02\x1f", "\x7f", "\x80", "a\x00b", "\u202ea\u202c", "\u2066a\u2069", "a\u00adb",
    "\ufffd", "ꙮ", "ʬ", "ꜩ",
)  # fmt: skip
_LANGUAGES = (
    "Grüße aus Köln", "Où est l’hôtel ?", "¿Dónde está?", "Zażółć gęślą jaźń", "Příliš žluťoučký",
    "Ağrı dağı", "Xin chào thế giới", "Привет, мир", "Здраво", "Γειά σου Κόσμε", "Բարեւ աշխարհ",
    "გამარჯობა", "שלום עולם", "שָׁלוֹם", "مرحبا بالعالم", "سلام دنیا", "نَحْنُ", "नमस्ते दुनिया", "ওহে বিশ্ব",
    "ਸਤ ਸ੍ਰੀ ਅਕਾਲ", "નમસ્તે", "வணக்கம் உலகம்", "నమస్కారం", "ನಮಸ್ಕಾರ", "നമസ്കാരം", "ආයුබෝවන්", "สวัสดีชาวโลก",
    "ສະບາຍດີ", "བོད་སྐད།", "မင်္ဂလာပါ", "ជំរាបសួរ", "ሰላም ለዓለም", "你好，世界", "繁體中文", "こんにちは世界",
    "カタカナ", "안녕하세요 세계", "ᠮᠣᠩᠭᠣᠯ", "ᎣᏏᏲ", "ᐊᐃᓐᖓᐃ", "ꦲꦏ꧀ꦱꦫ", "ⵜⴰⵎⴰⵣⵉⵖⵜ",
    "工作1314在apple", "日本語 text 混在",
)  # fmt: skip
_PASSAGES = (
    "The quick brown fox jumps over the lazy dog, doesn't it?",
    "Call me Ishmael. Some years ago - never mind how long precisely - having little money",
    "def f(x: int) -> float:\n    # half\n    return x / 2.0\n\n\nprint(f'{f(3):.2f}')\n",
    '{"name": "a", "values": [1, 2.5, null, true], "nested": {"b": "\\u00e9"}}',
    "<html>\n  <body class='x'>&nbsp;</body>\n</html>\n",
    "\\begin{equation}\n  e^{i\\pi} + 1 = 0\n\\end{equation}",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * 2; } // done",
    "SELECT * FROM t WHERE a >= 10 AND b LIKE '%x%';",
    "- item one\n- item two\n  1. nested\n\n| a | b |\n|---|---|\n",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "abababababababab xyzxyzxyz",
    "user@example.com; +49 (0)30 123-456; 10:45 p.m.",
)
FIXED = (
    *_SPACES, *_LINES, *_NUMBERS, *_FORMS, *_CASE, *_MARKS, *_PICTURES, *_RARE, *_LANGUAGES,
    *_PASSAGES,
)  # fmt: skip
"""Texts for any vocabulary."""

_BYTES = {256 + at: byte for at, byte in enumerate((*range(33), *range(127, 161), 173))}
"""GPT-2's alphabet: the bytes that other characters stand for."""
_SAMPLES, _TOGETHER = 1024, 16
"""How many tokens of the vocabulary are probed, and how many to a text."""
_WORDS = 6
"""Tokens of each script that a text is made of."""


def texts(tokenizer: Tokenizer) -> list[str]:
    """At least 300 texts: those for any vocabulary, then of its own tokens and scripts."""
    words = _words(tokenizer)
    sampled = [word for word in words[:: max(1, len(words) // _SAMPLES)] if word.isascii()]
    together = (sampled[at : at + _TOGETHER] for at in range(0, len(sampled), _TOGETHER))
    found = [*FIXED, *("".join(some) for some in together)]
    for some in _by_script(words).values():
        chosen = some[:: max(1, len(some) // _WORDS)][:_WORDS]
        apart = " ".join(word.strip() for word in chosen)
        found += [chosen[0], "".join(chosen), apart, apart.upper(), apart.lower()]
    return list(dict.fromkeys(found))


def with_tokens(contents: Iterable[str]) -> list[str]:
    """Each added token alone; and all of them inside text, several to a text."""
    tokens = list(dict.fromkeys(contents))
    found = list(tokens)
    for at in range(0, len(tokens), _TOGETHER):
        some = tokens[at : at + _TOGETHER]
        found += [
            "".join(f"a{token}b" for token in some),
            "".join(f" a {token} b\n" for token in some),
            "".join(f"{token}  {token}" for token in some),
            "".join(some),
        ]
    return found


def _words(tokenizer: Tokenizer) -> list[str]:
    """What the tokens of the vocabulary stand for, as far as they are whole characters, by id."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    ordered = "\0".join(sorted(vocabulary, key=vocabulary.__getitem__))
    if SPACE in vocabulary:
        ordered = ordered.replace(SPACE, " ")
    else:
        raw = ordered.translate(_BYTES).encode("latin-1", "ignore")
        ordered = raw.decode("utf-8", "ignore")
    return [word for word in ordered.split("\0") if word]


def _by_script(words: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for word in words:
        # A mark stands behind a letter of its own script. What is ASCII is in the other texts.
        first = word.lstrip()[:1]
        if word.isascii() or unicodedata.category(first or " ").startswith("M"):
            continue
        if letter := next((char for char in word if char > "\x7f" and char.isalpha()), None):
            found.setdefault(_script(letter), []).append(word)
    return found


@cache
def _script(letter: str) -> str:
    """``LATIN``, ``CYRILLIC``, ``CJK``: Unicode's names begin with it."""
    return unicodedata.name(letter, "UNKNOWN").partition(" ")[0]
