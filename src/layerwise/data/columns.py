"""The columns of an arrow table: which one holds the images, which one the labels, and what the labels are."""

import json
import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from layerwise.core.ranges import DataTask
from layerwise.data.machine import need
from layerwise.data.naming import IMAGE_NAMES, LABEL_NAMES, check_words, few, is_missing, pick
from layerwise.data.numbers import EXACT, chosen_targets
from layerwise.errors import LayerwiseError

PANDAS_INDEX = re.compile(r"__index_level_[0-9]+__")
"""Names under which pandas stores the numbers of the rows."""
TEXT_TYPES = ("string", "large_string", "string_view")  # arrow's names for words


class Columns(NamedTuple):
    """The columns of a table of images."""

    image: str
    label: str | None
    """None if the labels of a test split are withheld."""
    names: tuple[str, ...] | None
    """The class names that whole numbers index, if the file records them."""
    targets: tuple[str, ...] = ()
    """The columns of labels that are numbers."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The columns of labels, of either kind."""
        return self.targets or (() if self.label is None else (self.label,))


def find_columns(
    schema: Any,
    title: str,
    known: Columns | None = None,
    task: DataTask = "classification",
    targets: Sequence[str] = (),
) -> Columns:
    """The columns of images and of labels, and the class names if the schema has them.

    Args:
        schema: arrow schema, with the features that Hugging Face `datasets` notes in its metadata, if any.
        title: what to call the table in messages.
        known: the columns of the training split, which other splits have too, perhaps without the labels.
        task: what the labels are.
        targets: names of the columns of labels.
    """
    types = need("pyarrow").types
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise LayerwiseError(f"{title} has several columns of the name {name!r}; rename all but one of them.")
    features = _features(schema, title)

    def kind(name: str) -> str | None:
        return features.get(name, {}).get("_type")

    def is_image(field: Any) -> bool:
        struct = types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        return kind(field.name) == "Image" or struct or is_binary(field.type)

    def is_label(field: Any) -> bool:
        held = field.type.value_type if types.is_dictionary(field.type) else field.type
        number = types.is_integer(held) or types.is_boolean(held) or types.is_decimal(held)
        whole = types.is_floating(held) and field.name in LABEL_NAMES
        return kind(field.name) == "ClassLabel" or number or whole or str(held) in TEXT_TYPES

    if known is not None and known.image in schema.names:
        image = known.image
    else:
        images = [field.name for field in schema if is_image(field)]
        noted = [name for name in images if kind(name) == "Image"]
        image = _pick_column("image", noted or images, IMAGE_NAMES, schema, title, "encoded images")
    if known is not None and known.labels and known.labels[0] not in schema.names:
        return Columns(image, None, None)
    if task != "classification" or targets:
        wanted = chosen_targets(targets, schema.names, task, title)
        if task != "classification":
            return Columns(image, None, None, wanted)
        _check_labels(is_label(schema.field(wanted[0])), schema, wanted[0], title)
        known = Columns(image, wanted[0], None)
    labels = [
        field.name
        for field in schema
        if is_label(field) and field.name != image and not PANDAS_INDEX.fullmatch(field.name)
    ]
    if known is not None and known.label in labels:
        label = str(known.label)
    else:
        noted = [name for name in labels if kind(name) == "ClassLabel"]
        label = _pick_column("label", noted or labels, LABEL_NAMES, schema, title, "whole numbers or words")
    names = features[label].get("names") if kind(label) == "ClassLabel" else None
    if names is None:
        return Columns(image, label, None)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise LayerwiseError(f"{title} records no list of words as the classes of {label!r}; write it again.")
    return Columns(image, label, check_words(names, title) or None)


def _check_labels(good: bool, schema: Any, name: str, title: str) -> None:
    if not good:
        raise LayerwiseError(
            f"column {name!r} of {title} holds {schema.field(name).type}, not whole numbers or words; store "
            "them as such."
        )


def _pick_column(what: str, candidates: list[str], usual: Sequence[str], schema: Any, title: str, wanted: str) -> str:
    """Like `pick`, but a column with the right name and the wrong content is reported as such."""
    named = [name for name in usual if name in schema.names]
    if named and named[0] not in candidates and not any(name in candidates for name in usual):
        held = schema.field(named[0]).type
        raise LayerwiseError(f"column {named[0]!r} of {title} holds {held}, not {wanted}; store them as such.")
    return pick(what, candidates, usual, schema.names, title)


def _features(schema: Any, title: str) -> dict[str, dict]:
    """What Hugging Face `datasets` has noted about the columns."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, AttributeError, RecursionError) as reason:
        raise LayerwiseError(f"{title} holds damaged metadata about its columns; write it again.") from reason


def labels_of(column: Any, columns: Columns, title: str) -> list:
    """The labels of a column as whole numbers or words; None if a cell is empty."""
    found = []
    for row, value in enumerate(column.to_pylist()):
        if isinstance(value, bool):
            value = int(value) if columns.names else str(value)
        elif isinstance(value, (float, Decimal)):
            if math.isnan(value):
                value = None
            elif not math.isfinite(value) or value != int(value) or (isinstance(value, float) and abs(value) >= EXACT):
                raise LayerwiseError(
                    f"row {row} of {title} has the label {value} in column {columns.label!r}, which is not a class; "
                    "give whole numbers, stored as such, or words."
                )
            else:
                value = int(value)
        elif isinstance(value, str) and value not in (columns.names or ()) and is_missing(value):
            value = None
        if columns.names and isinstance(value, str):
            if value not in columns.names:
                raise LayerwiseError(
                    f"row {row} of {title} has the label {value!r}, which is none of the classes that the file records "
                    f"({few(columns.names)}); correct one of them."
                )
            value = columns.names.index(value)
        found.append(value)
    return found


def read_labels(column: Callable[[str], Any], columns: Columns, title: str) -> list:
    """The labels of a table: whole numbers or words, a tuple of numbers per row, or None if there is none.

    Args:
        column: gives an arrow column by name.
        columns: which columns hold labels.
        title: what to call the table in messages.
    """
    if columns.label is not None:
        return labels_of(column(columns.label), columns, title)
    found = []
    for name in columns.targets:
        values = column(name).to_pylist()
        for row, value in enumerate(values):
            if not isinstance(value, (int, float, Decimal)):
                raise LayerwiseError(
                    f"row {row} of {title} has {value!r} in column {name!r}, which is not a number; fill it or "
                    "take it out."
                )
        _check_long(values, name, title)
        found.append([float(value) for value in values])
    return list(zip(*found, strict=True))


def _check_long(values: Sequence[Any], name: str, title: str) -> None:
    """Refuse numbers of which two that differ are the same float64, such as long whole numbers."""
    first: dict[float, Any] = {}
    for value in values:
        if (
            not isinstance(value, float)
            and abs(value) >= EXACT
            and (other := first.setdefault(float(value), value)) != value
        ):
            raise LayerwiseError(
                f"{other} and {value} in column {name!r} of {title} are the same as floating-point numbers; take the "
                "column out, or subtract what they share."
            )


def is_binary(kind: Any) -> bool:
    """Whether an arrow type holds bytes."""
    return str(kind).startswith(("binary", "large_binary", "fixed_size_binary"))
