# SPDX-License-Identifier: Apache-2.0
"""Name what is in images, with a trained model from a folder or the Hub: python predict.py finetuned photos/new"""

import argparse

from peft_sage import SageClassifier
from peft_sage.pictures import find_images


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="folder or Hub id")
parser.add_argument("images", nargs="+", help="files, or folders of them")
args = parser.parse_args()

paths = find_images(args.images)
for path, [best] in zip(
    paths, SageClassifier.from_pretrained(args.model).predict(paths), strict=True
):
    print(f"{path}: {best['label']} {100 * best['score']:.1f} %")
