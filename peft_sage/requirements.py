# SPDX-License-Identifier: Apache-2.0
"""Say what to install where a library's version is not one that the package was tested with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement


#: The tuner's hooks hang on these; safetensors writes beside and renames since 0.8. The ranges are in `setup.cfg`.
CHECKED = ("torch", "transformers", "peft", "safetensors")


def check_versions(requirements: list[str] | None = None) -> None:
    """Check the installed versions of the libraries that the package builds on.

    Args:
        requirements: Such as `["peft>=0.21"]`. Default: those of the installed package.

    Raises:
        ImportError: If a version is out of range; it names the version and the command that mends it.
    """
    if requirements is None:
        try:
            requirements = requires("peft_sage") or []
        except PackageNotFoundError:  # run from its folder, without being installed
            return
    for requirement in map(Requirement, requirements):
        if requirement.name not in CHECKED or requirement.marker is not None:
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = "none"
        if found == "none" or not requirement.specifier.contains(found, prereleases=True):
            raise ImportError(
                f"peft_sage works with {requirement}, but the version installed here is {found}. Run: "
                f'pip install "{requirement}"'
            )


check_versions()
