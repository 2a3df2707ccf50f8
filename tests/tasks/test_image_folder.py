"""Image files: folders of classes, tables that name files, and what a tower reads of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import command_line
import foretune
import tiny_models
from foretune import FDAlign, PromptClassification, Run, Source
from foretune.errors import UserError
from foretune.models.image_input import ImageInput, image_input, read_image

COLOURS = {"cat": (200, 30, 30), "dog": (30, 30, 200), "mat": (20, 180, 20)}
RUN = Run(steps=2, batch_size=4, device="cpu", eval_every=0)


def picture(file: Path, colour: tuple[int, int, int], size: tuple[int, int] = (12, 9)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """photos/SPLIT/CLASS/I.png: three classes, two training and one test picture of each."""
    for name, colour in COLOURS.items():
        for i, split in enumerate(("train", "train", "test")):
            picture(tmp_path / "photos" / split / name / f"{i}.png", colour)
    return tmp_path / "photos"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_models.clip().save_pretrained(tmp_path / "clip")
    tiny_models.tokenizer().save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_folders_are_classes_splits_and_tasks(photos: Path, tmp_path: Path) -> None:
    [task] = foretune.load_tasks(Source(source=str(photos), validation=0), "prompts")[0]
    assert (task.name, len(task.train), len(task.test)) == ("photos", 6, 3)
    assert dict(task.test[0]) == {
        "image": str(photos / "test" / "cat" / "2.png"),
        "bytes": (photos / "test" / "cat" / "2.png").stat().st_size,
        "label": "cat",
    }
    for task_name in ("red", "blue"):
        for label in ("cat", "dog"):
            for i in range(4):
                picture(tmp_path / "two" / task_name / label / f"{i}.jpg", COLOURS[label])
    (tmp_path / "two" / "README.md").write_text("no rows")
    tasks, _ = foretune.load_tasks(Source(source=str(tmp_path / "two"), validation=0), "prompts")
    assert {t.name: len(t) for t in tasks} == {"blue": 8, "red": 8}
    assert all(t.test for t in tasks)  # carved


def test_a_table_names_files_beside_it(photos: Path) -> None:
    rows = [
        {"task": "pets", "image": f"{split}/{name}/{i}.png", "label": name, "split": split}
        for name in COLOURS
        for i, split in enumerate(("train", "train", "test"))
    ]
    table = photos / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [task] = foretune.load_tasks(Source(source=str(table), validation=0), "prompts")[0]
    assert Path(task.train[0]["image"]) == photos / "train" / "cat" / "0.png"


def test_what_a_tower_reads_is_what_its_image_processor_makes(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor, SiglipImageProcessor

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (21, 34, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for processor, how in (
        (
            CLIPImageProcessor(
                size={"shortest_edge": 10}, crop_size={"height": 8, "width": 8}, image_std=[0.3] * 3
            ),
            ImageInput(8, std=(0.3, 0.3, 0.3), edge=10),
        ),
        (
            SiglipImageProcessor(size={"height": 8, "width": 8}),
            ImageInput(8, (0.5,) * 3, (0.5,) * 3),
        ),
    ):
        theirs = processor(Image.open(tmp_path / "a.png"), return_tensors="np")["pixel_values"][0]
        ours = read_image(str(tmp_path / "a.png"), how)
        # A resized value is rounded to one of 256, by some libraries up and by others down.
        assert np.abs(ours - np.asarray(theirs)).max() <= 1.01 * 2 / 255 / min(how.std)


def test_the_settings_beside_a_model_are_taken(tmp_path: Path) -> None:
    assert image_input(tiny_models.clip()) == ImageInput(8, edge=8)
    assert image_input(tiny_models.siglip()) == ImageInput(8, (0.5,) * 3, (0.5,) * 3)
    assert image_input(tiny_models.bert()) is None
    settings = {"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "size": {"shortest_edge": 9}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    model = tiny_models.clip()
    model.name_or_path = str(tmp_path)
    assert image_input(model) == ImageInput(8, (0, 0, 0), (1, 1, 1), edge=9)
    visual = torch.nn.Identity()
    visual.image_size, visual.image_mean, visual.image_std = (8, 8), (0.1,) * 3, (0.2,) * 3
    open_clip = torch.nn.Module()
    open_clip.visual = visual
    assert image_input(open_clip) == ImageInput(8, (0.1,) * 3, (0.2,) * 3, edge=8)


def test_files_are_as_good_as_arrays(photos: Path) -> None:
    model = tiny_models.clip()
    objective = PromptClassification(tiny_models.tokenizer(), templates=("a red {}", "the {}"))
    files, _ = foretune.load_tasks(Source(source=str(photos), validation=0), "prompts")
    how = image_input(model)
    assert how is not None

    def arrays(rows: Any) -> list[dict[str, Any]]:
        return [{"x": read_image(row["image"], how), "y": row["label"]} for row in rows]

    [task] = files
    same = foretune.TaskCollection(
        (foretune.Task("photos", arrays(task.train), (), arrays(task.test)),)
    )
    scores = [
        foretune.adapt(model, tasks.with_objective(objective), FDAlign(learning_rate=1e-3), RUN)
        for tasks in (files, same)
    ]
    first, second = (a.models["photos", 0].state_dict() for a in scores)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_image_folders_on_the_command_line(photos: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fixed = ("--tasks", photos, "--objective", "prompts", "tasks.validation=0", "steps=2")
    result = command_line.the_json("adapt", base, *fixed, "--out", out, "method=fd-align")
    assert set(result["scores"]) == {"photos"}
    assert (out / "photos" / "model.safetensors").is_file()
    answers = tmp_path / "answers.jsonl"
    predicted = command_line.call(
        *("predict", base, out / "photos", photos / "test", "--out", answers)
    )
    assert predicted.exit_code == 0, predicted.output
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(rows) == 3 and {row["prediction"] for row in rows} <= set(COLOURS)


def test_faults_of_images_are_one_line(photos: Path, base: Path, tmp_path: Path) -> None:
    command = ("adapt", base, "--tasks", photos, "--objective", "prompts", "tasks.validation=0")
    command = (*command, "steps=2", "method=fd-align", "--out", tmp_path / "out")
    bad = photos / "train" / "cat" / "0.png"
    content = bad.read_bytes()
    bad.write_bytes(b"no picture")
    error = command_line.the_error(*command)
    assert 'task "photos", train row 1' in error and f"cannot read the image {bad}" in error
    bad.write_bytes(content[:50])  # it begins well
    assert f"cannot read the image {bad}" in command_line.the_error(*command)
    bad.write_bytes(content)
    picture(photos / "loose.png", (0, 0, 0))
    assert "lies in no folder of a class" in command_line.the_error(*command)
    with pytest.raises(UserError, match="no such file"):
        read_image(str(photos / "none.png"), ImageInput(8))


def test_without_pillow_it_is_said(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    tasks, _ = foretune.load_tasks(Source(source=str(photos), validation=0), "prompts")
    objective = PromptClassification(tiny_models.tokenizer())
    with pytest.raises(UserError, match="needs Pillow: pip install pillow"):
        objective.fit(tasks)
