# SPDX-License-Identifier: Apache-2.0
"""`SageClassifier` from texts to predictions; what it saves comes back in one line, in another process too."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch.utils.data import DataLoader
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    pipeline,
)

from peft_sage import SageClassifier, SageConfig, SageLoss, encode_class_descriptions
from tests.conftest import (
    TEXT,
    VISION,
    byte_tokenizer,
    randomise,
    tiny_clip,
    tiny_siglip,
)


NAMES = ["a cat", "Dog_1", "Kuh"]


@pytest.fixture
def folder(tmp_path) -> str:
    """A folder with a tiny CLIP, its tokenizer and its image processor."""
    folder = tmp_path / "clip"
    tiny_clip().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    processor().save_pretrained(folder)
    return str(folder)


def processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )


def pictures(count: int = 3) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [
        Image.fromarray(generator.integers(0, 255, (20, 24, 3), dtype=np.uint8))
        for _ in range(count)
    ]


def trained(model: PeftModel) -> PeftModel:
    """The model with other weights wherever it is trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def assert_same(got: list[list[dict]], want: list[list[dict]]) -> None:
    """Equal but for the rounding of another batch size."""
    assert [[entry["label"] for entry in answer] for answer in got] == [
        [e["label"] for e in a] for a in want
    ]
    scores = [
        torch.tensor([[entry["score"] for entry in answer] for answer in part])
        for part in (got, want)
    ]
    torch.testing.assert_close(*scores, atol=1e-5, rtol=1e-5)


CONFIGS = {
    "sage": SageConfig(),
    "adaptformer": SageConfig(guidance_rows=0),
    "lora": LoraConfig(
        target_modules=["q_proj", "c_fc", "qkv"],  # of transformers, open_clip, timm
        exclude_modules=r".*text.*|model\.transformer.*",
        modules_to_save=["class_head"],
    ),
    "head": SageConfig(target_modules=[]),
}


@pytest.mark.parametrize("make", [tiny_clip, tiny_siglip])
def test_untrained_it_is_zero_shot(make, pixel_values):
    model, tokenizer = make(), byte_tokenizer()
    embeds = encode_class_descriptions(model, tokenizer, NAMES, templates=["{}"])
    padding = "max_length" if model.config.model_type == "siglip" else "longest"
    spoken = [name.replace("_", " ") for name in NAMES]
    inputs = tokenizer(spoken, return_tensors="pt", padding=padding, max_length=40)
    with torch.no_grad():
        own = model(
            input_ids=inputs["input_ids"], pixel_values=pixel_values
        ).logits_per_image
        ours = SageClassifier(model, embeds, scale=10.0).eval()(pixel_values).logits
        own = (own - getattr(model, "logit_bias", 0)) / model.logit_scale.exp()
    torch.testing.assert_close(ours, 10 * own, rtol=1e-4, atol=1e-5)


def test_from_texts_encodes_once_and_keeps_the_names(folder, tmp_path, monkeypatch):
    classifier = SageClassifier.from_texts(folder, NAMES, cache_dir=tmp_path / "kept")
    assert classifier.class_names == NAMES and classifier.image_processor is not None
    model = tiny_clip()
    texts = {"a cat": ["one"], "Dog_1": ["two", "three"]}
    written = SageClassifier.from_texts(model, texts, tokenizer=byte_tokenizer())
    torch.testing.assert_close(
        written.text_embeds, encode_class_descriptions(model, byte_tokenizer(), texts)
    )
    assert written.class_names == list(texts)
    # What was kept needs no encoding; other texts do.
    monkeypatch.setattr(
        "peft_sage.towers.embeddings.encode_text",
        lambda *_: pytest.fail("encoded again"),
    )
    again = SageClassifier.from_texts(folder, NAMES, cache_dir=tmp_path / "kept")
    assert torch.equal(again.text_embeds, classifier.text_embeds)
    with pytest.raises(pytest.fail.Exception, match="encoded again"):
        SageClassifier.from_texts(folder, [*NAMES, "owl"], cache_dir=tmp_path / "kept")


def test_output_in_training_has_what_the_loss_needs_and_in_evaluation_only_logits(
    clip, pixel_values
):
    classifier = SageClassifier(clip, torch.randn(3, 16)).train()
    base = F.normalize(torch.randn(4, 16), dim=-1)
    output = classifier(pixel_values, base_image_embeds=base)
    torch.testing.assert_close(
        output.logits, output.logit_scale * output.image_embeds @ output.class_embeds.T
    )
    for name in ("image_embeds", "class_embeds", "text_embeds"):
        torch.testing.assert_close(
            output[name].norm(dim=-1), torch.ones(len(output[name]))
        )
    assert output.base_image_embeds is base
    SageLoss([3, 2, 1], text_prior=1.0, text_guidance=1.0)(
        output, torch.tensor([0, 0, 1, 2])
    ).backward()
    assert classifier.class_head.weight.grad.abs().sum() > 0
    assert list(classifier.eval()(pixel_values)) == ["logits"]
    labels = torch.tensor([0, 2, 2, 1])
    output = classifier(pixel_values, labels=labels)
    assert list(output) == ["loss", "logits"] and torch.equal(
        output.loss, F.cross_entropy(output.logits, labels)
    )
    classifier._is_replica = True  # what `nn.DataParallel` sets
    with pytest.raises(RuntimeError, match="accelerate launch"):
        classifier(pixel_values)


@pytest.mark.parametrize("method", CONFIGS)
def test_what_was_saved_comes_back_in_one_line(folder, tmp_path, method):
    classifier = SageClassifier.from_texts(folder, NAMES)
    model = trained(get_peft_model(classifier, CONFIGS[method]))
    want = model.predict(pictures(), top_k=3)
    model.save_pretrained(tmp_path / "saved")
    loaded = SageClassifier.from_pretrained(tmp_path / "saved")
    assert loaded.class_names == NAMES and loaded.predict(pictures(), top_k=3) == want
    assert torch.equal(loaded.text_embeds, classifier.text_embeds)
    # To train on, as anywhere in PEFT.
    fresh = SageClassifier.from_texts(folder, NAMES)
    again = PeftModel.from_pretrained(fresh, tmp_path / "saved", is_trainable=True)
    assert again.eval().predict(pictures(), top_k=3) == want
    assert any(parameter.requires_grad for parameter in again.parameters())
    auto = AutoPeftModel.from_pretrained(
        str(tmp_path / "saved"), import_allowlist=["peft_sage"]
    )
    auto.image_processor = processor()
    assert auto.eval().predict(pictures(), top_k=3) == want
    # A head for other classes is refused by name.
    with pytest.raises((ValueError, RuntimeError), match="class_head"):
        PeftModel.from_pretrained(
            SageClassifier.from_texts(folder, ["one", "two"]), tmp_path / "saved"
        )


def naflex():
    vision = {name: value for name, value in VISION.items() if name != "image_size"} | {
        "num_patches": 4
    }
    return Siglip2Model(Siglip2Config(text_config=TEXT, vision_config=vision))


def open_clip_tower():
    vision = {
        "image_size": 16,
        "patch_size": 8,
        "width": 32,
        "layers": 2,
        "head_width": 16,
    }
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
    return pytest.importorskip("open_clip").CLIP(
        embed_dim=32, vision_cfg=vision, text_cfg=text
    )


def timm_tower():
    size = {
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
    }
    return pytest.importorskip("timm").create_model(
        "vit_tiny_patch16_224", num_classes=0, **size
    )


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("make", [tiny_siglip, naflex, open_clip_tower, timm_tower])
def test_towers_of_every_kind_come_back(tmp_path, make, method):
    torch.manual_seed(0)
    base = make()
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    ready = (
        Siglip2ImageProcessor(patch_size=8, max_num_patches=4)
        if make is naflex
        else processor()
    )
    classifier = SageClassifier(base, torch.randn(3, 32), NAMES, image_processor=ready)
    before = classifier.predict(pictures(), top_k=3)
    model = trained(get_peft_model(classifier, CONFIGS[method]))
    want = model.predict(pictures(), top_k=3)
    model.save_pretrained(tmp_path)
    ready.save_pretrained(tmp_path)
    again = make()
    again.load_state_dict(weights)
    loaded = SageClassifier.from_pretrained(tmp_path, clip=again)
    assert (
        loaded.class_names == NAMES
        and loaded.predict(pictures(), top_k=3) == want != before
    )


def test_in_another_process(folder, tmp_path):
    model = trained(
        get_peft_model(SageClassifier.from_texts(folder, NAMES), SageConfig())
    )
    model.save_pretrained(tmp_path / "saved")
    pictures(1)[0].save(tmp_path / "one.png")
    code = "import json, sys; from peft_sage import SageClassifier as S; "
    code += "print(json.dumps(S.from_pretrained(sys.argv[1]).predict([sys.argv[2]])))"
    command = [
        sys.executable,
        "-c",
        code,
        str(tmp_path / "saved"),
        str(tmp_path / "one.png"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    (got,) = json.loads(result.stdout)
    (want,) = model.predict(pictures(1))
    assert got[0]["label"] == want[0]["label"] and got[0]["score"] == pytest.approx(
        want[0]["score"], abs=1e-5
    )


def test_a_base_without_a_name_is_given(tmp_path):
    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(**VISION, projection_dim=16)
    )
    vision.name_or_path = ""
    classifier = SageClassifier(
        vision, torch.randn(3, 16), NAMES, image_processor=processor()
    )
    model = trained(get_peft_model(classifier, SageConfig()))
    model.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="give it as `clip`"):
        SageClassifier.from_pretrained(tmp_path)
    base = CLIPVisionModelWithProjection(vision.config)
    base.load_state_dict(
        {
            n.replace(".base_layer", ""): p
            for n, p in vision.state_dict().items()
            if "sage" not in n
        }
    )
    loaded = SageClassifier.from_pretrained(tmp_path, clip=base)
    assert loaded.predict(pictures(), top_k=3) == model.predict(pictures(), top_k=3)


def test_an_adapter_of_something_else_is_refused(folder, tmp_path, clip):
    model = get_peft_model(
        clip, SageConfig(guidance=torch.randn(3, 16), modules_to_save=[])
    )
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="no `class_head`"):
        SageClassifier.from_pretrained(tmp_path / "bare", clip=tiny_clip())


def test_predict_reads_paths_folders_pictures_and_arrays_alike(folder, tmp_path):
    classifier = SageClassifier.from_texts(folder, NAMES)
    images = pictures()
    (tmp_path / "new").mkdir()
    for index, image in enumerate(images):
        image.save(tmp_path / "new" / f"{index}.png")
    (tmp_path / "new" / ".hidden.png").write_bytes(b"")
    paths = sorted((tmp_path / "new").glob("[0-9].png"))
    want = classifier.predict(images, top_k=3, batch_size=2)
    for given in (
        paths,
        [str(path) for path in paths],
        tmp_path / "new",
        [np.asarray(image) for image in images],
    ):
        assert_same(classifier.predict(given, top_k=3), want)
    assert [len(answer) for answer in want] == [3] * 3
    for answer in want:
        assert sum(entry["score"] for entry in answer) == pytest.approx(1, abs=1e-5)
        assert answer[0]["score"] >= answer[1]["score"] and answer[0]["label"] in NAMES
    rotated = images[0].rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    rotated.save(tmp_path / "turned.png", exif=exif)
    assert_same(classifier.predict([tmp_path / "turned.png"], top_k=3), want[:1])


def test_predict_names_what_it_cannot_read(folder, tmp_path):
    classifier = SageClassifier.from_texts(folder, NAMES)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    for given, message in (
        ([tmp_path / "broken.png"], "broken.png"),
        ([tmp_path / "missing.png"], "missing.png"),
        (tmp_path / "empty", "empty"),
    ):
        with pytest.raises(ValueError, match=message):
            classifier.predict(given)
    with pytest.raises(
        ValueError, match="`top_k` must be an integer, at least 1, got 0"
    ):
        classifier.predict(pictures(), top_k=0)
    with pytest.raises(ValueError, match="`batch_size`"):
        classifier.predict(pictures(), batch_size=0)
    with pytest.raises(ValueError, match="`image_processor`"):
        SageClassifier(tiny_clip(), torch.randn(3, 16)).predict(pictures())


def test_embed_is_the_frozen_tower_whatever_is_given(folder):
    classifier = SageClassifier.from_texts(folder, NAMES)
    images = pictures(5)
    pixels = processor()(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        want = F.normalize(tiny_clip().get_image_features(pixels).pooler_output, dim=-1)
    model = trained(get_peft_model(classifier, SageConfig())).train()
    rows = [{"pixel_values": row, "labels": 0} for row in pixels]
    loader = DataLoader(rows, batch_size=2)
    for given in (
        images,
        rows,
        loader,
        ({"pixel_values": part} for part in pixels.split(2)),
        [{"image": i} for i in images],
    ):
        torch.testing.assert_close(model.embed(given, batch_size=2), want)
    # The adapters are on again, trained as before, and the model in its mode.
    assert model.training and any(
        "peft_sage_" in n for n, p in model.named_parameters() if p.requires_grad
    )
    assert not torch.allclose(
        classifier.eval()(pixels).logits,
        25 * want @ classifier.text_embeds.T,
        atol=1e-3,
    )


def test_set_classes_reaches_the_trained_head_and_the_guidance(folder, pixel_values):
    model = get_peft_model(SageClassifier.from_texts(folder, NAMES), SageConfig())
    randomise(model)
    model.eval().set_classes(["owl", "cow", "bee", "elk"])
    fresh = get_peft_model(
        SageClassifier.from_texts(folder, ["owl", "cow", "bee", "elk"]), SageConfig()
    )
    randomise(fresh)
    torch.testing.assert_close(
        model(pixel_values).logits, fresh.eval()(pixel_values).logits
    )
    assert model.class_names == ["owl", "cow", "bee", "elk"]
    model.set_classes(torch.eye(2, 16))
    assert model.class_names is None and model.config.id2label == {
        0: "LABEL_0",
        1: "LABEL_1",
    }
    with pytest.raises(
        ValueError, match=r"`classes` must have the shape \(M, 16\), got \(8, 15\)"
    ):
        model.set_classes(torch.randn(8, 15))


def test_pipeline(folder):
    classifier = SageClassifier.from_texts(folder, NAMES)
    pipe = pipeline(
        "image-classification",
        model=classifier,
        image_processor=processor(),
        device="cpu",
    )
    for got, want in zip(
        pipe(pictures(), top_k=2), classifier.predict(pictures(), top_k=2), strict=True
    ):
        assert [entry["label"] for entry in got] == [entry["label"] for entry in want]
        assert got[0]["score"] == pytest.approx(want[0]["score"], abs=1e-5)


def test_the_siglip_head_is_left_alone(pixel_values):
    model = get_peft_model(
        SageClassifier(tiny_siglip(), torch.randn(3, 32)), SageConfig()
    )
    heads = [
        n
        for n, p in model.named_parameters()
        if p.requires_grad and "peft_sage_" not in n
    ]
    assert heads == ["base_model.model.class_head.modules_to_save.default.weight"]


def test_half_precision_tower_with_float32_head(clip, pixel_values):
    classifier = SageClassifier(clip.to(torch.bfloat16), torch.randn(5, 16))
    assert classifier(pixel_values.bfloat16()).logits.dtype == torch.float32
    assert (
        classifier.embed([{"pixel_values": row} for row in pixel_values]).dtype
        == torch.float32
    )


def test_head_is_invariant_to_the_size_of_its_rows(clip, pixel_values):
    classifier = SageClassifier(clip, torch.randn(5, 16))
    before = classifier(pixel_values).logits
    with torch.no_grad():
        classifier.class_head.weight *= 7
    torch.testing.assert_close(classifier(pixel_values).logits, before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"text_embeds": [[1.0]]}, TypeError, "`text_embeds`"),
        (
            {"text_embeds": torch.randn(5)},
            ValueError,
            "`text_embeds` must have the shape",
        ),
        (
            {"text_embeds": torch.full((2, 16), torch.nan)},
            ValueError,
            "`text_embeds` must be finite",
        ),
        ({"scale": 0.0}, ValueError, "`scale`"),
        (
            {"class_names": ["one"]},
            ValueError,
            "`class_names` must have 2 names, one per row, got 1",
        ),
    ],
)
def test_errors(clip, arguments, error, message):
    with pytest.raises(error, match=message):
        SageClassifier(clip, **{"text_embeds": torch.randn(2, 16), **arguments})
    with pytest.raises(ValueError, match="tokenizer"):
        SageClassifier.from_texts(clip, NAMES)  # it does not say where it came from
