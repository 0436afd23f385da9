# SPDX-License-Identifier: Apache-2.0
"""`SageClassifier` from texts to predictions; what it saves comes back in one line, in another process too."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoImageProcessor,
    CLIPImageProcessor,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    Trainer,
    TrainingArguments,
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


def trained(model: PeftModel) -> PeftModel:
    """The model with other weights wherever it is trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


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


@pytest.mark.parametrize(
    "pair",
    [("Owl", "owl"), ("snowy_owl", "snowy owl"), ("caf\u00e9", "cafe\u0301")],
)
def test_classes_that_are_alike_are_named(pair, clip):
    for source in ([*pair, "cow"], dict.fromkeys(["cow", *pair], "a text")):
        with pytest.warns(UserWarning, match=f"alike .*: '{pair[0]}' and '{pair[1]}'"):
            model = SageClassifier.from_texts(clip, source, tokenizer=byte_tokenizer())
        with pytest.warns(UserWarning, match="alike"):
            model.set_classes(source)


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


def test_an_adapter_of_something_else_is_refused(folder, tmp_path, clip):
    model = get_peft_model(
        clip, SageConfig(guidance=torch.randn(3, 16), modules_to_save=[])
    )
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="no `class_head`"):
        SageClassifier.from_pretrained(tmp_path / "bare", clip=tiny_clip())
    inner = get_peft_model(SageClassifier.from_texts(folder, NAMES), SageConfig())
    get_peft_model(inner, CONFIGS["lora"]).save_pretrained(tmp_path / "nested")
    with pytest.raises(ValueError, match="no `class_head`"):
        SageClassifier.from_pretrained(tmp_path / "nested", clip=tiny_clip())


def test_the_head_of_an_adapter_is_not_dropped_in_silence(folder, tmp_path, clip):
    model = get_peft_model(SageClassifier.from_texts(folder, NAMES), SageConfig())
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="trained 'class_head', which the model lacks"):
        PeftModel.from_pretrained(clip, tmp_path)
    with pytest.raises(TypeError, match="'torch_dtype'.* are for loading a model"):
        SageClassifier.from_pretrained(tmp_path, clip=clip, torch_dtype=torch.bfloat16)


@pytest.mark.parametrize("method", ["sage", "lora"])
def test_a_tower_that_was_merged_is_not_lost_in_silence(folder, tmp_path, method):
    classifier = SageClassifier.from_texts(folder, NAMES)
    model = trained(get_peft_model(classifier, CONFIGS[method]))
    if method == "lora":
        model.unload().bfloat16().save_pretrained(tmp_path / "cast")
        classifier.float().save_pretrained(tmp_path / "and_back")
        model = trained(get_peft_model(classifier, CONFIGS[method]))
        with pytest.raises(ValueError, match="save before `merge_and_unload`"):
            model.merge_and_unload().save_pretrained(tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
    else:
        model.unload().save_pretrained(tmp_path / "head")
        loaded = SageClassifier.from_pretrained(tmp_path / "head")
        assert_same(loaded.predict(pictures(), 3), classifier.predict(pictures(), 3))


def test_all_weights_that_trainer_saved_without_peft(folder, tmp_path):
    classifier = SageClassifier.from_texts(folder, NAMES).eval()
    for parameter in classifier.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    Trainer(classifier, arguments).save_model(tmp_path)
    loaded = SageClassifier.from_pretrained(tmp_path, clip=tiny_clip())
    assert_same(loaded.predict(pictures(), 3), classifier.predict(pictures(), 3))
    with pytest.raises(ValueError, match="does not name its base model: give .*`clip`"):
        SageClassifier.from_pretrained(tmp_path)


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
        ({"class_names": {"a", "b"}}, TypeError, "`class_names` must be a list"),
    ],
)
def test_errors(clip, arguments, error, message):
    with pytest.raises(error, match=message):
        SageClassifier(clip, **{"text_embeds": torch.randn(2, 16), **arguments})
    with pytest.raises(ValueError, match="tokenizer"):
        SageClassifier.from_texts(clip, NAMES)  # it does not say where it came from


# The object saves itself


@pytest.mark.parametrize("method", [*CONFIGS, "none"])
def test_it_saves_itself_as_through_peft(folder, tmp_path, method):
    classifier = SageClassifier.from_texts(folder, NAMES)
    model: nn.Module = classifier
    if method in CONFIGS:
        model = trained(get_peft_model(classifier, CONFIGS[method]))
    else:
        classifier.head.weight.data += torch.randn(3, 16)
    want = model.eval().predict(pictures(), top_k=3)
    classifier.save_pretrained(tmp_path / "own")
    loaded = SageClassifier.from_pretrained(tmp_path / "own")
    assert loaded.predict(pictures(), top_k=3) == want
    assert loaded.class_names == NAMES
    # To train on, as anywhere in PEFT.
    trainable = SageClassifier.from_pretrained(tmp_path / "own", is_trainable=True)
    assert trainable.class_head.weight.requires_grad
    assert not loaded.class_head.weight.requires_grad
    fresh = SageClassifier.from_texts(folder, NAMES)
    again = PeftModel.from_pretrained(fresh, tmp_path / "own", is_trainable=True)
    assert again.eval().predict(pictures(), top_k=3) == want
    assert any(parameter.requires_grad for parameter in again.parameters())
    auto = AutoPeftModel.from_pretrained(
        str(tmp_path / "own"), import_allowlist=["peft_sage"]
    )
    auto.image_processor = processor()
    assert auto.eval().predict(pictures(), top_k=3) == want
    other = SageClassifier.from_texts(folder, ["one", "two"])
    with pytest.raises((ValueError, RuntimeError), match="class_head"):
        PeftModel.from_pretrained(other, tmp_path / "own")
    # And once more, from what was loaded.
    loaded.save_pretrained(tmp_path / "twice")
    twice = SageClassifier.from_pretrained(tmp_path / "twice")
    assert twice.predict(pictures(), top_k=3) == want
    if method in CONFIGS:
        model.save_pretrained(tmp_path / "peft")
        files = [
            load_file(tmp_path / name / "adapter_model.safetensors")
            for name in ("own", "peft")
        ]
        torch.testing.assert_close(*files, rtol=0, atol=0)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`folder` must be a folder"):
        classifier.save_pretrained(tmp_path / "file")


def test_the_image_processor_comes_back_with_the_head(folder, tmp_path):
    own = CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size=16, image_mean=[0.1] * 3
    )
    for method in ("sage", "lora", "head"):
        classifier = SageClassifier.from_texts(folder, NAMES, image_processor=own)
        get_peft_model(classifier, CONFIGS[method]).save_pretrained(tmp_path / method)
        loaded = SageClassifier.from_pretrained(tmp_path / method)
        assert loaded.image_processor.to_dict() == own.to_dict()
        assert loaded.predict(pictures()) == classifier.predict(pictures())
        given = processor()
        loaded = SageClassifier.from_pretrained(
            tmp_path / method, image_processor=given
        )
        assert loaded.image_processor is given


class Compose(nn.Module):
    """As torchvision's, which newer versions make a module."""

    transforms = ()

    def forward(self, image):
        return torch.from_numpy(np.array(image.resize((16, 16)))).permute(2, 0, 1) / 255


def test_an_image_processor_that_cannot_be_saved_is_asked_for(folder, tmp_path):
    classifier = SageClassifier.from_texts(folder, NAMES)
    classifier.image_processor = Compose()
    model = get_peft_model(classifier, SageConfig()).eval()
    want = model.predict(pictures(), top_k=3)
    with pytest.warns(UserWarning, match="a Compose, cannot be saved"):
        classifier.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="give it as `image_processor="):
        loaded = SageClassifier.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`image_processor`"):
        loaded.predict(pictures())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = SageClassifier.from_pretrained(tmp_path, image_processor=Compose())
    assert loaded.predict(pictures(), top_k=3) == want


def repository(cache: Path, name: str, **folders: Path) -> None:
    """A repository as the Hub's cache holds it, with a revision for each folder."""
    root = cache / ("models--" + name.replace("/", "--"))
    (root / "refs").mkdir(parents=True)
    for index, (revision, folder) in enumerate(folders.items()):
        shutil.copytree(folder, root / "snapshots" / (str(index) * 40))
        (root / "refs" / revision).write_text(str(index) * 40)


@pytest.mark.parametrize("method", ["sage", "lora", "head"])
def test_all_comes_from_one_revision(folder, tmp_path, method, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    newer = tmp_path / "newer"
    tiny_clip(seed=1).save_pretrained(newer)
    byte_tokenizer().save_pretrained(newer)
    CLIPImageProcessor(size={"shortest_edge": 20}).save_pretrained(newer)
    repository(tmp_path / "hub", "user/clip", main=newer, v1=Path(folder))
    here = {"cache_dir": tmp_path / "hub"}
    want = SageClassifier.from_texts(folder, NAMES)
    classifier = SageClassifier.from_texts("user/clip", NAMES, revision="v1")
    torch.testing.assert_close(classifier.text_embeds, want.text_embeds)
    assert classifier.image_processor.to_dict() == want.image_processor.to_dict()
    model = trained(get_peft_model(classifier, CONFIGS[method]))
    model.save_pretrained(tmp_path / "adapter")
    loaded = SageClassifier.from_pretrained(tmp_path / "adapter", **here)
    assert loaded.predict(pictures(), top_k=3) == model.predict(pictures(), top_k=3)
    loaded.set_classes(["owl"])
    want.set_classes(["owl"])
    torch.testing.assert_close(loaded.text_embeds, want.text_embeds)
    # And the adapter at a revision of its own, with another processor.
    shutil.copytree(tmp_path / "adapter", tmp_path / "later")
    loaded.image_processor = AutoImageProcessor.from_pretrained(newer)
    loaded.save_pretrained(tmp_path / "later")
    parts = {"main": tmp_path / "later", "v2": tmp_path / "adapter"}
    repository(tmp_path / "hub", "user/owls", **parts)
    for revision, size in (("main", 20), ("v2", 16)):
        at = SageClassifier.from_pretrained("user/owls", revision=revision, **here)
        assert at.image_processor.size["shortest_edge"] == size


def test_subfolders_dtypes_and_working_directories(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(folder).parent)
    classifier = SageClassifier.from_texts("clip", NAMES)
    model = get_peft_model(classifier, SageConfig(), adapter_name="owls").eval()
    model.save_pretrained(tmp_path / "all")
    monkeypatch.chdir(tmp_path)
    loaded = SageClassifier.from_pretrained("all", subfolder="owls")
    assert loaded.predict(pictures()) == model.predict(pictures())
    with pytest.raises(ValueError, match=r"its subfolders \['owls'\] do"):
        SageClassifier.from_pretrained("all")
    with pytest.raises(ValueError, match=r"its subfolders \['owls'\] do"):
        SageClassifier.from_texts("all", NAMES)
    with pytest.raises(ValueError, match="`subfolder` cannot be kept"):
        SageClassifier.from_texts(Path(folder).parent, NAMES, subfolder="clip")
    arguments = {"subfolder": "owls", "torch_dtype": torch.bfloat16}
    assert SageClassifier.from_pretrained("all", **arguments).dtype == torch.bfloat16
    made = SageClassifier.from_texts(folder, NAMES, torch_dtype="bfloat16")
    assert made.dtype == torch.bfloat16
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="not in .* any more: give it as `clip`"):
        SageClassifier.from_pretrained("all", subfolder="owls")


@pytest.mark.parametrize("method", CONFIGS)
def test_an_adapter_is_no_model_to_start_from(folder, tmp_path, method):
    model = get_peft_model(SageClassifier.from_texts(folder, NAMES), CONFIGS[method])
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=f"`model` must be .* is an adapter of .*{folder}"
    ):
        SageClassifier.from_texts(tmp_path, NAMES)


# All is of the head that runs


def test_without_its_adapter_it_is_what_it_was(folder, tmp_path, pixel_values):
    zero = [*NAMES, "owl", "elk"]
    plain = SageClassifier.from_texts(folder, zero).predict(pictures(), top_k=5)
    other = get_peft_model(
        SageClassifier.from_texts(folder, ["x", "y", "z", "u", "v"]), SageConfig()
    )
    other.save_pretrained(tmp_path)
    for change in (["x", "y"], [f"new {k}" for k in range(9)], None):
        classifier = SageClassifier.from_texts(folder, zero)
        if change is None:
            model = PeftModel.from_pretrained(classifier, tmp_path)
        else:
            model = get_peft_model(classifier, SageConfig())
            classifier.set_classes(change)
        names = classifier.class_names
        with model.disable_adapter():
            assert_same(classifier.predict(pictures(), top_k=5), plain)
            assert classifier.class_names == zero
            output = model.train()(pixel_values=pixel_values)
            assert len(output.class_embeds) == len(output.text_embeds) == 5
            assert output.logits.shape[1] == 5
            classifier.set_classes(["only"])
        assert classifier.class_names == names != zero


def test_old_classes_keep_what_they_learned(folder, tmp_path):
    texts = {name: [f"{name}, closely"] for name in NAMES}
    model = get_peft_model(SageClassifier.from_texts(folder, texts), SageConfig())
    trained(model)
    weight = model.head.weight.clone()
    embeds = model.text_embeds.clone()
    fresh = SageClassifier.from_texts(folder, ["owl", "Kuh"]).text_embeds
    model.set_classes(["owl", "Kuh", "a cat"])
    assert model.class_names == ["owl", "Kuh", "a cat"]
    torch.testing.assert_close(model.head.weight[1:], weight[[2, 0]])
    torch.testing.assert_close(model.text_embeds[1:], embeds[[2, 0]])
    torch.testing.assert_close(model.head.weight[0], fresh[0])
    model.set_classes({"Kuh": ["a photo of a Kuh."]})  # another text, the same row
    torch.testing.assert_close(model.head.weight, weight[[2]])
    torch.testing.assert_close(model.text_embeds, fresh[[1]])
    model.add_classes(["owl"])
    assert model.class_names == ["Kuh", "owl"]
    torch.testing.assert_close(model.head.weight, torch.stack([weight[2], fresh[0]]))
    assert model.head.weight.requires_grad
    want = model.predict(pictures(), top_k=2)
    model.save_pretrained(tmp_path)
    assert SageClassifier.from_pretrained(tmp_path).predict(pictures(), top_k=2) == want
    with pytest.raises(ValueError, match=r"`texts` has classes .*\['owl'\]"):
        model.add_classes(["elk", "owl"])
    with pytest.warns(UserWarning, match="may be one class: 'owl' and 'Owl'"):
        model.add_classes(["Owl"])


def test_a_head_that_is_a_target_is_refused(folder, pixel_values):
    classifier = SageClassifier.from_texts(folder, NAMES)
    model = get_peft_model(classifier, LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="`target_modules` matches the `class_head`"):
        model(pixel_values=pixel_values)
