# SPDX-License-Identifier: Apache-2.0
"""Print the tested model families, as the Markdown table of docs/towers.md and as the list of the README."""

from .families import families_line, families_table


print(families_table(), families_line(), sep="\n\n")
