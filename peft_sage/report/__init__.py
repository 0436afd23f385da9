# SPDX-License-Identifier: Apache-2.0
"""What a run leaves for people: its results, a page and a model card."""

try:
    import jinja2  # noqa: F401
    import matplotlib  # noqa: F401
    import sklearn  # noqa: F401
    import torchmetrics  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'`peft_sage.report` needs {error.name}: pip install "peft_sage[report]"'
    ) from error

from .results import Evaluation, RunResults


__all__ = ["Evaluation", "RunResults"]
