"""Image embeddings from text: ours against diffusers' PriorTransformer and UnCLIPScheduler with the same weights.

    python dev.py bench prior

diffusers' loop is that of its Kandinsky pipeline: prompts with and without guidance in one batch, all 81 tokens in every step, 25
steps. Ours reads each prompt once and evaluates 3 tokens per step. `FD` is the Frechet distance per coordinate of what Pocket's prior
makes of 128 captions that it has not seen, 4 each, so that ways can be compared at equal quality; the other case has our default
network for ViT-L, with random weights. Goals: 4 times diffusers' embeddings per second at equal FD; of a step no more than 5 % outside
the network; training waits for its pairs less than 5 % of a step.
"""

import statistics
import tempfile
import time
from pathlib import Path

from harness.boot import boot, load_pack, prepare
from harness.timing import Way, interleaved

EACH, STEPS, GUIDANCE = 4, 25, 1.5
POCKET, LARGE = "Pocket", "ViT-L, 12 layers of 512"
PROMPTS, ROUNDS = (
    {POCKET: 16, LARGE: 2},
    {POCKET: 5, LARGE: 3},
)  # the large one takes diffusers half a minute a round on two cores


def main(argv: list[str]) -> None:
    prepare(Path(tempfile.mkdtemp(prefix="counterpoint-bench-")))
    boot()
    pack = load_pack()
    import torch

    with torch.inference_mode():
        for name, prior in {POCKET: pocket(pack), LARGE: large(pack)}.items():
            compare(pack, name, prior)
    print(f"of a step of training spent on drawing pairs and noise: {waiting(pack):.1%}")


def compare(pack, name: str, prior) -> None:
    prompts, rounds = PROMPTS[name], ROUNDS[name]
    texts, nothing = captions(pack, prior, prompts)
    found = ways(pack, prior, texts, nothing, list(range(EACH)))
    timings = interleaved(found, rounds)
    print(f"\n{name}: {prompts} prompts, {EACH} embeddings each, guidance {GUIDANCE}")
    first = timings[0].seconds
    for timing in timings:
        ratios = sorted(a / b for a, b in zip(first, timing.seconds, strict=True))
        rate = prompts * EACH / timing.median
        distance = f", FD {quality(pack, prior, timing.name):.3f}" if name == POCKET else ""
        print(
            f"  {timing.name:28}{rate:8.1f} per second, {statistics.median(ratios):6.2f} times diffusers' "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f}){distance}"
        )
    print(f"  outside the network: {outside(pack, prior, texts, nothing, rounds):.1%} of 25 steps")


def ways(pack, prior, texts, nothing, seeds: list[int]) -> dict[str, Way]:
    """What each makes: (prompts, seeds, d)."""
    module = pack.training.prior.prior

    def ours(steps: int, sampler: str) -> Way:
        how = module.Sampling(steps, sampler, GUIDANCE)
        return lambda: module.sampled(prior, texts, nothing, seeds, how)

    return {
        "diffusers, 25 steps": diffusers_loop(prior, texts, nothing, seeds),
        "ours, 25 steps, ancestral": ours(STEPS, "ancestral"),
        "ours, 8 steps, dpm++ 2m": ours(8, "dpm++ 2m"),
        "ours, 4 steps, dpm++ 2m": ours(4, "dpm++ 2m"),
    }


def diffusers_loop(prior, texts, nothing, seeds: list[int]) -> Way:
    import torch
    from diffusers import PriorTransformer, UnCLIPScheduler

    shape, each = prior.network.shape, len(seeds)
    network = PriorTransformer(
        shape.heads, shape.width // shape.heads, shape.layers, shape.dim, shape.text_length,
        embedding_proj_dim=shape.text_dim, clip_embed_dim=shape.dim,
    )  # fmt: skip
    statistics_of = {"clip_mean": prior.start.norm.mean[None], "clip_std": prior.start.norm.std[None]}
    network.load_state_dict({**prior.network.state_dict(), **statistics_of}, strict=False)
    network.eval()
    count = len(texts.pooled)
    wide = [
        torch.cat([a, b.expand(len(a), *b.shape[1:])]).repeat_interleave(each, 0)
        for a, b in zip(texts, nothing, strict=True)
    ]
    pooled, states, mask = wide

    def loop():
        scheduler = UnCLIPScheduler(prediction_type="sample", clip_sample=False)
        scheduler.set_timesteps(STEPS)
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(count * each, shape.dim, generator=generator)
        for i, t in enumerate(scheduler.timesteps):
            said = network(torch.cat([latents] * 2), t, pooled, states, mask).predicted_image_embedding
            with_text, without = said.chunk(2)
            said = without + GUIDANCE * (with_text - without)
            following = None if i + 1 == len(scheduler.timesteps) else scheduler.timesteps[i + 1]
            latents = scheduler.step(said, t, latents, following, generator=generator).prev_sample
        return network.post_process_latents(latents).view(count, each, -1)

    return loop


def pocket(pack):
    return pack.training.prior.prior.load(pack.nodes.pocket_models.MODELS / "clip_priors" / "pocket-prior.safetensors")


def large(pack):
    """Our default network for ViT-L: 768 numbers, texts of 77 tokens."""
    import torch

    prior, generator = pack.training.prior, torch.Generator().manual_seed(0)
    network = prior.network.drawn(prior.network.shape_of(768, 768, 768, 77), generator)
    units = dict(zip(prior.starts.NORM, (torch.zeros(768), torch.ones(768)), strict=True))
    return prior.prior.Prior(network.eval(), prior.starts.StartDistribution("whitened", units))


def captions(pack, prior, count: int):
    """So many captions of Pocket's world; random states of the same lengths for a larger CLIP."""
    import torch

    read = pack.nodes.prior.text.text_of(pack.nodes.pocket_models.load_clip(), ["", *said(pack, count)]).texts
    if prior.dim != read.pooled.shape[1]:
        generator = torch.Generator().manual_seed(1)
        shape = prior.network.shape
        read = read._replace(
            pooled=torch.randn(count + 1, shape.text_dim, generator=generator),
            states=torch.randn(count + 1, shape.text_length, shape.states_dim, generator=generator),
        )
    return read.rows(slice(1, None)), read.rows(slice(1))


def scenes(pack, count: int):
    return pack.training.pocket.world.sample_scenes(count, 4711)


def said(pack, count: int) -> list[str]:
    return pack.training.pocket.grammar.captions(scenes(pack, count), 4711)


def quality(pack, prior, way: str) -> float:
    """Frechet distance of 128 x 4 embeddings from those of the true pictures, at guidance 1.5 for all ways alike."""
    import torch

    vision, painter = pack.nodes.pocket_models.load_vision(), pack.training.pocket.painter
    drawn = scenes(pack, 128)
    pictures = torch.cat([painter.paint(drawn[i : i + 64]).image for i in range(0, 128, 64)]).movedim(1, -1)
    real = vision.encode_image(pictures)["image_embeds"].float()
    made = ways(pack, prior, *captions(pack, prior, 128), list(range(4)))[way]()
    return pack.training.prior.measures.figures(made, real, real)["frechet"]


def outside(pack, prior, texts, nothing, rounds: int) -> float:
    """Share of the time of 25 steps that is not spent in the network."""
    module, network, spent = pack.training.prior.prior, prior.network, []
    forward, read = network.forward, network.read

    def timed(function):
        def call(*args):
            started = time.perf_counter()
            answer = function(*args)
            spent[-1] += time.perf_counter() - started
            return answer

        return call

    shares = []
    network.forward, network.read = timed(forward), timed(read)
    for _ in range(rounds):
        spent.append(0.0)
        started = time.perf_counter()
        module.sampled(prior, texts, nothing, list(range(EACH)), module.Sampling(STEPS, "ancestral", GUIDANCE))
        shares.append(1 - spent[-1] / (time.perf_counter() - started))
    del network.forward, network.read
    return statistics.median(shares)


def waiting(pack) -> float:
    """Share of a step of training, on pairs from a file, that goes into drawing them and their noise."""
    import torch

    prior, world, grammar = pack.training.prior, pack.training.pocket.world, pack.training.pocket.grammar
    encoders = pack.nodes.prior.pairs.encoders_of(
        pack.nodes.pocket_models.load_clip(), pack.nodes.pocket_models.load_vision()
    )
    scenes = world.sample_scenes(prior.pairs.SHARD, 11)

    def painted():
        for start in range(0, len(scenes.shape), 64):
            pictures = pack.training.pocket.painter.paint(scenes[start : start + 64]).image.movedim(1, -1)
            yield from zip(pictures.split(1), said_of[start : start + 64], strict=True)

    said_of = grammar.captions(scenes, 11)
    with torch.inference_mode():
        pairs = prior.pairs.measured(
            [("bench", painted)], encoders, Path(tempfile.mkdtemp(prefix="counterpoint-bench-"))
        )
    start = prior.starts.fit("whitened", pairs.pooled, pairs.images)
    network = prior.network.drawn(
        prior.network.shape_of(128, 128, *pairs.words[::-1]), torch.Generator().manual_seed(0)
    )
    trainer = prior.trainer.PriorTrainer(pairs, network, start, prior.trainer.Settings())
    steps = iter(range(10_000))
    draw = lambda: [trainer.drawn(torch.Generator().manual_seed(i)) for i in range(10)]  # noqa: E731
    step = lambda: [trainer.step(next(steps)) for _ in range(10)]  # noqa: E731
    drawing, stepping = interleaved({"draw": draw, "step": step}, ROUNDS[POCKET])
    return drawing.median / stepping.median
