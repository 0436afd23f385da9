# SPDX-License-Identifier: Apache-2.0
"""Where the MLPs of a vision tower are, and how a model embeds text and images.

Nothing here changes a model, keeps state, or imports a model library.
"""
