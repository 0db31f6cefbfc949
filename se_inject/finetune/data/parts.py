"""The images of a run: its parts train, val and test, each image with its class."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from se_inject.finetune.data.sources import Source
from se_inject.finetune.options.trust import printable


@dataclass(frozen=True)
class Part:
    """Some images of a source, each with the index of its class in the run."""

    source: Source
    indices: Sequence[int]
    labels: Sequence[int]

    @property
    def names(self) -> list[str]:
        return [self.source.names[i] for i in self.indices]


@dataclass(frozen=True)
class Split:
    """The images of a run. ``parts`` has train and val, and also test if the data have one."""

    classes: tuple[str, ...]
    parts: Mapping[str, Part]

    def counts(self) -> dict[str, list[int]]:
        """The number of images of each class in each part."""
        found = {name: Counter(part.labels) for name, part in self.parts.items()}
        return {name: [c[i] for i in range(len(self.classes))] for name, c in found.items()}

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """The name, the class and the part of each image."""
        for name, part in self.parts.items():
            for image, label in zip(part.names, part.labels, strict=True):
                yield image, self.classes[label], name


def limited(split: Split, limit: int | None) -> Split:
    """Keep at most ``limit`` images of each part. The classes take turns, one image at a time."""
    if limit is None:
        return split
    parts = {}
    for name, part in split.parts.items():
        turns: Counter[int] = Counter()
        ranked = []
        for index, label in zip(part.indices, part.labels, strict=True):
            ranked.append((turns[label], label, index))
            turns[label] += 1
        kept = sorted((index, label) for _, label, index in sorted(ranked)[:limit])
        parts[name] = Part(part.source, [i for i, _ in kept], [label for _, label in kept])
    return Split(split.classes, parts)


def table_of(result: Split) -> list[str]:
    """The lines of a table that counts the images of each class in each part.

    If there are many classes, only the first and the last few are shown.
    """
    counts, total = result.counts(), len(result.classes)
    shown = [*range(total)] if total <= 12 else [*range(5), -1, *range(total - 5, total)]
    rows = [["class", *counts]]
    for i in shown:
        numbers = [f"{part[i]:,}" for part in counts.values()]
        rows.append(
            ["...", *("" for _ in counts)] if i < 0 else [printable(result.classes[i]), *numbers]
        )
    rows.append([f"{total} classes", *(f"{sum(part):,}" for part in counts.values())])
    width = min(40, max(len(row[0]) for row in rows))
    return [
        "  ".join([row[0][:width].ljust(width), *(cell.rjust(7) for cell in row[1:])])
        for row in rows
    ]
