"""What a model answers with: one `Prediction` for any number of heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import PosthocError, suggest

if TYPE_CHECKING:
    import pandas

Context = tuple[tuple[str, str, tuple[str, ...]], ...]  # (head, kind, its fields) for every head


class MissingFieldError(PosthocError, AttributeError):
    """A prediction was asked for a field that its head does not give, or that was not kept."""


class Prediction:
    """The uncertainty of a batch of B images, from one or several heads.

    Always there: `uncertainty` [B] float32, higher = less certain; `percentile` [B], 0 to 100, the share of the
    held-out scores not above it; `kind` ("aleatoric", "decision", "total" or "epistemic"). From the backbone:
    `embedding` [B,D] and `logits` [B,C], None without a classifier or when not kept. By head: `kappa`, `resultant`
    (A_d(kappa), 0 to 1, comparable across dimensions), `temperature`, `mutual_information` (nats), `variance` [B,C],
    and what else the head names; `fields` lists them. The plain fields are the first head's; `prediction["laplace"]`
    is another head's.

    Indexing with a slice, an integer, an index list or a mask keeps those rows (an integer keeps one row, batch
    dimension included). A pytree of its tensors: it goes through `torch.compile` and `torch.export`.

    Raises MissingFieldError (a PosthocError and an AttributeError) for a field that is not there.
    """

    kind: str
    uncertainty: Tensor
    percentile: Tensor

    def __init__(
        self,
        heads: Mapping[str, Mapping[str, Any]],
        kinds: Mapping[str, str],
        embedding: Any = None,
        logits: Any = None,
    ) -> None:
        self._heads = {name: dict(fields) for name, fields in heads.items()}
        self._kinds = {name: kinds[name] for name in self._heads}
        self.embedding = embedding
        self.logits = logits

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the heads, the first one's fields being the plain fields."""
        return tuple(self._heads)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields the first head gives."""
        return tuple(self._first()) if self._heads else ()

    def _first(self) -> dict[str, Any]:
        return next(iter(self._heads.values()))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not self._heads:
            raise AttributeError(name)
        if name == "kind":
            return next(iter(self._kinds.values()))
        fields = self._first()
        if name in fields:
            return fields[name]
        owners = [head for head, of in self._heads.items() if name in of]
        hint = f" The head {owners[0]!r} has it: prediction[{owners[0]!r}].{name}." if owners else ""
        raise MissingFieldError(
            f"The head {self.heads[0]!r} gives no field {name!r} here; fields: {', '.join(fields)}.{hint}"
        )

    def __getitem__(self, index: Any) -> Prediction:
        if isinstance(index, str):
            if index not in self._heads:
                raise PosthocError(f"This prediction has no head {index!r}: {suggest(index, self._heads)}")
            return Prediction({index: self._heads[index]}, self._kinds, self.embedding, self.logits)
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"row {index} of a prediction of {len(self)} images")
            index = slice(index, index + 1 or None)
        return self._map(lambda value: value[index])

    def __len__(self) -> int:
        return len(next(self._leaves()))

    def __iter__(self) -> Iterator[Prediction]:
        return (self[row] for row in range(len(self)))

    def _leaves(self) -> Iterator[Any]:
        for fields in self._heads.values():
            yield from fields.values()
        yield from (value for value in (self.embedding, self.logits) if value is not None)

    def _map(self, change: Callable[[Any], Any]) -> Prediction:
        heads = {head: {name: change(value) for name, value in of.items()} for head, of in self._heads.items()}
        shared = [None if value is None else change(value) for value in (self.embedding, self.logits)]
        return Prediction(heads, self._kinds, *shared)

    def cpu(self) -> Prediction:
        """The same on the CPU."""
        return self._map(lambda value: value.cpu())

    def detach(self) -> Prediction:
        """The same without gradient."""
        return self._map(lambda value: value.detach())

    def numpy(self) -> Prediction:
        """The same with NumPy arrays (on the CPU, without gradient) in place of tensors."""
        return self._map(lambda value: value.detach().cpu().numpy())

    def to_pandas(self) -> pandas.DataFrame:
        """One row per image: the first head's one-dimensional fields by plain name, others as `head.field`.

        Logits become the column `predicted` (their argmax); other fields of more than one dimension are left out.
        Raises PosthocError when pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise PosthocError("to_pandas() needs pandas, which is not installed: pip install pandas") from error
        arrays = self._map(torch.as_tensor).numpy()
        columns: dict[str, Any] = {}
        for head, fields in arrays._heads.items():
            prefix = "" if head == self.heads[0] else f"{head}."
            columns.update({prefix + name: value for name, value in fields.items() if value.ndim == 1})
        if arrays.logits is not None:
            columns["predicted"] = arrays.logits.argmax(axis=1)
        return pandas.DataFrame(columns)

    def __repr__(self) -> str:
        heads = "; ".join(f"{head} ({self._kinds[head]}): {', '.join(of)}" for head, of in self._heads.items())
        shared = [name for name in ("embedding", "logits") if getattr(self, name) is not None]
        return f"Prediction({len(self)} images; {heads}{'; ' if shared else ''}{', '.join(shared)})"


def _context(prediction: Prediction) -> tuple[Context, bool, bool]:
    heads = tuple((head, prediction._kinds[head], tuple(of)) for head, of in prediction._heads.items())
    return heads, prediction.embedding is not None, prediction.logits is not None


def _flatten(prediction: Prediction) -> tuple[list[Any], Any]:
    return list(prediction._leaves()), _context(prediction)


def _flatten_with_keys(prediction: Prediction) -> tuple[list[tuple[Any, Any]], Any]:
    context = heads, embedding, logits = _context(prediction)
    names = [f"{head}.{field}" for head, _, fields in heads for field in fields]
    names += ["embedding"] * embedding + ["logits"] * logits
    return [(pytree.MappingKey(name), leaf) for name, leaf in zip(names, prediction._leaves(), strict=True)], context


def _unflatten(leaves: Any, context: Any) -> Prediction:
    heads, embedding, logits = context
    values = iter(leaves)
    fields = {head: {name: next(values) for name in names} for head, _, names in heads}
    shared = [next(values) if there else None for there in (embedding, logits)]
    return Prediction(fields, {head: kind for head, kind, _ in heads}, *shared)


def _context_of_json(context: Any) -> Any:
    heads, embedding, logits = context
    return tuple((head, kind, tuple(fields)) for head, kind, fields in heads), embedding, logits


pytree.register_pytree_node(
    Prediction,
    _flatten,
    _unflatten,
    serialized_type_name="posthoc.Prediction",
    to_dumpable_context=lambda context: context,
    from_dumpable_context=_context_of_json,
    flatten_with_keys_fn=_flatten_with_keys,
)
