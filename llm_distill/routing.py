"""Data that are routed: does every example name a teacher that there is?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from datasets import Dataset, IterableDataset

from llm_distill.data.given import first_of
from llm_distill.errors import InputError
from llm_distill.teachers import routers

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from llm_distill.teachers import Teacher

CHECKED = 1000
"""Examples that are looked at where there is no table."""


def check_routes(teacher: Teacher, dataset: object, name: str) -> None:
    """Refuse data that a teacher cannot route: of a table every row, else the first examples.

    Args:
        teacher: Its experts are looked up, and those of its members.
        dataset: As Trainer takes it; several under names, too.
        name: Of the dataset, for messages.

    Raises:
        InputError: For a column that is missing, or that names no expert.
    """
    if isinstance(dataset, Mapping):
        for key, part in dataset.items():
            check_routes(teacher, part, f"{name}[{key}]")
        return
    for router in routers(teacher):
        columns = _columns(dataset)
        if columns is not None and router.by not in columns:
            raise InputError(
                f"{name} has no column '{router.by}', by which {router.spec.name} routes; it has "
                f"{', '.join(columns)}"
            )
        router.check_names(_values(dataset, router.by), name)


def _columns(dataset: object) -> Sequence[str] | None:
    """The columns of a dataset that knows them."""
    return dataset.column_names if isinstance(dataset, Dataset | IterableDataset) else None


def _values(dataset: object, column: str) -> Iterable[object]:
    """What a column says; the collator refuses examples that do not have it."""
    if isinstance(dataset, Dataset):
        found: list[object] = dataset.unique(column)
        return found
    examples = (example for example in first_of(dataset, CHECKED) if isinstance(example, Mapping))
    return (example[column] for example in examples if column in example)
