"""Which tokens of a prompt name the subject, whatever the CLIP: SD's, SDXL's two, T5, or a language model with a template."""

from __future__ import annotations

import re

import torch
from comfy.text_encoders.flux import Flux2Tokenizer

from ..bridge import encoder_module

SUBJECT = "counterpoint_subject"  # in a conditioning, beside what core keeps there: for each row its real words, and which are the subject
LENGTH = "counterpoint_subject_length"  # of the text that these places are in


def name_subject(conditioning: list, clip, prompts: list[str], subject: str) -> list:
    """The conditioning of `prompts`, one row each, filled up to one length, that knows where its words name the subject. Raises
    ValueError where none do."""
    (states, facts), *more = conditioning
    length = states.shape[1]
    alike = len({sum(map(len, sections)) for p in prompts for sections in [*clip.tokenize(p).values()][-1:]}) == 1
    found = []
    for prompt in prompts:
        own = length if alike else clip.encode_from_tokens(clip.tokenize(prompt)).shape[1]
        places, named = subject_words(clip, prompt, subject, own)
        in_front = length - own if isinstance(clip.tokenizer, Flux2Tokenizer) else 0  # others are filled up behind
        found.append((places + in_front, named))
    for prompt, (_, named) in zip(prompts, found, strict=True):
        if not named.any():
            raise ValueError(
                f"The prompt {prompt!r} does not name the subject {subject!r}: write the same words in both, as in 'a red fox in the snow' "
                "and 'red fox'."
            )
    return [[states, {**facts, SUBJECT: found, LENGTH: length}], *more]


def subject_words(clip, prompt: str, subject: str, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The places of the prompt's real words (n,) in a conditioning of `length` tokens, and for each whether it names the subject (n,).

    Real are neither what core puts around words, nor a template, nor fillings. All occurrences count, capitals or not, with a
    plural's s.
    """
    said, unsaid, alone = (clip.tokenize(text, return_word_ids=True) for text in (prompt, "", subject))
    named, end = {}, length
    for key in reversed(said):  # a T5 or a language model ends the conditioning; CLIPs begin it, or are no part of it
        tokenizer = getattr(clip.tokenizer, f"clip_{key}", None) or getattr(clip.tokenizer, key)
        start = end - sum(map(len, said[key]))
        reads = encoder_module(clip, tokenizer.embedding_key) is not None
        if not reads or (start and tokenizer.embedding_key.startswith("clip_")):
            continue
        words, mention = (_real(text[key], unsaid[key][0]) for text in (said, alone))
        pieces, mention = ([_spelled(tokenizer, token) for _, token in text] for text in (words, mention))
        seen = zip(words, pieces, _mentions(pieces, mention), strict=True)
        named |= {
            start + place: mentioned for (place, _), piece, mentioned in seen if piece.strip()
        }  # T5 has a blank alone
        end = start or end  # SDXL's two encoders read the same words side by side
    places = sorted(place for place in named if place >= 0)
    return torch.tensor(places, dtype=torch.long), torch.tensor([named[place] for place in places], dtype=torch.bool)


def _real(sections: list[list], empty: list) -> list[tuple[int, object]]:
    """Place and token of what an empty prompt has not."""
    words, at = [], 0
    template = [token for token, _, word in empty if word]
    for section in sections:
        inner = [(at + i, token) for i, (token, _, word) in enumerate(section) if word]
        words += inner
        at += len(section)
    if not template:
        return words
    before = _common([token for _, token in words], template)
    after = _common([token for _, token in reversed(words[before:])], template[before:][::-1])
    return words[before : len(words) - after]


def _common(one: list, other: list) -> int:
    """How many tokens two lists begin with in common."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if not isinstance(a, int) or a != b:
            break
        count += 1
    return count


def _spelled(tokenizer, token) -> str:
    """The letters of a token, with a blank where a word begins or ends; every vector of a learned word is the same letter."""
    piece = tokenizer.inv_vocab[token] if isinstance(token, int) else " \ufffc "
    return piece.replace("</w>", " ").replace("\u2581", " ").replace("\u0120", " ").lower()


def _mentions(pieces: list[str], subject: list[str]) -> list[bool]:
    """For each piece of a text whether it is part of a mention of the subject, which is spelled as the text is."""
    text, belongs = "", []
    for number, piece in enumerate(pieces):
        text += piece
        belongs += [number] * len(piece)
    letters = "".join("".join(subject).split())
    pattern = r"(?<!\w)" + r"\s*".join(map(re.escape, letters)) + r"(e?s)?(?!\w)"
    spans = [found.span() for found in re.finditer(pattern, text)] if letters else []
    mentioned = {belongs[i] for span in spans for i in range(*span) if not text[i].isspace()}
    return [number in mentioned for number in range(len(pieces))]
