# SPDX-License-Identifier: Apache-2.0
"""Outside of the tested versions, the import says what to install."""

import re
from importlib.metadata import requires, version

import pytest
from packaging.requirements import Requirement

from peft_sage.requirements import CHECKED, check_versions


def test_the_metadata_bounds_what_is_checked():
    bounded = {r.name: r.specifier for r in map(Requirement, requires("peft_sage")) if not r.marker}
    for name in CHECKED:
        assert bounded[name].contains(version(name), prereleases=True)
    assert not bounded["peft"].contains("0.20.0") and not bounded["peft"].contains("0.22.0")
    assert not bounded["transformers"].contains("5.0.0")


@pytest.mark.parametrize("requirement", ["peft<0.2", "transformers>=99", "torch==1.0", "safetensors<0.1"])
def test_other_versions_are_refused_with_the_command(requirement):
    name = Requirement(requirement).name
    with pytest.raises(ImportError, match=re.escape(f"installed here is {version(name)}")) as error:
        check_versions([requirement])
    assert f'pip install "{Requirement(requirement)}"' in str(error.value)


def test_extras_are_not_checked():
    check_versions(['torch<1; extra == "old"', "numpy<0.1"])
