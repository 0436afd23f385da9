# SPDX-License-Identifier: Apache-2.0
"""Share what training left in a folder, with its model card. Log in first: `hf auth login`.

python push_to_hub.py finetuned user/name --private
"""

import argparse
import re
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import LocalTokenNotFoundError, validate_repo_id
from peft import PeftConfig

from peft_sage import SageClassifier


# The report shows many of the images that it was made from: upload it yourself if they may be seen.
NOT_SHARED = [
    "README.md",
    "report.html",
    "checkpoint*",
    "checkpoints/*",
    "logs/*",
    "runs/*",
]

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("folder", type=Path, help="what training saved")
parser.add_argument("repo_id", help="user/name")
parser.add_argument("--private", action="store_true", help="only you can see it")
args = parser.parse_args()

validate_repo_id(args.repo_id)
api = HfApi()
try:
    api.whoami()
except LocalTokenNotFoundError:
    parser.error("you are not logged in to the Hub: run `hf auth login`")
base_model = PeftConfig.from_pretrained(args.folder).base_model_name_or_path
if base_model and Path(base_model).is_dir():
    print(f"The base model {base_model!r} is a local folder: see docs/hub.md.")

api.create_repo(args.repo_id, private=args.private, exist_ok=True)
url = api.upload_folder(
    repo_id=args.repo_id, folder_path=args.folder, ignore_patterns=NOT_SHARED
)
# The card in the folder says how to load the folder; the card on the Hub, how to load it from there.
card = ModelCard.load(args.folder / "README.md")
card.text = re.sub(r'(from_pretrained\()".+"\)', rf'\1"{args.repo_id}")', card.text)
card.push_to_hub(args.repo_id)
print(f"Pushed: {url}")

names = SageClassifier.from_pretrained(args.repo_id).class_names
print(f"Loaded {args.repo_id} with {len(names)} classes: {', '.join(names[:5])}")
