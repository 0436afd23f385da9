# SPDX-License-Identifier: Apache-2.0
"""An adapter's weights under the names of the model that they are loaded into: complete and finite, or refused."""

from collections.abc import Iterable

from torch import Tensor

from .registration import PREFIX
from .towers.mlps import same_module


PEFT_ROOT = "base_model.model."


def align_names(
    state_dict: dict[str, Tensor], mlps: Iterable[str]
) -> dict[str, Tensor]:
    """Rename the adapted MLPs of a weights file to those of the model, which may hold the same tower in another class.

    Raises:
        ValueError: They do not correspond one to one.
    """
    in_model = sorted(name.removeprefix(PEFT_ROOT) for name in mlps)
    ours = [key for key in state_dict if f".{PREFIX}" in key]
    in_file = sorted({_mlp(key) for key in ours})
    if len(in_file) != len(in_model) or not all(map(same_module, in_file, in_model)):
        raise ValueError(
            "The adapter's weights do not fit the model: the file has adapted blocks "
            f"{_preview(in_file)}, the model {_preview(in_model)}."
        )
    renamed = dict(zip(in_file, in_model, strict=True))
    keys = {
        key: PEFT_ROOT + renamed[_mlp(key)] + key[key.index(f".{PREFIX}") :]
        for key in ours
    }
    return {keys.get(key, key): value for key, value in state_dict.items()}


def check_complete(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check that a weights file holds exactly the tensors that an adapter needs.

    Raises:
        ValueError: A tensor is missing, is not expected, has another shape (but any where the model's has no entries,
            as in a blank head), or holds NaN or infinity.
    """
    missing = sorted(expected.keys() - found.keys())
    surplus = found.keys() - expected.keys()
    unknown = sorted(key for key in surplus if f".{PREFIX}" in key)
    if missing or unknown:
        raise ValueError(
            "The adapter's weights do not fit its configuration: missing from the file "
            f"{_preview(missing)}, not expected in it {_preview(unknown)}."
        )
    for key, value in expected.items():
        got = found[key]
        has_shape = value.numel() > 0 or f".{PREFIX}" in key
        same_shape = value.shape == got.shape or not has_shape
        if not same_shape or got.is_floating_point() != value.is_floating_point():
            raise ValueError(
                f"The adapter's weights do not fit: {key!r} is {got.dtype} {tuple(got.shape)} in the file, "
                f"expected {value.dtype} {tuple(value.shape)}."
            )
        if not got.is_meta and not got.isfinite().all():
            raise ValueError(
                f"The adapter's weights are damaged: {key!r} holds NaN or infinity."
            )


def _mlp(key: str) -> str:
    return key[: key.index(f".{PREFIX}")].removeprefix(PEFT_ROOT)


def _preview(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{names[:4]}{more}"
