"""`foretune prune` as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import foretune
import tiny_models
from command_line import call
from foretune.pruning import FORMAT, PLAN_FILE
from foretune.pruning.experts import count_experts, find_blocks
from foretune.pruning.folders import task_examples
from format_checks import assert_versions, newer
from fuzzing import check_command, copied, damaged
from pruning import tiny_mixtures


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a mixture and a task's rows."""
    monkeypatch.chdir(tmp_path)
    tiny_mixtures.mixture("olmoe").save_pretrained("mix")
    tiny_models.tokenizer().save_pretrained("mix")
    write("task.jsonl", tiny_mixtures.rows(count=20))
    return tmp_path


def write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(line: str, code: int = 0) -> Any:
    result = call("prune", *line.split())
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    if code:
        errors = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
        assert len(errors) == 1
        return errors[0]
    return result


def test_a_record_of_other_experts_than_the_config_is_refused(place: Path) -> None:
    run("uncurl mix experts=4 --rows task.jsonl --out small")
    record = json.loads(Path("small", PLAN_FILE).read_text())
    for block in record["blocks"].values():
        block["groups"].append([0])
        block["weights"].append([1.0])
    Path("small", PLAN_FILE).write_text(json.dumps(record))
    with pytest.raises(foretune.errors.UserError, match=r"experts.json leaves 5 experts in"):
        foretune.load_model("small", head="causal-lm")


def test_a_mixture_is_pruned_and_transformers_loads_it(place: Path) -> None:
    said = run("uncurl mix experts=4 --rows task.jsonl --out small").stdout
    assert "as given" in said and "21,120" in said and "11,776" in said
    assert "Model: small (plain folder, loads in transformers)" in said
    loaded = transformers.AutoModelForCausalLM.from_pretrained("small")
    assert [block.num_experts for block in find_blocks(loaded)] == [4, 4]
    assert transformers.AutoTokenizer.from_pretrained("small")("cat dog").input_ids
    assert json.loads(Path("small/experts.json").read_text())["scores"]["held_out_rows"] == 4


def test_what_only_foretune_loads_is_said_and_the_line_works(place: Path) -> None:
    said = run("uncurl mix experts=4 router=remap --rows task.jsonl --out small").stdout
    line = 'foretune.load_model("small", head="causal-lm")'
    assert f"(only foretune loads it: {line})" in said
    model, tokenizer = eval(line, {"foretune": foretune})
    assert tokenizer is not None
    assert torch.isfinite(tiny_mixtures.logits(model)).all()


@pytest.mark.parametrize("router", ["kept", "remap"])
def test_a_pruned_model_of_a_newer_version_is_refused(place: Path, router: str) -> None:
    changes = "router=remap" if router == "remap" else ""
    run(f"uncurl mix experts=4 {changes} --rows task.jsonl --out small")
    file = place / "small" / PLAN_FILE
    assert_versions(file, FORMAT, lambda: foretune.load_model("small", head="causal-lm"))
    file.write_text(file.read_text().replace(FORMAT, newer(FORMAT)))
    line = run("frequency small experts=2 --rows task.jsonl --compare", code=2)
    assert f"experts.json was written by a newer foretune (format {newer(FORMAT)})" in line


def test_every_method_is_compared_before_anything_is_saved(place: Path) -> None:
    told = run("uncurl mix experts=[3,4] --rows task.jsonl --compare --json").stdout
    result = json.loads(told)
    names = [entry["method"] for entry in result["scored"]]
    assert names == ["as given", "uncurl", "random-experts", "frequency", "hc-smoe", "reap"]
    assert all(entry["experts"] == [3, 4] for entry in result["scored"][1:])
    assert result["out"] is None and not Path("small").exists()
    text = run("uncurl mix experts=4 --rows task.jsonl --compare").stdout
    assert "Nothing saved: no --out." in text and ("Lowest loss:" in text or "uncurl" in text)


def test_by_score_blocks_end_with_different_numbers_and_foretune_loads_them(place: Path) -> None:
    line = "frequency mix experts=3 budget=score --rows task.jsonl --compare --json --out small"
    result = json.loads(run(line).stdout)
    assert all(sum(entry["experts"]) == 6 for entry in result["scored"][1:])
    counts = result["size"]["after"]["experts"]
    assert len(set(counts)) == 2 and result["loads_with"] == "foretune"
    model, _ = foretune.load_model("small", head="causal-lm")
    assert count_experts(model) == counts


def test_the_model_is_saved_as_it_was_scored_after_recovery(place: Path) -> None:
    line = "frequency mix experts=4 --rows task.jsonl --recover 8 --learning-rate 0.01 --json --out"
    result = json.loads(run(f"{line} small").stdout)
    given, own = result["scored"]
    assert given["loss_recovered"] < given["loss"] and own["loss_recovered"] < own["loss"]
    from foretune.pruning.prune import held_out_loss

    model, tokenizer = foretune.load_model("small", head="causal-lm")
    told = held_out_loss(model, task_examples("task.jsonl").held_out, tokenizer, max_tokens=256)
    assert told["loss"] == pytest.approx(own["loss_recovered"], rel=1e-5)


def test_a_router_over_all_experts_is_pointed_out(place: Path) -> None:
    said = run("frequency mix experts=4 --rows task.jsonl --out a").stdout
    assert "keep_denominator=true prevents that" in said
    kept = "frequency mix experts=4 keep_denominator=true --rows task.jsonl --out b"
    assert "only foretune loads it" in run(kept).stdout


def test_rows_are_cut_by_split_and_task(place: Path) -> None:
    rows = [
        {"task": task, "split": split, "text": f"{word} cat dog"}
        for task, word in (("one", "a"), ("two", "b"))
        for split in ("train", "train", "test")
    ]
    write("many.jsonl", rows)
    one = task_examples("many.jsonl", "one")
    assert [r["text"] for r in one.train] == ["a cat dog"] * 2
    assert one.held_out == [{"text": "a cat dog"}]
    assert len(task_examples("many.jsonl").held_out) == 2
    plain = task_examples("task.jsonl")  # no split: every fifth row is held out
    assert (len(plain.train), len(plain.held_out)) == (16, 4)
    assert not [row for row in plain.held_out if row in plain.train]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("uncurl mix experts=1 --rows task.jsonl --out x", "experts must be from 2 to 8, got 1"),
        ("uncurl mix experts=9 --rows task.jsonl --out x", "from 2 to 8, got 9"),
        ("uncurl mix experts=[4,4,4] --rows task.jsonl --out x", "3 numbers, the model has 2"),
        ("reap mix experts=[3,5] budget=score --rows task.jsonl --out x", "needs one number"),
        ("reap mix budget=layer --rows task.jsonl --out x", "budget must be one of equal, score"),
        ("uncurl mix expert=4 --rows task.jsonl --out x", 'Did you mean "experts"?'),
        ("uncurl mix experts --rows task.jsonl --out x", "must read KEY=VALUE"),
        ("uncurl mix router=rows --rows task.jsonl --out x", "router must be one of mean"),
        ("uncrul mix --rows task.jsonl --out x", 'Did you mean "uncurl"?'),
        ("lora mix --rows task.jsonl --out x", "lora is a method for adapt, not for prune"),
        ("uncurl mix --rows task.jsonl", "prune needs --out"),
        ("uncurl mix --out x", "Missing option '--rows'"),
        ("uncurl mix --rows none.jsonl --out x", "no such file or folder: none.jsonl"),
        ("uncurl none/none/none --rows task.jsonl --out x", "no folder none/none/none"),
        ("uncurl dense --rows task.jsonl --out x", "LlamaForCausalLM has no mixture of experts"),
        ("uncurl mix --rows bad.jsonl --out x", "bad.jsonl line 2: text is empty"),
        ("uncurl mix --rows one.jsonl --out x", "both are needed"),
        ("uncurl mix --rows task.jsonl --task red --out x", 'no row whose task is "red"'),
        ("uncurl mix --rows task.jsonl --out mix", "mix is not empty"),
        ("uncurl mix --rows task.jsonl --out mix --overwrite", "which the command reads"),
        ("uncurl mix --rows task.jsonl --out task.jsonl", "is a file; --out needs a folder"),
        ("uncurl mix --rows task.jsonl --out x --learning-rate 0", "must be a number above 0"),
        ("uncurl mix --rows task.jsonl --out x --low-memory --recover 1", "leave --compare and"),
        ("uncurl mix router=remap --rows task.jsonl --out x --low-memory", "plain folders only"),
        ("reap mix budget=score --rows task.jsonl --out x --low-memory", "plain folders only"),
        ("uncurl mix --rows task.jsonl --out x --recover -1", "Invalid value for '--recover'"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(place: Path, line: str, message: str) -> None:
    write("bad.jsonl", [{"text": "a b"}, {"text": " "}])
    write("one.jsonl", [{"text": "a b"}])
    if "dense" in line:
        tiny_models.llama().save_pretrained("dense")
        tiny_models.tokenizer().save_pretrained("dense")
    assert message in run(line, code=2)
    assert not Path("x").exists() and not list(place.glob(".unfinished*"))
    assert not Path("mix/experts.json").exists()


def test_a_model_without_a_tokenizer_is_refused(place: Path) -> None:
    for file in Path("mix").glob("tokenizer*"):
        file.unlink()
    assert "need the model's tokenizer" in run("uncurl mix --rows task.jsonl --out x", code=2)


def test_overwrite_replaces_a_pruned_model(place: Path) -> None:
    run("frequency mix experts=4 --rows task.jsonl --out small")
    assert "is not empty" in run("frequency mix experts=3 --rows task.jsonl --out small", code=2)
    run("frequency mix experts=3 --rows task.jsonl --out small --overwrite")
    assert json.loads(Path("small/experts.json").read_text())["method"]["experts"] == 3


@pytest.mark.parametrize("line", ["prune --help", "prune uncurl mix expert=4 --rows x --out y"])
def test_help_and_mistakes_need_no_torch(line: str) -> None:
    code = (
        "import sys\nfrom foretune.cli import app\n"
        f"try:\n    app({line.split()!r})\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pruned mixture that transformers cannot load."""
    folder = tmp_path_factory.mktemp("pruned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny_mixtures.mixture("olmoe").save_pretrained("mix")
        tiny_models.tokenizer().save_pretrained("mix")
        write("task.jsonl", tiny_mixtures.rows(count=20))
        run("uncurl mix experts=4 router=remap --rows task.jsonl --out small")
    return folder


@pytest.mark.parametrize("file", ["experts.json", "config.json", "foretune_experts.safetensors"])
@given(data=st.data())
def test_a_damaged_file_is_read_or_one_line(data: st.DataObject, file: str, pruned: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        folder = copied(pruned, pruned.with_name("copy"))
        patch.chdir(folder)
        path = folder / "small" / file
        path.write_bytes(data.draw(damaged(path)))
        check_command(folder, ("generate", "small", "the cat", "--max-new-tokens", "2"))
