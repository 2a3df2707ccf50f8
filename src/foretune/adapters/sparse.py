"""A sparse change of a model: chosen entries of its parameters move, all others keep their bits.

    symbol   here            shape     meaning
    P0       base            any       the given parameters
    M        indices[name]   (m,)      places of the trained entries in the flattened parameter
    P_M      values[name]    (m,)      what stands there; the only thing that an optimiser sees
    ΔP       P_M − P0_M      (m,)      what a file holds, as P_M itself, so that it loads bit by bit

The parameters stay where they are. A backward pass makes the gradient of one parameter after the
other; each is read at M and freed at once, so that only |M| numbers of all gradients are ever kept
(Hu et al., "High-efficient diffusion model fine-tuning with progressive sparse low-rank
adaptation", arXiv:2409.06633, eq. 6 and 7). Any module, tied parameters and any optimiser will do.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from foretune.errors import UserError
from foretune.formats import SPARSE, check_format
from foretune.linalg.low_rank import nuclear_gradient
from foretune.models.surgery import has_fresh_head, head_modules, match_head

FILE = "sparse_delta.safetensors"


def within(name: str, modules: Sequence[str]) -> bool:
    """Whether a parameter belongs to one of the modules."""
    return any(name.startswith(f"{module}.") for module in modules)


def entries_below(
    model: nn.Module, threshold: float, whole: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Where the trainable parameters are below the threshold in absolute value.

    Args:
        model: Parameters with `requires_grad=False` have no entries.
        threshold: θ_t of 1[|P0| < θ_t].
        whole: Modules all of whose entries are taken.

    Returns:
        Parameter's name → (m,) places in the flattened parameter, int32 where that is enough.
    """
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            mask = torch.ones_like(p, dtype=torch.bool) if within(name, whole) else None
            mask = p.detach().abs() < threshold if mask is None else mask
            found[name] = _places(mask.flatten())
    return found


def threshold_of(model: nn.Module, fraction: float, leave_out: Sequence[str] = ()) -> float:
    """The threshold below which this share of the trainable entries lies, ties apart.

    Args:
        model: Parameters with `requires_grad=False` do not count.
        fraction: Above 0, at most 1.
        leave_out: Modules that do not count.
    """
    sizes = [
        p.detach().abs().flatten().float()
        for name, p in model.named_parameters()
        if p.requires_grad and not within(name, leave_out)
    ]
    return threshold_among(sizes, fraction)


def threshold_among(sizes: Sequence[Tensor], fraction: float) -> float:
    """The threshold below which this share of the entries of flat tensors lies, ties apart."""
    if not sizes:
        return 0.0
    every = torch.cat(list(sizes))
    count = round(fraction * len(every))
    if count >= len(every):
        return torch.nextafter(every.max(), every.new_tensor(torch.inf)).item()
    return every.kthvalue(count + 1).values.item()


def smallest_entries(weights: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
    """Where the smallest entries in absolute value of all these weights together lie.

    Args:
        weights: Each by its name.
        fraction: Share of all entries; above 0, at most 1.

    Returns:
        Name → (m,) places in the flattened weight; weights without any are left out.

    Raises:
        UserError: No entry at all: too many are equal, or the share is too small.
    """
    sizes = {name: w.detach().abs().flatten().float() for name, w in weights.items()}
    threshold = threshold_among(list(sizes.values()), fraction)
    found = {name: _places(size < threshold) for name, size in sizes.items()}
    found = {name: places for name, places in found.items() if len(places)}
    if not found:
        raise UserError(
            f"fraction {fraction:g} of the adapted layers' weights is no entry at all (none is "
            f"below {threshold:g} in absolute value): raise fraction"
        )
    return found


class SparseDelta:
    """The chosen entries of a model's parameters, as leaves of their own.

    Inside `attached()` a backward pass fills `.grad` of the values and leaves none on the
    parameters. After an optimiser's step `write` puts the values into the model;
    `write_after(optimizer)` makes the optimiser do so.

    Args:
        model: Changed in place by `write`, at the entries only. Parameters without entries are
            frozen.
        indices: Parameter's name → (m,) distinct places in the flattened parameter.
        threshold: Written into the file.
        whole: Modules that are a task's own (heads): all their entries are in `indices`, and a
            base need not have the same ones.

    Raises:
        UserError: No entry at all.

    Example:
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
        whole: Sequence[str] = (),
    ) -> None:
        self.model, self.threshold, self.whole = model, threshold, list(whole)
        kept = {name: places for name, places in indices.items() if len(places)}
        own = sum(len(places) for name, places in kept.items() if not within(name, whole))
        if not own:
            smallest = min(
                (
                    p.detach().abs().min().item()
                    for n, p in model.named_parameters()
                    if n in indices
                ),
                default=None,
            )
            raise UserError(
                f"no parameter of {type(model).__name__} that may be trained is below the "
                f"threshold {threshold:g} (the smallest is {smallest}): raise threshold, or give "
                "fraction"
            )
        self.marks = {n: _mark(p) for n, p in model.named_parameters() if not within(n, whole)}
        self.buffers = {n: b.detach().clone() for n, b in _kept_buffers(model)}
        self.values: dict[str, nn.Parameter] = {}
        self.indices: dict[str, Tensor] = {}  # of the entries that move
        for name, p in model.named_parameters():
            p.requires_grad_(name in kept)
            if name not in kept:
                continue
            if not p.is_contiguous():
                p.data = p.data.contiguous()
            places = kept[name].to(p.device)
            self.indices[name] = places
            self.values[name] = nn.Parameter(p.detach().view(-1)[places].clone())
        self.support = dict(self.indices)  # of all entries that ever moved

    def parameters(self) -> list[nn.Parameter]:
        """What an optimiser moves."""
        return list(self.values.values())

    def numel(self) -> int:
        """How many entries move."""
        return sum(v.numel() for v in self.values.values())

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Inside the block gradients go to the values: ∂/∂P_M = (∂/∂P)[M] (eq. 7)."""
        known = dict(self.model.named_parameters())
        hooks = [
            known[name].register_post_accumulate_grad_hook(self._taker(name))
            for name in self.values
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _taker(self, name: str) -> Any:
        def take(p: Tensor) -> None:
            assert p.grad is not None
            value, part = self.values[name], p.grad.reshape(-1)[self.indices[name]]
            value.grad = part if value.grad is None else value.grad + part
            p.grad = None

        return take

    @torch.no_grad()
    def write(self) -> None:
        """Puts the values into the model: P[M] ← P_M (eq. 6)."""
        for name, p in self.model.named_parameters():
            if name in self.values:
                p.view(-1)[self.indices[name]] = self.values[name].detach()

    def write_after(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Lets every step of the optimiser end with `write`; returns the optimiser."""
        optimizer.register_step_post_hook(lambda *_: self.write())
        return optimizer

    @torch.no_grad()
    def read(self) -> None:
        """Takes the values from the model, when something else has written into it."""
        for name, p in self.model.named_parameters():
            if name in self.values:
                self.values[name].copy_(p.view(-1)[self.indices[name]])

    def move(self, device: torch.device) -> None:
        """Moves values and indices to where the model has gone."""
        for name, value in self.values.items():
            value.data = value.data.to(device)
            self.indices[name] = self.indices[name].to(device)

    @torch.no_grad()
    def reselect(self, optimizer: torch.optim.Optimizer | None = None) -> tuple[int, int]:
        """Goes on with the entries that are still below the threshold; the others stay as they are.

        Heads of their own go on whole. The optimiser's moments of the entries that stay in are
        kept.

        Args:
            optimizer: Holds `parameters()`.

        Returns:
            Entries before and after, heads not counted.
        """
        before = after = 0
        for name, value in self.values.items():
            if within(name, self.whole):
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

    @torch.no_grad()
    def add_nuclear(self, weight: float) -> None:
        """Adds the gradient of weight · Σ ‖P ⊙ M‖_* to `.grad` of the values (eq. 5).

        A parameter of more than two axes is a matrix of its first axis by all others; one of a
        single axis has no rank and is left out, and so are heads of their own.
        """
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        for name, value in self.values.items():
            if len(shapes[name]) < 2 or within(name, self.whole) or not len(value):
                continue
            matrix = value.new_zeros(shapes[name].numel())
            matrix[self.indices[name]] = value.detach()
            push = nuclear_gradient(matrix.view(shapes[name][0], -1)).reshape(-1)
            part = weight * push[self.indices[name]].to(value.dtype)
            value.grad = part if value.grad is None else value.grad + part

    def save(self, folder: Path | str) -> Path:
        """Writes the entries that may have moved, and buffers that have, into one file.

        Returns:
            The file.
        """
        path = Path(folder) / FILE
        known = dict(self.model.named_parameters())
        tensors = {}
        for name, places in self.support.items():
            p = known[name].detach().cpu().contiguous()
            tensors[f"{name}:values"] = p.view(-1)[places.cpu()].clone()
            tensors[f"{name}:indices"] = places.cpu().contiguous()
        for name, buffer in _kept_buffers(self.model):
            if not torch.equal(buffer.cpu(), self.buffers[name].cpu()):
                tensors[f"{name}:buffer"] = buffer.detach().cpu().contiguous().clone()
        whole = {n: list(p.shape) for n, p in known.items() if within(n, self.whole)}
        about = {"threshold": self.threshold, "whole": whole, "sha256": self.marks}
        save_file(tensors, str(path), {"format": SPARSE, "about": json.dumps(about)})
        return path


def load_sparse(
    model: nn.Module,
    folder: Path | str | Sequence[Path | str],
    alpha: float | Sequence[float] = 1.0,
) -> nn.Module:
    """A copy of a base with what SaRA changed for a task, or for several.

    The result is P0 + Σ α_i ΔP_i (eq. 9 and 10 of arXiv:2409.06633). One folder with alpha 1
    gives the adapted model bit by bit. Heads of their own and buffers are taken as they are, so
    only one folder may bring them.

    Args:
        model: The base that was adapted; it is not changed.
        folder: One task's folder (or file), or several.
        alpha: How much of each change; one number for all, or one for each.

    Raises:
        UserError: No such file, no file of this kind, another base, or as many alphas as there
            are not folders.

    Example:
        >>> load_sparse(base, "adapters/greek", alpha=0.6)              # doctest: +SKIP
        >>> load_sparse(base, ["adapters/greek", "adapters/tifinagh"], 0.6)  # doctest: +SKIP
    """
    folders = [folder] if isinstance(folder, (str, Path)) else list(folder)
    alphas = [float(alpha)] * len(folders) if isinstance(alpha, (int, float)) else list(alpha)
    if not folders or len(alphas) != len(folders):
        raise UserError(f"{len(folders)} folders want as many alphas, got {len(alphas)}")
    made = copy.deepcopy(model)
    marks = {name: _mark(p) for name, p in model.named_parameters()}
    start = dict(model.named_parameters())
    brought: dict[str, Path] = {}  # what cannot be added up → who brought it
    for where, share in zip(folders, alphas, strict=True):
        path = Path(where) / FILE if Path(where).is_dir() else Path(where)
        about, tensors = _read(path)
        _check_base(model, about, marks, path)
        for name, shape in about["whole"].items():
            _claim(brought, name, path)
            if name in start and list(start[name].shape) != shape and has_fresh_head(made):
                match_head(made, shape[0], 0)
        exact = len(folders) == 1 and share == 1
        _add(made, start, tensors, about, 1.0 if exact else share, exact)
        for name, buffer in _kept_buffers(made):
            if f"{name}:buffer" in tensors:
                _claim(brought, name, path)
                buffer.data.copy_(tensors[f"{name}:buffer"])
    return made


@torch.no_grad()
def _add(
    made: nn.Module,
    start: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    share: float,
    exact: bool,
) -> None:
    known = dict(made.named_parameters())
    for key in tensors:
        name, _, part = key.rpartition(":")
        if part != "values":
            continue
        p = known[name]
        places = tensors[f"{name}:indices"].to(p.device)
        values = tensors[key].to(p.device)
        if not p.is_contiguous():
            p.data = p.data.contiguous()
        if exact or name in about["whole"]:
            p.view(-1)[places] = values.to(p.dtype)
        else:
            change = values - start[name].detach().reshape(-1)[places]
            p.view(-1)[places] += (share * change).to(p.dtype)


def _claim(brought: dict[str, Path], name: str, path: Path) -> None:
    if name in brought:
        raise UserError(
            f"{brought[name]} and {path} both bring a {name} of their own, which cannot be added "
            "up: load one of them alone"
        )
    brought[name] = path


def _check_base(
    model: nn.Module, about: Mapping[str, Any], marks: Mapping[str, str], path: Path
) -> None:
    """Raises UserError unless the model is the one whose entries the file holds."""
    wrong = [n for n, mark in about["sha256"].items() if marks.get(n) != mark]
    absent = [n for n in about["whole"] if n not in marks]
    if not wrong and not absent:
        return
    name = (wrong + absent)[0]
    how = "differs" if name in marks else "is missing"
    raise UserError(
        f"{path} was made for another base: {name} {how} in this {type(model).__name__} "
        f"({len(wrong) + len(absent)} of {len(about['sha256']) + len(about['whole'])} parameters); "
        "load the very weights that were adapted, in the same dtype"
    )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise UserError(f"no sparse change in {path.parent}: there is no file {path.name}")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            if "format" not in metadata:
                raise UserError(
                    f"{path} holds no sparse change: its format is None, {SPARSE!r} would do"
                )
            check_format(path, metadata, SPARSE)
            return json.loads(metadata["about"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no whole safetensors file: {error}") from error


def _places(mask: Tensor) -> Tensor:
    kind = torch.int32 if len(mask) < 2**31 else torch.int64
    return torch.nonzero(mask).flatten().to(kind)


def _kept_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that belong to the model's state, running statistics for one."""
    saved = model.state_dict(keep_vars=True)
    yield from ((name, b) for name, b in model.named_buffers() if name in saved)


def _mark(p: Tensor) -> str:
    """sha256 of shape, type and values."""
    digest = hashlib.sha256(f"{tuple(p.shape)}{p.dtype}".encode())
    digest.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def own_heads(model: nn.Module, num_outputs: int | None) -> list[str]:
    """The modules that a task has for itself, where it has any."""
    return head_modules(model) if num_outputs is not None and has_fresh_head(model) else []
