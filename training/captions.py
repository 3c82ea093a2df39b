"""Captions as a training needs them: the content of a picture in a few plain words, without a word about its style."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

LIMIT_WORDS = 55  # about the 75 pieces of words that CLIP reads
TEMPLATE = "{caption} in the style of picture"  # what will stand around a caption; one vector for `picture`
GONE = "\0"  # stands where a style word stood

ARTICLE = r"(?:an?|the|this)"
OF = r"(?:of|showing|depicting|featuring|that\s+shows|which\s+shows)"
MADE = r"(?:(?:done|made|painted|drawn|rendered|shown|depicted)\s+)"
IN = r"(?:in|with|as|by|using|like|from|and|or)"
# Behind a style word these begin something new; anything else is what the style word describes.
NEXT = r"(?:of|in|on|at|with|by|and|or|under|over|near|behind|beside|before|from|to|for|while|as|is|are|against|next)"
# Words between an article and "photo of" that describe the photo: no article, no preposition, no verb in -ing.
DESCRIBING = rf"(?:\s+(?!{ARTICLE}\b|(?:in|with|at|on|by|of|near)\b|\w+ing\b)[\w-]+){{0,3}}"

# In this order; what stands around a style word goes with it where it would have nothing to say any more.
AROUND = [
    (rf"{GONE}(?:[\s,/-]+(?:(?:and|or)\s+)?{GONE})+", GONE),
    (rf"{GONE}\s+{OF}(?=\s*(?:$|[,.;:!?)]))", GONE),
    (rf"(?:^{ARTICLE}{DESCRIBING}\s+|\b{ARTICLE}\s+)?{GONE},?\s+{OF}\s+", ""),
    (rf"^(?:{ARTICLE}\s+)?{GONE}\s*[,:;-]*\s*(?:(?:and|or|with|in)\s+(?=\w))?(?={ARTICLE}\b|$)", ""),
    (rf"[\s,]*(?:\b{MADE}?{IN}\s+)?(?:\b{ARTICLE}\s+)?{GONE}(?=\s*(?:$|[,.;:!?)]|\s{NEXT}\b))", ""),
    (rf"\b(?:a|an)\s+{GONE}\s+(?=[aeiou])", "an "),
    (rf"\b(?:a|an)\s+{GONE}\s+(?=\w)", "a "),
    (GONE, ""),
    (r"\(\s*\)|\[\s*\]", ""),
    (r"\s+", " "),
    (r"\s+([,.;:!?)])", r"\1"),
    (r"([,;:])(?:\s*[,;:])+", r"\1"),
    (r"[,;:]\s*([.!?])", r"\1"),
]

SUBJECT = r"(?:image|picture|photo|photograph|scene|painting|illustration|drawing|artwork)"
SHOWS = r"(?:shows|depicts|features|displays|presents|portrays|captures|contains|is\s+of|is\s+showing|is\s+depicting)"
OPENINGS = [
    r"(?:sure|certainly|of course|okay|ok)[,.!:]+\s*",
    r"here(?:'s|\s+is|\s+are)\b[^:.]{0,80}:\s*",
    r"(?:\w+\s+)?(?:prompt|caption|description|answer|assistant|output)\s*:\s*",
    rf"(?:this|the|that)\s+{SUBJECT}\s+{SHOWS}\b:?\s*",
    rf"(?:in|on)\s+(?:this|the)\s+{SUBJECT},?\s+(?:there\s+(?:is|are)\s+|we\s+(?:can\s+)?see\s+|you\s+(?:can\s+)?see\s+)?",
    r"(?:an?|the)\s+(?:image|picture)\s+(?:of|showing|depicting)\s+",
    r"(?:there\s+(?:is|are)|we\s+(?:can\s+)?see)\s+",
]
QUOTES = [('"', '"'), ("'", "'"), ("“", "”"), ("‘", "’"), ("`", "`"), ("**", "**"), ("*", "*")]


def tidy(reply: str) -> str:
    """A model's reply as a caption: one line, without quotes, `Caption:`, `This image shows`, and the last full stop."""
    text = re.sub(r"(?s)<think>.*?(</think>|$)", " ", reply)
    text = " ".join(re.sub(r"^\s*[-*•]\s+", "", line) for line in text.splitlines())
    text = " ".join(text.split())
    before = None
    while text != before:
        before = text
        text = _without_quotes(text.strip())
        for opening in OPENINGS:
            text = _like(before, re.sub(rf"^{opening}(?=\S)", "", text, flags=re.IGNORECASE))
        text = text.removesuffix("." if not text.endswith("..") else "").rstrip()
    return text


def _without_quotes(text: str) -> str:
    for left, right in QUOTES:
        inner = text[len(left) : -len(right)]
        whole = text.startswith(left) and text.rstrip(".").endswith(right)
        if whole and len(text) > len(left) + len(right) and left not in inner and right not in inner.rstrip("."):
            return text.rstrip(".")[len(left) : -len(right)].strip()
    return text


def _like(before: str, text: str) -> str:
    """The text with a capital where `before` began with one."""
    return text[:1].upper() + text[1:] if before[:1].isupper() and text != before else text


def words(typed: str) -> list[str]:
    """The style words of a list with commas. Raises ValueError for one that would take away everything."""
    found = [" ".join(w.split()) for w in re.split(r"[,\n]", typed) if w.strip()]
    for word in found:
        if not re.search(r"\w", word):
            raise ValueError(f"The style word {word!r} has no letters: write words, and * only after or inside one.")
    return found


def strip(caption: str, style: Sequence[str]) -> str:
    """A caption without these style words, and without what only led to them ("a", "of", "in", commas).

    Whole words, capitals or not. `*` in a word stands for letters, `*` alone for the rest up to the next comma or stop:
    `in the style of *`. A caption that has none of them comes back as it is.
    """
    if not style:
        return caption
    longest_first = sorted(style, key=len, reverse=True)
    any_of_them = "|".join(_pattern(word) for word in longest_first)
    marked = re.sub(
        rf"(?<!\w)(?:{any_of_them})(?!\w)",
        lambda m: f"{GONE} of" if m.group().lower().endswith(" of") else GONE,
        caption,
        flags=re.IGNORECASE,
    )
    if marked == caption:
        return caption
    for pattern, instead in AROUND:
        marked = re.sub(pattern, instead, marked, flags=re.IGNORECASE)
    return _like(caption, marked.lstrip(" ,;:.!?-").rstrip(" ,;:-"))


def _pattern(word: str) -> str:
    pattern = ""
    for part in word.split():
        if part == "*":
            pattern += r"\b[^,.;:!?\n]*" if pattern else r"[^,.;:!?\n]*"
        else:
            letters = re.escape(part).replace(r"\*", r"\w*").replace(r"\-", r"[\s-]")
            pattern += rf"[\s-]+{letters}" if pattern else letters
    return pattern


def warnings(captions: Sequence[str], tokens: Callable[[str], tuple[int, int]] | None = None) -> list[str]:
    """A line for everything about captions that would harm a training; pictures are counted from 1.

    `tokens` says how many pieces of words a text has, and how many are read at most; without, words are counted.
    """
    lines = []
    if empty := [i for i, c in enumerate(captions, 1) if not c.strip()]:
        lines.append(f"{_pictures(empty)}: the caption is empty; write one, or strip fewer words")
    same: dict[str, list[int]] = {}
    for i, caption in enumerate(captions, 1):
        same.setdefault(caption.strip().casefold(), []).append(i)
    for text, which in same.items():
        if text and len(which) > 1:
            lines.append(f"{_pictures(which)}: the same caption {len(which)} times ({_short(captions[which[0] - 1])})")
    for i, caption in enumerate(captions, 1):
        if said := _too_long(caption, tokens):
            lines.append(f"picture {i}: {said}")
    return lines


def _too_long(caption: str, tokens: Callable[[str], tuple[int, int]] | None) -> str:
    if tokens is None:
        count = len(caption.split())
        return f"{count} words, more than the {LIMIT_WORDS} or so that CLIP reads" if count > LIMIT_WORDS else ""
    count, most = tokens(TEMPLATE.format(caption=caption))
    return f"{count} pieces of words with 'in the style of ...', and CLIP reads {most}" if count > most else ""


def _pictures(which: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(map(str, which[:most])) + (f" and {len(which) - most} more" if len(which) > most else "")
    return f"picture{'s' if len(which) > 1 else ''} {shown}"


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[:most].rstrip() + "..."
