# SPDX-License-Identifier: Apache-2.0
"""What a run leaves for people: its results, a page and a model card."""

from pathlib import Path
from typing import Any


try:
    from .card import make_model_card
    from .figures import plot_long_tail
    from .page import Page
    from .results import Evaluation, RunResults
    from .templates import render
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'`peft_sage.report` needs {error.name}: pip install "peft_sage[report]"'
    ) from error


__all__ = ["Evaluation", "RunResults", "make_model_card", "write_report"]


def write_report(
    folder: str | Path, results: RunResults, data: Any, repo_id: str | None = None
) -> None:
    """Write `results.json`, `report.html`, `README.md` (the model card) and `long_tail.png` into a folder.

    Args:
        folder: Where the model was saved. It must exist.
        results: The results of the run.
        data: The [`ImageData`] of the run.
        repo_id: What the card loads the model from. Default: the folder.
    """
    folder = Path(folder)
    results.save(folder)
    plot_long_tail(results).savefig(folder / "long_tail.png")
    make_model_card(results, repo_id or str(folder)).save(folder / "README.md")
    page = render("page.html.jinja", page=Page(results, data), run=results)
    (folder / "report.html").write_text(page, encoding="utf-8")
