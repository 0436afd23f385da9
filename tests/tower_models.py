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
        "metaclip_2",
        "siglip",
        "siglip2",
        "chinese_clip",
        "altclip",
        "clipseg",
        "xclip",
        "owlvit",
        "owlv2",
        "blip",
        "blip-2",
        "instructblip",
        "idefics",
        "idefics2",
        "idefics3",
        "smolvlm",
        "janus",
        "deepseek_vl",
    ],
    "encoder.layers.{}.mlp": [
        "clip_vision_model",
        "siglip_vision_model",
        "mlcd_vision_model",
        "seggpt",
    ],
    "vision_model.encoder.stages.{}.layers.{}.mlp": ["groupvit"],
    "vision_model.encoder.layers.{}.ffn": ["aimv2"],
    "encoder.layers.{}.ffn": ["aimv2_vision_model"],
    "vision_model.encoder.layer.{}.mlp": ["tipsv2"],
    "vision_model.layers.{}.mlp": ["vision-text-dual-encoder"],
    "image_model.encoder.layer.{}.output": ["flava"],
    "layers.{}.mlp": [
        "vit",
        "deit",
        "beit",
        "vit_msn",
        "ijepa",
        "vit_mae",
        "vivit",
        "pixio",
    ],
    "encoder.layer.{}.mlp": [
        "dinov2",
        "dinov2_with_registers",
        "vjepa2",
        "radio",
        "internvl_vision",
        "vitdet",
    ],
    "model.layer.{}.mlp": ["dinov3_vit", "sapiens2"],
    "encoder.layer.{}.output": [
        "data2vec-vision",
        "timesformer",
        "yolos",
        "dpt",
        "videomae",
    ],
    "encoder.layers.{}.blocks.{}.output": ["swinv2", "donut-swin"],
    "transformer.layers.{}.feed_forward": ["pixtral"],
    "encoder.stages.{}.layers.{}.mlp": ["hiera", "focalnet"],
    "encoder.layers.{}.blocks.{}.mlp": ["swin"],
    "encoder.block.{}.{}.mlp": ["pvt"],
    "stages.{}.blocks.{}.mlp": ["segformer", "timm (ConvNeXt)"],
    "encoder.stages.{}.layers.{}.output": ["cvt"],
    "encoder.layer.{}.transformer.layer.{}.output": ["mobilevit"],
    "vision_encoder.layers.{}.mlp": ["sam_vision_model"],
    "vision_tower.encoder.layers.{}.mlp": [
        "llava",
        "llava_next",
        "llava_onevision",
        "vipllava",
        "paligemma",
        "gemma3",
        "cohere2_vision",
        "lfm2_vl",
    ],
    "image_tower.encoder.layers.{}.mlp": ["video_llava"],
    "image_encoder.vision_model.encoder.layers.{}.mlp": ["git"],
    "vision_model.model.encoder.layers.{}.mlp": ["kosmos-2"],
    "vision_tower.transformer.layers.{}.feed_forward": ["mistral3"],
    "vision_tower.encoder.layer.{}.mlp": ["internvl"],
    "visual.blocks.{}.mlp": ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"],
    "vision_model.{}.layers.{}.mlp": ["mllama"],
    "vision_model.model.layers.{}.mlp": ["llama4"],
    "vision_tower.transformer.encoder.layers.{}.ffn": ["ovis2"],
    "vision_tower.layers.{}.mlp": ["got_ocr2"],
    "timm_model.blocks.{}.mlp": ["timm_wrapper"],
    "vision_tower.timm_model.blocks.{}.mlp": ["perception_lm"],
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
    checkpointing: bool = (
        True  # False where transformers has none, whatever the tower says
    )

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
    ids[:, 0], ids[:, -1] = TEXT["bos_token_id"], TEXT["eos_token_id"]
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
    Tiny("metaclip_2", "MetaClip2Model", DUAL, tower="vision_model", text=images),
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
    Tiny("clipseg", "CLIPSegModel", DUAL, tower="vision_model", text=images),
    Tiny(
        "clipseg",
        "CLIPSegForImageSegmentation",
        dict(DUAL, extract_layers=[0, 1], reduce_dim=16),
        tower="clip.vision_model",
        blocks="clip.vision_model.encoder.layers.{}.mlp",
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
        "owlvit",
        "OwlViTForObjectDetection",
        DUAL,
        tower="owlvit.vision_model",
        blocks="owlvit.vision_model.encoder.layers.{}.mlp",
    ),
    Tiny("owlv2", "Owlv2Model", DUAL, tower="vision_model", text=images),
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
    Tiny(
        "blip-2",
        "Blip2ForImageTextRetrieval",
        dict(
            vision_config=VISION,
            image_text_hidden_size=24,
            qformer_config=dict(
                TEXT, encoder_hidden_size=32, use_qformer_text_input=True
            ),
            text_config=dict(
                TEXT, model_type="opt", ffn_dim=64, word_embed_proj_dim=32
            ),
            num_query_tokens=1,
        ),
        tower="vision_model",
    ),
    Tiny(
        "instructblip",
        "InstructBlipModel",
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
    Tiny("deit", "DeiTModel", VISION),
    Tiny("beit", "BeitModel", VISION),
    Tiny("beit", "BeitForImageClassification", VISION, blocks="beit.layers.{}.mlp"),
    Tiny("vit_msn", "ViTMSNModel", VISION),
    Tiny("ijepa", "IJepaModel", VISION),
    Tiny("vit_mae", "ViTMAEModel", VISION),
    Tiny(
        "vit_mae",
        "ViTMAEForPreTraining",
        dict(
            VISION,
            decoder_hidden_size=16,
            decoder_num_attention_heads=2,
            decoder_num_hidden_layers=1,
            decoder_intermediate_size=16,
        ),
        blocks="vit.layers.{}.mlp",
        tower="vit",
    ),
    Tiny("dinov2", "Dinov2Model", VISION),
    Tiny("dinov2", "Dinov2Model", dict(VISION, use_swiglu_ffn=True)),
    Tiny(
        "dinov2",
        "Dinov2ForImageClassification",
        VISION,
        blocks="dinov2.encoder.layer.{}.mlp",
    ),
    Tiny("dinov2_with_registers", "Dinov2WithRegistersModel", VISION),
    Tiny("dinov3_vit", "DINOv3ViTModel", VISION),
    Tiny("mlcd_vision_model", "MLCDVisionModel", VISION),
    Tiny(
        "yolos", "YolosModel", dict(VISION, image_size=[16, 16], num_detection_tokens=2)
    ),
    Tiny("dpt", "DPTModel", VISION),
    Tiny(
        "videomae",
        "VideoMAEModel",
        dict(VISION, num_frames=2, tubelet_size=2),
        inputs=video(),
    ),
    Tiny(
        "vivit",
        "VivitModel",
        dict(VISION, num_frames=2, tubelet_size=[2, 8, 8]),
        inputs=video(),
    ),
    Tiny(
        "vjepa2",
        "VJEPA2Model",
        dict(
            VISION,
            crop_size=16,
            frames_per_clip=2,
            tubelet_size=2,
            pred_hidden_size=16,
            pred_num_attention_heads=2,
            pred_num_hidden_layers=1,
            pred_num_mask_tokens=2,
        ),
        inputs=video("pixel_values_videos"),
    ),
    Tiny("data2vec-vision", "Data2VecVisionModel", VISION),
    Tiny(
        "data2vec-vision",
        "Data2VecVisionForImageClassification",
        VISION,
        blocks="data2vec_vision.encoder.layer.{}.output",
    ),
    Tiny("timesformer", "TimesformerModel", dict(VISION, num_frames=2), inputs=video()),
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
        "seggpt",
        "SegGptModel",
        dict(VISION, image_size=[16, 16]),
        inputs=lambda: {
            "pixel_values": torch.randn(2, 3, 8, 16),
            "prompt_pixel_values": torch.randn(2, 3, 8, 16),
            "prompt_masks": torch.randn(2, 3, 8, 16),
        },
    ),
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
    Tiny("vitdet", "VitDetModel", VISION),
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
    Tiny(
        "swin",
        "SwinForImageClassification",
        SWIN,
        counts=[(0, 0), (1, 0)],
        inputs=SWIN_IMAGES,
        blocks="swin.encoder.layers.{}.blocks.{}.mlp",
    ),
    Tiny(
        "focalnet",
        "FocalNetModel",
        dict(
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[1, 1],
            hidden_sizes=[16, 32],
            focal_levels=[1, 1],
            focal_windows=[3, 3],
        ),
        counts=[(0, 0), (1, 0)],
        inputs=SWIN_IMAGES,
    ),
    Tiny(
        "pvt",
        "PvtModel",
        dict(
            image_size=32,
            num_encoder_blocks=2,
            depths=[1, 1],
            sequence_reduction_ratios=[2, 1],
            hidden_sizes=[16, 32],
            patch_sizes=[4, 2],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
        ),
        counts=[(0, 0), (1, 0)],
        inputs=SWIN_IMAGES,
    ),
    Tiny(
        "segformer",
        "SegformerModel",
        dict(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[16, 32],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
        ),
        counts=[(0, 0), (1, 0)],
        inputs=SWIN_IMAGES,
    ),
    Tiny(
        "cvt",
        "CvtModel",
        dict(
            patch_sizes=[7, 3],
            patch_stride=[4, 2],
            patch_padding=[2, 1],
            embed_dim=[16, 32],
            num_heads=[1, 2],
            depth=[1, 2],
            mlp_ratio=[2.0, 2.0],
            attention_drop_rate=[0.0, 0.0],
            drop_rate=[0.0, 0.0],
            drop_path_rate=[0.0, 0.0],
            qkv_bias=[True, True],
            cls_token=[False, True],
            qkv_projection_method=["dw_bn"] * 2,
            num_stages=2,
            kernel_qkv=[3, 3],
            padding_kv=[1, 1],
            stride_kv=[2, 2],
            padding_q=[1, 1],
            stride_q=[1, 1],
        ),
        counts=[(0, 0), (1, 0), (1, 1)],
        inputs=SWIN_IMAGES,
    ),
    Tiny(
        "mobilevit",
        "MobileViTModel",
        dict(
            image_size=32,
            initializer_range=0.5,
            hidden_sizes=[16, 16, 16],
            neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
            num_attention_heads=2,
        ),
        counts=[(2, 0), (2, 1), (3, 0), (3, 1), (3, 2), (3, 3), (4, 0), (4, 1), (4, 2)],
        inputs=SWIN_IMAGES,
    ),
    Tiny(
        "sam_vision_model",
        "SamVisionModel",
        dict(
            hidden_size=32,
            mlp_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            output_channels=8,
            window_size=2,
            global_attn_indexes=[1],
        ),
    ),
    # Towers inside language models, which stay untouched.
    Tiny("llava", "LlavaModel", LLAVA, tower="vision_tower"),
    Tiny(
        "llava",
        "LlavaForConditionalGeneration",
        LLAVA,
        tower="model.vision_tower",
        blocks="model.vision_tower.encoder.layers.{}.mlp",
    ),
    Tiny("llava_next", "LlavaNextModel", LLAVA, tower="vision_tower"),
    Tiny(
        "llava_onevision",
        "LlavaOnevisionModel",
        dict(
            vision_config=dict(VISION, model_type="siglip_vision_model"),
            text_config=dict(LANGUAGE, model_type="qwen2"),
        ),
        tower="vision_tower",
    ),
    Tiny("vipllava", "VipLlavaModel", LLAVA, tower="vision_tower"),
    Tiny("video_llava", "VideoLlavaModel", LLAVA, tower="image_tower"),
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
        "gemma3",
        "Gemma3Model",
        dict(
            vision_config=dict(VISION, model_type="siglip_vision_model"),
            text_config=LANGUAGE,
        ),
        tower="vision_tower",
    ),
    Tiny("git", "GitModel", dict(TEXT, vision_config=VISION), tower="image_encoder"),
    Tiny(
        "idefics",
        "IdeficsModel",
        dict(
            LANGUAGE,
            vision_config=dict(
                embed_dim=32,
                image_size=16,
                patch_size=8,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
            ),
        ),
        tower="vision_model",
    ),
    Tiny(
        "idefics2",
        "Idefics2Model",
        dict(vision_config=VISION, text_config=dict(LANGUAGE, model_type="mistral")),
        tower="vision_model",
    ),
    Tiny(
        "idefics3",
        "Idefics3Model",
        dict(vision_config=VISION, text_config=dict(LANGUAGE, model_type="llama")),
        tower="vision_model",
    ),
    Tiny(
        "smolvlm",
        "SmolVLMModel",
        dict(vision_config=VISION, text_config=dict(LANGUAGE, model_type="llama")),
        tower="vision_model",
    ),
    Tiny(
        "kosmos-2",
        "Kosmos2Model",
        dict(
            vision_config=VISION,
            text_config=dict(
                embed_dim=32, ffn_dim=64, layers=1, attention_heads=2, vocab_size=64
            ),
            latent_query_num=2,
        ),
        tower="vision_model",
    ),
    Tiny(
        "mistral3",
        "Mistral3Model",
        dict(
            vision_config=dict(VISION, model_type="pixtral"),
            text_config=dict(LANGUAGE, model_type="mistral"),
        ),
        tower="vision_tower",
        inputs=lambda: {
            "pixel_values": torch.randn(2, 3, 16, 16),
            "image_sizes": torch.tensor([[16, 16], [16, 16]]),
        },
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
    Tiny(
        "qwen2_5_vl",
        "Qwen2_5_VLModel",
        dict(
            vision_config=dict(
                QWEN_VISION,
                hidden_size=32,
                out_hidden_size=32,
                intermediate_size=64,
                window_size=8,
                fullatt_block_indexes=[1],
            ),
            text_config=dict(
                LANGUAGE,
                rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3]},
            ),
        ),
        tower="visual",
        inputs=patches(96),
    ),
    Tiny(
        "mllama",
        "MllamaModel",
        dict(
            vision_config=dict(
                hidden_size=32,
                attention_heads=2,
                num_hidden_layers=2,
                num_global_layers=1,
                intermediate_size=64,
                vision_output_dim=96,
                image_size=16,
                patch_size=8,
                max_num_tiles=1,
                intermediate_layers_indices=[0, 1],
                supported_aspect_ratios=[[1, 1]],
            ),
            text_config=dict(LANGUAGE, cross_attention_layers=[1]),
        ),
        tower="vision_model",
        counts=[("transformer", 0), ("transformer", 1), ("global_transformer", 0)],
        inputs=lambda: {
            "pixel_values": torch.randn(1, 1, 1, 3, 16, 16),
            "aspect_ratio_ids": torch.tensor([[1]]),
            "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
        },
        checkpointing=False,
    ),
    Tiny(
        "llama4",
        "Llama4ForConditionalGeneration",
        dict(
            vision_config=dict(
                VISION,
                intermediate_size=128,
                vision_output_dim=32,
                projector_input_dim=32,
                projector_output_dim=32,
            ),
            text_config=dict(LANGUAGE, num_local_experts=1, intermediate_size_mlp=64),
        ),
        tower="vision_model",
    ),
    Tiny(
        "qwen3_vl",
        "Qwen3VLModel",
        dict(
            vision_config=dict(
                QWEN_VISION,
                hidden_size=32,
                out_hidden_size=32,
                intermediate_size=64,
                num_position_embeddings=16,
                deepstack_visual_indexes=[0],
            ),
            text_config=dict(
                LANGUAGE,
                rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3]},
            ),
        ),
        tower="visual",
        inputs=patches(96),
    ),
    Tiny(
        "glm4v",
        "Glm4vModel",
        dict(
            vision_config=dict(
                QWEN_VISION,
                hidden_size=32,
                out_hidden_size=32,
                intermediate_size=64,
                image_size=16,
            ),
            text_config=dict(
                LANGUAGE,
                rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3]},
            ),
        ),
        tower="visual",
        inputs=patches(96),
    ),
    Tiny(
        "cohere2_vision",
        "Cohere2VisionModel",
        dict(
            vision_config=dict(VISION, model_type="siglip_vision_model"),
            text_config=dict(LANGUAGE, model_type="cohere2"),
        ),
        tower="vision_tower",
    ),
    Tiny(
        "lfm2_vl",
        "Lfm2VlModel",
        dict(
            vision_config=dict(
                VISION, num_patches=4, model_type="siglip2_vision_model"
            ),
            text_config=dict(
                LANGUAGE, model_type="lfm2", layer_types=["conv", "full_attention"]
            ),
        ),
        tower="vision_tower",
        inputs=NAFLEX,
    ),
    Tiny(
        "ovis2",
        "Ovis2Model",
        dict(
            vision_config=dict(VISION, vocab_size=32, num_visual_indicator_tokens=2),
            text_config=dict(LANGUAGE, model_type="qwen2"),
        ),
        tower="vision_tower",
    ),
    Tiny(
        "got_ocr2",
        "GotOcr2Model",
        dict(
            vision_config=dict(
                hidden_size=32,
                mlp_dim=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=16,
                patch_size=8,
                output_channels=8,
                window_size=2,
                global_attn_indexes=[1],
            ),
            text_config=dict(LANGUAGE, model_type="qwen2"),
        ),
        tower="vision_tower",
    ),
    Tiny(
        "janus",
        "JanusModel",
        dict(
            vision_config=dict(VISION, projection_dim=32),
            vq_config=dict(
                embed_dim=8,
                num_embeddings=8,
                base_channels=32,
                channel_multiplier=[1],
                num_res_blocks=1,
                double_latent=False,
                latent_channels=8,
            ),
            text_config=dict(LANGUAGE, model_type="llama"),
        ),
        tower="vision_model",
    ),
    Tiny(
        "deepseek_vl",
        "DeepseekVLModel",
        dict(
            vision_config=dict(VISION, model_type="siglip_vision_model"),
            text_config=dict(LANGUAGE, model_type="llama"),
        ),
        tower="vision_model",
    ),
]

# Families that `peft_sage.towers` does not name and that it was not written for.
UNLISTED = [
    Tiny(
        "mgp-str",
        "MgpstrModel",
        dict(
            image_size=[16, 16],
            patch_size=8,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            mlp_ratio=2.0,
        ),
        blocks="encoder.blocks.{}.mlp",
    ),
    Tiny(
        "kosmos-2.5",
        "Kosmos2_5Model",
        dict(
            vision_config=dict(
                hidden_size=32,
                patch_embed_hidden_size=48,
                head_dim=16,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                patch_size=4,
            ),
            text_config=dict(
                embed_dim=32, ffn_dim=64, layers=1, attention_heads=2, vocab_size=64
            ),
            latent_query_num=2,
        ),
        tower="vision_model",
        inputs=lambda: {
            "flattened_patches": torch.cat(
                [torch.ones(2, 4, 2), torch.randn(2, 4, 48)], dim=-1
            )
        },
        blocks="vision_model.encoder.layer.{}.mlp",
    ),
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
