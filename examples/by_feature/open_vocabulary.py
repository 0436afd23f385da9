# SPDX-License-Identifier: Apache-2.0
"""Open vocabulary: train on every second class, then give adapter and head the other classes, without training.

python examples/by_feature/open_vocabulary.py
"""

import numpy as np
import torch
from demo import Demo, Images, evaluate, load, parse, report, train
from peft import get_peft_model

from peft_sage import SageClassifier, SageConfig, SageLoss, encode_class_descriptions


def only(data: Images, classes: list[int]) -> Images:
    """Return the images of some classes, numbered anew."""
    part = data.images.select(np.flatnonzero(np.isin(data.images.labels, classes)))
    part.labels = np.searchsorted(classes, part.labels)
    return Images(part, data.processor)


def texts_of(demo: Demo, classes: list[int]) -> dict[str, list[str]]:
    """Return the descriptions of some classes."""
    return {demo.class_names[k]: demo.descriptions[demo.class_names[k]] for k in classes}


args = parse(__doc__)
demo = load(args)
known, unknown = (list(range(start, len(demo.class_names), 2)) for start in (0, 1))
texts = {"known": texts_of(demo, known), "new": texts_of(demo, unknown)}
heads = {name: encode_class_descriptions(demo.clip, demo.tokenizer, texts[name]) for name in texts}
counts = torch.ones(len(unknown), dtype=torch.long)  # no training images: the groups mean nothing here

classifier = SageClassifier(demo.clip, heads["new"])
test = only(demo.splits["test"], unknown)
report("new classes, zero-shot", {**evaluate(classifier, test, counts), "few": float("nan")})

classifier.set_classes(texts["known"])
config = SageConfig(class_descriptions=texts["known"], modules_to_save=[])  # the head stays as it is
model = get_peft_model(classifier, config)
train(model, only(demo.splits["train"], known), SageLoss(demo.class_counts[known]), args)
report("known classes", evaluate(model, only(demo.splits["test"], known), demo.class_counts[known]))

classifier.set_classes(texts["new"])  # the guidance follows
report("new classes, adapter of the known ones", {**evaluate(model, test, counts), "few": float("nan")})
