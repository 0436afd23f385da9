# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: C408 - the configurations read like the keyword arguments that they are
"""The tested families of vision towers: where their MLPs are, and tiny random models of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING


#: The adapted MLPs of each family, with `{}` for each number: from a pattern to its families, by `model_type` or the
#: name of a library of plain modules.
PATTERNS = {
    "vision_model.encoder.layers.{}.mlp": [
        "clip",
        "siglip",
        "siglip2",
        "chinese_clip",
        "altclip",
        "xclip",
        "owlvit",
        "blip",
        "blip-2",
    ],
    "encoder.layers.{}.mlp": [
        "clip_vision_model",
        "siglip_vision_model",
        "mlcd_vision_model",
    ],
    "vision_model.encoder.stages.{}.layers.{}.mlp": ["groupvit"],
    "vision_model.encoder.layers.{}.ffn": ["aimv2"],
    "encoder.layers.{}.ffn": ["aimv2_vision_model"],
    "vision_model.encoder.layer.{}.mlp": ["tipsv2"],
    "vision_model.layers.{}.mlp": ["vision-text-dual-encoder"],
    "image_model.encoder.layer.{}.output": ["flava"],
    "layers.{}.mlp": ["vit", "beit", "ijepa", "vit_mae", "pixio"],
    "encoder.layer.{}.mlp": [
        "dinov2",
        "dinov2_with_registers",
        "radio",
        "internvl_vision",
    ],
    "model.layer.{}.mlp": ["dinov3_vit", "sapiens2"],
    "encoder.layer.{}.output": ["data2vec-vision"],
    "encoder.layers.{}.blocks.{}.output": ["swinv2", "donut-swin"],
    "transformer.layers.{}.feed_forward": ["pixtral"],
    "encoder.stages.{}.layers.{}.mlp": ["hiera"],
    "encoder.layers.{}.blocks.{}.mlp": ["swin"],
    "stages.{}.blocks.{}.mlp": ["timm (ConvNeXt)"],
    "vision_tower.encoder.layers.{}.mlp": ["llava", "paligemma"],
    "vision_tower.encoder.layer.{}.mlp": ["internvl"],
    "visual.blocks.{}.mlp": ["qwen2_vl"],
    "timm_model.blocks.{}.mlp": ["timm_wrapper"],
    "blocks.{}.mlp": ["timm (ViT, EVA, BEiT, DINO, PE)"],
    "layers.{}.blocks.{}.mlp": ["timm (Swin)"],
    "visual.transformer.resblocks.{}.mlp": ["open_clip", "OpenAI's clip"],
    "visual.trunk.blocks.{}.mlp": ["open_clip with a timm tower"],
}
FAMILIES = {
    family: pattern for pattern, families in PATTERNS.items() for family in families
}

VISION = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
)
# EOS, which CLIP-like text towers pool, has the highest id.
TEXT = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=64,
    max_position_embeddings=40,
    bos_token_id=1,
    eos_token_id=63,
    pad_token_id=0,
)
LANGUAGE = dict(TEXT, num_key_value_heads=2, head_dim=16)


def images() -> dict[str, torch.Tensor]:
    """Two images."""
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


@dataclass
class Tiny:
    """A tiny model: how it is made, which blocks it has, and what its vision tower reads."""

    model_type: str
    model_class: str
    config: dict[str, Any]
    counts: list[Any] = field(
        default_factory=lambda: [0, 1]
    )  # what fills the family's pattern of names
    tower: str = ""  # the sub-module that the tests run
    inputs: Callable[[], dict[str, torch.Tensor]] = images
    text: Callable[[], dict[str, torch.Tensor]] | None = (
        None  # images for the model as a whole, where it embeds text
    )
    config_type: str | None = (
        None  # where the class takes the configuration of another type
    )
    blocks: str | None = None  # another pattern, for a further class of the same family

    @property
    def id(self) -> str:
        """The name of the test."""
        return f"{self.model_type}-{self.model_class}"

    def build(self) -> nn.Module:
        """Make the model; the caller has set the seed."""
        config = CONFIG_MAPPING[self.config_type or self.model_type](**self.config)
        return getattr(transformers, self.model_class)(config).eval()


def tokens() -> dict[str, torch.Tensor]:
    """Three texts that start with BOS and end with EOS, one of them padded."""
    ids = torch.randint(4, 60, (3, 7))
    ids[:, 0] = TEXT["bos_token_id"]
    ids[:, -1] = TEXT["eos_token_id"]
    ids[2, 4:] = torch.tensor(
        [TEXT["eos_token_id"], TEXT["pad_token_id"], TEXT["pad_token_id"]]
    )
    return {"input_ids": ids, "attention_mask": (ids != TEXT["pad_token_id"]).long()}


def video(name: str = "pixel_values") -> Callable[[], dict[str, torch.Tensor]]:
    """Two frames a video."""
    return lambda: {name: torch.randn(2, 2, 3, 16, 16)}


def patches(
    width: int, count: int = 4, grid: str = "grid_thw"
) -> Callable[[], dict[str, torch.Tensor]]:
    """One image as a list of flattened patches, as the towers of Qwen's models read it."""
    return lambda: {
        "hidden_states": torch.randn(count, width),
        grid: torch.tensor([[1, 2, 2]]),
    }


NAFLEX = lambda: {  # noqa: E731
    "pixel_values": torch.randn(2, 4, 192),
    # The second image fills only two of its four places.
    "pixel_attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    "spatial_shapes": torch.tensor([[2, 2], [1, 2]]),
}
DUAL = dict(text_config=TEXT, vision_config=VISION, projection_dim=24)
LLAVA = dict(
    vision_config=dict(VISION, model_type="clip_vision_model"),
    text_config=dict(LANGUAGE, model_type="llama"),
)
SWIN = dict(
    image_size=32,
    patch_size=4,
    embed_dim=16,
    depths=[1, 1],
    num_heads=[2, 2],
    window_size=4,
)
SWIN_IMAGES = lambda: {"pixel_values": torch.randn(2, 3, 32, 32)}  # noqa: E731
QWEN_VISION = dict(
    depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2
)

TINY = [
    # Image-text models.
    Tiny("clip", "CLIPModel", DUAL, tower="vision_model", text=images),
    Tiny(
        "clip",
        "CLIPVisionModelWithProjection",
        dict(VISION, projection_dim=24),
        config_type="clip_vision_model",
        blocks="vision_model.encoder.layers.{}.mlp",
    ),
    Tiny("clip", "CLIPForImageClassification", DUAL),
    Tiny("clip_vision_model", "CLIPVisionModel", VISION),
    Tiny(
        "siglip",
        "SiglipModel",
        dict(text_config=TEXT, vision_config=VISION),
        tower="vision_model",
        text=images,
    ),
    Tiny(
        "siglip",
        "SiglipForImageClassification",
        dict(text_config=TEXT, vision_config=VISION),
    ),
    Tiny("siglip_vision_model", "SiglipVisionModel", VISION),
    Tiny(
        "siglip2",
        "Siglip2Model",
        dict(text_config=TEXT, vision_config=dict(VISION, num_patches=4)),
        tower="vision_model",
        inputs=NAFLEX,
        text=NAFLEX,
    ),
    Tiny("chinese_clip", "ChineseCLIPModel", DUAL, tower="vision_model", text=images),
    Tiny(
        "altclip",
        "AltCLIPModel",
        dict(DUAL, text_config=dict(TEXT, project_dim=24)),
        tower="vision_model",
        text=images,
    ),
    Tiny(
        "xclip",
        "XCLIPModel",
        dict(
            DUAL,
            vision_config=dict(
                VISION,
                num_frames=2,
                mit_hidden_size=24,
                mit_num_attention_heads=2,
                mit_num_hidden_layers=1,
                mit_intermediate_size=32,
            ),
            prompt_layers=1,
            prompt_num_attention_heads=2,
        ),
        tower="vision_model",
        inputs=lambda: {"pixel_values": torch.randn(4, 3, 16, 16)},
        text=video(),
    ),
    Tiny(
        "groupvit",
        "GroupViTModel",
        dict(
            text_config=TEXT,
            vision_config=dict(
                VISION,
                depths=[1, 1, 1],
                num_group_tokens=[4, 2, 0],
                num_output_groups=[4, 2, 0],
            ),
            projection_dim=24,
            projection_intermediate_dim=32,
        ),
        counts=[(0, 0), (1, 0), (2, 0)],
        tower="vision_model",
        text=images,
    ),
    Tiny("owlvit", "OwlViTModel", DUAL, tower="vision_model", text=images),
    Tiny(
        "blip",
        "BlipModel",
        dict(DUAL, text_config=dict(TEXT, encoder_hidden_size=32)),
        tower="vision_model",
        text=images,
    ),
    Tiny(
        "blip-2",
        "Blip2Model",
        dict(
            vision_config=VISION,
            qformer_config=dict(TEXT, encoder_hidden_size=32),
            text_config=dict(
                TEXT, model_type="opt", ffn_dim=64, word_embed_proj_dim=32
            ),
            num_query_tokens=3,
        ),
        tower="vision_model",
    ),
    Tiny("aimv2", "Aimv2Model", DUAL, tower="vision_model", text=images),
    Tiny("aimv2_vision_model", "Aimv2VisionModel", VISION),
    Tiny(
        "tipsv2",
        "Tipsv2Model",
        dict(text_config=TEXT, vision_config=VISION),
        tower="vision_model",
        text=images,
    ),
    Tiny(
        "vision-text-dual-encoder",
        "VisionTextDualEncoderModel",
        dict(
            vision_config=dict(VISION, model_type="vit"),
            text_config=dict(TEXT, model_type="bert"),
            projection_dim=24,
        ),
        tower="vision_model",
        text=images,
    ),
    Tiny(
        "flava",
        "FlavaModel",
        dict(
            image_config=VISION,
            text_config=TEXT,
            multimodal_config=dict(TEXT),
            projection_dim=24,
        ),
        tower="image_model",
    ),
    # Vision towers.
    Tiny("vit", "ViTModel", VISION),
    Tiny("vit", "ViTForImageClassification", VISION, blocks="vit.layers.{}.mlp"),
    Tiny("beit", "BeitModel", VISION),
    Tiny("ijepa", "IJepaModel", VISION),
    Tiny("vit_mae", "ViTMAEModel", VISION),
    Tiny("dinov2", "Dinov2Model", VISION),
    Tiny("dinov2", "Dinov2Model", dict(VISION, use_swiglu_ffn=True)),
    Tiny("dinov2_with_registers", "Dinov2WithRegistersModel", VISION),
    Tiny("dinov3_vit", "DINOv3ViTModel", VISION),
    Tiny("mlcd_vision_model", "MLCDVisionModel", VISION),
    Tiny("data2vec-vision", "Data2VecVisionModel", VISION),
    Tiny("swinv2", "Swinv2Model", SWIN, counts=[(0, 0), (1, 0)], inputs=SWIN_IMAGES),
    Tiny(
        "donut-swin",
        "DonutSwinModel",
        SWIN,
        counts=[(0, 0), (1, 0)],
        inputs=SWIN_IMAGES,
    ),
    Tiny("radio", "RadioModel", VISION),
    Tiny("pixio", "PixioModel", VISION),
    Tiny("sapiens2", "Sapiens2Model", VISION),
    Tiny(
        "pixtral",
        "PixtralVisionModel",
        dict(VISION),
        inputs=lambda: {
            "pixel_values": torch.randn(2, 3, 16, 16),
            "image_sizes": torch.tensor([[16, 16], [16, 16]]),
        },
    ),
    Tiny(
        "internvl_vision",
        "InternVLVisionModel",
        dict(VISION, image_size=[16, 16], patch_size=[8, 8]),
    ),
    Tiny(
        "hiera",
        "HieraModel",
        dict(
            image_size=[16, 16],
            patch_size=[3, 3],
            patch_stride=[2, 2],
            patch_padding=[1, 1],
            embed_dim=16,
            depths=[1, 1],
            num_heads=[1, 2],
            embed_dim_multiplier=2.0,
            num_query_pool=1,
            masked_unit_size=[4, 4],
        ),
        counts=[(0, 0), (1, 0)],
    ),
    Tiny("swin", "SwinModel", SWIN, counts=[(0, 0), (1, 0)], inputs=SWIN_IMAGES),
    # Towers inside language models, which stay untouched.
    Tiny("llava", "LlavaModel", LLAVA, tower="vision_tower"),
    Tiny(
        "paligemma",
        "PaliGemmaModel",
        dict(
            vision_config=dict(VISION, model_type="siglip_vision_model"),
            text_config=dict(LANGUAGE, model_type="gemma"),
        ),
        tower="vision_tower",
    ),
    Tiny(
        "internvl",
        "InternVLModel",
        dict(
            vision_config=dict(VISION, image_size=[16, 16], patch_size=[8, 8]),
            text_config=dict(LANGUAGE, model_type="qwen2"),
        ),
        tower="vision_tower",
    ),
    Tiny(
        "qwen2_vl",
        "Qwen2VLModel",
        dict(
            vision_config=dict(QWEN_VISION, embed_dim=32, hidden_size=32, mlp_ratio=2),
            text_config=dict(
                LANGUAGE,
                rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3]},
            ),
        ),
        tower="visual",
        inputs=patches(96),
    ),
]

# Families that `peft_sage.towers` does not name and that it was not written for.
UNLISTED = [
    Tiny(
        "sam2_hiera_det_model",
        "Sam2HieraDetModel",
        dict(
            hidden_size=16,
            num_attention_heads=1,
            query_stride=[2, 2],
            image_size=[32, 32],
            patch_kernel_size=[7, 7],
            patch_stride=[4, 4],
            patch_padding=[3, 3],
            blocks_per_stage=[1, 1],
            embed_dim_per_stage=[16, 32],
            num_attention_heads_per_stage=[1, 2],
            window_size_per_stage=[4, 4],
            global_attention_blocks=[],
            num_query_pool_stages=1,
            window_positional_embedding_background_size=[4, 4],
        ),
        inputs=SWIN_IMAGES,
        blocks="blocks.{}.mlp",
    ),
]
