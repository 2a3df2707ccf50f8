"""`foretune check`: do these adapters do on this base what they were trained to do?

The commonest fault in serving is an adapter that is not applied: it was trained on another base, it
is empty, it is a copy of another one, or the engine reads it otherwise. None of these raises an
error by itself.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foretune.adapters.config_file import read_config
from foretune.adapters.peft_format import bank_like, load_adapter
from foretune.adapters.stored_adapter import (
    StoredAdapter,
    read_adapter,
    read_base_record,
)
from foretune.errors import ForetuneError, UserError
from foretune.files import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, VERSIONS
from foretune.formats import read_tensors
from foretune.models.loading import head_of_class, load_base, load_model
from foretune.models.pretrained import quiet
from foretune.models.routing import route
from foretune.models.surgery import head_modules, head_width, match_head
from foretune.printable import in_one_line
from foretune.recipes.saved_base import find_base
from foretune.tasks.readers import read_rows
from foretune.training.trained_on import read_trained_on

PROBE = "What would you do? I agree with most of it, but not with the last point."
NUM_ROWS = 8  # of a file of rows
LAST_LAYERS = ("out_proj", "classifier", "score")  # of heads of several layers, by name
TOLERANCE = 1e-3  # of the largest output: differences of summation order are below it


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What was seen of one adapter.

    Args:
        adapter: Its folder.
        faults: What is wrong with it; empty if nothing is.
        notes: What could not be checked.
        effect: Largest change of an output on the probe; None if it could not be applied.
        difference: Largest difference between an output as foretune computes it and as stock PEFT
            does; None if it was not compared.
    """

    adapter: str
    faults: list[str]
    notes: list[str]
    effect: float | None = None
    difference: float | None = None


def check_adapters(base: Path, adapters: Sequence[Path], rows: Path | None) -> dict[str, Any]:
    """Checks adapters on a base.

    Args:
        base: Folder of the base, a GGUF file, or the name of a model.
        adapters: PEFT folders, or folders that hold such folders.
        rows: A file of rows to try them on; None for a sentence, which takes a tokenizer.

    Returns:
        JSON-able: base, adapters (the fields of `Checked`), and ok: whether none has a fault.

    Raises:
        UserError: There is no such base, no adapter, or nothing to try them on.
    """
    saved = find_base(base)
    folders = all_adapters(adapters)
    # in half precision two sound orders of summation differ by more than the tolerance
    bases = BasesOfAdapters(saved.folder, torch.float32)
    results: list[Checked] = []
    first_with: dict[str, str] = {}
    for folder in folders:
        results.append(_checked(folder, bases, rows, first_with))
    return {
        "base": str(base),
        "adapters": [asdict(result) for result in results],
        "ok": not any(result.faults for result in results),
    }


def all_adapters(folders: Sequence[Path]) -> list[Path]:
    """The PEFT folders in several folders, each once.

    Raises:
        UserError: There is none in one of them.
    """
    paths = [path for folder in folders for path in adapter_folders(folder)]
    return list({path.resolve(): path for path in reversed(paths)}.values())[::-1]


def adapter_folders(folder: Path) -> list[Path]:
    """The PEFT folders in a folder, which may be one itself; without earlier versions.

    Raises:
        UserError: There is none.
    """
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        return [folder]
    inside = sorted(
        path.parent
        for path in folder.glob(f"**/{ADAPTER_CONFIG_FILE}")
        if VERSIONS not in path.relative_to(folder).parts
    )
    if not inside:
        what = f"no {ADAPTER_CONFIG_FILE} in it" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder} is not an adapter, and holds none: {what}")
    return inside


class BasesOfAdapters:
    """The base, with the head that an adapter was trained with.

    Args:
        folder: Its folder.
        dtype: Dtype of the weights; "auto" for the one that they were saved in, None for that of
            `held_in`.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | str | None) -> None:
        self.folder, self.dtype = folder, dtype
        with quiet():
            self.model, self.tokenizer = load_base(self.folder, dtype=dtype)
        self.loaded: dict[tuple[str, int | None], nn.Module] = {}

    def of(self, adapter: Path) -> nn.Module:
        """The base in the class and with the width of head of an adapter.

        Raises:
            UserError: The adapter's record is damaged.
        """
        record = read_base_record(adapter)
        recorded = None if record is None else record.get("model_class")
        name = recorded or type(self.model).__name__
        width = _head_width(adapter, self.model)
        if name == type(self.model).__name__ and width in (None, head_width(self.model)):
            return self.model
        key = (name, width)
        if key not in self.loaded:
            head = head_of_class(name)
            if name == type(self.model).__name__:
                model = copy.deepcopy(self.model)
                match_head(model, width, seed=0)
            elif head is not None:
                with quiet():
                    model, _ = load_model(
                        self.folder, head=head, num_labels=width, dtype=self.dtype
                    )
            else:
                model = self.model  # its fingerprint will tell
            self.loaded[key] = model
        return self.loaded[key]


def _head_width(adapter: Path, model: nn.Module) -> int | None:
    """The number of outputs of an adapter's own head; None if it has none."""
    saved = read_config(adapter).get("modules_to_save") or []
    heads = [name.rpartition(".")[2] for name in saved]
    if not heads or not (adapter / ADAPTER_WEIGHTS_FILE).is_file():
        return None
    names = {name.rpartition(".")[2] for name in head_modules(model)} | {*LAST_LAYERS}
    widths = {
        name.removesuffix(".weight").rpartition(".")[2]: len(tensor)
        for name, tensor in read_tensors(adapter / ADAPTER_WEIGHTS_FILE).items()
        if name.endswith(".weight") and tensor.dim() == 2 and any(f".{h}." in name for h in heads)
    }
    if not widths or not names & {*heads}:
        return None
    last = next((layer for layer in LAST_LAYERS if layer in widths), [*widths][-1])
    return widths[last]


def _checked(
    folder: Path, bases: BasesOfAdapters, rows: Path | None, first_with: dict[str, str]
) -> Checked:
    """The checks of one adapter.

    Args:
        folder: Its folder.
        bases: The base.
        rows: As in `check_adapters`.
        first_with: Digest of weights → the first adapter with them; this one is added.

    Raises:
        UserError: There is nothing to try it on.
    """
    faults: list[str] = []
    notes: list[str] = []
    try:
        model = bases.of(folder)
        stored = read_adapter(folder, model, allow_unverified=True)
    except ForetuneError as error:
        return Checked(adapter=str(folder), faults=[str(error)], notes=notes)
    notes += stored.notes
    # Where held-out tasks chose not to adapt, an adapter has no effect on purpose.
    untrained = read_trained_on(folder).get("steps") == 0
    same = first_with.setdefault(_digest(stored), str(folder))
    if same != str(folder) and not untrained:
        faults.append(f"has the same weights as {same}")
    probe = _probe(model, bases.tokenizer, rows)
    with torch.no_grad():
        try:
            plain = _outputs(model, probe)
        except Exception as error:  # whatever a model makes of inputs that are not its own
            raise UserError(
                f"the base does not take the rows that the adapters are tried on: "
                f"{in_one_line(str(error))[:200]}"
            ) from error
        try:
            applied = _by_peft(model, folder, probe)
        except Exception as error:  # whatever PEFT makes of the folder
            faults.append(f"stock PEFT does not load it: {in_one_line(str(error))[:200]}")
            return Checked(adapter=str(folder), faults=faults, notes=notes)
        if applied.shape != plain.shape:
            notes.append("not compared: it changes the shape of the outputs")
            return Checked(adapter=str(folder), faults=faults, notes=notes)
        effect = float((applied - plain).abs().max())
        if not effect > 0 and untrained:
            notes.append("changes no output: it was trained for 0 steps")
        elif not effect > 0:
            faults.append("changes no output on the probe")
        difference = None
        try:
            ours = _by_bank(model, folder, stored, probe)
        except ForetuneError as error:
            notes.append(f"not compared with stock PEFT: {error}")
        else:
            difference = float((applied - ours).abs().max())
            if difference > TOLERANCE * float(applied.abs().max()):
                faults.append("stock PEFT computes other outputs than foretune")
    return Checked(
        adapter=str(folder), faults=faults, notes=notes, effect=effect, difference=difference
    )


def _digest(stored: StoredAdapter) -> str:
    """A digest of an adapter's weights, whatever its folder is called."""
    digest = hashlib.sha256(str(stored.config.get("lora_alpha")).encode())
    for name in sorted(stored.tensors):
        digest.update(name.encode())
        digest.update(stored.tensors[name].float().numpy().tobytes())
    return digest.hexdigest()


def _probe(model: nn.Module, tokenizer: Any, rows: Path | None) -> dict[str, Tensor]:
    """Inputs of the model.

    Raises:
        UserError: There are none.
    """
    examples = []
    if rows is not None:
        for row in read_rows(str(rows)):
            examples.append(row.fields)
            if len(examples) == NUM_ROWS:
                break
    if examples and all("x" in example for example in examples):
        arrays = [np.asarray(example["x"], dtype=np.float32) for example in examples]
        if len({array.shape for array in arrays}) > 1:
            arrays = arrays[:1]
        return {"": torch.from_numpy(np.stack(arrays))}
    if tokenizer is None:
        where = "" if rows is None else f", and {rows} has no x"
        raise UserError(f"the base reads arrays{where}: add --rows with a file of rows that have x")
    texts = [_text(example) for example in examples] or [PROBE]
    if tokenizer.pad_token is None:
        texts = texts[:1]
    encoded = tokenizer(texts, padding=len(texts) > 1, truncation=True, max_length=64)
    inputs = {name: torch.tensor(encoded[name]) for name in ("input_ids", "attention_mask")}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    return inputs


def _text(example: dict[str, Any]) -> str:
    """A text of a row.

    Raises:
        UserError: It has none.
    """
    for name in ("text", "prompt", "context", "completion"):
        value = example.get(name)
        if isinstance(value, list) and value and isinstance(value[-1], str):
            value = value[-1]
        if isinstance(value, str) and value.strip():
            return value
    if isinstance(example.get("messages"), list) and example["messages"]:
        return str(example["messages"][0].get("content"))
    raise UserError("a row of --rows has no text, prompt, context, messages or x")


def _outputs(model: Any, probe: dict[str, Tensor]) -> Tensor:
    """(rows, …) outputs in float32: logits, or the last hidden states."""
    output = model(probe[""]) if "" in probe else model(**probe)
    if not isinstance(output, Tensor):
        names = ("logits", "last_hidden_state", "pooler_output")
        values = (getattr(output, name, None) for name in names)
        output = next(value for value in values if value is not None)
    return output.float()


def _by_peft(model: nn.Module, folder: Path, probe: dict[str, Tensor]) -> Tensor:
    """The outputs as stock PEFT computes them."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
    return _outputs(adapted.eval(), probe)


def _by_bank(
    model: nn.Module, folder: Path, stored: StoredAdapter, probe: dict[str, Tensor]
) -> Tensor:
    """The outputs as the bank computes them.

    Raises:
        UserError: The bank has no such adapters.
    """
    model = copy.deepcopy(model)
    bank = bank_like(model, stored, [folder.name])
    load_adapter(bank, 0, folder, model, allow_unverified=True)
    num_rows = len(next(iter(probe.values())))
    with bank.attached(), route([0] * num_rows):
        return _outputs(model, probe)
