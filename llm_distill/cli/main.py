"""Arguments in, exit code out. Nothing heavy is imported before the arguments are good."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llm_distill import __version__
from llm_distill.errors import InputError, OwnError, ServerError, sentence
from llm_distill.recipe import Recipe
from llm_distill.recipe.sections import SECTIONS
from llm_distill.recipe.values import did_you_mean

DONE, FAILED, BAD_INPUT = 0, 1, 2

NOISY = ("bitsandbytes", "torch.utils._pytree", "torchao")
"""What warns of files for other devices as soon as transformers finds it installed."""

EPILOG = """\
any value of the recipe can be set, in YAML:
  --training.learning_rate 1e-5   --data.max_length=512   --teacher path/to/model
  --objectives.1.Logits.temperature 2.0

several GPUs:
  accelerate launch --config_file recipes/accelerate/ddp.yaml -m llm_distill run recipes/x.yaml

exit codes: 0 done, 1 failed, 2 bad input
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Without the program's name; by default that of this process.

    Returns:
        The exit code: 0, 2, or 1 for a loss that is no number and for a teacher's server that
        stopped answering. What else fails raises, which makes Python exit 1 with a traceback.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        rest, overrides = split_overrides(given)
        asked = _parser().parse_args(rest)
        _do(asked, overrides)
    except (InputError, FloatingPointError, ServerError) as error:
        # All processes find the same faults before they work, and others later.
        rank, alone = os.environ.get("RANK", "0"), isinstance(error, OwnError | ServerError)
        if rank == "0" or alone:
            who = f" process {rank}" if alone and os.environ.get("WORLD_SIZE", "1") != "1" else ""
            sys.stderr.write(f"llm-distill{who}: {sentence(error)}\n")
        return BAD_INPUT if isinstance(error, InputError) else FAILED
    except SystemExit as stop:  # argparse: 0 after --help, 2 after a mistake
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    return DONE


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Take what sets values of the recipe out of the arguments.

    Raises:
        InputError: For an unknown section, or an override without a value.

    >>> split_overrides(["run", "--data.limit=5", "--training.max_steps", "-1", "x.yaml"])
    (['run', 'x.yaml'], [('data.limit', '5'), ('training.max_steps', '-1')])
    """
    rest: list[str] = []
    overrides: list[tuple[str, str]] = []
    words = iter(argv)
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        section = key.partition(".")[0]
        if not word.startswith("--") or ("." not in key and section not in SECTIONS):
            rest.append(word)
            continue
        if section not in SECTIONS:
            near = did_you_mean(section, SECTIONS) or f"; there is {', '.join(SECTIONS)}"
            raise InputError(f"--{key}: no section {section!r} in a recipe{near}")
        if not equals:
            value = next(words, "--")
        if value.startswith("--"):
            raise InputError(f"--{key} has no value; write --{key}=value")
        overrides.append((key, value))
    return rest, overrides


def _parser() -> argparse.ArgumentParser:
    """Four commands, which read a recipe in the same way."""
    parser = _described(argparse.ArgumentParser(prog="llm-distill", allow_abbrev=False))
    parser.description = "Distil a language model as a recipe says."
    parser.add_argument("--version", action="version", version=f"llm-distill {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="run | check | map | cache"
    )
    run = _reading_recipes(commands.add_parser("run", help="train", allow_abbrev=False))
    told = "read the recipe, configs and tokenizers, print what would be trained; no weights"
    _reading_recipes(commands.add_parser("check", help=told, allow_abbrev=False))
    told = "run the teacher once, and write what it says; runs of the recipe then need no teacher"
    cache = _reading_recipes(commands.add_parser("cache", help=told, allow_abbrev=False))
    cache.add_argument(
        "--overwrite", action="store_true", help="replace a cache that is there and differs"
    )
    told = "decide, draw and write which layer learns from which; nothing is trained"
    _taking_maps(_reading_recipes(commands.add_parser("map", help=told, allow_abbrev=False)))
    kept = run.add_mutually_exclusive_group()
    kept.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="go on from this checkpoint; from the newest one in the output folder by default",
    )
    kept.add_argument(
        "--overwrite",
        action="store_true",
        help="train although the output folder is not empty; its checkpoints are deleted",
    )
    return parser


def _taking_maps(parser: argparse.ArgumentParser) -> None:
    """What `map` takes."""
    parser.add_argument(
        "-o",
        "--output",
        metavar="FOLDER",
        help="where maps and pictures go; by default the recipe's training.output_dir",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace maps that are there and differ"
    )
    parser.add_argument(
        "--no-data",
        action="store_true",
        help="load no weights and no data: write maps that need none, and draw nothing",
    )


def _reading_recipes(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What all commands take."""
    parser.add_argument("recipe", help="a YAML file, such as recipes/logits.yaml")
    parser.add_argument(
        "--allow-code",
        action="append",
        default=[],
        metavar="package.module",
        help="let the recipe name code of this module or package; or the id of a model whose "
        "repository brings its own code",
    )
    return _described(parser)


def _described(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """With the words below the options."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


def _do(asked: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> None:
    """Read the recipe, and do as the command says."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    if asked.allow_code and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # as `python -m` does, so that both find the same code
    recipe = Recipe.load(asked.recipe, overrides, asked.allow_code)
    if asked.command == "check":
        from llm_distill.cli.check import check

        check(recipe)
        return
    if asked.command == "cache":
        from llm_distill.cli.cache import cache

        cache(recipe, overwrite=asked.overwrite)
        return
    if asked.command == "map":
        from llm_distill.cli.map import map_layers

        map_layers(recipe, folder=asked.output, overwrite=asked.overwrite, reads=not asked.no_data)
        return
    from llm_distill.cli.run import run

    run(recipe, resume=asked.resume, overwrite=asked.overwrite)
