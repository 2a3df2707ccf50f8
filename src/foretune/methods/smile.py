"""SMILE: fuse fine-tuned models into a mixture of low-rank experts, without data or training.

Paper: Tang et al., "SMILE: Zero-Shot Sparse Mixture of Low-Rank Experts Construction From
Pre-Trained Foundation Models", 2024, arXiv:2408.10174.

Each linear layer keeps the base's weight; what model i changed in it becomes expert i:

    D_i = W_i − W_0 = U_i S_i V_iᵀ
    r_i(x) = ‖ V_i[:, :g]ᵀ x ‖,   p = softmax over the top K of r, the rest 0
    y = W_0 x + b_0 + Σ_i p_i ( U_i[:, :k] S_i[:k] V_i[:, :k]ᵀ x + b_i − b_0 )

    symbol  here        shape      meaning
    T                              fine-tuned models
    k       k                      rank of an expert
    g       gate_k                 rank of its gate
    K       top_k                  experts that answer for a token
    V_iᵀ    down, gate  (k, in)    right singular vectors of D_i
    U_i S_i up          (out, k)   left ones, scaled

Deviations:
    - An expert that leaves a layer as it is is never chosen there. The authors' gate is then made
      of the vectors of a zero matrix, so that chance decides.
    - A layer of which only the bias changed has experts too (the authors' code drops them).
    - A LoRA expert is decomposed through its factors, exactly, without forming B A.
    - Embeddings' transposes (lm_head) and task heads get no experts: heads are kept, one a task.
    - Beside the paper's gate there are one from a few activations, routing by sequence and from
      outside: on LoRA experts the paper's gate fell behind plain averaging in our measurements.
Silent in the paper:
    - Padding: it does not count for routing by sequence or for the usage that is told.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from foretune.errors import UserError
from foretune.run import one_of, whole

if TYPE_CHECKING:
    from torch import Tensor, nn

    from foretune.adapters.finetuned import Finetuned, Source
    from foretune.models.fused import Fused
    from foretune.models.mixture import Routing

PAPER = {
    "title": "SMILE: Zero-Shot Sparse Mixture of Low-Rank Experts Construction From Pre-Trained "
    "Foundation Models",
    "authors": "Anke Tang and Li Shen and Yong Luo and Shuai Xie and Han Hu and Lefei Zhang and "
    "Bo Du and Dacheng Tao",
    "year": 2024,
    "venue": "arXiv",
    "arxiv": "2408.10174",
}
RIDGE = 0.1  # share of the mean energy added to each direction where the gate is from activations


@dataclass(frozen=True, kw_only=True)
class SMILE:
    """Fuse models over one base: each linear layer routes to low-rank experts, without training.

    Args:
        k: Rank of an expert; null for the whole change of the weight.
        gate_k: Rank of an expert's gate. Near the layer's width all gates are alike.
        top_k: Experts that answer together, weighted by a softmax of their gates.
        gate: "weights" (the paper's: directions that fine-tuning changed) or "activations" (those
            in which a task's own inputs stand out; takes `samples`).
        routing: "token" (the paper's), "sequence" (one choice for each sequence and layer), or
            "task" (yours, by `set_task`).
        rest: What is in no fused layer (embeddings, norms, convolutions): "base" leaves it, or
            "average" takes the mean of the models.
        target_modules: Layers to fuse, by the end of their names or by pattern (`*.attention.*`);
            null for every linear layer.
        exclude_modules: Modules left as in the base with all that is in them, likewise.
    """

    k: int | None = 32
    gate_k: int = 16
    top_k: int = 1
    gate: Literal["weights", "activations"] = "weights"
    routing: Literal["token", "sequence", "task"] = "token"
    rest: Literal["base", "average"] = "base"
    target_modules: Sequence[str] | None = None
    exclude_modules: Sequence[str] = ()

    name: ClassVar[str] = "smile"
    label: ClassVar[str] = "SMILE"
    verb: ClassVar[str] = "fuse"
    paper: ClassVar[dict[str, Any] | None] = PAPER

    def __post_init__(self) -> None:
        whole("k", self.k, 1, optional=True)
        whole("gate_k", self.gate_k, 1)
        whole("top_k", self.top_k, 1)
        one_of("gate", self.gate, ("weights", "activations"))
        one_of("routing", self.routing, ("token", "sequence", "task"))
        one_of("rest", self.rest, ("base", "average"))
        for field in ("target_modules", "exclude_modules"):
            value = getattr(self, field)
            if value is None and field == "target_modules":
                continue
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise UserError(f"{field} must be a list of module names, got {value!r}")
            # A tuple, so that the record is hashable and JSON gives it back.
            object.__setattr__(self, field, tuple(str(name) for name in value))

    def to_dict(self) -> dict[str, Any]:
        fields = {"name": self.name, **asdict(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    def fuse(
        self,
        base: Source,
        finetuned: Mapping[str, Source],
        samples: Mapping[str, Sequence[Any]] | None = None,
        tokenizer: Any = None,
    ) -> Fused:
        """Fuses models over one base; what it is given stays as it is.

        Args:
            base: A model, or its folder.
            finetuned: Name → a model, a folder, a PEFT model or a PEFT folder.
            samples: For gate="activations": name → a few texts of the task, or batches (mappings
                that the model is called with).
            tokenizer: For texts, where the base's folder has none.

        Raises:
            UserError: Models that do not fit the base, a layer that cannot be fused, no layer that
                changed, or no samples for a gate that needs them.
        """
        import torch

        from foretune.adapters.finetuned import make_skeleton, open_finetuned
        from foretune.adapters.heads import keep_heads
        from foretune.models.fused import Fused, watch_mask
        from foretune.models.mixture import Routing

        self._check_samples(finetuned, samples)
        model, found = make_skeleton(base, finetuned)
        self._check_model(model)
        routing = Routing(list(finetuned), self.routing, self.top_k, causal=_generates(model))
        total = sum(p.numel() for p in model.parameters())
        with torch.no_grad():
            experts = [open_finetuned(n, source, model) for n, source in finetuned.items()]
            labels = keep_heads(model, experts, routing)
            report = {"base_parameters": total, **self._fuse_layers(model, experts, routing)}
        watch_mask(model, routing)
        fused = Fused(
            model.eval(),
            list(finetuned),
            self.to_dict(),
            routing,
            labels,
            report,
            found or tokenizer,
        )
        if samples is not None and self.gate == "activations":
            from foretune.adapters.activation_gate import set_gates

            set_gates(fused, samples, self.gate_k, RIDGE)
        report["extra_parameters"] = sum(p.numel() for p in model.parameters()) - total
        return fused

    def _fuse_layers(
        self, model: nn.Module, experts: Sequence[Finetuned], routing: Routing
    ) -> dict[str, Any]:
        """Replaces the linear layers one by one; tells what was done."""
        from foretune.models.mixture import replace_module

        fused: dict[str, float] = {}
        handled: set[str] = set()
        for name, layer in self._layers(model).items():
            made = self._layer(name, layer, experts, routing)
            handled |= {f"{name}.{key}" for key, _ in layer.named_parameters()}
            if made is not None:
                replace_module(model, name, made[0])
                handled |= {f"{name}.{key}" for key, _ in made[0].named_parameters()}
                fused[name] = made[1]
        if not fused:
            raise UserError(
                "no linear layer differs between the base and what was fine-tuned: is this the "
                "base that they were tuned from, or do target_modules leave them out?"
            )
        left = self._rest(model, experts, handled)
        lora = [e.name for e in experts if e.factors]
        notes = []
        if lora and self.gate == "weights" and self.routing != "task":
            notes.append(
                f"{', '.join(lora)}: LoRA. On LoRA experts the gate from weights fell behind plain "
                "averaging in our measurements; try gate=activations with routing=sequence, or "
                "routing=task"
            )
        if left and self.rest == "base":
            notes.append(
                f"{len(left)} parameters outside the fused layers differ and stay as in the base: "
                f"{', '.join(left[:3])}{' …' if len(left) > 3 else ''}"
            )
        kept = sum(fused.values()) / len(fused)
        return {"layers": len(fused), "energy_kept": kept, "left_out": left, "notes": notes}

    def _layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """The layers that may get experts.

        Raises:
            UserError: A name in target_modules matches none.
        """
        from torch import nn
        from transformers import Conv1D

        from foretune.models.mixture import TaskHeads
        from foretune.models.surgery import has_fresh_head, head_modules

        kept = [f"{n}." for n, m in model.named_modules() if isinstance(m, TaskHeads)]
        if has_fresh_head(model):
            kept += [f"{name}." for name in head_modules(model)]
        output = getattr(model, "get_output_embeddings", lambda: None)()
        found = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D))
            and not f"{name}.".startswith(tuple(kept))
            and not type(module).__name__.startswith("NonDynamicallyQuantizable")
            and (module is not output or self.target_modules is not None)
        }
        if self.target_modules is not None:
            for wanted in self.target_modules:
                if not any(_matches(name, [wanted]) for name in found):
                    ends = sorted({name.rpartition(".")[2] for name in found})
                    raise UserError(
                        f"no module matches target_modules=['{wanted}']; "
                        f"{type(model).__name__} has: {', '.join(ends)}"
                    )
            found = {n: m for n, m in found.items() if _matches(n, self.target_modules)}
        return {n: m for n, m in found.items() if not _inside(n, self.exclude_modules)}

    def _layer(
        self, name: str, layer: Any, experts: Sequence[Finetuned], routing: Routing
    ) -> tuple[nn.Module, float] | None:
        """(the layer with experts, the share of the changes' energy that they keep)."""
        import torch

        from foretune.models.mixture import LowRankExperts

        triplets, energies = [], []
        for expert in experts:
            found, energy = self._factors(name, layer, expert)
            triplets.append(found)
            energies.append(energy)
        biases = [expert.parameter_delta(f"{name}.bias", layer.bias) for expert in experts]
        if all(f is None for f in triplets) and all(b is None for b in biases):
            return None
        weight = layer.weight
        kind = weight.dtype if weight.is_floating_point() else torch.float32
        place = {"device": weight.device, "dtype": kind}
        size_out, size_in = _shape(layer)
        nothing = (torch.zeros(size_out, 1), torch.zeros(1), torch.zeros(1, size_in))
        known = [nothing if f is None else f for f in triplets]
        down = _stack([vh for _, _, vh in known], self.k)
        up = _stack([(u * s).T for u, s, _ in known], self.k).transpose(1, 2)
        bias = None
        if any(b is not None for b in biases):
            bias = torch.stack([torch.zeros(size_out) if b is None else b.cpu() for b in biases])
        made = LowRankExperts(
            layer,
            up=(up @ down if self.k is None else up).to(**place).contiguous(),
            down=None if self.k is None else down.to(**place),
            gate=_stack([vh for _, _, vh in known], self.gate_k).to(**place),
            offset=None,
            bias=None if bias is None else bias.to(**place),
            present=torch.tensor(
                [f is not None or b is not None for f, b in zip(triplets, biases, strict=True)],
                device=weight.device,
            ),
            routing=routing,
        )
        counted = [e for e in energies if e is not None]
        return made, sum(counted) / len(counted) if counted else 1.0

    def _factors(
        self, name: str, layer: Any, expert: Finetuned
    ) -> tuple[tuple[Tensor, Tensor, Tensor] | None, float | None]:
        """An expert's leading singular triplets, and the share of the energy in the first k."""
        from foretune.linalg.low_rank import svd_of_product, truncated_svd

        if name in expert.factors:
            found = svd_of_product(*expert.factors[name])
            if not bool(found[1].any()):
                return None, None
        else:
            delta = expert.delta(name, layer)
            if delta is None:
                return None, None
            found = truncated_svd(delta, None)
        energy = found[1].square()
        kept = float(energy[: self.k].sum() / energy.sum())
        keep = None if self.k is None else max(self.k, self.gate_k)
        u, s, vh = (part.cpu() for part in found)
        return (u[:, :keep].clone(), s[:keep].clone(), vh[:keep].clone()), kept

    def _rest(self, model: nn.Module, experts: Sequence[Finetuned], handled: set[str]) -> list[str]:
        """Parameters outside the fused layers that differ; averaged where that is wanted."""
        from foretune.adapters.finetuned import change_rest

        return change_rest(
            model,
            experts,
            lambda name: name in handled or _inside(name, self.exclude_modules),
            average=self.rest == "average",
        )

    def _check_model(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        if self.routing == "sequence" and getattr(config, "is_encoder_decoder", False):
            raise UserError(
                f"routing=sequence is not for an encoder-decoder ({type(model).__name__}), whose "
                "layers see two sequences; use routing=token or routing=task"
            )

    def _check_samples(
        self, finetuned: Mapping[str, Source], samples: Mapping[str, Sequence[Any]] | None
    ) -> None:
        if not finetuned:
            raise UserError("nothing to fuse: give at least one fine-tuned model")
        if self.top_k > len(finetuned):
            raise UserError(
                f"top_k={self.top_k} experts a token, but only {len(finetuned)} are fused"
            )
        if self.gate == "weights":
            if samples is not None:
                raise UserError("samples are for gate=activations; gate=weights needs none")
            return
        absent = [name for name in finetuned if not (samples or {}).get(name)]
        if absent:
            raise UserError(
                f"gate=activations needs samples of every task; none for {', '.join(absent)}"
            )


def _generates(model: nn.Module) -> bool:
    able = getattr(model, "can_generate", None)
    return bool(able and able())


def _matches(name: str, wanted: Sequence[str]) -> bool:
    """Whether a module is meant by its full name, the end of it, or a pattern."""
    return any(name == w or name.endswith(f".{w}") or fnmatch.fnmatchcase(name, w) for w in wanted)


def _inside(name: str, wanted: Sequence[str]) -> bool:
    """Whether a module or parameter is, or lies in, a module that is meant."""
    return any(_matches(part, wanted) for part in accumulate(name.split("."), "{}.{}".format))


def _shape(layer: Any) -> tuple[int, int]:
    """(out, in) of a linear layer; of a `Conv1D`, whose weight is stored the other way round."""
    return (layer.nf, layer.nx) if hasattr(layer, "nf") else (layer.out_features, layer.in_features)


def _stack(rows: Sequence[Tensor], limit: int | None) -> Tensor:
    """(T, r, size) of the leading rows of each; experts of lower rank end in zeros."""
    from torch.nn.utils.rnn import pad_sequence

    return pad_sequence([row[:limit] for row in rows], batch_first=True)
