"""Output folders that can be interrupted, and the frame around every recipe's `main`.

A step owns one folder. `recipe.json` in it says with which settings it was started, `done.json` that it
finished and what it found. So a finished step is skipped, an unfinished one is emptied and done again,
one of other settings that finished or has checkpoints is kept beside the new one, and a folder without
`recipe.json` is somebody else's and is never touched. (FlagEmbedding itself overwrites any folder.)
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

from embedding_tutorial import files
from embedding_tutorial.files import ROOT, TutorialError, move_aside, read_json, recover, write_json

OUTPUT = ROOT / "recipes" / "output"


def parser(text):
    """A parser whose help is the docstring of the recipe, with the defaults of its options."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    return argparse.ArgumentParser(description=text, formatter_class=Formatter)


def label(path):
    """A short name for a model folder or a data file: that of its own folder where its name says nothing."""
    path, plain = Path(path), ("model", "train", "groups", "merged", "fine-tuned")
    return path.parent.name if path.stem in plain else path.stem


def run(main):
    """Call `main`; a TutorialError ends the program with its message and status 1."""
    try:
        main()
    except TutorialError as error:
        sys.exit(f"Stopped: {error}")


def open_step(folder, settings, keep=()):
    """Prepare `folder` for a step. Returns what it found if it has already finished, else None.

    settings: a dict that JSON can hold, everything that changes the result. keep: what an unfinished step
    with these settings can go on from; the rest is deleted. TutorialError for a folder that no recipe made.
    """
    folder, name = Path(folder), files.relative(folder)
    recover(folder)
    marker, done = folder / "recipe.json", folder / "done.json"
    if folder.exists() and not folder.is_dir() or folder.is_dir() and any(folder.iterdir()):
        if not marker.is_file():
            remedy = "Nothing was touched: choose another --output, or move that folder away."
            raise TutorialError(f"{name} exists and no recipe made it. {remedy}")
        before = read_json(marker)
        if before == settings and done.exists():
            print(f"{name}: already finished with these settings, skipped. Delete it to redo it.")
            return read_json(done)
        half = "" if done.exists() else " and cut off; its checkpoints are kept"
        if before != settings and (done.exists() or any(folder.glob("work/checkpoint-*"))):
            changed = sorted(name for name in {*before, *settings} if before.get(name) != settings.get(name))
            aside = folder.with_name(folder.name + ".previous")
            if aside.exists() and not (aside / "recipe.json").is_file():
                raise TutorialError(f"{files.relative(aside)} exists and no recipe made it. Move it away.")
            where = aside.name + (", in place of an older one" if aside.exists() else "")
            move_aside(folder, aside)
            print(f"{name} was made with other settings ({', '.join(changed)}){half}: now {where}.")
        else:
            print(f"{name}: an earlier run did not finish{'.' if keep else ', done again.'}")
            for entry in folder.iterdir():
                if entry != marker and not (before == settings and entry.name in keep):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(marker, settings)


def close_step(folder, found):
    """Mark the step as finished. found: a dict that JSON can hold; returned with the seconds it took."""
    begin = (Path(folder) / "recipe.json").stat().st_mtime
    found = {**found, "wall_seconds": round(time.time() - begin, 1)}
    write_json(Path(folder) / "done.json", found)
    print(f"Written: {files.relative(folder)}")
    return found
