"""Models and pipelines of diffusers: folders, conditions, latents, and what is predicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import foretune
import tiny_models
from command_line import the_error, the_json
from foretune import Denoising, Run, SaRA, Task, TaskCollection, UserError, load_sparse
from foretune.evaluation.samples import draw_samples
from foretune.models import diffusion
from foretune.models.loading import load_base, load_model, save_base

diffusers = pytest.importorskip("diffusers")
RUN = Run(steps=2, batch_size=4, device="cpu", eval_every=0)
METHOD = SaRA(fraction=0.2, learning_rate=0.01)
WIDTH = 16  # of the text encoder


def conditional(channels: int = 4) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def pipeline(folder: Path, **schedule: Any) -> Any:
    """A random Stable Diffusion of the smallest size, saved."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=WIDTH,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
        )
    )
    tokenizer = tiny_models.tokenizer()
    tokenizer.model_max_length = 8
    vae = diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    whole = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=conditional(),
        scheduler=diffusers.DDPMScheduler(num_train_timesteps=20, **schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    whole.save_pretrained(folder)
    return whole


def rows(number: int, shape: tuple[int, ...], **columns: Any) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {"x": rng.uniform(-1, 1, shape).astype("f4")} | {k: v(rng) for k, v in columns.items()}
        for _ in range(number)
    ]


def tasks(examples: list[dict[str, Any]], **fields: Any) -> TaskCollection:
    fields = {"num_steps": 10, **fields}
    return TaskCollection((Task("a", examples, (), examples[:2]),), Denoising(**fields))


def states(rng: np.random.Generator) -> Any:
    return rng.normal(size=(5, WIDTH)).astype("f4")


def equal(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_the_loss_is_that_of_the_equation(prediction: Any) -> None:
    examples = rows(3, (4, 8, 8), encoder_hidden_states=states)
    model = conditional().eval()
    collection = tasks(examples, prediction=prediction)
    objective = collection.objective.fit(collection).bind(model)
    assert objective.inputs == ("encoder_hidden_states",)
    encoded = [
        objective.sample(objective.encode(row, "a"), np.random.default_rng(i))
        for i, row in enumerate(examples)
    ]
    alphas = objective.scheduler().alphas_cumprod
    with torch.no_grad():
        losses = objective.losses(model, objective.collate(encoded, (0, 0, 0)))
        for row, loss in zip(encoded, losses, strict=True):
            x, noise, t = (torch.from_numpy(np.asarray(row[name])) for name in ("x", "noise", "t"))
            a = alphas[t].view(1, 1, 1)
            noisy = a.sqrt() * x + (1 - a).sqrt() * noise[0]
            target, told = noise[0], t
            if prediction == "v_prediction":
                target = a.sqrt() * noise[0] - (1 - a).sqrt() * x
            if prediction == "flow":
                sigma = (t.item() + 1) / 10
                noisy, target, told = (1 - sigma) * x + sigma * noise[0], noise[0] - x, t + 1
            condition = torch.from_numpy(row["encoder_hidden_states"])[None]
            predicted = model(noisy[None], told, condition).sample[0]
            expected = (predicted - target).square().mean()
            torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_a_folder_of_one_model_is_adapted_and_saved(tmp_path: Path) -> None:
    conditional().save_pretrained(tmp_path / "unet")
    model, tokenizer = load_base(tmp_path / "unet")
    assert tokenizer is None and type(load_model(tmp_path / "unet")[0]) is type(model)
    collection = tasks(rows(6, (4, 8, 8), encoder_hidden_states=states))
    foretune.adapt(model, collection, METHOD, RUN).save(tmp_path / "out")
    adapted = load_sparse(model, tmp_path / "out" / "a")
    save_base(adapted, None, tmp_path / "new")
    stock = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "new")
    assert equal(stock, adapted) and not equal(stock, model)


def test_a_retrained_denoiser_is_a_folder_of_diffusers(tmp_path: Path) -> None:
    collection = tasks(rows(6, (4, 8, 8), encoder_hidden_states=states))
    run = RUN.replace(out=tmp_path / "run")
    base = foretune.retrain(conditional(), collection, foretune.Standard(), run).model
    stock = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "run" / "base")
    assert equal(stock, base) and equal(load_base(tmp_path / "run" / "base")[0], base)


def test_what_a_denoiser_needs_is_asked_for() -> None:
    with pytest.raises(UserError, match="UNet2DConditionModel needs encoder_hidden_states besides"):
        foretune.adapt(conditional(), tasks(rows(4, (4, 8, 8))), METHOD, RUN)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.001))

        def forward(self, noisy: Any, time: Any, depth: Any, mask: Any) -> Any:
            return self.scale * noisy + depth.mean() * mask.mean()

    with pytest.raises(UserError, match=r"Two needs depth and mask besides .* a column of that"):
        foretune.adapt(Two(), tasks(rows(4, (1, 8, 8))), METHOD, RUN)
    columns = {name: lambda rng: rng.normal(size=3).astype("f4") for name in ("depth", "mask")}
    foretune.adapt(Two(), tasks(rows(4, (1, 8, 8), **columns)), foretune.Full(), RUN)


def test_conditions_that_cannot_be_stacked_are_one_line() -> None:
    lengths = iter(range(4, 20))
    ragged = rows(4, (4, 8, 8), encoder_hidden_states=lambda rng: np.ones((next(lengths), WIDTH)))
    with pytest.raises(UserError, match="encoder_hidden_states must be numbers of one shape"):
        foretune.adapt(conditional(), tasks(ragged), METHOD, RUN)
    some = rows(3, (4, 8, 8), encoder_hidden_states=states, class_labels=lambda rng: 1)
    del some[1]["class_labels"]
    with pytest.raises(UserError, match="only some rows have class_labels"):
        foretune.adapt(conditional(), tasks(some), METHOD, RUN)
    words = rows(4, (4, 8, 8), encoder_hidden_states=lambda rng: "a cat")
    with pytest.raises(UserError, match="encoder_hidden_states must be numbers of one shape"):
        foretune.adapt(conditional(), tasks(words), METHOD, RUN)


def test_class_labels_are_whole_numbers() -> None:
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        num_layers=1,
        norm_num_groups=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    examples = rows(4, (4, 8, 8), class_labels=lambda rng: int(rng.integers(3)))
    adapted = foretune.adapt(model, tasks(examples), METHOD, RUN)
    assert ("a", 0) in adapted.scores


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_pipeline_reads_texts_and_images(prediction: str, tmp_path: Path) -> None:
    whole = pipeline(tmp_path / "sd", prediction_type=prediction)
    model, _ = load_base(tmp_path / "sd")
    assert equal(model, whole.unet)
    examples = rows(4, (3, 16, 16), text=lambda rng: "a red cat")
    collection = tasks(examples)
    objective = collection.objective.fit(collection).bind(model)
    assert (objective.num_steps, objective.prediction) == (20, prediction)
    encoded = objective.encode(examples[0], "a")
    with torch.no_grad():
        expected = whole.vae.encode(torch.from_numpy(examples[0]["x"])[None]).latent_dist.mean
        embedded, _ = whole.encode_prompt("a red cat", "cpu", 1, False)
    np.testing.assert_allclose(encoded["x"], 0.18215 * expected[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(encoded["encoder_hidden_states"], embedded[0].numpy(), atol=1e-5)
    foretune.adapt(model, collection, METHOD, RUN).save(tmp_path / "out")
    whole.unet = load_sparse(whole.unet, tmp_path / "out" / "a")  # as a user of diffusers does
    assert not equal(whole.unet, model)


def test_latents_are_taken_as_they_are(tmp_path: Path) -> None:
    pipeline(tmp_path / "sd")
    model, _ = load_base(tmp_path / "sd")
    examples = rows(2, (4, 8, 8), encoder_hidden_states=states)
    collection = tasks(examples)
    objective = collection.objective.fit(collection).bind(model)
    assert np.array_equal(objective.encode(examples[0], "a")["x"], examples[0]["x"])


def test_pipelines_as_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline(Path("sd"))
    x = np.stack([row["x"] for row in rows(8, (3, 16, 16))])
    np.savez("images.npz", x=x, text=["a cat"] * 8, task=["a"] * 8)
    np.savez("bare.npz", x=x, task=["a"] * 8)
    how = ["--objective", "denoising", "method=sara", "fields.fraction=0.2", "steps=2"]
    how.append("batch_size=4")
    command = ["adapt", "sd", "--tasks", "images.npz", *how]
    result = the_json(*command, "--out", "out")
    assert "a" in json.dumps(result) and Path("out/a/sparse_delta.safetensors").is_file()
    assert "give each row a text" in the_error("adapt", "sd", "--tasks", "bare.npz", *how)
    Path("sd/text_encoder_2").mkdir()
    diffusion.surroundings.cache_clear()
    assert "has several text encoders" in the_error(*command, "--out", "two")
    assert not Path("two").exists()
    config = Path("sd/unet/config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "Nothing"}))
    assert "diffusers has no model 'Nothing'" in the_error(*command, "--out", "none")


def test_samples_of_a_flow_end_where_it_leads() -> None:
    class Towards(nn.Module):
        """The flow of data that is always 0.5: ε − x_0, from x_t and σ."""

        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.tensor(0.5))

        def forward(self, noisy: Any, t: Any) -> Any:
            return (noisy - self.value) / (t.view(-1, 1, 1, 1) / 20)

    samples = draw_samples(Towards(), Denoising(num_steps=20, prediction="flow"), (1, 4, 4), 2)
    np.testing.assert_allclose(samples, 0.5, atol=1e-5)
