# SPDX-License-Identifier: Apache-2.0
"""What a training script's command line needs: flags from dataclasses, errors to act on, a folder of its own."""

import argparse
import dataclasses
import difflib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import torch
import yaml
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations.integration_utils import (
    get_available_reporting_integrations,
)

from .arguments import SageTrainingArguments, has_fast_bfloat16
from .pictures import available_cores
from .run_files import RESULT_ARGUMENTS, changed_settings, latest_checkpoint


ARGUMENTS_FILE = "arguments.json"
#: With less free space a run is refused at once.
MIN_FREE_BYTES = 50 * 2**20


def _option(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class RunArguments(SageTrainingArguments):
    """What a script asks in addition to the recipe."""

    _argument_group_name = "Recipe and output"
    output_dir: str | None = _option("finetuned", "For adapter, report, checkpoints")
    resume_from_checkpoint: str | None = _option(None, "A checkpoint, or latest")
    overwrite_output_dir: bool = _option(False, "Replace a run with other settings")
    bf16: bool = _option(
        has_fast_bfloat16(), "bfloat16 mixed precision; by default on CPUs made for it"
    )

    def __post_init__(self) -> None:
        if has_fast_bfloat16():
            self.use_cpu = True  # transformers wants to hear it
            self.bf16 = self.bf16 and not self.fp16
        super().__post_init__()


class CommandLineParser(HfArgumentParser):
    """`HfArgumentParser` with `--config FILE.yaml`, and sections in which what transformers adds comes last."""

    def __init__(self, dataclass_types: Any, description: str) -> None:
        super().__init__(
            dataclass_types,
            description=description,
            usage="%(prog)s [--flag value ...]",
            epilog="--debug shows where in the code an error arose.",
            allow_abbrev=False,
            formatter_class=_HelpFormatter,
        )
        self.add_argument(
            "--config", help="YAML file with values for these flags; the others win"
        )

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        hints = get_type_hints(dtype)
        own = {
            name
            for kind in dtype.__mro__
            if kind is not TrainingArguments
            for name in vars(kind).get("__annotations__", ())
        }
        for title, is_own in (
            (getattr(dtype, "_argument_group_name", dtype.__name__), True),
            ("All other arguments of transformers' Trainer", False),
        ):
            fields = [f for f in dataclasses.fields(dtype) if f.init]
            fields = [f for f in fields if (f.name in own) == is_own]
            section: Any = self.add_argument_group(title) if fields else None
            for f in fields:
                f.type = hints[f.name]
                self._parse_dataclass_field(section, f)

    def error(self, message: str) -> NoReturn:
        """End with exit code 2 and the message, without the list of all flags."""
        unknown = re.fullmatch(r"unrecognized arguments: (\S+).*", message)
        flags = self._option_string_actions
        near = difflib.get_close_matches(unknown[1], flags, 1) if unknown else []
        hint = f" (did you mean {near[0]}?)" if near else ""
        self.exit(2, f"error: {message}{hint}\n")

    def parse(self, argv: Sequence[str]) -> list[Any]:
        """The dataclasses; flags in `argv` win over the file that `--config` names."""
        config = self.parse_args(list(argv)).config
        flags = self._flags_of(config) if config else []
        *parsed, _ = self.parse_args_into_dataclasses(
            [*flags, *argv], look_for_args_file=False
        )
        return parsed

    def _flags_of(self, path: str) -> list[str]:
        """A YAML file as flags, so that the rules of the command line hold for it too."""
        try:
            # Every scalar stays a string: YAML itself reads `no` as false and 1e-3 as text.
            text = Path(path).read_text(encoding="utf-8")
            values = yaml.load(text, Loader=yaml.BaseLoader) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"`--config` {path!r} cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(
                f"`--config` {path!r} must map flags to values, got a {type(values).__name__}."
            )
        options = {*self._option_string_actions} - {"-h", "--help", "--config"}
        known = {name.lstrip("-").replace("-", "_"): name for name in options}
        flags: list[str] = []
        for key, value in values.items():
            name = key.replace("-", "_")
            if name not in known:
                raise ValueError(f"`--config` {path!r} has the unknown key {key!r}.")
            if isinstance(value, list):
                flags += [known[name], *value]
            elif value not in ("", "null"):
                flags.append(f"{known[name]}={value}")
        return flags


class _HelpFormatter(
    argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        # Where the default depends on other things, the help says it.
        return (
            action.help if action.default is None else super()._get_help_string(action)
        )


def run(
    job: Callable[..., Any],
    dataclass_types: Sequence[type],
    description: str,
    argv: Sequence[str] | None = None,
) -> None:
    """Parse the command line and do the job, `job(*dataclasses)`, the last of which are the training arguments.

    What is wrong with the input ends the process with one block of text and exit code 2, an interruption with what
    was saved and the command that continues.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    argv = [flag for flag in given if flag != "--debug"]
    folder, note = None, _note_of_launcher()
    try:
        parsed = CommandLineParser(dataclass_types, description).parse(argv)
        folder = parsed[-1].output_dir
        _use_all_cores()
        job(*parsed)
    except KeyboardInterrupt:
        if is_first_process():
            print(_interruption(folder, argv), file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        if "--debug" in given:
            raise
        if is_first_process():
            print(f"error: {error}{note}", file=sys.stderr)
        sys.exit(2)


def is_first_process() -> bool:
    """Whether this process is the first on its machine; it needs no process group."""
    return os.environ.get("LOCAL_RANK", "0") in ("0", "-1")


def _note_of_launcher() -> str:
    """A line below an error, which tells it from what a launcher prints afterwards."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "\nWhat follows is torchrun's report that a process ended."
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return "\nWhat follows is accelerate's report that the process ended; `accelerate launch --quiet` omits it."
    return ""


def _interruption(folder: str | None, argv: Sequence[str]) -> str:
    checkpoint = latest_checkpoint(folder) if folder else None
    command = ["python", sys.argv[0], *argv]
    if checkpoint is None:
        return f"\nInterrupted before a checkpoint was saved.\nStart again with: {shlex.join(command)}"
    if not any(flag.startswith("--resume") for flag in argv):
        command += ["--resume_from_checkpoint", "latest"]
    return (
        f"\nInterrupted; {checkpoint} is saved.\nContinue with: {shlex.join(command)}"
    )


def _use_all_cores() -> None:
    # Launchers leave a process on a CPU one thread.
    if "LOCAL_WORLD_SIZE" in os.environ and not torch.cuda.is_available():
        share = available_cores() // int(os.environ["LOCAL_WORLD_SIZE"])
        torch.set_num_threads(max(1, share))


def check_run(args: SageTrainingArguments) -> None:
    """Raise ValueError or OSError unless there are the trackers, room to write and, for a push, a login and a name."""
    for tracker in args.report_to or ():
        if tracker not in get_available_reporting_integrations():
            raise ValueError(
                f"`report_to` {tracker!r} is unknown or not installed: pip install {tracker}"
            )
    folder = Path(str(args.output_dir)).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"`output_dir` {args.output_dir!r} cannot be written to.")
    free = shutil.disk_usage(existing).free
    if free < MIN_FREE_BYTES:
        raise OSError(
            f"`output_dir` {args.output_dir!r} is on a disk with {free // 2**20} MiB free; make room first."
        )
    if not args.push_to_hub:
        return
    validate_repo_id(args.hub_model_id or folder.name)
    try:
        HfApi().whoami(token=args.hub_token)
    except Exception as error:
        raise ValueError(
            f"`push_to_hub` needs a login: run `hf auth login`, or give `hub_token` ({error})."
        ) from error


def claim_output_dir(
    args: SageTrainingArguments,
    settings: dict[str, Any],
    overwrite: bool,
    write: bool = True,
) -> None:
    """Refuse the folder of a run with other settings; or else note the settings of this one there.

    Args:
        args: Their `output_dir` is meant, and what the result depends on of them is compared.
        settings: What else is compared, and may come in parts: of what is not known yet nothing is said.
        overwrite: Whether the other run's checkpoints are removed instead.
        write: Whether this run begins.

    Raises:
        ValueError: The folder is another run's. The settings that differ are named.
    """
    settings = {name: getattr(args, name) for name in RESULT_ARGUMENTS} | settings
    settings = json.loads(json.dumps(settings, default=str))
    folder = Path(str(args.output_dir))
    file = folder / ARGUMENTS_FILE
    has_results = file.with_name("results.json").is_file()
    saved = {}
    if file.is_file() and (has_results or latest_checkpoint(folder)):
        saved = json.loads(file.read_text(encoding="utf-8"))
    common = {name: saved[name] for name in settings if name in saved}
    changed = changed_settings(common, {name: settings[name] for name in common})
    if changed and not overwrite:
        raise ValueError(
            f"`output_dir` {args.output_dir!r} is of a run with other settings ({'; '.join(changed)}); choose another "
            "one, or give `--overwrite-output-dir`."
        )
    if not write or not is_first_process():
        return
    if changed:
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    file.parent.mkdir(parents=True, exist_ok=True)
    settings = settings if changed else saved | settings
    file.write_text(json.dumps(settings, indent=2), encoding="utf-8")
