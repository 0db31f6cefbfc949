"""Writes the model card: a text for people, and above it the data that the Hub's search reads."""

from typing import TYPE_CHECKING

from se_inject.keep.hub.about import About, RunSaid
from se_inject.layers.variant import Variant

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_TASK = "image-classification"


def card_text(about: About, source: str) -> str:
    """The text of the whole README.md.

    Args:
        source: what the reader of the card will pass to ``from_pretrained``.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        license=about.license,
        library_name="se-inject",
        base_model=about.base_repo,
        pipeline_tag=_TASK if about.run else None,
        tags=["se-inject", "squeeze-and-excitation"],
        datasets=_dataset(about.run),
        model_name=f"{about.name} with SE blocks",
        eval_results=_results(about.run) if about.run else None,
    )
    parts = [f"# {about.name} with Squeeze-and-Excitation blocks", _what(about)]
    parts += ["## How to load it", _load(about, source)]
    if about.run:
        parts += ["## Results", _figures(about.run)]
    parts += ["## Licence", _licence(about)]
    text = "\n\n".join(parts)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def _dataset(run: RunSaid | None) -> str | None:
    return run.data.removeprefix("hfds/") if run and run.data.startswith("hfds/") else None


def _results(run: RunSaid) -> "list[EvalResult]":
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=_TASK,
            dataset_type=_dataset(run) or run.data,
            dataset_name=run.data,
            dataset_split=figure.split,
            metric_type="accuracy",
            metric_value=round(figure.value, 6),
        )
        for figure in run.figures
    ]


def _what(about: About) -> str:
    ratios = sorted({site.r for site in about.sites})
    custom = any(site.settings.custom for site in about.sites)
    rows = [
        ("base", f"`{about.base}`" if about.base else f"a `{about.class_name}`"),
        ("blocks", f"{len(about.sites)}, " + _kind(about, custom, ratios)),
        ("parameters", f"{about.params:,}, of which {about.se_params:,} are in the blocks"),
    ]
    if about.num_classes:
        rows.append(("classes", f"{about.num_classes}"))
    if about.run:
        rows.append(("data", f"`{about.run.data}`"))
        rows.append(("images", " × ".join(map(str, about.run.input_size))))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        "[Squeeze-and-Excitation](https://arxiv.org/abs/1709.01507) blocks for a network that had"
        f" none, put in by se-inject.\n\n| | |\n|---|---|\n{table}"
    )


def _kind(about: About, custom: bool, ratios: list[int]) -> str:
    if custom:
        return "another attention layer in place of SE"
    variants = {site.settings.variant for site in about.sites}
    options = [v.differing() for v in variants] if variants != {Variant()} else []
    said = {f"{k}={v}" for of_one in options for k, v in of_one.items()}
    return ", ".join([f"r = {' and '.join(map(str, ratios))}", *sorted(said)])


def _load(about: About, source: str) -> str:
    if about.library_base is None:
        return _python(
            "from se_inject import load_se", f'model = load_se(base, "{source}")  # base: your own'
        )
    return _python("import se_inject", f'model = se_inject.from_pretrained("{source}")') + (
        "\n\nThe base is built by its name, and its own weights are fetched where they are not in"
        f" `se.safetensors`. For a base that you have built: `se_inject.load_se(base, "
        f'"{source}")`. Neither runs code of this repository.'
    )


def _python(*lines: str) -> str:
    return "\n".join(["```sh", "pip install se-inject", "```", "", "```python", *lines, "```"])


def _figures(run: RunSaid) -> str:
    rows = "\n".join(f"| {f.images} | {100 * f.value:.2f} % |" for f in run.figures)
    return f"| accuracy on | |\n|---|---|\n{rows}\n\n{run.verdict}"


def _licence(about: About) -> str:
    if about.license is None:
        return "The licence of the base is not known here, and none is given: ask the author."
    return f"`{about.license}`"
