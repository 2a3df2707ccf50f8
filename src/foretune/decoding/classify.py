"""Labels of new rows by a store, with the references behind each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from foretune.decoding.encoder_states import encoder_states, room_of
from foretune.decoding.lookup import Lookup
from foretune.decoding.model_scores import states_and_log_probs
from foretune.decoding.reference_store import ReferenceStore
from foretune.decoding.references import References, read_references
from foretune.errors import UserError


def classify(
    model: Any,
    tokenizer: Any,
    store: ReferenceStore,
    rows: Sequence[Mapping[str, Any]],
    *,
    lookup: Lookup | None = None,
    shown: int = 3,
) -> list[dict[str, Any]]:
    """The label of each row.

    Args:
        model: The model that the store was built with.
        tokenizer: Its tokenizer.
        store: A store of labels.
        rows: Rows with `prompt` (or `text`), or with `context` and `candidates`; labels and answers
            are not read.
        lookup: How to query the store; None for `store.lookup`.
        shown: Number of references to name for each row, those with the largest weights.

    Returns:
        For each row `label`, `probability` (among the labels) and `neighbours`: each `row` (from
        0), `weight`, `label`, and `reference`, the row itself.

    Raises:
        UserError: The store has no labels, or was built with another model; or a row cannot be
            read.
    """
    if not store.labels:
        raise UserError("this store continues texts: only a store of rows with labels classifies")
    store.check_model(model)
    lookup = lookup or store.lookup
    any_answer = {"answer": 0} if store.kind == "choice" else {"label": next(iter(store.labels))}
    like = References(store.kind, store.labels)
    references = read_references(
        [{**row, **any_answer} for row in rows],
        tokenizer,
        max_tokens=room_of(model),
        like=like,
    )
    states, model_log_p = states_and_model(model, store, references, lookup)
    probs = store.label_log_probs(states, model_log_p, lookup).exp()
    answer, names = store.label_reference(states, lookup), list(store.labels)
    predictions = []
    for i, row in enumerate(probs):
        best = int(row.argmax())
        neighbours = [
            {
                "row": int(store.sources[place]),
                "weight": weight,
                "label": names[int(store.values[place])],
                **({"reference": store.rows[int(store.sources[place])]} if store.rows else {}),
            }
            for place, weight in answer.heaviest(i, shown)
        ]
        predictions.append(
            {"label": names[best], "probability": float(row[best]), "neighbours": neighbours}
        )
    return predictions


def states_and_model(
    model: Any, store: ReferenceStore, references: References, lookup: Lookup
) -> tuple[Tensor, Tensor | None]:
    """States (N, d) of labelled texts, and the model's own log-probabilities of the labels (N, C).

    These are None where the store does not mix them in: with λ = 1, and of an encoder.

    Raises:
        UserError: λ is below 1 for a store of an encoder.
    """
    if store.is_of_encoder:
        if lookup.mix < 1:
            raise UserError(f"an encoder has no answer of its own: mix must be 1, got {lookup.mix}")
        return encoder_states(model, references.texts), None
    scored: list[int] | None = [] if lookup.mix == 1 else None
    states, model_log_p = states_and_log_probs(model, references, scored)
    return states.float(), model_log_p if scored is None else None
