"""A sparse change of a model: selected entries of its parameters are trained, all others fixed.

    symbol   here            shape     meaning
    P0       base            any       the original parameters
    M        indices[name]   (m,)      positions of the trained entries in the flattened parameter
    P_M      values[name]    (m,)      values at these positions; all that an optimiser sees
    ΔP       P_M − P0_M      (m,)      the change; a file holds P_M, so that it loads bit for bit

The parameters stay in place. A backward pass computes the gradient of one parameter after the
other; each is read at M and freed at once, so that only |M| numbers of all gradients are ever kept
(Hu et al., "High-efficient diffusion model fine-tuning with progressive sparse low-rank
adaptation", arXiv:2409.06633, eq. 6 and 7). Works with any module and optimiser, and with tied
parameters.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from typing_extensions import TypedDict

from foretune.adapters.entries import within
from foretune.errors import UserError
from foretune.files import SPARSE_FILE
from foretune.formats import SPARSE, check_format, parse_json, read_tensors
from foretune.linalg.low_rank import nuclear_gradient
from foretune.models.surgery import has_fresh_head, head_modules, match_head

SMALL_SIDE = 64  # rows or columns of a matrix that the authors' code takes for low-rank anyway


class SparseDelta:
    """The selected entries of a model's parameters, as separate leaf tensors.

    Inside `attached()` a backward pass fills `.grad` of the values and leaves none on the
    parameters. After an optimiser step, `write` copies the values into the model;
    `write_after(optimizer)` makes the optimiser do so.

    Args:
        model: Changed in place by `write`, only at the selected entries. Parameters without
            entries are frozen.
        indices: Parameter name → (m,) distinct positions in the flattened parameter.
        threshold: Threshold of the selection: `reselect` applies it again, `save` records it.
        heads: Names of modules that belong to the task: all their entries are in `indices`, and
            a base may have different ones.

    Raises:
        UserError: No entry is selected outside the heads.

    Example:
        >>> from foretune.adapters.entries import entries_below
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(3, 2)
        >>> delta = SparseDelta(model, entries_below(model, 0.1), threshold=0.1)
        >>> optimizer = delta.write_after(torch.optim.AdamW(delta.parameters(), lr=0.1))
        >>> with delta.attached():
        ...     model(torch.ones(1, 3)).sum().backward()
        >>> model.weight.grad is None
        True
        >>> _ = optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        indices: Mapping[str, Tensor],
        *,
        threshold: float,
        heads: Sequence[str] = (),
    ) -> None:
        self.model, self.threshold, self.heads = model, threshold, list(heads)
        selected = {name: positions for name, positions in indices.items() if len(positions)}
        if all(within(name, heads) for name in selected):
            smallest = min(
                (
                    p.detach().abs().min().item()
                    for n, p in model.named_parameters()
                    if n in indices
                ),
                default=None,
            )
            raise UserError(
                f"no trainable parameter of {type(model).__name__} is below the threshold "
                f"{threshold:g} in absolute value (the smallest is {smallest}): raise threshold, "
                "or set fraction"
            )
        self.hashes = {n: _sha256(p) for n, p in model.named_parameters() if not within(n, heads)}
        self.buffers = {n: b.detach().clone() for n, b in _saved_buffers(model)}
        self.values: dict[str, nn.Parameter] = {}
        self.indices: dict[str, Tensor] = {}  # of the entries that are still trained
        for name, p in model.named_parameters():
            p.requires_grad_(name in selected)
            if name not in selected:
                continue
            if not p.is_contiguous():
                p.data = p.data.contiguous()
            positions = selected[name].to(p.device)
            self.indices[name] = positions
            self.values[name] = nn.Parameter(p.detach().view(-1)[positions].clone())
        self.support = dict(self.indices)  # of all entries that were ever trained

    def parameters(self) -> list[nn.Parameter]:
        """The values (m,) of each parameter, for an optimiser."""
        return list(self.values.values())

    def numel(self) -> int:
        """The number of entries that are trained."""
        return sum(v.numel() for v in self.values.values())

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Inside the block gradients go to the values: ∂/∂P_M = (∂/∂P)[M] (eq. 7)."""
        parameters = dict(self.model.named_parameters())
        hooks = [
            parameters[name].register_post_accumulate_grad_hook(self._grad_hook(name))
            for name in self.values
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _grad_hook(self, name: str) -> Callable[[Tensor], None]:
        """A hook that moves a parameter's gradient to its values."""

        def move_gradient(p: Tensor) -> None:
            assert p.grad is not None
            value, grad = self.values[name], p.grad.reshape(-1)[self.indices[name]]
            value.grad = grad if value.grad is None else value.grad + grad
            p.grad = None

        return move_gradient

    @torch.no_grad()
    def write(self) -> None:
        """Copies the values into the model: P[M] ← P_M (eq. 6)."""
        for name, p in self.model.named_parameters():
            if name in self.values:
                p.view(-1)[self.indices[name]] = self.values[name].detach()

    def write_after(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Makes each step of the optimiser end with `write`; returns the optimiser."""
        optimizer.register_step_post_hook(lambda *_: self.write())
        return optimizer

    @torch.no_grad()
    def read(self) -> None:
        """Copies the values from the model, after something else has written into it."""
        for name, p in self.model.named_parameters():
            if name in self.values:
                self.values[name].copy_(p.view(-1)[self.indices[name]])

    def move(self, device: torch.device) -> None:
        """Moves values and indices to the device that the model is on."""
        for name, value in self.values.items():
            value.data = value.data.to(device)
            self.indices[name] = self.indices[name].to(device)

    @torch.no_grad()
    def reselect(self, optimizer: torch.optim.Optimizer | None = None) -> tuple[int, int]:
        """Continues with the entries that are still below the threshold; the others are frozen.

        Heads continue in full. The optimiser's moments of the remaining entries are kept.

        Args:
            optimizer: The optimiser of `parameters()`.

        Returns:
            The numbers of entries before and after, without the heads.
        """
        before = after = 0
        for name, value in self.values.items():
            if within(name, self.heads):
                continue
            keep = value.abs() < self.threshold
            before, after = before + len(keep), after + int(keep.sum())
            state = {} if optimizer is None else optimizer.state.get(value, {})
            for key, moment in state.items():
                if isinstance(moment, Tensor) and moment.shape == value.shape:
                    state[key] = moment[keep].clone()
            self.indices[name] = self.indices[name][keep].clone()
            value.grad = None
            value.data = value.data[keep].clone()
        return before, after

    def large_matrices(self) -> list[str]:
        """Names of the matrices of more than 64 rows and columns that hold trained entries."""
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        return [
            name
            for name, value in self.values.items()
            if len(shapes[name]) == 2
            and min(shapes[name]) > SMALL_SIDE
            and len(value)
            and not within(name, self.heads)
        ]

    @torch.no_grad()
    def add_nuclear(self, weight: float, names: Collection[str] | None = None) -> None:
        """Adds the gradient of weight · Σ ‖P ⊙ M‖_* to `.grad` of the values (eq. 5).

        A parameter of more than two axes is a matrix of its first axis by all others; one of a
        single axis has no rank and is left out, and so are heads.

        Args:
            weight: λ.
            names: The parameters that the sum is taken over; None for all.
        """
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        for name, value in self.values.items():
            if len(shapes[name]) < 2 or within(name, self.heads) or not len(value):
                continue
            if names is not None and name not in names:
                continue
            matrix = value.new_zeros(shapes[name].numel())
            matrix[self.indices[name]] = value.detach()
            dense_grad = nuclear_gradient(matrix.view(shapes[name][0], -1)).reshape(-1)
            grad = weight * dense_grad[self.indices[name]].to(value.dtype)
            value.grad = grad if value.grad is None else value.grad + grad

    def save(self, folder: Path | str) -> Path:
        """Writes the entries that were trained, and the buffers that changed, into one file.

        Returns:
            Its path.
        """
        path = Path(folder) / SPARSE_FILE
        parameters = dict(self.model.named_parameters())
        tensors = {}
        for name, positions in self.support.items():
            p = parameters[name].detach().cpu().contiguous()
            tensors[f"{name}:values"] = p.view(-1)[positions.cpu()].clone()
            tensors[f"{name}:indices"] = positions.cpu().contiguous()
        for name, buffer in _saved_buffers(self.model):
            if not torch.equal(buffer.cpu(), self.buffers[name].cpu()):
                tensors[f"{name}:buffer"] = buffer.detach().cpu().contiguous().clone()
        head_shapes = {n: list(p.shape) for n, p in parameters.items() if within(n, self.heads)}
        header = {"threshold": self.threshold, "whole": head_shapes, "sha256": self.hashes}
        save_file(tensors, str(path), {"format": SPARSE, "about": json.dumps(header)})
        return path


def load_sparse(
    model: nn.Module,
    folder: Path | str | Sequence[Path | str],
    alpha: float | Sequence[float] = 1.0,
) -> nn.Module:
    """A copy of a base with SaRA's change for one task, or for several.

    The result is P0 + Σ α_i ΔP_i (eq. 9 and 10 of arXiv:2409.06633). One folder with alpha 1
    gives the adapted model bit for bit. Task heads and buffers are not scaled, so only one folder
    may contain them.

    Args:
        model: The base that was adapted; it is not changed.
        folder: One task's folder (or file), or several.
        alpha: Weight of each change: one number for all, or one per folder.

    Raises:
        UserError: A file is missing, is not a sparse change, or belongs to another base; or the
            numbers of alphas and folders differ.

    Example:
        >>> load_sparse(base, "adapters/greek", alpha=0.6)              # doctest: +SKIP
        >>> load_sparse(base, ["adapters/greek", "adapters/tifinagh"], 0.6)  # doctest: +SKIP
    """
    folders = [folder] if isinstance(folder, (str, Path)) else list(folder)
    alphas = [float(alpha)] * len(folders) if isinstance(alpha, (int, float)) else list(alpha)
    if not folders or len(alphas) != len(folders):
        raise UserError(f"{len(folders)} folders need as many alphas, got {len(alphas)}")
    adapted = copy.deepcopy(model)
    hashes = {name: _sha256(p) for name, p in model.named_parameters()}
    base_parameters = dict(model.named_parameters())
    sources: dict[str, Path] = {}  # name of a tensor that cannot be added up → its file
    for where, weight in zip(folders, alphas, strict=True):
        path = Path(where) / SPARSE_FILE if Path(where).is_dir() else Path(where)
        header, tensors = _read(path)
        _check_base(model, header, hashes, path)
        for name, shape in header["whole"].items():
            _check_unique(sources, name, path)
            base_shape = list(base_parameters[name].shape)
            if base_shape != shape and has_fresh_head(adapted):
                match_head(adapted, shape[0], 0)
        _check_tensors(dict(adapted.named_parameters()), tensors, path)
        exact = len(folders) == 1 and weight == 1
        _add(adapted, base_parameters, tensors, header, 1.0 if exact else weight, exact)
        for name, buffer in _saved_buffers(adapted):
            if f"{name}:buffer" in tensors:
                _check_unique(sources, name, path)
                buffer.data.copy_(tensors[f"{name}:buffer"])
    return adapted


@torch.no_grad()
def _add(
    adapted: nn.Module,
    base_parameters: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    header: Header,
    weight: float,
    exact: bool,
) -> None:
    """Adds weight · ΔP of a file to a model in place; heads, and if `exact` all, are copied."""
    parameters = dict(adapted.named_parameters())
    for key in tensors:
        name, _, part = key.rpartition(":")
        if part != "values":
            continue
        p = parameters[name]
        positions = tensors[f"{name}:indices"].to(p.device)
        values = tensors[key].to(p.device)
        if not p.is_contiguous():
            p.data = p.data.contiguous()
        if exact or name in header["whole"]:
            p.view(-1)[positions] = values.to(p.dtype)
        else:
            change = values - base_parameters[name].detach().reshape(-1)[positions]
            p.view(-1)[positions] += (weight * change).to(p.dtype)


def _check_unique(sources: dict[str, Path], name: str, path: Path) -> None:
    """Records that the file at `path` contains the head or buffer `name`.

    Raises:
        UserError: Another file contains it too.
    """
    if name in sources:
        raise UserError(
            f"{sources[name]} and {path} both contain {name}, which cannot be added up: load only "
            "one of them"
        )
    sources[name] = path


def _check_base(model: nn.Module, header: Header, hashes: Mapping[str, str], path: Path) -> None:
    """Checks that the model is the base of the file.

    Raises:
        UserError: A parameter differs or is missing.
    """
    wrong = [n for n, digest in header["sha256"].items() if hashes.get(n) != digest]
    absent = [n for n in header["whole"] if n not in hashes]
    if not wrong and not absent:
        return
    name = (wrong + absent)[0]
    how = "differs" if name in hashes else "is missing"
    total = len(header["sha256"]) + len(header["whole"])
    raise UserError(
        f"{path} was made for another base: {name} {how} in this {type(model).__name__} "
        f"({len(wrong) + len(absent)} of {total} parameters); load the exact weights that were "
        "adapted, in the same dtype"
    )


# What a file says about itself: the shape of each head, the digest of each parameter of the base.
Header = TypedDict(  # noqa: UP013 - a field of a class is a name, and "whole" says too little
    "Header", {"whole": dict[str, list[int]], "sha256": dict[str, str]}
)


def _read(path: Path) -> tuple[Header, dict[str, Tensor]]:
    """The header and the tensors of a file.

    Raises:
        UserError: The file is missing, damaged, or of another format.
    """
    if not path.is_file():
        raise UserError(f"no sparse change in {path.parent}: there is no file {path.name}")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            if "format" not in metadata:
                raise UserError(
                    f"{path} is not a sparse change: its format is None, expected {SPARSE!r}"
                )
            check_format(path, metadata, SPARSE)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a complete safetensors file: {error}") from error
    return parse_json(metadata.get("about", ""), path, Header), read_tensors(path)


def _check_tensors(
    parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], path: Path
) -> None:
    """Checks that indices and values belong together and lie within the parameters.

    Raises:
        UserError: They do not.
    """
    for key, values in tensors.items():
        name, _, part = key.rpartition(":")
        if part == "buffer":
            continue
        positions = tensors.get(f"{name}:indices")
        fits = (
            part in ("values", "indices")
            and name in parameters
            and positions is not None
            and not positions.is_floating_point()
            and f"{name}:values" in tensors
            and positions.shape == values.shape == (len(values),)
            and (
                not len(values)
                or 0 <= int(positions.min()) <= int(positions.max()) < parameters[name].numel()
            )
        )
        if not fits:
            raise UserError(f"{path} is damaged: {key} does not fit the base's parameters")


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, buffer) of the buffers in the model's state dict, such as running statistics."""
    saved = model.state_dict(keep_vars=True)
    yield from ((name, b) for name, b in model.named_buffers() if name in saved)


def _sha256(p: Tensor) -> str:
    """SHA-256 of shape, dtype and values."""
    digest = hashlib.sha256(f"{tuple(p.shape)}{p.dtype}".encode())
    digest.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def task_heads(model: nn.Module, num_outputs: int | None) -> list[str]:
    """The names of the head modules that belong to the task; empty where the head is the base's."""
    return head_modules(model) if num_outputs is not None and has_fresh_head(model) else []
