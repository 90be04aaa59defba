"""Python for model cards: how an exported model is called without this package, and what its scores say.

Each piece ends with `scores`, {class: probability} or {target: value}, and a line that shows what `predict` would say.
"""

from __future__ import annotations

_SCORES = {"single-label": "softmax(-1)", "multi-label": "sigmoid()", "regression": "float()"}
_SAYS = {
    "single-label": "print(max(scores, key=scores.get), scores)",
    "multi-label": "print([name for name, score in scores.items() if score > 0.5], scores)",
    "regression": "print(scores)  # the value of each target",
}


def from_logits(task: str, logits: str, config: str) -> str:
    """`logits` is an expression for the logits of one sample, `config` one for the model's configuration."""
    return (
        f"scores = dict(zip({config}.id2label.values(), {logits}.{_SCORES[task]}.tolist(), strict=True))\n{_SAYS[task]}"
    )


def from_pipeline(task: str, pipeline: str, num_classes: int, given: str, more: str = "") -> str:
    """`pipeline` is the Hub's name of the task, `given` an expression for what it is called with, `more` arguments."""
    return (
        f'classify = pipeline("{pipeline}", model=".")\n'
        f"said = classify({given}, top_k={num_classes}{more})\n"
        f'scores = {{one["label"]: one["score"] for one in said}}\n{_SAYS[task]}'
    )
