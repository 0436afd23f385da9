# SPDX-License-Identifier: Apache-2.0
"""Every family of vision towers, each as a tiny random model (`tower_models.py`)."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_sage import SageConfig, SageLayer
from peft_sage.towers import FAMILIES, find_blocks
from tests.tower_models import TINY, Tiny


PATTERNS = {family.model_type: family.blocks for family in FAMILIES}
every_family = pytest.mark.parametrize("tiny", TINY, ids=lambda tiny: tiny.id)


def expected(tiny: Tiny) -> list[str]:
    pattern = tiny.blocks or PATTERNS[tiny.model_type]
    return [pattern.format(*(count if isinstance(count, tuple) else (count,))) for count in tiny.counts]


def adapted(model: nn.Module, init_weights: bool = True) -> PeftModel:
    config = SageConfig(guidance=torch.randn(5, 12), r=4, num_heads=2, init_weights=init_weights)
    return get_peft_model(model, config)


def run(tiny: Tiny, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The output of the vision tower, wherever PEFT moved it."""
    prefix = "base_model.model" if isinstance(model, PeftModel) else ""
    tower = model.get_submodule(".".join(filter(None, (prefix, tiny.tower))))
    torch.manual_seed(1)  # masked autoencoders hide patches at random
    return first_tensor(tower(**inputs))


def first_tensor(output: Any) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    hidden = getattr(output, "last_hidden_state", None)
    return first_tensor(output[0]) if hidden is None else hidden


def gradients(tiny: Tiny, model: PeftModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = run(tiny, model, inputs)
    # A plain sum has no gradient behind a LayerNorm.
    torch.manual_seed(2)
    (output * torch.randn_like(output)).sum().backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


@every_family
def test_expected_blocks_are_adapted_and_nothing_else_is_trainable(tiny: Tiny) -> None:
    torch.manual_seed(0)
    model = tiny.build().requires_grad_(False)  # what torch computes with depends on it
    blocks, inputs = expected(tiny), tiny.inputs()
    assert find_blocks(model) == blocks
    before = run(tiny, model, inputs)
    peft_model = adapted(model)
    assert find_blocks(peft_model) == [f"base_model.model.{block}" for block in blocks]
    layers = [name for name, module in peft_model.named_modules() if isinstance(module, SageLayer)]
    assert layers == find_blocks(peft_model)
    trainable = {name for name, weight in peft_model.named_parameters() if weight.requires_grad}
    assert trainable == {name for name, _ in peft_model.named_parameters() if ".peft_sage_" in name}
    assert torch.equal(run(tiny, peft_model, inputs), before)


@every_family
def test_every_adapter_weight_gets_a_gradient(tiny: Tiny) -> None:
    torch.manual_seed(0)
    model, inputs = adapted(tiny.build()), tiny.inputs()
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    gradients(tiny, model, inputs)
    optimizer.step()  # until then the up-projection is zero and hides the rest
    for name, gradient in gradients(tiny, model, inputs).items():
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), name


@every_family
def test_saved_adapter_gives_the_same_output(tiny: Tiny, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = tiny.build()
    base, inputs = io.BytesIO(), tiny.inputs()
    torch.save(model.state_dict(), base)
    before = run(tiny, model, inputs)
    peft_model = adapted(model, init_weights=False).eval()
    after = run(tiny, peft_model, inputs)
    assert not torch.equal(after, before)
    peft_model.save_pretrained(tmp_path)
    other = tiny.build()
    other.load_state_dict(torch.load(io.BytesIO(base.getvalue())))
    assert torch.equal(run(tiny, PeftModel.from_pretrained(other, tmp_path).eval(), inputs), after)


@every_family
def test_bfloat16(tiny: Tiny) -> None:
    torch.manual_seed(0)
    model = tiny.build().requires_grad_(False).to(torch.bfloat16)
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in tiny.inputs().items()}
    before = run(tiny, model, inputs)
    model = adapted(model)
    after = run(tiny, model, inputs)
    assert after.dtype == torch.bfloat16 and torch.equal(after, before)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients(tiny, model, inputs).values())


@every_family
def test_gradient_checkpointing_changes_no_gradient(tiny: Tiny) -> None:
    torch.manual_seed(0)
    model = tiny.build()
    tower = model.get_submodule(tiny.tower)
    if not (tiny.checkpointing and getattr(tower, "supports_gradient_checkpointing", False)):
        pytest.skip("transformers has no gradient checkpointing for this tower")
    model, inputs = adapted(model, init_weights=False), tiny.inputs()
    expected_gradients = gradients(tiny, model, inputs)
    tower.gradient_checkpointing_enable()
    for module in tower.modules():
        # Blocks are checkpointed in training only, which for others would mean dropout.
        module.training = hasattr(module, "gradient_checkpointing")
    calls = []
    handles = [m.register_forward_pre_hook(lambda *_: calls.append(1)) for m in model.modules() if isinstance(m, SageLayer)]
    for name, gradient in gradients(tiny, model, inputs).items():
        torch.testing.assert_close(gradient, expected_gradients[name], msg=name)
    assert len(calls) > len(handles)  # blocks ran again in the backward pass
