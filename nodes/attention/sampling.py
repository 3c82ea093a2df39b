"""What is known while one batch is painted: which part of the picture and which words each prompt is for, and where the subject was seen."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .subject import SubjectMaps
from .words import LENGTH, SUBJECT

KEY = "counterpoint.shared_attention"


class Sampling:
    """Made for each run of a sampler, handed to attention in its options, gone with it."""

    def __init__(self, count: int, size: tuple[int, int]):
        """`count` pictures whose latents have height and width `size`."""
        self.count, self.size = count, tuple(size)
        self.masks: torch.Tensor | None = None  # of the steps that are done
        self.places: dict[tuple, list[torch.Tensor]] = {}  # where subjects lie at this noise level, by grid and area
        self.names = False  # whether a prompt names its subject
        self._maps, self._sigma = SubjectMaps(), None
        self._prompts: dict[object, dict] = {}

    @staticmethod
    def told(executor, model, conds, x_in, timestep, model_options):
        """Around each evaluation of all prompts at one noise level: the only place where core shows them whole."""
        sampling = model_options.get("transformer_options", {}).get(KEY)
        if sampling is not None:
            sampling.begin(conds, float(timestep[0]))
        return executor(model, conds, x_in, timestep, model_options)

    def begin(self, conds: list, sigma: float) -> None:
        """Samplers may ask several times for one noise level; it is one step, and what it showed counts from the next one on, for
        every prompt alike and in whatever order they are asked."""
        self._prompts = {prompt["uuid"]: prompt for prompts in conds for prompt in prompts or ()}
        self.names = any(SUBJECT in prompt for prompt in self._prompts.values())
        if sigma != self._sigma:
            self._maps.close_step()
            self.masks, self.places, self._sigma = self._maps.masks(), {}, sigma

    def finished(self) -> torch.Tensor | None:
        self._maps.close_step()
        return self._maps.masks()

    def area(self, options: dict, chunk: int) -> tuple[int, int, int, int] | None:
        """(height, width, y, x) in latents where a prompt is for a part of the picture; None where it is for all."""
        area = self._prompt(options, chunk).get("area")
        if area is None:
            return None
        half = len(area) // 2
        height, width, y, x = *area[:half][-2:], *area[half:][-2:]
        return min(height, self.size[0] - y), min(width, self.size[1] - x), y, x

    def read(self, q: torch.Tensor, k: torch.Tensor, options: dict, grid: tuple[int, int], attention_to: Callable,
             from_end: bool = False) -> None:  # fmt: skip
        """One layer's image queries (rows, heads, tokens, width) and keys of words; prompts that name a subject and are for the whole
        picture are read."""
        for chunk in range(len(options["cond_or_uncond"])):
            prompt = self._prompt(options, chunk)
            if SUBJECT not in prompt or "area" in prompt:
                continue
            named, rows = prompt[SUBJECT], range(chunk * self.count, (chunk + 1) * self.count)
            ahead = k.shape[2] - prompt[LENGTH] if from_end else 0
            read = [self._row(q[r], k[r], *named[i % len(named)], ahead, attention_to) for i, r in enumerate(rows)]
            self._maps.add(torch.stack(read), grid)

    @staticmethod
    def _row(q, k, places: torch.Tensor, named: torch.Tensor, ahead: int, attention_to: Callable) -> torch.Tensor:
        return attention_to(q, k[:, (places + ahead).to(k.device)], named)

    def _prompt(self, options: dict, chunk: int) -> dict:
        uuids = options.get("uuids")
        return self._prompts.get(uuids[chunk], {}) if uuids else {}
