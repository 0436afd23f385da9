# SPDX-License-Identifier: Apache-2.0
"""Keys and values that evaluation keeps are those that it would compute anew."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_sage import SageConfig, SageLayer, key_value_cache
from tests.conftest import randomise, tiny_clip


X = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))


def block() -> nn.ModuleDict:
    return nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))})


def config(classes: int = 7) -> SageConfig:
    return SageConfig(guidance=torch.randn(classes, 6), r=8, target_modules=["mlp"])


@pytest.fixture
def model():
    model = get_peft_model(block(), config())
    randomise(model)
    return model.eval()


@pytest.fixture
def projections(monkeypatch):
    """How often the guidance was projected in order to be kept."""
    calls = []
    plain = key_value_cache.project
    monkeypatch.setattr(key_value_cache, "project", lambda *args: calls.append(args) or plain(*args))
    return calls


def layer(model) -> SageLayer:
    return model.base_model.model["mlp"]


@torch.no_grad()
def evaluate(model, **kwargs) -> torch.Tensor:
    return layer(model)(X, **kwargs)


def test_batches_of_an_evaluation_are_projected_once_and_equal_to_training_mode(model, projections):
    first, second = evaluate(model), evaluate(model)
    assert len(projections) == 1
    assert torch.equal(first, second)
    assert torch.equal(first, layer(model)(X))
    assert torch.equal(first, evaluate(model.train()))


def in_place(model):
    with torch.no_grad():
        layer(model).peft_sage_key["default"].weight.add_(0.5)


def through_data(model):
    layer(model).peft_sage_value["default"].weight.data.mul_(-2)


def by_an_optimizer(model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    layer(model)(X).square().sum().backward()
    torch.optim.AdamW(parameters, lr=0.1).step()


def by_loading_weights(model):
    other = get_peft_model(block(), SageConfig(guidance=torch.randn(7, 6), r=8, target_modules=["mlp"]))
    randomise(other, seed=1)
    model.load_state_dict(other.state_dict())


def by_loading_guidance_only(model):
    state = {name: -tensor for name, tensor in model.state_dict().items() if "guidance" in name}
    model.load_state_dict(state, strict=False)


def by_set_guidance(model):
    model.set_guidance(torch.randn(7, 6))


def by_more_guidance(model):
    model.set_guidance(torch.randn(9, 6))


def by_guidance_written_to(model):
    layer(model).guidance("default").mul_(-1)


CHANGES = [
    in_place,
    through_data,
    by_an_optimizer,
    by_loading_weights,
    by_loading_guidance_only,
    by_set_guidance,
    by_more_guidance,
    by_guidance_written_to,
]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(model, change):
    before = evaluate(model)
    change(model)
    after = evaluate(model)
    assert not torch.allclose(after, before)
    assert torch.equal(after, evaluate(copy.deepcopy(model)))


@pytest.mark.parametrize("mode", [True, False])
def test_a_change_of_mode_drops_it(model, mode, projections):
    evaluate(model)
    model.train(mode).eval()
    evaluate(model)
    assert len(projections) == 2


def test_another_precision(model):
    evaluate(model)
    x = X.double()
    with torch.no_grad():
        torch.testing.assert_close(layer(model.double())(x).float(), evaluate(model.float()))


def test_autocast_does_not_take_what_was_kept_in_float32(model):
    evaluate(model)
    with torch.autocast("cpu", torch.bfloat16):
        cast = evaluate(model)
        assert torch.equal(cast, evaluate(copy.deepcopy(model)))
    assert torch.equal(evaluate(model), evaluate(copy.deepcopy(model)))


def test_gradients_flow_after_an_evaluation_in_inference_mode(model):
    with torch.inference_mode():
        layer(model)(X)
    key = layer(model).peft_sage_key["default"].weight
    layer(model)(X).square().sum().backward()
    assert key.grad.abs().sum() > 0
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    x = X.clone().requires_grad_()
    layer(model)(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_several_adapters(model):
    model.add_adapter("second", config(4))
    randomise(model.eval(), seed=2)
    fresh = copy.deepcopy(model)
    mixed = {"adapter_names": ["second", "default"]}
    for name in ("default", "second", "default"):
        model.set_adapter(name)
        fresh.set_adapter(name)
        assert torch.equal(evaluate(model), evaluate(copy.deepcopy(fresh)))
        assert torch.equal(evaluate(model, **mixed), evaluate(copy.deepcopy(fresh), **mixed))
    model.delete_adapter("second")
    model.set_adapter("default")
    model.add_adapter("second", config(4))
    model.eval().set_adapter("second")
    assert torch.equal(evaluate(model), evaluate(copy.deepcopy(model)))


def test_copies_and_files_go_without(model):
    layer_alone = layer(model)
    size = len(pickle.dumps(layer_alone))
    before = evaluate(model)
    assert len(pickle.dumps(layer_alone)) == size
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(layer_alone))(X), before)


def test_threads(model):
    expected = evaluate(copy.deepcopy(model))
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: evaluate(model), range(32)):
            torch.testing.assert_close(result, expected)  # threads may split a product otherwise: not bit for bit


@torch.no_grad()
def test_ensemble_by_vmap(model, projections):
    evaluate(model)
    kept = len(projections)
    name = "peft_sage_key.default.weight"
    weights = torch.randn(3, *layer(model).get_parameter(name).shape)
    call = lambda weight: torch.func.functional_call(layer(model), {name: weight}, X)  # noqa: E731
    together = torch.func.vmap(call)(weights)
    for weight, output in zip(weights, together, strict=True):
        torch.testing.assert_close(call(weight), output)
    assert len(projections) > kept


def test_a_whole_tower(projections):
    model = get_peft_model(tiny_clip(), SageConfig(guidance=torch.randn(5, 16), r=8)).eval()
    randomise(model)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        first, second = (model.get_image_features(images).pooler_output for _ in range(2))
    assert len(projections) == 3  # one a block
    assert torch.equal(first, second)
