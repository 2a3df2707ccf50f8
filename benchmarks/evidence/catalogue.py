"""The collections of the evidence: the recipe of each, and its settings."""

from __future__ import annotations

import json
from pathlib import Path

from foretune.recipes.yaml_io import parse_yaml

FOLDER = Path("benchmarks/evidence")
TEXTS = ("tasks.source={data}/opinions/{name}.jsonl.gz", "model.name=minilm")
ARRAYS = ("tasks.source={made}/{name}.npz",)
COLLECTIONS: dict[str, tuple[str, ...]] = {
    # name: recipe, settings. {data} is the folder of the data, {made} what data.py makes of it.
    "land-bank": ("tower", *TEXTS, "tasks.unseen=94"),
    "senate-117": ("tower", *ARRAYS, "tasks.unseen=33"),
    "senate-100": ("tower", *ARRAYS, "tasks.unseen=33"),
    "uber-taiwan": ("tower", *ARRAYS, "tasks.unseen=150"),
    "toxcast": ("tower", *ARRAYS, "tasks.unseen=60"),
    "taxes": ("tower", *TEXTS, "tasks.unseen=86"),
    "biodiversity": ("tower", *TEXTS, "tasks.unseen=99"),
    "housing": ("tower", *TEXTS, "tasks.unseen=68"),
    "senate-95": ("tower", *ARRAYS, "tasks.unseen=33"),
    "senate-103": ("tower", *ARRAYS, "tasks.unseen=33"),
    "senate-108": ("tower", *ARRAYS, "tasks.unseen=33"),
    "har": ("tower", *ARRAYS, "tasks.unseen=6"),
    "omniglot-pairs": ("tower", *ARRAYS, "tasks.unseen=20"),
    "convai2": (
        "choice",
        "tasks.source={data}/convai2/valid.jsonl.gz",
        "tasks.unseen=40",
        "tasks.group_column=dialogue",
        "tasks.candidate_pool=60",
    ),
    "python-docs": (
        "choice",
        "tasks.source=python-docs",
        "tasks.unseen=16",
        "tasks.min_rows=60",
        "tasks.max_rows=100",
        "tasks.candidates_from=own",
    ),
    "clinc150": ("clinc150", "tasks.source={data}/clinc150/clinc150.jsonl.gz"),
    "shakespeare": ("shakespeare", "tasks.source={data}/shakespeare/speakers.jsonl.gz"),
}

# Where `auto` chooses among the methods of the recipe, too; chosen before any of these was run.
AUTO = ("senate-117", "senate-100", "land-bank", "housing", "har")


def recipe_of(name: str, data: Path, made: Path) -> tuple[str, list[str]]:
    """(path of the recipe, settings) of a collection.

    Args:
        name: One of `COLLECTIONS`.
        data: Folder of the data.
        made: Folder of what data.py makes of it.
    """
    recipe, *settings = COLLECTIONS[name]
    filled = [text.format(data=data, made=made, name=name) for text in settings]
    return str(FOLDER / f"{recipe}.yaml"), [f"name={name}", *filled]


def auto_of(recipe: str) -> str:
    """The setting of a recipe that has `auto` choose among its methods, instead of these.

    `auto` runs apart from the methods that it chooses among, because both take long. With the same
    seed its base is the same bits as the one that the chosen method makes by itself.
    """
    candidates = parse_yaml(Path(recipe).read_text("utf-8"), recipe)["retrain"]["methods"]
    return "retrain.methods=" + json.dumps([{"auto": {"candidates": candidates}}])
