# SPDX-License-Identifier: Apache-2.0
"""Every name of PEFT that is private or has moved between releases, in one place.

Tried on PEFT 0.21.0, 0.21.1 and 0.21.2.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
from packaging.specifiers import SpecifierSet
from torch import nn


#: The releases of PEFT that this package works with, as in setup.cfg.
SUPPORTED = ">=0.21,<0.22"

if not SpecifierSet(SUPPORTED).contains(peft.__version__, prereleases=True):
    raise ImportError(
        f"peft_sage needs peft{SUPPORTED}, but peft {peft.__version__} is installed: "
        f"run `pip install 'peft{SUPPORTED}'`."
    )

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # noqa: E402
from peft.tuners._buffer_dict import BufferDict  # noqa: E402
from peft.tuners.tuners_utils import (  # noqa: E402
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    check_target_module_exists,
)
from peft.utils import (  # noqa: E402
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    register_peft_method,
)
from peft.utils.constants import DUMMY_TARGET_MODULES  # noqa: E402


__all__ = [
    "DUMMY_TARGET_MODULES",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "SUPPORTED",
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "BufferDict",
    "ModulesToSaveWrapper",
    "active_module",
    "adapters_off",
    "is_target",
    "register_peft_method",
]


def is_target(config: Any, name: str) -> bool:
    """Whether a configuration asks for the module of this name, as PEFT matches names.

    Without `target_modules`, for any that `exclude_modules` and `modules_to_save` leave.
    """
    asked = copy.copy(config)
    asked.target_modules = config.target_modules or set()
    asked.target_parameters = None
    found = check_target_module_exists(asked, name)
    if config.target_modules is None:
        return not isinstance(found, _ExcludedModule)
    return bool(found)


def active_module(module: nn.Module) -> nn.Module:
    """The module that runs where PEFT has wrapped one of `modules_to_save`; others as they are."""
    if not isinstance(module, ModulesToSaveWrapper):
        return module
    names = module.active_adapters
    trained = all(name in module.modules_to_save for name in names)
    if module.disable_adapters or not names or not trained:
        return module.original_module
    return module.modules_to_save[names[0]]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Run a model without adapters and trained copies of modules, of whatever method.

    Unlike PEFT's `enable_adapters(False)` it leaves alone what requires gradients.
    """
    configs = getattr(model, "peft_config", {}).values()
    if any(getattr(config, "bias", "none") != "none" for config in configs):
        warnings.warn(
            "An adapter with `bias` trains biases of the base model itself, which cannot be switched off.",
            stacklevel=3,
        )
    layers = [
        module
        for module in model.modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        and not module.disable_adapters
    ]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
