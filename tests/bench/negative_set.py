"""A set of pictures for 32 prompts: our Generate Set, which batches across prompts, against one prompt at a time.

    python dev.py bench negative_set

All ways run as whole prompts through ComfyUI's executor and end with 32 PNG files on disk. Generate Set with batches of 1
shows what one graph instead of 32 saves; the rest is batching. Goal: 1.5 times as fast as one prompt at a time.
"""

import itertools
import tempfile
from pathlib import Path

from harness.boot import boot, load_pack, prepare
from harness.timing import Way, command

PROMPTS = 32


def main(argv: list[str]) -> None:
    command("negative_set", argv, load, f"{PROMPTS} pictures of 128 pixels, 20 steps, CFG 4; seconds", rounds=3)


def load() -> dict[str, Way]:
    prepare(Path(tempfile.mkdtemp(prefix="counterpoint-bench-")))
    boot()
    pack = load_pack()
    from harness.executor import Graph
    from harness.training import node

    world, grammar = pack.training.pocket.world, pack.training.pocket.grammar
    scenes = world.sample_scenes(PROMPTS, 1)
    texts = [f"{grammar.content(scenes, i)} in the style of picture" for i in range(PROMPTS)]
    seeds, graph = itertools.count(1000, PROMPTS), Graph()
    models = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2]}
    loaded = {"1": node("CounterpointLoadPocketModels")}
    graph({**loaded, **stock(node, texts[0], 0)})

    def ours(batch: int) -> None:
        made = node("CounterpointGenerateSet", **models, prompts="\n".join(texts), seed=next(seeds), batch=batch)
        graph({**loaded, "2": made})

    def one_by_one() -> None:
        first = next(seeds)
        for i, text in enumerate(texts):
            graph({**loaded, **stock(node, text, first + i)})

    return {
        "one prompt at a time": one_by_one,
        "Generate Set, batches of 1": lambda: ours(1),
        "Generate Set": lambda: ours(0),
    }


def stock(node, text: str, seed: int) -> dict:
    """What a person would build from core's nodes."""
    return {
        "2": node("CLIPTextEncode", clip=["1", 1], text=text),
        "3": node("CLIPTextEncode", clip=["1", 1], text=""),
        "4": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "5": node("KSampler", model=["1", 0], positive=["2", 0], negative=["3", 0], latent_image=["4", 0], seed=seed, steps=20, cfg=4.0,
                  sampler_name="euler", scheduler="normal", denoise=1.0),
        "6": node("VAEDecode", samples=["5", 0], vae=["1", 2]),
        "7": node("SaveImage", images=["6", 0], filename_prefix="one"),
    }  # fmt: skip
