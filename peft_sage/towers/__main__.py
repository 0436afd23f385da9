# SPDX-License-Identifier: Apache-2.0
"""Print the tested model families as a Markdown table."""

from .families import families_table


print(families_table())
