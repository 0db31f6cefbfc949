"""Puts the notebooks of ``examples/`` into the site, so that its pages can link to them."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add each notebook as ``notebooks/NAME.ipynb``, a file to download."""
    examples = Path(config.docs_dir).parent / "examples"
    for path in sorted(examples.glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))
    return files
