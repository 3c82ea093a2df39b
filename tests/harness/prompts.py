"""Prompts (API format) for the small models, to start a test's own from."""


def paint(text: str = "a red cat", seed: int = 1, steps: int = 3, weights: int = 0) -> dict[str, dict]:
    """1 models, 2 text, 3 empty latent, 4 sampler, 5 decode, 6 save: one picture of 64 x 64."""
    sampler = {
        "model": ["1", 0],
        "positive": ["2", 0],
        "negative": ["2", 0],
        "latent_image": ["3", 0],
        "seed": seed,
        "steps": steps,
        "cfg": 2.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
    }
    return {
        "1": {"class_type": "SmallModelsLoadSD15", "inputs": {"seed": weights}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": text}},
        "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "4": {"class_type": "KSampler", "inputs": sampler},
        "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
        "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 0], "filename_prefix": "small"}},
    }
