# SPDX-License-Identifier: Apache-2.0
"""Make Sage known to PEFT in the running process.

PEFT looks its methods up by a member of the enum `PeftType` and has no extension point for new members. So the one
thing that is touched is that enum, in memory: no file of PEFT is edited and nothing else is replaced.
"""

from peft import PeftType

from ._peft_compat import PEFT_TYPE_TO_CONFIG_MAPPING, register_peft_method


#: The value names this package, because a user who forgot `import peft_sage` sees nothing but this value.
PEFT_TYPE_NAME = "PEFT_SAGE"

#: The prefix of all parameters and buffers. The shorter `sage_` is part of names such as `message_encoder`.
PREFIX = "peft_sage_"


def add_peft_type(name: str) -> PeftType:
    """Return the member `name` of `PeftType`, which is its value as well, and create it if it does not exist.

    Look-up by name and by value, iteration, pickle, deepcopy and JSON work as for PEFT's own members.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType)  # type: ignore[attr-defined]
    # The metaclass forbids setting members on an enum, so its own `__setattr__` is passed by.
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def register(config_cls: type, model_cls: type) -> None:
    """Register the method with PEFT, once; KeyError, by PEFT, if another package holds the name or the prefix."""
    if PEFT_TYPE_TO_CONFIG_MAPPING.get(add_peft_type(PEFT_TYPE_NAME)) is not config_cls:
        register_peft_method(
            name=PEFT_TYPE_NAME.lower(),
            config_cls=config_cls,
            model_cls=model_cls,
            prefix=PREFIX,
        )
