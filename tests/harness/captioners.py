"""Image-to-text models a few thousand numbers large, saved as transformers saves them. What they say is chance, and always
the same for the same picture."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = "a red green blue cat dog house tree on under the mat big small two and sits runs near sea".split()
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32,
          "patch_size": 8}  # fmt: skip
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": 512}  # fmt: skip
SQUARE = {"size": {"height": 32, "width": 32}}
TEMPLATE = (
    "{% for m in messages %}<user>{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% else %} {{ c['text'] }}"
    "{% endif %}{% endfor %}</s>{% endfor %}{% if add_generation_prompt %} <bot>{% endif %}"
)


def tokenizer(special: list[str] = (), kind: str = "PreTrainedTokenizerFast", **named: str):
    """A whole word is one piece. Until transformers 5 a processor wanted a tokenizer of its own kind."""
    marks = ["<pad>", "<unk>", "<s>", "</s>", "<user>", "<bot>", *special]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*marks, *WORDS])}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.add_special_tokens(marks)
    kind = kind if int(transformers.__version__.split(".")[0]) < 5 else "PreTrainedTokenizerFast"
    return getattr(transformers, kind)(
        tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens=named, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


@torch.no_grad()
def loud(model: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Weights large enough for pictures to make a difference."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim > 1 or "embedding" in name:
            p.copy_(torch.randn(p.shape, generator=generator) * 1.5 / p.shape[-1] ** 0.5)
    return model


def blip(folder: Path, seed: int = 9) -> Path:
    """Describes without being asked."""
    folder.mkdir(parents=True)
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*marks, *WORDS]))
    words = transformers.BertTokenizer(str(folder / "vocab.txt"))
    words.save_pretrained(folder)
    transformers.BlipImageProcessor(**SQUARE).save_pretrained(folder)
    text = {**TEXT, "vocab_size": len(words), "encoder_hidden_size": 16, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3,
            "pad_token_id": 0}  # fmt: skip
    config = transformers.BlipConfig(vision_config=VISION, text_config=text, projection_dim=16)
    loud(transformers.BlipForConditionalGeneration(config), seed).save_pretrained(folder)
    return folder


def git(folder: Path) -> Path:
    """Pictures and words in one row."""
    blip(folder)  # for its words
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    config = transformers.GitConfig(
        vision_config=VISION, vocab_size=5 + len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    loud(transformers.GitForCausalLM(config)).save_pretrained(folder)
    return folder


def blip2(folder: Path, asked: bool = False) -> Path:
    """Four numbers of a picture stand before the words; BLIP-2 is not asked, InstructBLIP is."""
    folder.mkdir(parents=True)
    words, eyes = tokenizer(["<image>"], "GPT2TokenizerFast"), transformers.BlipImageProcessor(**SQUARE)
    kind = "InstructBlip" if asked else "Blip2"
    if asked:
        (folder / "words.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
        processor = transformers.InstructBlipProcessor(
            eyes, words, transformers.BertTokenizer(str(folder / "words.txt")), num_query_tokens=4
        )
    else:
        processor = transformers.Blip2Processor(eyes, words, num_query_tokens=4)
    processor.save_pretrained(folder)
    asking = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
              "encoder_hidden_size": 16, "vocab_size": 60, "cross_attention_frequency": 1}  # fmt: skip
    text = {"model_type": "opt", "vocab_size": len(words), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 128, "bos_token_id": 2, "eos_token_id": 3,
            "pad_token_id": 0}  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(
        vision_config=VISION, qformer_config=asking, text_config=text, num_query_tokens=4,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    loud(getattr(transformers, f"{kind}ForConditionalGeneration")(config), 4).save_pretrained(folder)
    return folder


def encoder_decoder(folder: Path) -> Path:
    """ViT and GPT-2, which has no token to pad with."""
    words = tokenizer()
    words.pad_token = None
    words.save_pretrained(folder)
    transformers.ViTImageProcessor(**SQUARE).save_pretrained(folder)
    eyes = transformers.ViTConfig(**VISION)
    mouth = transformers.GPT2Config(
        vocab_size=len(words), n_embd=16, n_layer=1, n_head=2, is_decoder=True, add_cross_attention=True,
        bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(eyes, mouth)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 3, 3
    model = loud(transformers.VisionEncoderDecoderModel(config))
    model.generation_config.decoder_start_token_id, model.generation_config.pad_token_id = 2, 3
    model.save_pretrained(folder)
    return folder


def qwen(folder: Path) -> Path:
    """A chat model whose pictures take more room the larger they are."""
    marks = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    words = tokenizer(["<|vision_start|>", "<|vision_end|>", *marks.values()], "Qwen2TokenizerFast", **marks)
    eyes = transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 84, patch_size=14)
    video = transformers.Qwen2VLVideoProcessor()
    template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    transformers.Qwen2VLProcessor(eyes, words, video, chat_template=template).save_pretrained(folder)
    number = words.convert_tokens_to_ids
    text = {**TEXT, "vocab_size": len(words), "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0,
            "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}}  # fmt: skip
    config = transformers.Qwen2VLConfig(
        text_config=text,
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=number("<|image_pad|>"), video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"), vision_end_token_id=number("<|vision_end|>"),
    )  # fmt: skip
    model = loud(transformers.Qwen2VLForConditionalGeneration(config))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 3, 0
    model.save_pretrained(folder)
    return folder


def llava(folder: Path) -> Path:
    """A chat model whose template begins with the first token itself."""
    words = tokenizer(["<image>"], image_token="<image>")
    words._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    eyes = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    template = "<s>" + TEMPLATE.replace("IMAGE", "<image>")
    transformers.LlavaProcessor(
        eyes, words, patch_size=8, vision_feature_select_strategy="default", chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    text = {
        **TEXT,
        "model_type": "llama",
        "vocab_size": len(words),
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
    config = transformers.LlavaConfig(
        vision_config={**VISION, "model_type": "clip_vision_model"}, text_config=text,
        image_token_id=words.convert_tokens_to_ids("<image>"), vision_feature_layer=-1,
    )  # fmt: skip
    loud(transformers.LlavaForConditionalGeneration(config)).save_pretrained(folder)
    return folder


def florence(folder: Path, seed: int = 3) -> Path:
    """Asked with a task, whose long name the processor writes out."""
    words = tokenizer(["<image>"], "BartTokenizerFast", image_token="<image>")
    words.image_token, words.image_token_id = "<image>", words.convert_tokens_to_ids("<image>")
    eyes = transformers.CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False)
    eyes.image_seq_length = 5  # 2 x 2 places and their mean
    transformers.Florence2Processor(
        eyes, words, num_additional_image_tokens=0, post_processor_config={"pure_text": {}}
    ).save_pretrained(folder)
    text = {"model_type": "bart", "vocab_size": len(words), "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
            "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "decoder_start_token_id": 2,
            "max_position_embeddings": 256}  # fmt: skip
    vision = {"depths": (1, 1, 1, 1), "embed_dim": (8, 8, 16, 16), "num_heads": (2, 2, 2, 2), "num_groups": (2, 2, 2, 2),
              "projection_dim": 16, "window_size": 4}  # fmt: skip
    config = transformers.Florence2Config(
        text_config=text, vision_config=vision, image_token_id=words.image_token_id, is_encoder_decoder=True
    )
    loud(transformers.Florence2ForConditionalGeneration(config), seed).save_pretrained(folder)
    return folder


def paligemma(folder: Path) -> Path:
    """Asked in the words it was trained on; its tokenizer has places (<loc0001>) among its words."""
    words = tokenizer(["<image>"], "GemmaTokenizerFast", image_token="<image>")
    words.image_token, words.image_token_id = "<image>", words.convert_tokens_to_ids("<image>")
    eyes = transformers.SiglipImageProcessor(**SQUARE)
    eyes.image_seq_length = 16
    transformers.PaliGemmaProcessor(eyes, words).save_pretrained(folder)
    text = {"model_type": "gemma", **TEXT, "head_dim": 8, "vocab_size": len(words), "bos_token_id": 2, "eos_token_id": 3,
            "pad_token_id": 0}  # fmt: skip
    config = transformers.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **VISION, "projection_dim": 16, "vision_use_head": False},
        text_config=text, image_token_index=words.image_token_id, projection_dim=16, hidden_size=16,
    )  # fmt: skip
    loud(transformers.PaliGemmaForConditionalGeneration(config), 4).save_pretrained(folder)
    return folder


def internvl(folder: Path) -> Path:
    """A chat model that cuts wide pictures into several."""
    marks = {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<video>"}  # fmt: skip
    words = tokenizer(list(marks.values()), "Qwen2TokenizerFast", **marks)
    words.context_image_token_id = words.convert_tokens_to_ids("<IMG_CONTEXT>")
    square = {"height": 32, "width": 32}
    eyes = transformers.GotOcr2ImageProcessor(size=square, crop_to_patches=True, max_patches=4)
    video, template = transformers.InternVLVideoProcessor(size=square), TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>")
    transformers.InternVLProcessor(eyes, words, video, image_seq_length=4, chat_template=template).save_pretrained(
        folder
    )
    text = {
        "model_type": "qwen2",
        **TEXT,
        "vocab_size": len(words),
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
    config = transformers.InternVLConfig(
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8]}, text_config=text,
        image_token_id=words.context_image_token_id, image_seq_length=4,
    )  # fmt: skip
    loud(transformers.InternVLForConditionalGeneration(config)).save_pretrained(folder)
    return folder


KINDS = {
    "blip": blip, "blip-2": blip2, "instructblip": lambda folder: blip2(folder, asked=True), "git": git,
    "vision-encoder-decoder": encoder_decoder, "florence2": florence, "paligemma": paligemma,
    "qwen2_vl": qwen, "llava": llava, "internvl": internvl,
}  # fmt: skip


def pictures(n: int, seed: int = 0) -> list[torch.Tensor]:
    """(1, H, W, 3) each, of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(40, 60), (64, 32), (30, 30), (84, 56), (28, 90)]
    return [torch.rand(1, *sizes[i % len(sizes)], 3, generator=generator) for i in range(n)]
