"""`python -m embedding_tutorial COMMAND`: own pairs from a file to a better search; `--help` lists them.

A thin layer on `own_data`, whose functions do the same in Python. A TutorialError is one line on stderr and
the exit code 1; a wrong option is 2.
"""

import os
import sys
from pathlib import Path

import click

from .files import TutorialError


class Commands(click.Group):
    """Turns what a reader can put right into one line instead of a traceback."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except (TutorialError, OSError) as error:
            raise click.ClickException(" ".join(str(error).split())) from error


def columns(command):
    """The options that name a file's columns."""
    command = click.option("--query", metavar="COLUMN", help="The column of queries.")(command)
    return click.option("--passage", metavar="COLUMN", help="The column of passages.")(command)


device = click.option("--device", metavar="cpu|cuda|cuda:1", help="Default: a GPU where torch can use one.")
corpus = click.option("--corpus", metavar="FILE", help="Further passages to search among.")


def device_named(name):
    from .profiles import choose_device

    return choose_device(name)[0]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
def main():
    """Fine-tune an embedding model on your own pairs, and search with it.

    FILE holds pairs of a query and its passage: JSON lines, JSON, CSV or Parquet.
    """
    for stream in (sys.stdout, sys.stderr):  # a Windows console may not know every letter
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


@main.command()
@click.argument("file")
@click.option("--model", default="pocket", show_default=True, metavar="DIR|pocket|bge-m3")
@device
@columns
def check(file, model, device, query, passage):
    """Say what is in FILE: doubles, lengths, languages, likely false negatives."""
    from . import own_data

    click.echo(own_data.check(file, model, query, passage, True, device_named(device)))


@main.command()
@click.argument("file")
@click.option("--out", required=True, metavar="DIR", help="Where the model goes; its run goes to DIR-run.")
@click.option("--model", default="pocket", show_default=True, metavar="DIR|pocket|bge-m3")
@click.option(
    "--runs", default=1, show_default=True, type=click.IntRange(1), help="The mean of so many runs."
)
@click.option("--epochs", type=click.IntRange(1), help="Default: the recipe's 5.")
@click.option(
    "--learning-rate", type=click.FloatRange(0, min_open=True), help="2e-4 for pocket, 2e-5 for bge-m3."
)
@click.option("--max-length", type=click.IntRange(8), help="Tokens that are read of a text. Default: 512.")
@click.option("--checkpointing", is_flag=True, help="Less memory, more time.")
@click.option("--more", metavar="FILE", help="Further pairs, for training alone (see `answers`).")
@click.option("--curve", is_flag=True, help="Train on 20, 40, 80, … pairs, three times each, instead.")
@corpus
@device
@columns
def train(file, out, model, runs, curve, device, **options):
    """Train on FILE with the tutorial's recipe; killed, it goes on from the last epoch."""
    from . import own_data, reports

    options = {name: value for name, value in options.items() if value} | {"device": device_named(device)}
    if curve:
        for size, score in own_data.curve(file, out, model, **options).items():
            click.echo(f"{size:>8}  MRR {reports.interval(score)}")
        click.echo(f"Figure: {out}-curve.png")
    else:
        results = own_data.train(file, out, model, runs, **options)
        click.echo(f"\n{own_data.table_of(results)}\n\nThe model and its card: {out}")


@main.command()
@click.argument("file")
@click.option("--out", required=True, metavar="FILE", help="Where the requests go, as JSON lines.")
@click.option("--count", default=200, show_default=True, type=click.IntRange(1), help="Pairs to ask for.")
@columns
def ask(file, out, count, query, passage):
    """Write requests to a language model for more pairs like those of FILE. Nothing is sent."""
    from . import more_pairs

    number = more_pairs.write_requests(file, out, count, query=query, passage=passage)
    click.echo(f"{number:,} requests for {count:,} pairs: {out}")


@main.command()
@click.argument("file")
@click.argument("answers")
@click.option("--out", required=True, metavar="FILE", help="Where the pairs that are kept go.")
@click.option("--model", default="pocket", show_default=True, metavar="DIR|pocket|bge-m3")
@click.option("--run-code", is_flag=True, help="Run the assertions of the answers: a language model's code.")
@columns
def answers(file, answers, out, model, run_code, query, passage):
    """Keep what can be trained on of the ANSWERS (JSON lines) to the requests of `ask` for FILE."""
    from . import more_pairs

    found = more_pairs.keep_answers(file, answers, out, model, run_code, query, passage)
    for what, number in found.items():
        click.echo(f"{number:>6,}  {what}")


@main.command()
@click.argument("folder", metavar="DIR")
@click.argument("file")
@corpus
@device
@columns
def evaluate(folder, file, corpus, device, query, passage):
    """Recall@1 and MRR of the model in DIR on FILE, with 95 % intervals."""
    from . import own_data, reports

    scores, n, m = own_data.evaluate_file(folder, file, corpus, query, passage, device_named(device))
    click.echo(f"{n:,} queries, {m:,} passages")
    for name, score in scores.items():
        click.echo(f"{name:>8}  {reports.interval(score)}")


@main.command()
@click.argument("folder", metavar="DIR")
@click.argument("file")
@click.argument("query", required=False)
@click.option("--top", default=3, show_default=True, type=click.IntRange(1), help="Passages to show.")
@click.option("--passage", metavar="COLUMN", help="The column of passages.")
@device
def search(folder, file, query, top, passage, device):
    """Search the passages of FILE (pairs, or one text a row) with the model in DIR.

    Without QUERY it asks for queries, until an empty one.
    """
    from . import own_data, reports

    find = own_data.Search(folder, file, passage, device_named(device))
    asked = query or click.prompt("query (empty: end)", default="", show_default=False)
    while asked.strip():
        for score, text in find(asked, top):
            click.echo(f"{score:.3f}\n{reports.preview(text)}\n")
        asked = "" if query else click.prompt("query (empty: end)", default="", show_default=False)


@main.command()
@click.argument("folder", metavar="DIR")
@click.option("--onnx", is_flag=True, required=True, help="The format; ONNX is the only one.")
@click.option("--int8", is_flag=True, help="Also quantise the weights to 8 bits.")
@click.option("--out", metavar="DIR", help="Default: DIR-onnx.")
def export(folder, onnx, int8, out):
    """Write the model in DIR for ONNX Runtime."""
    from .onnx_export import export_onnx
    from .own_data import beside

    out = Path(out) if out else beside(folder, "-onnx")
    export_onnx(Path(folder), out, int8=int8)
    click.echo(f"ONNX model: {out}")


@main.command()
@click.option("--pairs", metavar="FILE", help="Your own pairs instead of the tutorial's.")
@corpus
@columns
def run(pairs, corpus, query, passage):
    """Run both notebooks from top to bottom, in place."""
    from . import run_notebooks

    given = {"PAIRS": pairs and Path(pairs).absolute(), "CORPUS": corpus and Path(corpus).absolute()}
    for name, value in (given | {"QUERY": query, "PASSAGE": passage}).items():
        if value:
            os.environ[f"TUTORIAL_{name}"] = str(value)
    run_notebooks.main(run_notebooks.NOTEBOOKS)


if __name__ == "__main__":
    main(prog_name="python -m embedding_tutorial")
