"""`foretune datastore` and `generate --method rtd` as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny_models
from command_line import call, the_error, the_json
from foretune.decoding import STORE_FILE
from foretune.decoding.store_folder import FORMAT
from format_checks import assert_versions_by_command
from fuzzing import check_command, copied, damaged

WORDS = [w for w in tiny_models.WORDS if len(w) > 1]
TEXTS = [{"text": " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 8))} for i in range(1, 12)]
LABELLED = [
    {
        "prompt": f"the {a} {b}",
        "label": "red" if a in WORDS[:6] else "blue",
        "split": "test" if b == "two" else "train",
    }
    for a in WORDS
    for b in ("sat", "on", "two")
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, rows, and a store of each kind."""
    folder = tmp_path_factory.mktemp("datastore")
    tiny_models.llama(hidden_size=32).save_pretrained(folder / "model")
    tiny_models.tokenizer(special=False).save_pretrained(folder / "model")
    write(folder / "texts.jsonl", TEXTS)
    write(folder / "rows.jsonl", LABELLED)
    for rows, store in (("texts", "of-texts"), ("rows", "of-labels")):
        made = call(
            *("datastore", "build", folder / "model", "--rows", folder / f"{rows}.jsonl"),
            *("--out", folder / store),
            *(("--split", "train") if rows == "rows" else ()),
        )
        assert made.exit_code == 0, made.output
    return folder


@pytest.mark.parametrize(
    "args",
    [
        ["datastore", "--help"],
        ["datastore", "eval", "--help"],
        ["datastore", "build", "m", "--rows", "r", "--key-type", "int8"],
        ["datastore", "eval", "s", "mixx=1", "--rows", "r"],
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported(args):
    code = (
        "import sys\nfrom foretune.cli import app\n"
        f"try: app({args!r})\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_build_says_what_it_made(place):
    made = the_json(
        *("datastore", "build", place / "model", "--rows", place / "texts.jsonl"),
        *("--out", place / "again", "--heads", 4, "--key-type", "float16"),
    )
    assert (made["rows"], made["kind"], made["hidden_size"]) == (11, "text", 32)
    assert made["entries"] == 11 * 6
    about = json.loads((place / "again" / "store.json").read_text())
    assert about["lookup"]["heads"] == 4 and about["name"] == str(place / "model")


def test_tune_writes_what_it_found_into_the_store(place):
    found = the_json("datastore", "tune", place / "of-texts", "--heads", 2)
    about = json.loads((place / "of-texts" / "store.json").read_text())
    assert about["tuned"] == found and about["lookup"]["heads"] == 2
    assert about["lookup"]["mix"] == found["mix"]
    shown = call("datastore", "tune", place / "of-texts").stdout
    assert "the model alone" in shown and f"mix {found['mix']:g}" in shown


def test_eval_of_labels_has_every_control(place):
    rows = ("--rows", place / "rows.jsonl", "--split", "test")
    table = the_json("datastore", "eval", place / "of-labels", *rows, "--lora-steps", 3)
    methods = [row["method"] for row in table["rows"]]
    assert methods == [
        *("zero-shot", "calibrated", "8 in the prompt", "nearest class mean"),
        *("logistic probe", "LoRA", "RTD"),
    ]
    assert table["metric"] == "accuracy" and table["examples"] == len(LABELLED) // 3
    assert all(0 <= row["score"] <= 1 for row in table["rows"])
    alone = the_json("datastore", "eval", place / "of-labels", "mix=0", *rows, "--lora-steps", 0)
    scores = {row["method"]: row for row in alone["rows"]}
    assert "LoRA" not in scores
    assert scores["RTD"]["log_loss"] == pytest.approx(scores["zero-shot"]["log_loss"])


def test_eval_of_texts_is_in_perplexity(place):
    result = call(
        *("datastore", "eval", place / "of-texts", "mix=1", "neighbours=1"),
        *("--rows", place / "texts.jsonl", "--lora-steps", 2),
    )
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["method", "perplexity", "log-loss", "seconds"]
    assert [line.split("  ")[0] for line in lines[1:-2]] == [
        *("zero-shot", "token counts", "texts in the prompt", "LoRA", "RTD")
    ]
    # The rows are those of the store, so the nearest entry is the answer itself.
    assert lines[-3].split()[1] == "1.000"
    assert lines[-2] == "66 tokens, 66 entries in the store"
    assert lines[-1] == "No baseline is ahead of RTD."


def test_generate_reads_the_store_and_names_what_stands_behind_each_token(place):
    told = the_json(
        *("generate", place / "model", " ".join(TEXTS[4]["text"].split()[:3])),
        *("mix=1", "neighbours=1", "--method", "rtd", "--store", place / "of-texts"),
        *("--max-new-tokens", 2),
    )
    [one] = told["results"]
    assert one["text"].split() == TEXTS[4]["text"].split()[3:5]
    assert [token["neighbours"][0]["row"] for token in one["tokens"]] == [4, 4]
    assert one["tokens"][0]["neighbours"][0]["reference"] == TEXTS[4]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["build", "{}/none", "--rows", "{}/texts.jsonl", "--out", "{}/x"],
            "cannot load|no folder",
        ),
        (["build", "{}/model", "--rows", "{}/none.jsonl", "--out", "{}/x"], "no such file"),
        (["build", "{}/model", "--rows", "{}/bad.jsonl", "--out", "{}/x"], "malformed JSON"),
        (["build", "{}/model", "--rows", "{}/texts.jsonl", "--out", "{}/of-texts"], "is not empty"),
        (
            ["build", "{}/model", "--rows", "{}/texts.jsonl", "--out", "{}/model", "--overwrite"],
            "which the command reads",
        ),
        (
            ["build", "{}/model", "--rows", "{}/rows.jsonl", "--split", "dev", "--out", "{}/x"],
            "has no row of split dev; it has test, train",
        ),
        (
            ["build", "{}/model", "--rows", "{}/texts.jsonl", "--heads", "5", "--out", "{}/x"],
            "heads must divide the width of a state, 32, got 5",
        ),
        (["build", "{}/model"], "Missing option '--rows'"),
        (["tune", "{}/model"], "is not a store: it has no store.safetensors"),
        (["eval", "{}/of-texts", "--rows", "{}/rows.jsonl"], "the store was built from text"),
        (["eval", "{}/of-texts", "mixx=1", "--rows", "{}/rows.jsonl"], 'Did you mean "mix"'),
        (["eval", "{}/of-texts", "mix=2", "--rows", "{}/rows.jsonl"], "mix is a share"),
        (
            ["eval", "{}/of-texts", "--rows", "{}/texts.jsonl", "--model", "{}/other"],
            "built with another base",
        ),
        (["bild"], "No such command 'bild'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_leave_nothing(place, args, message):
    import re

    if not (place / "other").exists():
        tiny_models.llama(hidden_size=32, seed=1).save_pretrained(place / "other")
        tiny_models.tokenizer(special=False).save_pretrained(place / "other")
    (place / "bad.jsonl").write_text("{broken\n")
    assert re.search(message, the_error("datastore", *[a.format(place) for a in args]))
    assert not (place / "x").exists()


def test_a_store_of_a_newer_version_is_refused(place):
    rows = ("--rows", place / "texts.jsonl")
    command = ("datastore", "eval", place / "of-texts", *rows)
    assert_versions_by_command(place / "of-texts" / STORE_FILE, FORMAT, *command)


def test_generate_without_a_store_says_how_to_make_one(place):
    line = the_error("generate", place / "model", "the", "--method", "rtd")
    assert "foretune datastore build MODEL" in line


@pytest.mark.parametrize("file", ["store.json", "store.safetensors", "rows.jsonl"])
@given(data=st.data())
def test_a_damaged_store_is_read_or_one_line(data, file, place):
    with pytest.MonkeyPatch.context() as patch:
        folder = copied(place, place.with_name("copy"))
        patch.chdir(folder)
        path = folder / "of-texts" / file
        path.write_bytes(data.draw(damaged(path)))
        command = ("generate", "model", "the cat", "--method", "rtd", "--store", "of-texts")
        check_command(folder, (*command, "--max-new-tokens", "2"))
