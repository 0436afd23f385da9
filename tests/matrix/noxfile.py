# SPDX-License-Identifier: Apache-2.0
"""The versions that peft_sage is tested with: `nox -f tests/matrix/noxfile.py`.

Each session installs one combination from PyPI into an environment of its own (a few GB each, as PyTorch from PyPI
brings CUDA) and runs the tests of the core. `README.md` beside this file says which of them passed. The ranges in
`setup.cfg` are these, and `import peft_sage` checks them.
"""

import nox


nox.options.default_venv_backend = "uv|virtualenv"

CORE = [
    *(
        "tests/test_registration.py",
        "tests/test_config.py",
        "tests/test_layer.py",
        "tests/test_model.py",
    ),
    *(
        "tests/test_encoding.py",
        "tests/test_classifier.py",
        "tests/test_workflows.py",
    ),
]
#: Python, torch, transformers, peft
COMBINATIONS = [
    ("3.10", "2.6.0", "5.16.1", "0.21.0"),
    ("3.11", "2.13.0", "5.22.0", "0.21.2"),
    ("3.11", "2.13.0", "5.23.0", "0.21.0"),
    ("3.11", "2.13.0", "5.23.0", "0.21.1"),
    ("3.11", "2.13.0", "5.23.0", "0.21.2"),
    ("3.11", "2.14.1", "5.23.0", "0.21.2"),
    ("3.12", "2.13.0", "5.23.0", "0.21.2"),
    ("3.13", "2.13.0", "5.23.0", "0.21.2"),
]


def install_and_test(
    session: nox.Session, torch: str, transformers: str, peft: str
) -> None:
    """Install one combination and run the tests of the core, with the arguments that follow `--`."""
    session.install(
        f"torch=={torch}",
        f"transformers=={transformers}",
        f"peft=={peft}",
        "-e",
        ".[test]",
    )
    session.chdir(session.invoked_from)
    session.run("python", "-m", "pytest", *CORE, *session.posargs)


for python, torch, transformers, peft in COMBINATIONS:

    @nox.session(
        python=python,
        name=f"py{python}-torch{torch}-transformers{transformers}-peft{peft}",
    )
    def combination(
        session: nox.Session,
        torch: str = torch,
        transformers: str = transformers,
        peft: str = peft,
    ) -> None:
        """One row of the matrix."""
        install_and_test(session, torch, transformers, peft)
