# SPDX-License-Identifier: Apache-2.0
"""The families that the tests cover, for the documentation: `python -m peft_sage.towers` prints them.

Nothing reads this list to find blocks: it states what the structural rule finds. Most families that are not on it work
as well.
"""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """A model family.

    Args:
        model_type: The `model_type` of its configuration, or what a library of plain modules is called.
        blocks: Names of the adapted blocks, with `{}` for each number.
        text: Whether the model embeds text as well, so that class descriptions need no other model.
    """

    model_type: str
    blocks: str
    text: bool = False


FAMILIES = (
    # Models of image and text.
    Family("clip", "vision_model.encoder.layers.{}.mlp", text=True),
    Family("clip_vision_model", "encoder.layers.{}.mlp"),
    Family("metaclip_2", "vision_model.encoder.layers.{}.mlp", text=True),
    Family("siglip", "vision_model.encoder.layers.{}.mlp", text=True),
    Family("siglip_vision_model", "encoder.layers.{}.mlp"),
    Family("siglip2", "vision_model.encoder.layers.{}.mlp", text=True),
    Family("chinese_clip", "vision_model.encoder.layers.{}.mlp", text=True),
    Family("altclip", "vision_model.encoder.layers.{}.mlp", text=True),
    Family("clipseg", "vision_model.encoder.layers.{}.mlp", text=True),
    Family("xclip", "vision_model.encoder.layers.{}.mlp", text=True),
    Family("groupvit", "vision_model.encoder.stages.{}.layers.{}.mlp", text=True),
    Family("owlvit", "vision_model.encoder.layers.{}.mlp", text=True),
    Family("owlv2", "vision_model.encoder.layers.{}.mlp", text=True),
    Family("blip", "vision_model.encoder.layers.{}.mlp", text=True),
    Family("blip-2", "vision_model.encoder.layers.{}.mlp"),
    Family("instructblip", "vision_model.encoder.layers.{}.mlp"),
    Family("aimv2", "vision_model.encoder.layers.{}.ffn", text=True),
    Family("aimv2_vision_model", "encoder.layers.{}.ffn"),
    Family("tipsv2", "vision_model.encoder.layer.{}.mlp", text=True),
    Family("vision-text-dual-encoder", "vision_model.layers.{}.mlp", text=True),
    Family("flava", "image_model.encoder.layer.{}.output", text=True),
    # Vision towers.
    Family("vit", "layers.{}.mlp"),
    Family("deit", "layers.{}.mlp"),
    Family("beit", "layers.{}.mlp"),
    Family("vit_msn", "layers.{}.mlp"),
    Family("ijepa", "layers.{}.mlp"),
    Family("vit_mae", "layers.{}.mlp"),
    Family("dinov2", "encoder.layer.{}.mlp"),
    Family("dinov2_with_registers", "encoder.layer.{}.mlp"),
    Family("dinov3_vit", "model.layer.{}.mlp"),
    Family("mlcd_vision_model", "encoder.layers.{}.mlp"),
    Family("data2vec-vision", "encoder.layer.{}.output"),
    Family("timesformer", "encoder.layer.{}.output"),
    Family("swinv2", "encoder.layers.{}.blocks.{}.output"),
    Family("donut-swin", "encoder.layers.{}.blocks.{}.output"),
    Family("yolos", "encoder.layer.{}.output"),
    Family("dpt", "encoder.layer.{}.output"),
    Family("videomae", "encoder.layer.{}.output"),
    Family("vivit", "layers.{}.mlp"),
    Family("vjepa2", "encoder.layer.{}.mlp"),
    Family("radio", "encoder.layer.{}.mlp"),
    Family("pixio", "layers.{}.mlp"),
    Family("sapiens2", "model.layer.{}.mlp"),
    Family("seggpt", "encoder.layers.{}.mlp"),
    Family("pixtral", "transformer.layers.{}.feed_forward"),
    Family("internvl_vision", "encoder.layer.{}.mlp"),
    Family("vitdet", "encoder.layer.{}.mlp"),
    Family("hiera", "encoder.stages.{}.layers.{}.mlp"),
    Family("swin", "encoder.layers.{}.blocks.{}.mlp"),
    Family("focalnet", "encoder.stages.{}.layers.{}.mlp"),
    Family("pvt", "encoder.block.{}.{}.mlp"),
    Family("segformer", "stages.{}.blocks.{}.mlp"),
    Family("cvt", "encoder.stages.{}.layers.{}.output"),
    Family("mobilevit", "encoder.layer.{}.transformer.layer.{}.output"),
    Family("sam_vision_model", "vision_encoder.layers.{}.mlp"),
    # The vision towers of models that generate text.
    Family("llava", "vision_tower.encoder.layers.{}.mlp"),
    Family("llava_next", "vision_tower.encoder.layers.{}.mlp"),
    Family("llava_onevision", "vision_tower.encoder.layers.{}.mlp"),
    Family("vipllava", "vision_tower.encoder.layers.{}.mlp"),
    Family("video_llava", "image_tower.encoder.layers.{}.mlp"),
    Family("paligemma", "vision_tower.encoder.layers.{}.mlp"),
    Family("gemma3", "vision_tower.encoder.layers.{}.mlp"),
    Family("git", "image_encoder.vision_model.encoder.layers.{}.mlp"),
    Family("idefics", "vision_model.encoder.layers.{}.mlp"),
    Family("idefics2", "vision_model.encoder.layers.{}.mlp"),
    Family("idefics3", "vision_model.encoder.layers.{}.mlp"),
    Family("smolvlm", "vision_model.encoder.layers.{}.mlp"),
    Family("kosmos-2", "vision_model.model.encoder.layers.{}.mlp"),
    Family("mistral3", "vision_tower.transformer.layers.{}.feed_forward"),
    Family("internvl", "vision_tower.encoder.layer.{}.mlp"),
    Family("qwen2_vl", "visual.blocks.{}.mlp"),
    Family("qwen2_5_vl", "visual.blocks.{}.mlp"),
    Family("mllama", "vision_model.{}.layers.{}.mlp"),
    Family("llama4", "vision_model.model.layers.{}.mlp"),
    Family("qwen3_vl", "visual.blocks.{}.mlp"),
    Family("glm4v", "visual.blocks.{}.mlp"),
    Family("cohere2_vision", "vision_tower.encoder.layers.{}.mlp"),
    Family("lfm2_vl", "vision_tower.encoder.layers.{}.mlp"),
    Family("ovis2", "vision_tower.transformer.encoder.layers.{}.ffn"),
    Family("got_ocr2", "vision_tower.layers.{}.mlp"),
    Family("janus", "vision_model.encoder.layers.{}.mlp"),
    Family("deepseek_vl", "vision_model.encoder.layers.{}.mlp"),
    # Libraries of plain modules.
    Family("timm_wrapper", "timm_model.blocks.{}.mlp"),
    Family("perception_lm", "vision_tower.timm_model.blocks.{}.mlp"),
    Family("timm (ViT, EVA, BEiT, DINO, PE)", "blocks.{}.mlp"),
    Family("timm (Swin)", "layers.{}.blocks.{}.mlp"),
    Family("timm (ConvNeXt)", "stages.{}.blocks.{}.mlp"),
    Family("open_clip", "visual.transformer.resblocks.{}.mlp", text=True),
    Family("open_clip with a timm tower", "visual.trunk.blocks.{}.mlp", text=True),
    Family("OpenAI's clip", "visual.transformer.resblocks.{}.mlp", text=True),
)


def families_table() -> str:
    """Return the families as a Markdown table."""
    rows = [f"| `{f.model_type}` | `{f.blocks.replace('{}', '*')}` | {'yes' if f.text else ''} |" for f in FAMILIES]
    return "\n".join(["| `model_type` | adapted blocks | text embeddings |", "|---|---|---|", *rows])


def families_line() -> str:
    """Return the names of the families, for the README."""
    return ", ".join(f"`{family.model_type}`" for family in FAMILIES)
