"""Tasks by name: the menu of ``[model] task``."""

from fedpeft.tasks.causal_lm import CausalLanguageModelling, CausalLM
from fedpeft.tasks.image_classification import (
    Dinov2Classifier,
    ImageClassification,
    ImageClassifier,
)
from fedpeft.tasks.module import TaskModule
from fedpeft.tasks.task import Task
from fedpeft.tasks.text_classification import TextClassification, TextClassifier

TASKS: dict[str, type[Task]] = {
    "text-classification": TextClassification,
    "image-classification": ImageClassification,
    "causal-lm": CausalLanguageModelling,
}

__all__ = [
    "TASKS",
    "CausalLM",
    "CausalLanguageModelling",
    "Dinov2Classifier",
    "ImageClassification",
    "ImageClassifier",
    "Task",
    "TaskModule",
    "TextClassification",
    "TextClassifier",
]
