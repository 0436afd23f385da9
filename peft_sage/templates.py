# SPDX-License-Identifier: Apache-2.0
"""Sets of templates for class names, for `text_templates` of `SageConfig` and `templates` of the other functions.

The sentences are ours, of the kind that CLIP was trained on; none of the sets has been tuned on a benchmark.
"""

NATURAL = [
    "a photo of a {}.",
    "a close-up photo of a {}.",
    "a photo of one {}.",
    "a cropped photo of a {}.",
]
SPECIES = [
    "a photo of a {}, a species.",
    "a photo of a {} in the wild.",
    "a close-up photo of a {}.",
]
PRODUCTS = [
    "a photo of a {}, a product.",
    "a product photo of a {} on a white background.",
    "a {} for sale.",
]
SATELLITE = [
    "a satellite photo of {}.",
    "an aerial view of {}.",
    "a photo of {} from above.",
]
MEDICAL = [
    "a medical image showing {}.",
    "a scan with signs of {}.",
    "a clinical photo of {}.",
]
TEXTURE = ["a photo of a {} texture.", "a close-up of a {} surface.", "a {} pattern."]
