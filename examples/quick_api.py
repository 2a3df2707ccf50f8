"""The Python API on one page: retrain, compare, adapt. Runs in seconds and downloads nothing.

Each task maps 8 sensor readings to 2 labels. The tasks share which readings matter; each task adds
a small random change to their weights.
"""

from pathlib import Path

import numpy as np

import foretune
from foretune import PEFTML, Classification, LoRA, NoRetraining, Run, Standard, Task, TaskCollection
from foretune.models.loading import load_module


def make_task(number: int, num_examples: int = 60) -> Task:
    """A task whose label is the sign of a weighted sum of the readings."""
    rng = np.random.default_rng(number)
    weights = np.array([1.0, -1.0, 1.0, 0, 0, 0, 0, 0]) + 0.3 * rng.normal(size=8)
    readings = rng.normal(size=(num_examples, 8)).astype(np.float32)
    examples = [{"x": x, "y": int(x @ weights > 0)} for x in readings]
    return Task(f"device-{number}", examples[:30], examples[30:40], examples[40:])


def main() -> None:
    """Compares three bases on unseen devices and adapts one of them."""
    tasks = TaskCollection(tuple(make_task(number) for number in range(14)), Classification())
    seen, unseen = tasks.split(unseen=6, seed=0)
    model = load_module(Path(__file__).with_name("arrays_model.py"), inputs=8, outputs=2)

    run = Run(seed=0, steps=30, batch_size=4)
    methods = [NoRetraining(), Standard(learning_rate=1e-2), PEFTML(learning_rate=1e-2)]
    bases = {method.name: foretune.retrain(model, seen, method, run) for method in methods}

    lora = LoRA(learning_rate=1e-2, lora={"r": 2, "lora_alpha": 4})
    comparison = foretune.compare(bases, unseen, adapt=lora, run=run, shots=(8,))
    print(comparison.sentence)

    adapted = foretune.adapt(bases["peft-ml"].model, unseen, lora, run, shots=8)
    for (task, _), score in sorted(adapted.scores.items()):
        print(f"{task}: {score:.2f}")


if __name__ == "__main__":
    main()
