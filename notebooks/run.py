"""Runs the notebooks beside this file and keeps their results: `python notebooks/run.py [NAME ...]`.

Progress bars and what else depends on the moment or the machine is left out, so that a notebook changes only if its
results do.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WIDGET = "application/vnd.jupyter.widget-view+json"


def run(path: Path) -> None:
    """Executes a notebook in an empty folder and writes it back.

    Raises:
        CellExecutionError: A cell failed; the file stays as it was.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        place = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if kept(output)]
    nbformat.write(notebook, path)


def kept(output: Any) -> bool:
    """Results stay; progress bars and what was said on stderr go."""
    if output.output_type == "stream":
        return output.name != "stderr"
    return WIDGET not in output.get("data", {}) and output.get("metadata", {}).get("sinklens") != "progress"


if __name__ == "__main__":
    names = sys.argv[1:]
    for path in sorted(HERE.glob("*.ipynb")):
        if not names or path.stem in names:
            run(path)
            print(path.name)
