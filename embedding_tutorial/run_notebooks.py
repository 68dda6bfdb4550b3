"""Execute notebooks in place and show what happens: `python -m embedding_tutorial.run_notebooks FILE ...`

Prints which cell of how many is running, and its output as it comes, progress bars included. A notebook
is written back only when all its cells ran; an interrupted or failing run leaves the file as it was.
"""

import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from .files import ROOT, atomic_file

NAMES = ("01-train_embedding_with_validation.ipynb", "02-C-MTEB_retrieval_evaluation.ipynb")
NOTEBOOKS = [ROOT / name for name in NAMES]


class LiveClient(NotebookClient):
    """An nbclient that prints each cell's heading and its stream output while it runs."""

    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] == "stream":
            print(msg["content"]["text"], end="", flush=True)
        return super().process_message(msg, cell, cell_index)

    def announce(self, cell, cell_index):
        code = [i for i, c in enumerate(self.nb.cells) if c.cell_type == "code"]
        if cell.cell_type == "code":
            lines = [line for line in cell.source.splitlines() if line.strip() and not line.startswith("#|")]
            first = lines[0][:90] if lines else ""
            print(f"\n[cell {code.index(cell_index) + 1} of {len(code)}] {first}", flush=True)


def settle_carriage_returns(text):
    """What a terminal would show in the end: of a line that was overwritten with \\r, the last version."""
    lines = (re.sub(r"\r+$", "", line) for line in text.split("\n"))
    return "\n".join(line.rsplit("\r", 1)[-1] for line in lines)


def tidy(notebook):
    """Merge neighbouring stream outputs and keep only the last state of progress bars."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.metadata.pop("execution", None)  # time stamps: noise in every diff
        outputs = []
        for output in cell.outputs:
            if output.output_type == "stream" and outputs and outputs[-1].get("name") == output.name:
                outputs[-1].text += output.text
            else:
                outputs.append(output)
        for output in outputs:
            if output.output_type == "stream":
                output.text = settle_carriage_returns(output.text)
        cell.outputs = outputs
    return notebook


def run(path):
    """Execute one notebook in place. Raises CellExecutionError where a cell fails."""
    path = Path(path)
    notebook = nbformat.read(path, as_version=4)
    print(f"\n=== {path.name} ===", flush=True)
    resources = {"metadata": {"path": str(path.parent)}}
    client = LiveClient(notebook, timeout=None, kernel_name="python3", resources=resources)
    client.on_cell_start = client.announce
    start = time.perf_counter()
    client.execute()
    with atomic_file(path, "w") as file:
        nbformat.write(tidy(notebook), file)
    print(f"\n=== {path.name}: done in {(time.perf_counter() - start) / 60:.1f} min ===", flush=True)


def main(paths):
    for path in paths:
        try:
            run(path)
        except CellExecutionError as error:
            sys.exit(f"\n{path} stopped; the file is unchanged.\n{error}")
    print("\nFigures: images/*.png    Models: models/    Scores: c_mteb_results/")


if __name__ == "__main__":
    main(sys.argv[1:])
