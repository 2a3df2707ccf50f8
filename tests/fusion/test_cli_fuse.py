"""`foretune fuse` as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import command_line
import foretune
import tiny_models
from fusion.fused_models import adapted, ids, linears, output, saved

call = partial(command_line.call, "fuse")
the_error = partial(command_line.the_error, "fuse")


HEAVY = ("torch", "transformers", "peft")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base, one, two (full checkpoints), lora, and rows.jsonl in the current folder."""
    monkeypatch.chdir(tmp_path)
    base = tiny_models.bert(num_labels=3)
    saved(base, tmp_path / "base")
    tiny_models.tokenizer().save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("one", "two")):
        saved(linears(base, seed), tmp_path / name)
    saved(adapted(base, 5, ["query"], modules_to_save=["classifier"]), tmp_path / "lora")
    words = {"one": "the cat sat on a mat", "two": "red dog blue one two three"}
    rows = [
        {"task": task, "text": f"{a} {b}", "label": f"LABEL_{len(a) % 3}"}
        for task, text in words.items()
        for a in text.split()
        for b in text.split()
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def test_fuses_folders_and_says_what_came_out(folders: Path) -> None:
    result = call("smile", "base", "one=one", "two=two", "k=4", "gate_k=2", "--out", "out")
    assert result.exit_code == 0, result.output
    shown = result.stdout.splitlines()
    assert shown[0].startswith("Fused one, two by smile (k=4, gate_k=2, top_k=1,")
    assert shown[1].startswith("25 layers have experts, which keep ")
    assert shown[-1] == "Model: out"
    fused = foretune.load_fused("out")
    in_python = foretune.fuse("base", {"one": "one", "two": "two"}, foretune.SMILE(k=4, gate_k=2))
    batch = {"input_ids": ids()}
    assert torch.equal(output(fused.model, batch), output(in_python.model, batch))
    assert (
        fused.tokenizer("the cat")["input_ids"] == tiny_models.tokenizer()("the cat")["input_ids"]
    )


@pytest.mark.parametrize("method", ["average", "task-arithmetic", "ties"])
def test_static_merge_is_a_plain_folder(folders: Path, method: str) -> None:
    import transformers

    result = call(method, "base", "one=one", "two=two", "--out", "out", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["method"]["name"] == method and told["extra_parameters"] == 0
    plain = transformers.BertForSequenceClassification.from_pretrained("out").eval()
    batch = {"input_ids": ids()}
    assert torch.equal(output(plain, batch), output(foretune.load_fused("out").model, batch))


def test_loras_bring_their_heads(folders: Path) -> None:
    loras = ("smile", "base", "one=one", "lora=lora", "--out", "out")
    assert "lora does not record which base" in the_error(*loras)
    result = call(*loras, "--allow-unverified")
    assert "Note: lora does not record its base" in result.stdout
    assert "Each task keeps its own head: choose one with set_task(NAME)" in result.stdout
    assert "Note: nothing was measured." in result.stdout


def test_samples_make_the_gate(folders: Path) -> None:
    changes = ["gate=activations", "gate_k=2", "--samples", "rows.jsonl", "--out", "out"]
    result = call("smile", "base", "one=one", "two=two", *changes)
    assert result.exit_code == 0, result.output
    layer = foretune.load_fused("out").model.bert.encoder.layer[0].attention.self.query
    assert layer.gate.shape == (2, 2, 16) and layer.offset.shape == (2, 2)


def test_samples_measure_every_fusion_and_the_advice_follows_from_the_table(folders: Path) -> None:
    command = ["task-arithmetic", "base", "one=one", "two=two", "scale=5", "--samples"]
    result = call(*command, "rows.jsonl", "--out", "out")
    assert result.exit_code == 0, result.output
    shown = result.stdout.splitlines()
    assert shown[0] == "Measured on held-out rows (18 of one, 18 of two), which made no gate:"
    assert shown[1].split() == ["accuracy,", "%", "one", "two", "mean"]
    measured = foretune.load_fused("out").report["measured"]
    means = {c["name"]: c["mean"] for c in measured["candidates"]}
    assert list(means) == [
        *("base", "separate models", "average", "task-arithmetic", "ties"),
        *(
            f"smile gate={gate} routing={routing}"
            for gate in ("weights", "activations")
            for routing in ("token", "sequence")
        ),
        "smile routing=task",
    ]
    for line, mean in zip(shown[2:], means.values(), strict=False):
        assert line.split()[-1] == f"{100 * mean:.1f}"
    assert shown[12].startswith(f"Best: {measured['best']}.")
    assert result.stderr.splitlines()[:2] == ["measuring base", "measuring separate models"]


def test_auto_takes_the_best_by_held_out_rows_and_records_what_was_measured(folders: Path) -> None:
    assert "fuse auto takes the best fusion by held-out rows, and there are none" in the_error(
        "auto", "base", "one=one", "two=two", "--out", "out"
    )
    assert 'auto has no field "k"' in the_error("auto", "base", "one=one", "k=2", "--out", "out")
    command = ["auto", "base", "one=one", "two=two", "--samples", "rows.jsonl", "--out", "out"]
    result = command_line.the_json("fuse", *command)
    chosen = result["measured"]["chosen"]
    [record] = [c["method"] for c in result["measured"]["candidates"] if c["name"] == chosen]
    assert result["method"] == record == foretune.load_fused("out").method
    again = command_line.the_json("fuse", *command, "--overwrite")
    assert again["measured"] == result["measured"]
    # the same rows by the seed: what is saved is what was measured
    other = command_line.the_json("fuse", *command, "--overwrite", "--seed", "1")
    assert other["measured"] != result["measured"]


def test_full_folder_is_refused_and_replaced_only_if_it_is_ours(folders: Path) -> None:
    one = ("smile", "base", "one=one", "--out", "out")
    assert call(*one).exit_code == 0
    assert "out is not empty" in the_error(*one)
    assert call(*one, "--overwrite").exit_code == 0
    line = the_error("smile", "base", "one=one", "--out", "two", "--overwrite")
    assert (
        "two holds files that foretune did not write" in line
        and (folders / "two" / "config.json").is_file()
    )
    line = the_error("smile", "base", "one=one", "--out", "one", "--overwrite")
    assert "--overwrite would replace one, which the command reads" in line
    assert "rows.jsonl is a file" in the_error("smile", "base", "one=one", "--out", "rows.jsonl")


def test_nothing_is_left_behind_by_a_failure(folders: Path) -> None:
    saved(tiny_models.bert(num_labels=3, intermediate_size=24), folders / "odd")
    before = sorted(folders.iterdir())
    assert "was not tuned from this base" in the_error(
        "smile", "base", "one=one", "odd=odd", "--out", "out"
    )
    assert sorted(folders.iterdir()) == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["lora", "base", "one=one"], "lora is a method for adapt, not for fuse"),
        (["smil", "base", "one=one"], 'Did you mean "smile"?'),
        (["smile", "base", "one"], '"one" must read NAME=FOLDER or KEY=VALUE'),
        (["smile", "base", "one=one", "one=two"], "one is given twice"),
        (["smile", "base", "k=4"], "nothing to fuse: give NAME=FOLDER"),
        (["smile", "base", "one=one", "gatek=4"], 'no field "gatek"'),
        (["smile", "base", "one=one", "two=nowhere"], "no folder nowhere"),
        (["smile", "base", "one=one", "k=zero"], "k must be a whole number"),
        (["smile", "base", "one=one", "target_modules=query"], "must be a list of module names"),
        (["smile", "nobase", "one=one"], "base nobase: no such folder"),
        (["smile", "lora", "one=one"], "lora is an adapter, not a base"),
        (["smile", "base", "one=base"], "no linear layer differs"),
        (
            ["smile", "base", "one=one", "gate=activations"],
            "needs samples of every task; none for one",
        ),
        (
            ["smile", "base", "three=one", "gate=activations", "--samples", "rows.jsonl"],
            "rows.jsonl has no rows of task three; its tasks: one, two",
        ),
        (
            ["smile", "base", "one=one", "gate=activations", "--samples", "none.jsonl"],
            "no such file or folder: none.jsonl",
        ),
    ],
)
def test_mistakes_are_one_line(folders: Path, args: list[str], message: str) -> None:
    assert message in the_error(*args, "--out", "out")
    assert not (folders / "out").exists()


def test_broken_weights_are_one_line(folders: Path) -> None:
    (folders / "one" / "model.safetensors").write_bytes(b"no tensors")
    assert "cannot read one/model.safetensors" in the_error(
        "smile", "base", "one=one", "--out", "out"
    )


def test_pickled_weights_are_not_read(folders: Path) -> None:
    (folders / "one" / "model.safetensors").rename(folders / "one" / "pytorch_model.bin")
    assert "never loaded" in the_error("smile", "base", "one=one", "--out", "out")


def test_mistake_in_the_settings_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom foretune.cli import app\n"
        "try: app(['fuse', 'smile', 'base', 'gatek=4', '--out', 'x'])\nexcept SystemExit: pass\n"
        f"print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_adapters_of_foretune_are_fused_over_their_base(folders: Path) -> None:
    rows = [
        {"task": task, "split": split, "text": text, "label": label}
        for task in ("red", "blue")
        for label, text in (("no", "the cat"), ("yes", "red dog"))
        for split in ("train", "train", "test")
    ]
    (folders / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapt = ["base", "--tasks", "tasks.jsonl", "--objective", "classification", "steps=1"]
    assert command_line.call("adapt", *adapt, "--out", "adapters").exit_code == 0
    inputs = ["red=adapters/red", "blue=adapters/blue"]
    assert call("average", "base", *inputs, "--out", "out").exit_code == 0
    file = folders / "adapters" / "red" / "base_fingerprint.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "format": "foretune-adapter-9"}))
    line = the_error("average", "base", *inputs, "--out", "out2")
    assert "was written by a newer foretune (format foretune-adapter-9)" in line
    (folders / "adapters" / "red" / "labels.json").write_text("3")
    file.write_text(json.dumps(record))
    assert "labels.json is damaged" in the_error("average", "base", *inputs, "--out", "out2")
