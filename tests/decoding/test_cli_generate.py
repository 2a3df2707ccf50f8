"""`foretune generate` as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import command_line
import foretune
import tiny_models
from foretune.adapters.fingerprint import base_record
from foretune.models.precision import held_in

HEAVY = ("torch", "transformers", "peft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """large, tuned, untuned, oracle: models; adapter: over untuned; bert: no decoder."""
    root = tmp_path_factory.mktemp("models")
    sharp = {"initializer_range": 0.4, "num_hidden_layers": 1}
    wide = {**sharp, "hidden_size": 32}
    for name, seed, sizes in (
        ("large", 1, wide),
        ("oracle", 4, wide),
        ("tuned", 2, sharp),
        ("untuned", 3, sharp),
    ):
        tiny_models.llama(seed=seed, **sizes).save_pretrained(root / name)
        tiny_models.tokenizer().save_pretrained(root / name)
    tiny_models.bert(seed=1).save_pretrained(root / "bert")
    tiny_models.tokenizer().save_pretrained(root / "bert")
    torch.manual_seed(0)
    base = tiny_models.llama(seed=3, **sharp)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    adapted = peft.get_peft_model(base, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    adapted.peft_config["default"].base_model_name_or_path = str(root / "untuned")
    adapted.save_pretrained(root / "adapter")
    record = json.dumps(base_record(tiny_models.llama(seed=3, **sharp)))
    (root / "adapter" / "base_fingerprint.json").write_text(record)
    (root / "p.txt").write_text("the cat sat\na dog\n")
    (root / "side.txt").write_text("red the cat sat\nblue a dog\n")
    (root / "one.txt").write_text("red\n")
    return root


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


SHORT = ("--max-new-tokens", "5")
EFT = ("--method", "eft", "--tuned", "tuned", "--untuned", "untuned")


def call(*args: str, stdin: str | None = None) -> Any:
    return command_line.call("generate", *args, *SHORT, stdin=stdin)


def told(*args: str, stdin: str | None = None) -> list[str]:
    found = command_line.the_json("generate", *args, *SHORT, stdin=stdin)
    return [one["text"] for one in found["results"]]


def the_error(*args: str) -> str:
    return command_line.the_error("generate", *args, *SHORT)


@pytest.mark.usefixtures("here")
class TestGenerate:
    def test_prompts_come_from_the_line_a_file_or_stdin(self) -> None:
        plain = told("large", "the cat sat") + told("large", "a dog")
        assert told("large", "--prompts", "p.txt") == plain
        assert told("large", "--prompts", "-", stdin="the cat sat\na dog\n") == plain
        assert told("large", stdin="the cat sat\na dog\n") == plain

    def test_a_line_for_each_continuation(self) -> None:
        result = call("large", "--prompts", "p.txt")
        assert result.stdout.splitlines() == told("large", "--prompts", "p.txt")

    def test_eft_says_what_it_did(self) -> None:
        result = call("large", "the cat sat", "beta=0.5", "top_p=0.9", *EFT, "--json")
        found = json.loads(result.stdout)
        assert found["method"]["name"] == "eft"
        assert found["method"]["beta"] == 0.5 and found["method"]["top_p"] == 0.9
        assert {"prompt", "text", "num_tokens"} <= set(found["results"][0])

    def test_beta_zero_is_the_plain_model_and_beta_one_is_not(self) -> None:
        plain = told("large", "--prompts", "p.txt")
        assert told("large", "beta=0", "--prompts", "p.txt", *EFT) == plain
        assert told("large", "--prompts", "p.txt", *EFT) != plain

    def test_steering_the_untuned_model_gives_the_tuned_one(self) -> None:
        tuned = told("tuned", "--prompts", "p.txt")
        assert told("untuned", "--prompts", "p.txt", *EFT) == tuned

    def test_drafting_changes_nothing(self) -> None:
        args = ("large", "--prompts", "p.txt", *EFT)
        assert told(*args, "--speculative") == told(*args)

    def test_an_adapter_needs_no_untuned_model(self) -> None:
        pair = ("--method", "eft", "--tuned", "adapter")
        alone = told("large", "the cat sat", *pair)
        assert told("large", "the cat sat", *pair, "--untuned", "untuned") == alone
        adapted = told("adapter", "the cat sat")
        assert told("untuned", "the cat sat", *pair) == adapted

    def test_several_tuned_models_with_weights(self) -> None:
        both = ("--tuned", "tuned", "--tuned", "adapter", "--method", "eft", "--untuned", "untuned")
        only = told("large", "the cat sat", *EFT)
        assert told("large", "the cat sat", "weights=[1, 0]", *both) == only

    def test_side_models_read_prompts_of_their_own(self) -> None:
        args = ("large", "--prompts", "p.txt", *EFT)
        assert told(*args, "--tuned-prompts", "p.txt") == told(*args)
        assert told(*args, "--tuned-prompts", "side.txt") != told(*args)

    def test_drawing_has_a_seed_and_beams_a_width(self) -> None:
        drawn = [told("large", "a dog", "--sample", "--seed", s) for s in ("1", "1", "2")]
        assert drawn[0] == drawn[1] != drawn[2]
        assert told("large", "a dog", "--temperature", "1e-4") == told("large", "a dog")
        assert told("large", "a dog", "--beams", "3", *EFT)

    def test_sweep_compares_with_both_tuned_models_and_draws(self, tmp_path: Path) -> None:
        picture = tmp_path / "f.svg"
        args = ("large", "--prompts", "p.txt", *EFT, "--beta-sweep", "0.5,1", "--oracle", "oracle")
        result = call(*args, "--out", str(picture), "--json")
        assert result.exit_code == 0, result.output
        rows = json.loads(result.stdout)["rows"]
        whos = ["model alone", "EFT", "EFT", "small tuned alone", "large truly tuned"]
        assert [row["who"] for row in rows] == whos
        assert [row["beta"] for row in rows] == [0, 0.5, 1, None, None]
        assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
        assert rows[1]["reward"] > rows[0]["reward"] and rows[1]["kl"] > 0.01
        assert picture.read_text().startswith("<svg") and "0.5</text>" in picture.read_text()
        assert "small tuned alone" in call(*args).stdout
        assert f"{picture} exists: use --overwrite" in the_error(*args, "--out", str(picture))
        assert call(*args, "--out", str(picture), "--overwrite").exit_code == 0

    def test_models_run_where_and_in_what_they_are_told_to(self) -> None:
        plain = told("large", "the cat sat", *EFT)
        assert told("large", "the cat sat", *EFT, "--device", "cpu:0") == plain
        assert told("large", "the cat sat", *EFT, "--dtype", "bfloat16")
        record = foretune.EFT()
        with held_in("bfloat16", None, "cpu:0"):
            large, _, parts = record.load("large", tuned="adapter", untuned="untuned")
        for model in (large, *parts["tuned"], *parts["untuned"]):
            assert next(model.parameters()).dtype == torch.bfloat16

    def test_warnings_are_one_line(self, tmp_path: Path) -> None:
        narrow = tiny_models.llama(seed=3, vocab_size=20, num_hidden_layers=1)
        narrow.save_pretrained(tmp_path / "narrow")
        pair = ("--tuned", str(tmp_path / "narrow"), "--untuned", str(tmp_path / "narrow"))
        result = call("large", "one two three", "--method", "eft", *pair)
        assert result.exit_code == 0, result.output
        [line] = result.stderr.splitlines()
        assert line.startswith("warning: a side model has 20 tokens and cannot read token")

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("nowhere/at/all", "a dog"), "no folder nowhere/at/all"),
            (("bert", "a dog", *EFT), "bert lacks weights that BertLMHeadModel needs"),
            (
                ("large", "a dog", "--method", "lora"),
                "lora is a method for adapt, not for decode",
            ),
            (("large", "a dog", "--method", "eff"), 'no method "eff"'),
            (("large", "a dog", "beta=1"), "'beta=1' needs a --method"),
            (("large", "a dog", "betta=1", *EFT), 'eft has no field "betta"'),
            (("large", "a dog", "beta=x", *EFT), "beta must be a finite number, got 'x'"),
            (("large", "a", "dog", *EFT), '"dog" must read KEY=VALUE; put a prompt of'),
            (("large", "a dog", "--method", "eft"), "eft needs --tuned FOLDER"),
            (("large", "a dog", "--method", "eft", "--tuned", "tuned"), "untuned is missing"),
            (
                ("large", "a dog", "--tuned", "tuned"),
                "--tuned does not apply: there is no --method",
            ),
            (("large", "a dog", *EFT, "--store", "s"), "eft takes --tuned, --untuned"),
            (("large", "--prompts", "nowhere.txt"), "no file nowhere.txt with prompts"),
            (("large", "--prompts", "p.txt", *EFT, "--tuned-prompts", "one.txt"), "but 1 tuned_pr"),
            (("large", "a dog", "--speculative"), "need --method eft"),
            (("large", "a dog", "--device", "gpu"), "--device must be cpu, cuda, cuda:1"),
            (("large", "a dog", "--device", "cuda:99"), "device=cuda:99 is not available"),
            (
                ("large", "a dog", "--temperature", "0"),
                "--temperature must be a number from 0.000001 on, got 0",
            ),
            (("large", "a dog", "--beta-sweep", "1"), "--beta-sweep needs --method eft"),
            (("large", "a dog", *EFT, "--beta-sweep", "1;2"), "takes numbers such as 0.5,1,2"),
            (("large", "a dog", "--method", "eft", "--beta-sweep", "1"), "needs --tuned"),
            (("large", "a dog", "--out", "x.svg"), "--out needs --beta-sweep"),
            (("large", "a dog", "--oracle", "oracle"), "--oracle needs --beta-sweep"),
            (
                ("large", "a dog", *EFT, "--beta-sweep", "1", "--out", "x"),
                "must be an .svg file, got x",
            ),
            (("large",), "no prompt in standard input"),
            (("large", " ".join(["cat"] * 70)), "exceed the model's 64 positions"),
        ],
    )
    def test_mistakes_are_one_line(self, args: tuple[str, ...], message: str) -> None:
        assert message in the_error(*args)


@pytest.mark.parametrize(
    "args",
    [
        ["generate", "--help"],
        ["generate", "m", "p", "beta=x", "--method", "eft"],
        ["generate", "m", "p", "--out", "x.svg"],
    ],
    ids=["help", "field", "option"],
)
def test_help_and_mistakes_import_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys\nfrom foretune.cli import app\n"
        f"try: app({args!r})\nexcept SystemExit: pass\n"
        f"print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"
