"""The `objective:` block.

Keys and defaults repeat those of the classes in `foretune.tasks.objectives`, whose import would
import torch; a test compares the two.
"""

from __future__ import annotations

from typing import Literal

from foretune.recipes.blocks import Block


class ChoiceBlock(Block):
    """Choose the right candidate for a context."""

    kind: Literal["choice"]
    scoring: Literal["bi-encoder", "cross-encoder", "causal"] = "bi-encoder"
    temperature: float = 0.05
    max_context_tokens: int = 32
    max_response_tokens: int = 24
    context_turns: int | None = None
    train_candidates: int | None = None


class ClassificationBlock(Block):
    """Predict the label of a text or an array."""

    kind: Literal["classification"]
    max_tokens: int = 128


class CausalLMBlock(Block):
    """Predict the next token: of a text, of a completion, or of an assistant's turns."""

    kind: Literal["causal-lm"]
    max_tokens: int = 128
    train_on: Literal["last", "all"] = "last"


class PreferenceBlock(Block):
    """Tell the preferred answer to a prompt from the other one."""

    kind: Literal["preference"]
    scoring: Literal["reward", "dpo"] = "reward"
    beta: float = 0.1
    max_tokens: int = 256


class RegressionBlock(Block):
    """Predict an array from an array."""

    kind: Literal["regression"]


class PromptsBlock(Block):
    """Predict the label of a text or an image from the names of the labels."""

    kind: Literal["prompts"]
    max_tokens: int = 128
    templates: list[str] | None = None
    temperature: float | None = None


class DenoisingBlock(Block):
    """Predict the noise in a noisy image."""

    kind: Literal["denoising"]
    num_steps: int = 1000
    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    score_draws: int = 4
    prediction: Literal["epsilon", "v_prediction", "flow"] = "epsilon"


ObjectiveBlock = (
    ChoiceBlock
    | ClassificationBlock
    | CausalLMBlock
    | PreferenceBlock
    | RegressionBlock
    | PromptsBlock
    | DenoisingBlock
)
OBJECTIVES: dict[str, type[Block]] = {
    "choice": ChoiceBlock,
    "classification": ClassificationBlock,
    "causal-lm": CausalLMBlock,
    "preference": PreferenceBlock,
    "regression": RegressionBlock,
    "prompts": PromptsBlock,
    "denoising": DenoisingBlock,
}
