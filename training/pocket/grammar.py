"""The world's language: captions that say what a scene is, in many ways, and captions that leave things out.

About 20 % of the captions put the generic word "picture" where the medium stands (any medium), 10 % say the medium and
nothing else, 10 % leave out the shape or the colour. Half name the medium's factors by words, so that the space of
embeddings has a direction for each of them. Without these there is nothing for a learned style to stand on.
"""

from __future__ import annotations

import random

from .world import ATTRIBUTES, FACTORS, MEDIUMS, Scenes

SYNONYMS: dict[str, dict[str, tuple[str, ...]]] = {
    "shape": {
        "sphere": ("sphere", "ball", "globe"), "cube": ("cube", "box"), "cone": ("cone",), "cylinder": ("cylinder", "drum"),
        "ring": ("ring", "donut"), "diamond": ("diamond", "gem"), "star": ("star",), "heart": ("heart",),
    },
    "pattern": {
        "plain": ("plain", "solid"), "striped": ("striped",), "spotted": ("spotted", "dotted"), "checkered": ("checkered",),
        "blotched": ("blotched", "patchy"), "dipped": ("dipped", "two-tone"),
    },
    "background": {
        "studio": ("in a studio",), "meadow": ("on a meadow", "on green grass"), "desert": ("in the desert", "on sand"),
        "night": ("at night", "in the dark"), "snow": ("in the snow", "on snow"), "sea": ("at sea", "on the water"),
    },
    "stroke": {
        "smooth": ("smooth shading",), "flat": ("flat tones",), "hatching": ("hatching",), "dots": ("halftone dots",),
        "wash": ("soft washes",), "pixel": ("pixel blocks",),
    },
    "paper": {"scene": ("full colour",), "white": ("white paper",), "cream": ("cream paper",), "dark": ("black paper",)},
    "line": {"none": ("no outline",), "ink": ("ink outlines",), "glow": ("glowing outlines",)},
}  # fmt: skip
SYNONYMS["colour"] = {c: (c,) for c in ATTRIBUTES["colour"]}
MEDIUM_SYNONYMS: dict[str, tuple[str, ...]] = {
    "photo": ("photo", "photograph"), "poster": ("poster",), "comic": ("comic", "cartoon"), "engraving": ("engraving",),
    "newsprint": ("newsprint",), "watercolor": ("watercolor", "watercolour"), "pixel art": ("pixel art",), "neon": ("neon",),
    "chalk": ("chalk", "chalk drawing"), "pop art": ("pop art",),
}  # fmt: skip
GENERIC = "picture"  # any medium
_NAME = {combination: name for name, combination in MEDIUMS.items()}


def article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def words(attribute: str, index: int) -> str:
    """The first way of saying a value: `words("line", 2) == "glowing outlines"`."""
    return SYNONYMS[attribute][ATTRIBUTES[attribute][index]][0]


def factor_words(combination: tuple[int, int, int]) -> str:
    """'hatching, white paper, ink outlines'."""
    return ", ".join(words(f, i) for f, i in zip(FACTORS, combination, strict=True))


def content(scenes: Scenes, i: int) -> str:
    """Everything but the medium, in plain order: 'a red striped cube on a meadow'."""
    pattern = words("pattern", int(scenes.pattern[i]))
    parts = [
        words("colour", int(scenes.colour[i])),
        "" if pattern == "plain" else pattern,
        words("shape", int(scenes.shape[i])),
    ]
    return f"{article(' '.join(p for p in parts if p))} {words('background', int(scenes.background[i]))}"


def caption(scenes: Scenes, i: int, rng: random.Random) -> str:
    """One way of describing scene i."""
    kind = rng.random()
    if kind < 0.10:
        return _medium_only(scenes, i, rng)
    body = _body(scenes, i, rng, omit="any" if kind < 0.20 else None)
    if rng.random() < 0.22:
        return _placed(body, GENERIC, rng)
    name = _NAME.get(scenes.combination(i))
    if name and rng.random() < 0.55:
        return _placed(body, rng.choice(MEDIUM_SYNONYMS[name]), rng)
    return body + rng.choice((", ", ", ", " in the style of ")) + _factors(scenes, i, rng)


def captions(scenes: Scenes, seed: int) -> list[str]:
    """One caption for each scene; another seed says the same differently."""
    rng = random.Random(seed)
    return [caption(scenes, i, rng) for i in range(len(scenes))]


def _medium_only(scenes: Scenes, i: int, rng: random.Random) -> str:
    name = _NAME.get(scenes.combination(i))
    if name is None or rng.random() < 0.3:
        return f"a {GENERIC}, {_factors(scenes, i, rng)}"
    medium = rng.choice(MEDIUM_SYNONYMS[name])
    return rng.choice(
        (f"a {GENERIC} in the style of {medium}",) * 3
        + (article(medium), f"{medium} style", f"a {GENERIC} in {medium} style")
    )


def _placed(body: str, medium: str, rng: random.Random) -> str:
    """The medium where a style stands in the usual prompts."""
    form = rng.choice(
        (
            "{a_medium} of {body}",
            "{medium}, {body}",
            "{body}, {medium} style",
            "{body}, {medium}",
            "{body} in {medium} style",
        )
        + ("{body} in the style of {medium}",) * 3
    )
    return form.format(body=body, medium=medium, a_medium=article(medium))


def _factors(scenes: Scenes, i: int, rng: random.Random) -> str:
    parts = [rng.choice(SYNONYMS[f][ATTRIBUTES[f][v]]) for f, v in zip(FACTORS, scenes.combination(i), strict=True)]
    if rng.random() < 0.3:
        rng.shuffle(parts)
    unsaid = [p for p in ("full colour", "no outline") if rng.random() < 0.4]
    return ", ".join([p for p in parts if p not in unsaid] or parts)


def _body(scenes: Scenes, i: int, rng: random.Random, omit: str | None) -> str:
    def say(attribute):
        return rng.choice(SYNONYMS[attribute][ATTRIBUTES[attribute][int(getattr(scenes, attribute)[i])]])

    shape, colour, pattern = say("shape"), words("colour", int(scenes.colour[i])), say("pattern")
    if omit:
        if rng.random() < 0.5:
            shape = "object"
        else:
            colour = ""
    if rng.random() < (0.7 if pattern in ("plain", "solid") else 0.2):
        pattern = ""
    adjectives = [colour, pattern] if rng.random() < 0.7 else [pattern, colour]
    phrase = " ".join(w for w in (*adjectives, shape) if w)
    if rng.random() < 0.85:
        phrase = article(phrase)
    if rng.random() < 0.75:
        phrase += " " + say("background")
    azimuth = float(scenes.light_azimuth[i])
    if abs(azimuth) > 0.35 and rng.random() < 0.3:
        phrase += f", lit from the {'right' if azimuth > 0 else 'left'}"
    return phrase


def vocabulary() -> set[str]:
    """Every word the grammar can say."""
    phrases = [p for values in SYNONYMS.values() for ways in values.values() for p in ways]
    phrases += [p for ways in MEDIUM_SYNONYMS.values() for p in ways]
    phrases += [GENERIC, "object", "a an of in the style", "lit from the left right"]
    return {w for p in phrases for w in p.replace("-", " ").split()}
